"""Weights on disk: our safetensors, and other people's checkpoints under their own names."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from selfsup_ray.artifacts import read_json, whole_file
from selfsup_ray.config import build
from selfsup_ray.errors import ArtifactError, ConfigError, unless_storage
from selfsup_ray.models.backbones import Backbone, ResNetConfig, build_backbone
from selfsup_ray.models.checkpoint_keys import (
    BODY,
    Place,
    described,
    grouped,
    networks,
    preferred,
    tables,
)
from selfsup_ray.storage import located

M = TypeVar("M", bound=nn.Module)
D = TypeVar("D")


def write_weights(path: Path, parts: Mapping[str, nn.Module]) -> None:
    """Write the parameters and buffers of modules, under a prefix each, as safetensors."""
    tensors = {
        f"{prefix}{key}": value.detach().cpu().contiguous()
        for prefix, module in parts.items()
        for key, value in module.state_dict().items()
    }
    with whole_file(path) as temporary:
        save_file(tensors, temporary)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the CPU; no code in the file can run.

    Raises ArtifactError when the file is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        unless_storage(error)
        raise ArtifactError(f"{path} cannot be read as safetensors: {error}.") from None


def read_description(cls: type[D], path: Path) -> D:
    """Return the config in a JSON file, validated.

    Raises ArtifactError when the file is missing, damaged or describes something else.
    """
    values = read_json(path)
    try:
        return build(cls, values)
    except (ConfigError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} is not what this version writes: {error}") from None


def load_part(module: M, path: Path, prefix: str) -> M:
    """Fill a module from the tensors below a prefix in a safetensors file, and return it.

    Raises ArtifactError naming keys that are missing, unexpected or of another shape.
    """
    tensors = read_weights(path)
    given = {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}
    problems = key_problems(module.state_dict(), given)
    if problems:
        raise ArtifactError(f"{path} does not hold the network it should: {problems}.")
    module.load_state_dict(given)
    return module


def key_problems(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """Return in words which keys are missing, unexpected or of another shape; "" when none are."""
    shapes = [
        f"{key} ({_shape(given[key])}, wants {_shape(own[key])})"
        for key in own.keys() & given.keys()
        if own[key].shape != given[key].shape
    ]
    found = {
        "missing": sorted(own.keys() - given.keys()),
        "unexpected": sorted(given.keys() - own.keys()),
        "of another shape": sorted(shapes),
    }
    return "; ".join(f"{what}: {_some(keys)}" for what, keys in found.items() if keys)


def _shape(x: Tensor) -> str:
    return "x".join(str(side) for side in x.shape) or "scalar"


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
    return ", ".join(keys[:4]) + more


def content_hash(*paths: Path) -> str:
    """Return the SHA-256 of files, one after the other.

    Raises ArtifactError when one is missing.
    """
    whole = hashlib.sha256()
    for path in paths:
        if not path.exists():
            raise ArtifactError(f"{path} is missing. Run the stage that makes it again.")
        with open(path, "rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


@dataclass(frozen=True)
class Foreign:
    """A backbone filled from someone else's checkpoint, and what of the checkpoint was not used."""

    backbone: Backbone
    unused: tuple[str, ...]
    """Keys of the checkpoint, as written there; heads, key networks and queues as a rule."""
    place: Place
    others: tuple[Place, ...]
    """Further networks in the checkpoint, such as MoCo's key encoder."""

    def text(self) -> str:
        """Return which keys were taken and which were not, in a sentence or two."""
        shape = self.backbone.config
        assert isinstance(shape, ResNetConfig), "a checkpoint fills a ResNet"
        text = (
            f"all {len(self.backbone.state_dict())} weights of a {shape.name} (stem={shape.stem}, "
            f"width={shape.width}) found at {self.place}; {len(self.unused)} keys left out"
        )
        return (
            f"{text}: {', '.join(grouped(self.unused, self.others))}."
            if self.unused
            else f"{text}."
        )


