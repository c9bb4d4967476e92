"""Where a checkpoint keeps a ResNet, and torchvision's names for the keys it has there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Weights = Mapping[str, Tensor]

# A key with one of these words belongs to a copy that follows another network: encoder_k,
# momentum_backbone, target_net. DINO is evaluated with its teacher, hence not the student.
FOLLOWERS = {"k", "key", "momentum", "target", "ema", "student"}
BODY = re.compile(r"^(conv1|bn1|layer\d+)\.")
DEPTHS = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}


@dataclass(frozen=True)
class Place:
    """A network in a checkpoint: the table of tensors, and the keys' prefix there."""

    table: str
    """Names that lead to the table, joined by dots; "" when the file is the table."""
    prefix: str
    names: Mapping[str, str]
    """Key as written in the table -> torchvision's name."""

    def __str__(self) -> str:
        return f"{self.table}.{self.prefix}".strip(".") or "the top level"


def tables(
    loaded: Any, name: str = "", *, depth: int = 8
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield (place, tensors by key) of every mapping within a checkpoint that holds tensors.

    Down to `depth` mappings within each other: a file may hold one that lies within itself.
    """
    if not isinstance(loaded, Mapping) or not depth:
        return
    own = {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
    if own:
        yield name, own
    for key, value in loaded.items():
        yield from tables(value, f"{name}.{key}".lstrip("."), depth=depth - 1)


def networks(table: str, keys: Iterable[str]) -> Iterator[Place]:
    """Yield the ResNets among the keys of a table, in the order of their first keys.

    Two layouts are known: torchvision's names below any prefix (MoCo, DINO, SimCLR, BYOL, timm),
    and a Sequential of its parts with places for names (SeLa, lightly, MoCo's CIFAR notebook).
    """
    known = list(keys)
    present = set(known)
    for key in known:
        prefix = key.removesuffix("conv1.weight")
        if prefix != key and f"{prefix}layer1.0.conv1.weight" in present:
            yield Place(table, prefix, _plain(known, prefix))
        prefix = key.removesuffix("0.weight")
        first = _first_stage(present, prefix) if prefix != key else None
        if first is not None and f"{prefix}1.running_mean" in present:
            yield Place(table, prefix, _placed(known, prefix, first))


def _first_stage(present: set[str], prefix: str) -> int | None:
    """Return the place of the first stage in a Sequential; ReLU and pooling may come before it."""
    return next((i for i in (2, 3, 4) if f"{prefix}{i}.0.conv1.weight" in present), None)


def _plain(keys: list[str], prefix: str) -> dict[str, str]:
    return {key: _block(key.removeprefix(prefix)) for key in keys if key.startswith(prefix)}


def _block(name: str) -> str:
    # Small-image ResNets often call the downsampling `shortcut`.
    return name.replace(".shortcut.", ".downsample.")


def _placed(keys: list[str], prefix: str, first: int) -> dict[str, str]:
    parts = {"0": "conv1", "1": "bn1"} | {str(first + i): f"layer{i + 1}" for i in range(4)}
    names = {}
    for key in keys:
        place, dot, rest = key.removeprefix(prefix).partition(".")
        if key.startswith(prefix) and dot:
            names[key] = _block(f"{parts.get(place, place)}.{rest}")
    return names


def preferred(places: Iterable[Place]) -> list[Place]:
    """Return the places with the network to take first: the first that follows no other."""
    return sorted(places, key=_follows)


def _follows(place: Place) -> bool:
    return bool(FOLLOWERS & set(re.split(r"[._]", str(place))))


def described(weights: Weights, names: Mapping[str, str]) -> dict[str, str | int]:
    """Return {name, stem, width} of a network in a checkpoint, as `pretext.backbone` takes them.

    A first convolution of 3 x 3 is given as `cifar`: `stl`, which pools after it, has no other
    weights.
    """
    by_name = {name: weights[key] for key, name in names.items()}
    stages = [{n.split(".")[1] for n in by_name if n.startswith(f"layer{i}.")} for i in range(1, 5)]
    depths = tuple(len(blocks) for blocks in stages)
    is_deep = "layer1.0.conv3.weight" in by_name
    width, side = by_name["conv1.weight"].shape[0], by_name["conv1.weight"].shape[-1]
    kind = "bottleneck" if is_deep else "basic"
    name = DEPTHS.get((depths, is_deep), f"ResNet of {depths} {kind} blocks")  # type: ignore[arg-type]
    return {"name": name, "stem": "imagenet" if side == 7 else "cifar", "width": width}


def grouped(keys: Iterable[str], others: Iterable[Place]) -> list[str]:
    """Return keys in few words: those of one layer, or of one other network, become one entry."""
    prefixes = sorted((place.prefix for place in others if place.prefix), key=len, reverse=True)
    groups: dict[str, list[str]] = {}
    for key in keys:
        whole = next((p for p in prefixes if key.startswith(p)), None)
        parent = re.sub(r"(\.\d+)+$", "", key.rpartition(".")[0])
        group = f"{whole}*" if whole else f"{parent}.*" if parent else key
        groups.setdefault(group, []).append(key)
    return [k[0] if len(k) == 1 else f"{group} ({len(k)})" for group, k in groups.items()]
