"""Size and speed of a backbone and of views, from short trials on this machine."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from selfsup_ray.config import Resources
from selfsup_ray.data.views import Views, ViewsConfig
from selfsup_ray.models.backbones import BackboneConfig, PatchBackboneConfig, build_backbone
from selfsup_ray.ops.patch_sampling import num_positions

GPU_FLOPS = 30e12
"""Multiplications and additions a second that a data-centre GPU reaches on ResNets in bfloat16."""
TIMED_IMAGES = 16
"""Images of the forward pass that is timed."""


@dataclass(frozen=True)
class Network:
    """Size of a backbone for images of one side, from a pass over tensors without memory."""

    dim: int
    parameters: int
    flops: int
    """Of one image forward; a multiplication and an addition are two."""
    activation_bytes: int
    """Outputs of all layers for one image in float32."""


@functools.cache
def network(backbone: BackboneConfig, side: int) -> Network:
    """Return the size of a backbone for images of `side` pixels; nothing is computed."""
    if isinstance(backbone, PatchBackboneConfig):
        return _patch_network(backbone, side)
    with torch.device("meta"):
        module = build_backbone(backbone)
        image = torch.empty(1, 3, side, side)
    sizes: list[int] = []

    def note(layer: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and not list(layer.children()):
            sizes.append(output.numel() * output.element_size())

    for layer in module.modules():
        layer.register_forward_hook(note)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        module.eval()(image)
    parameters = sum(p.numel() for p in module.parameters())
    return Network(module.dim, parameters, int(counter.get_total_flops()), sum(sizes))


def _patch_network(backbone: PatchBackboneConfig, side: int) -> Network:
    """Return the size of a code: distances of every position to every entry, kept as bits."""
    positions = num_positions(side, side, patch_size=backbone.patch_size)
    values = backbone.size * (backbone.channels * backbone.patch_size**2 + 1)
    kept = positions * backbone.size // 8 + backbone.dim * 4
    return Network(backbone.dim, values, 2 * positions * values, kept)


@functools.cache
def forward_seconds(backbone: BackboneConfig, side: int, *, bfloat16: bool) -> float:
    """Return the seconds one core of this machine takes for an image forward, by a short trial."""
    module = build_backbone(backbone).to(memory_format=torch.channels_last)
    for values in module.buffers() if isinstance(backbone, PatchBackboneConfig) else ():
        values.normal_(generator=torch.Generator().manual_seed(0))  # zeros would all be ties
    images = torch.rand(TIMED_IMAGES, 3, side, side).to(memory_format=torch.channels_last)

    def forward() -> None:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            module(images)

    return _timed_on_one_thread(forward) / TIMED_IMAGES


@functools.cache
def view_seconds(views: ViewsConfig, side: int) -> float:
    """Return the seconds one core of this machine takes to make one view, by a short trial."""
    make = Views(views, image_size=side, seed=0, num_views=1)
    images = [torch.randint(0, 256, (64, 3, side, side), dtype=torch.uint8)]
    ids = torch.arange(64)
    return _timed_on_one_thread(lambda: make(images, ids, 0)) / 64


def _timed_on_one_thread(action: Callable[[], object]) -> float:
    """Return the shortest of two timings, after one call to warm up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        action()
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            action()
            seconds.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return min(seconds)


def network_seconds(
    backbone: BackboneConfig, side: int, *, passes: float, resources: Resources, bfloat16: bool
) -> tuple[float, str]:
    """Return seconds per image over all workers, and what that assumes.

    passes: in units of one forward pass; forward and backward together are three.
    """
    workers = max(resources.workers, 1)
    if resources.gpus:
        seconds = passes * network(backbone, side).flops / GPU_FLOPS
        return seconds / (workers * resources.gpus), f"{GPU_FLOPS / 1e12:.0f} TFLOP/s a GPU"
    one = forward_seconds(backbone, side, bfloat16=bfloat16)
    note = f"{1 / one:,.0f} images/s forward a core, timed on this machine"
    return passes * one / (workers * resources.cpus), note