def load_foreign(path: Path, config: ResNetConfig) -> Foreign:
    """Return a backbone with the weights of a checkpoint that something else has written.

    Read are .safetensors and torch files (loaded as plain tensors: no code in them can run), with
    torchvision's names below any prefix, or a Sequential of its parts: see `checkpoint_keys`.
    Raises ArtifactError unless every weight of the backbone is found in its shape.
    """
    path = located(path)
    table, place, others = _network_in(path)
    backbone = build_backbone(config)
    own = backbone.state_dict()
    # A key like layer3.5.conv1.weight too many tells of a deeper network, not of a head.
    given = {n: table[key] for key, n in place.names.items() if n in own or BODY.match(n)}
    # Checkpoints from before torch 0.4.1 have no batch counters; nothing here reads them.
    given = {k: v for k, v in own.items() if k.endswith("num_batches_tracked")} | given
    problems = key_problems(own, given)
    if problems:
        has = ", ".join(f"{key}: {value}" for key, value in described(table, place.names).items())
        raise ArtifactError(
            f"{path} does not hold a {config.name} with stem={config.stem}, width={config.width}: "
            f"{problems}. At {place} it has {{{has}}}: set `backbone` to that if you can."
        )
    backbone.load_state_dict(given)
    unused = tuple(key for key in table if place.names.get(key) not in own)
    return Foreign(backbone, unused, place, others)


def inspect_foreign(path: Path) -> str:
    """Return what a checkpoint holds, in lines: the network, how to ask for it, and what is over.

    Raises ArtifactError when there is no ResNet in it.
    """
    table, place, others = _network_in(located(path))
    found = described(table, place.names)
    known = [name for name in place.names.values() if BODY.match(name)]
    over = grouped([key for key, n in place.names.items() if not BODY.match(n)], ())
    over += grouped([key for key in table if key not in place.names], others)
    values = ", ".join(f"{key}: {value}" for key, value in found.items())
    lines = [
        f"{path}: {found['name']}, {len(known)} keys at {place}",
        f"keys left out: {', '.join(over) or 'none'}",
        *(f"another network: {other}" for other in others),
        "to embed images with it, no training:",
        f"  pretext: {{initial_weights: {path}, epochs: 0, backbone: {{{values}}}}}",
    ]
    if found["stem"] == "cifar":
        lines.append("  (stem: stl has the same weights; it pools after the first layer)")
    return "\n".join(lines)


def _network_in(path: Path) -> tuple[Mapping[str, Tensor], Place, tuple[Place, ...]]:
    """Return the tensors of the table with the network to take, its place, and further networks."""
    by_name = _read_foreign(path)
    found = preferred(place for name, table in by_name.items() for place in networks(name, table))
    if not found:
        keys = sorted(key for table in by_name.values() for key in table)
        raise ArtifactError(f"{path} holds no ResNet that can be read: {_why_none(keys)}.")
    first, *others = found
    return by_name[first.table], first, tuple(others)


def _why_none(keys: list[str]) -> str:
    stage = next((key for key in keys if key.endswith("layer1.0.conv1.weight")), None)
    if stage is not None:
        prefix = stage.removesuffix("layer1.0.conv1.weight")
        stem = [key for key in keys if key.startswith(f"{prefix}conv1")]
        has = f"there is {_some(stem)}, a stem of several layers" if stem else "there is none"
        return f"beside `{stage}` belongs a single `{prefix}conv1.weight`, but {has}"
    early = next((key for key in keys if key.endswith("2.0.bn1.weight")), None)
    if early is not None:
        return f"`{early}` without a normalisation after the first layer is a pre-activation ResNet"
    return f"no key ends in `layer1.0.conv1.weight`; there are {_some(keys)}"


def _read_foreign(path: Path) -> dict[str, dict[str, Tensor]]:
    """Return every table of tensors in a file, by its place."""
    if path.suffix == ".safetensors":
        return {"": read_weights(path)}
    wanted = "Give a checkpoint that holds tensors only, or convert it to .safetensors."
    loaded = load_plain(path, do=wanted)
    if not isinstance(loaded, Mapping):
        raise ArtifactError(f"{path} holds a {type(loaded).__name__}, not weights by name.")
    found = dict(tables(loaded))
    if not found:
        raise ArtifactError(
            f"{path} holds no tensors by name, only {_some(sorted(map(str, loaded)))}."
        )
    return found


def load_plain(path: Path, *, do: str, mapped: bool = False) -> Any:
    """Return what torch.save wrote, on the CPU; no code in the file can run.

    mapped: tensors are read when they are looked at, but for files in torch's format before 1.6.
    Raises ArtifactError ending in `do` when it holds anything but tensors and plain values.
    """
    try:
        file = os.fspath(path)
        mapped = mapped and zipfile.is_zipfile(file)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        unless_storage(error)
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise ArtifactError(f"{path} cannot be loaded as plain tensors ({reason}). {do}") from None
