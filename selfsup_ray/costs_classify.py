"""What a labelled network costs, as plain numbers; `costs` asks for an experiment."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from selfsup_ray.models.patch_cnn import PatchCNN
from selfsup_ray.models.patch_layers import (
    CNNConfig,
    DeeperConfig,
    PhiFullConfig,
    PhiHardConfig,
    PhiSimpleConfig,
    VanillaConfig,
)
from selfsup_ray.ops.spaced_patches import positions
from selfsup_ray.stages.classify_config import ClassifyConfig

NETWORK_FLOPS = 130e9
"""Multiplications and additions a second that one CPU core reaches in bfloat16 on codes, gated
linear layers and convolutions, all that happens between the products included."""
GPU_NETWORK_FLOPS = 10e12
CLASSES = 10
TESTED_SHARE = 0.2
"""Images that the accuracy is measured on, for each one that is trained on: as in CIFAR-10."""


@dataclass(frozen=True)
class NetworkCost:
    """memory_bytes: of one worker, without the process itself; disk_bytes: at the peak; seconds."""

    memory_bytes: int
    disk_bytes: int
    seconds: float
    assumes: str


@dataclass(frozen=True)
class _LayerWork:
    """Of one image: products of the code and of a forward pass, values of the widest tensor.

    A step takes the forward pass twice: the gradient of the weights is as much, and that of what
    is below the map is not needed.
    """

    code: float
    forward: float
    values: int
    parameters: int


def classify_cost(
    config: ClassifyConfig, *, n: int, side: int, entries: int, patch_size: int
) -> NetworkCost:
    """Return the cost of `classify` for n images of `side` pixels on a dictionary.

    n: images with labels, test images included. entries, patch_size: of the dictionary.
    """
    layers = _layers(config, side, entries, patch_size)
    known = layers[0].code if config.cache_codes else 0.0
    per_epoch = below = 0.0
    for work in layers:
        seen = below + work.code - known
        per_epoch += seen + 2 * work.forward + TESTED_SHARE * (seen + work.forward)
        below += work.code + work.forward
    ask, train = config.resources, n / (1 + TESTED_SHARE)
    if config.label_budget is not None:
        train = min(train, config.label_budget)
    rate = GPU_NETWORK_FLOPS * ask.gpus if ask.gpus else NETWORK_FLOPS * ask.cpus
    products = per_epoch * train * config.epochs + _cache_products(config, n, side, layers)
    batch = config.batch_size / max(ask.workers, 1) / config.accumulate
    memory = 4 * batch * max(w.values for w in layers) + 12 * max(w.parameters for w in layers)
    return NetworkCost(
        memory_bytes=int(memory),
        disk_bytes=_disk(config, n, side, entries, patch_size, layers),
        seconds=products / (rate * max(ask.workers, 1)),
        assumes=f"{config.epochs} epochs of {train:,.0f} images, {len(layers)} "
        f"layer{'s' if len(layers) > 1 else ''}, {rate / 1e9:,.0f} GFLOP/s a worker",
    )


def _layers(config: ClassifyConfig, side: int, entries: int, patch_size: int) -> list[_LayerWork]:
    model = config.model
    match model:
        case CNNConfig():
            return [_cnn(model, side)]
        case PhiSimpleConfig():
            positions = (side - patch_size + 1) ** 2
            code = 2.0 * positions * entries * 3 * patch_size**2
            values = positions * entries * 3 * patch_size**2
            return [_LayerWork(code, 2.0 * CLASSES * values, values, CLASSES * values)]
        case VanillaConfig():
            entries, patch_size = model.size, model.patch_size
    made, channels = list[_LayerWork](), 3
    for one in (model, *config.deeper):
        if made:
            assert not isinstance(one, PhiFullConfig | PhiHardConfig | VanillaConfig)
            entries, patch_size = one.size, one.patch_size
        work, channels, side = _layer(config, one, channels, side, entries, patch_size)
        made.append(work)
    return made


def _layer(
    config: ClassifyConfig,
    layer: PhiFullConfig | PhiHardConfig | VanillaConfig | DeeperConfig,
    channels: int,
    side: int,
    entries: int,
    patch_size: int,
) -> tuple[_LayerWork, int, int]:
    """Return the work of a layer, and channels and side of its map."""
    d, model = channels * patch_size**2, config.model
    side = max(positions(side, patch_size, layer.stride, layer.padding), 1)
    products = 2.0 * side**2 * entries * d
    heads = 1 + (len(model.also_k) if isinstance(model, PhiFullConfig | PhiHardConfig) else 0)
    gated = not isinstance(model, PhiHardConfig)
    values = side**2 * entries
    side = max(layer.side_after(side), 1)
    out = layer.bottleneck or entries
    after = 2.0 * side**2 * (entries * out + out * CLASSES)
    forward = heads * (after + (products if gated else products / 10))
    parameters = heads * ((entries * (d + 3) if gated else 0) + out * (entries + side**2 * CLASSES))
    code = 0.0 if isinstance(model, VanillaConfig) else products
    return _LayerWork(code, forward, values, parameters), out, side


def _cnn(model: CNNConfig, side: int) -> _LayerWork:
    with torch.device("meta"):
        network = PatchCNN(model, image_size=side, num_classes=CLASSES).eval()
        image = torch.empty(1, 3, side, side)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network(image)
    widths = [out for out in (p.shape[0] for p in network.parameters() if p.ndim == 4)]
    parameters = sum(p.numel() for p in network.parameters())
    # Trained end to end: the gradient of every layer's input is as much again.
    forward = 1.5 * counter.get_total_flops()
    return _LayerWork(0.0, forward, max(widths, default=3) * side**2, parameters)


def _cache_products(config: ClassifyConfig, n: int, side: int, layers: list[_LayerWork]) -> float:
    """Return the products of the codes of all views of all images."""
    if not config.cache_codes:
        return 0.0
    wide = (side + 2 * config.views.padding) ** 2 / side**2
    return 2 * wide * n * layers[0].code


def _disk(
    config: ClassifyConfig,
    n: int,
    side: int,
    entries: int,
    patch_size: int,
    layers: list[_LayerWork],
) -> int:
    """Return the weights, three times while they are trained, and the codes if they are kept."""
    weights = 3 * 4 * sum(work.parameters for work in layers)
    if not config.cache_codes:
        return weights
    positions = (side + 2 * config.views.padding - patch_size + 1) ** 2
    return weights + n * 2 * positions * -(-entries // 8)
