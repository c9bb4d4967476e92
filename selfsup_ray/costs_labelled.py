"""What linear probes, fine-tuning and maps of layers cost."""

from __future__ import annotations

from selfsup_ray.costs_classify import NetworkCost
from selfsup_ray.costs_network import network, network_seconds, view_seconds
from selfsup_ray.data.views import StandardViews
from selfsup_ray.models.backbones import BackboneConfig
from selfsup_ray.stages.labelled_config import (
    CountOfLabels,
    FinetuneConfig,
    LabelledConfig,
    LayersLinear,
    LinearConfig,
    ShareOfLabels,
)
from selfsup_ray.stages.lowshot_config import HeldOutRows, HeldOutShare
from selfsup_ray.stages.maps import MapsConfig

PROBES_BYTES = 5 * 9_600 * 1_000 * 12
"""Classifiers of five layers for 1,000 classes: weights, gradients and momentum."""


def labelled_cost(
    config: LinearConfig | FinetuneConfig,
    backbone: BackboneConfig,
    *,
    n: int,
    stored: int,
    side: int,
) -> NetworkCost:
    """Return the cost for n images, all with a label; stored, side: sides of images and views."""
    train, test = _images(config, n)
    net, ask = network(backbone, side), config.resources
    workers, batch = max(ask.workers, 1), config.batch_size
    if isinstance(config, LinearConfig) and config.features == "embeddings":
        return NetworkCost(
            memory_bytes=net.dim * 4 * batch,
            disk_bytes=1_000_000,
            seconds=train * config.epochs * net.dim * 1e-8,
            assumes=f"{train:,} rows in {config.epochs} epochs, d={net.dim} at most",
        )
    frozen = isinstance(config, LinearConfig)
    networks = 2 if isinstance(config, FinetuneConfig) and config.scratch else 1
    tests, views_of_one = -(-config.epochs // config.test_every), 1
    if isinstance(config, LayersLinear):
        tests = max(1, (config.epochs - config.test_from) // config.test_every)
        views_of_one = 10 if config.ten_crop else 1
    bfloat16 = config.precision == "bfloat16"
    one, note = network_seconds(backbone, side, passes=1, resources=ask, bfloat16=bfloat16)
    seen = train // batch * batch * config.epochs
    views = 0.0 if ask.gpus else view_seconds(StandardViews(size=side), stored)
    seconds = (
        seen * (one * (1 if frozen else 3) + views / (workers * ask.cpus))
        + tests * test * views_of_one * one
    )
    kept = net.activation_bytes * batch / workers / config.accumulate * (0.25 if frozen else 1)
    heads = PROBES_BYTES if isinstance(config, LayersLinear) else 0
    return NetworkCost(
        memory_bytes=int(net.parameters * 4 * (1 if frozen else 3) + kept + heads),
        disk_bytes=net.parameters * 4 * (2 if frozen else 3) * networks,
        seconds=networks * seconds,
        assumes=f"{train:,} images {config.epochs} times, {tests} tests of {test:,}, {note}"
        + (", ten views each" if views_of_one > 1 else "")
        + (", twice: also from scratch" if networks > 1 else ""),
    )


def _images(config: LabelledConfig, n: int) -> tuple[int, int]:
    """Return how many images are trained and tested on, about."""
    match config.test:
        case HeldOutShare(share=share):
            test = round(share * n)
        case HeldOutRows(first=first):
            test = max(n - first, 0)
        case _:
            test = n // 5
    train = round((n - test) * (1 - config.validation_share))
    match config.labels:
        case ShareOfLabels(share=share):
            return round(train * share), test
        case CountOfLabels(count=count):
            return min(count, train), test
        case _:
            return train, test


def maps_cost(config: MapsConfig, *, n: int, dim: int) -> NetworkCost:
    """Return the cost of pictures of layers; dim: of the last one."""
    images, drawn = min(config.images, n), len(config.layers) * len(config.methods)
    return NetworkCost(
        memory_bytes=3 * images * dim * 4,
        disk_bytes=images * 8 * (1 + drawn),
        seconds=images * drawn * 3e-3,
        assumes=f"{images:,} images placed {drawn} times, 3 ms each",
    )
