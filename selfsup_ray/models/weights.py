"""Weights on disk: our safetensors, and other people's checkpoints under their own names."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
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
from selfsup_ray.errors import ArtifactError, ConfigError
from selfsup_ray.models.backbones import Backbone, ResNetConfig, build_backbone
from selfsup_ray.storage import located

M = TypeVar("M", bound=nn.Module)
D = TypeVar("D")

# Where checkpoints keep the network we want; the first that holds a `conv1.weight` wins.
PREFIXES = ("encoder_q.", "backbone.", "encoder.", "")
# Wrappers that may stand before any of these: DataParallel, torch.compile, Lightning.
WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.|model\.)+")
BODY = re.compile(r"^(conv1|bn1|layer\d+)\.")


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


def load_foreign(path: Path, config: ResNetConfig) -> Foreign:
    """Return a backbone with the weights of a checkpoint that something else has written.

    Read are .safetensors and torch files (loaded as plain tensors: no code in them can run), with
    torchvision's names, also below `module.`, `encoder_q.` (MoCo), `backbone.` or `encoder.`.
    Raises ArtifactError unless every weight of the backbone is found in its shape.
    """
    path = located(path)
    written = _read_foreign(path)
    names = _torchvision_names(written)
    backbone = build_backbone(config)
    own = backbone.state_dict()
    # A key like layer3.5.conv1.weight too many tells of a deeper network, not of a head.
    given = {name: written[key] for key, name in names.items() if name in own or BODY.match(name)}
    # Checkpoints from before torch 0.4.1 have no batch counters; nothing here reads them.
    given = {k: v for k, v in own.items() if k.endswith("num_batches_tracked")} | given
    problems = key_problems(own, given)
    if problems:
        raise ArtifactError(
            f"{path} does not hold a {config.name} with stem={config.stem}, width={config.width}: "
            f"{problems}. Its keys are {_some(sorted(written))}."
        )
    backbone.load_state_dict(given)
    return Foreign(backbone, tuple(key for key in written if names.get(key) not in own))


def _torchvision_names(keys: Iterable[str]) -> dict[str, str]:
    """Return, for the keys of the network we want, the names torchvision has for them."""
    bare = {key: WRAPPERS.sub("", key) for key in keys}
    prefix = next((p for p in PREFIXES if f"{p}conv1.weight" in bare.values()), "")
    return {
        # Small-image ResNets often call the downsampling `shortcut`.
        key: name.removeprefix(prefix).replace(".shortcut.", ".downsample.")
        for key, name in bare.items()
        if name.startswith(prefix)
    }


def _read_foreign(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_weights(path)
    wanted = "Give a checkpoint that holds tensors only, or convert it to .safetensors."
    loaded = load_plain(path, do=wanted)
    return _tensors_in(loaded, path)


def load_plain(path: Path, *, do: str) -> Any:
    """Return what torch.save wrote, on the CPU; no code in the file can run.

    Raises ArtifactError ending in `do` when it holds anything but tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise ArtifactError(f"{path} cannot be loaded as plain tensors ({reason}). {do}") from None


def _tensors_in(loaded: Any, path: Path) -> dict[str, Tensor]:
    for name in ("state_dict", "model", "model_state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping):
            loaded = loaded[name]
    if not isinstance(loaded, Mapping):
        raise ArtifactError(f"{path} holds a {type(loaded).__name__}, not weights by name.")
    tensors = {str(key): x for key, x in loaded.items() if isinstance(x, Tensor)}
    if not tensors:
        raise ArtifactError(f"{path} holds no tensors by name, only {_some(sorted(loaded))}.")
    return tensors
