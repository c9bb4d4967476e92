"""Published SeLa checkpoints: network, heads and labels under the names of the original."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from selfsup_ray.errors import ArtifactError
from selfsup_ray.models.backbone import PreactResNetConfig, ResNetConfig
from selfsup_ray.models.checkpoint_keys import tables
from selfsup_ray.models.weights import key_problems, load_foreign, load_plain
from selfsup_ray.storage import located

if TYPE_CHECKING:
    from selfsup_ray.models.sela import SeLa

HEAD = re.compile(r"^top_layer(\d*)\.(weight|bias)$")
STAGE = re.compile(r"^features\.([2-5])\.")


def fill_published(objective: SeLa, path: Path) -> str:
    """Fill an objective from a checkpoint of the original code; return in words what was there.

    Its labels (`L` or `labels`, T x N) are taken when they are of as many heads and images.
    Raises ArtifactError unless every weight of network and heads is found in its shape.
    """
    path = located(path)
    loaded = load_plain(path, do="Give a checkpoint of the original code that holds tensors only.")
    weights = _weights(loaded)
    heads = _heads(weights)
    _fill(objective.heads, heads, path, what="heads (num_heads, num_clusters)")
    shape = objective.backbone.config
    if isinstance(shape, ResNetConfig):
        objective.backbone.load_state_dict(load_foreign(path, shape).backbone.state_dict())
    else:
        named = _preact(weights) if isinstance(shape, PreactResNetConfig) else _body(weights)
        _fill(objective.backbone, named, path, what=f"network ({shape.name})")
    labels = _labels(loaded)
    text = f"{path}: a {shape.name} with {len(objective.heads)} heads"
    if labels is None:
        return f"{text}, no labels; they start anew"
    if labels.shape != (objective.labels.num_heads, len(objective.labels)):
        return f"{text}; its labels {tuple(labels.shape)} are of other images and left out"
    objective.labels.start_from(lambda first, stop: labels[:, first:stop].T.numpy())
    return f"{text} and the labels of all {labels.shape[1]:,} images"


def _weights(loaded: Any) -> dict[str, Tensor]:
    """Return the table with a head in it, without the prefix of DataParallel."""
    for _, table in tables(loaded):
        plain = {key.removeprefix("module."): value for key, value in table.items()}
        plain = {key.replace(".module.", "."): value for key, value in plain.items()}
        if any(HEAD.match(key) for key in plain):
            return plain
    return {}


def _body(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in weights.items() if not HEAD.match(key)}


def _heads(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {key: HEAD.match(key) for key in weights}
    return {f"{int(m[1] or 0)}.{m[2]}": weights[key] for key, m in found.items() if m is not None}


def _preact(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return our names: a Sequential of stem, pool and stages; bn1 for norm1."""
    named = {}
    for key, value in _body(weights).items():
        name = re.sub(r"^features\.0\.", "stem.", key)
        name = STAGE.sub(lambda m: f"stages.{int(m[1]) - 2}.", name)
        name = re.sub(r"\.bn([123])\.", r".norm\1.", name)
        named[name.replace(".shortcut.0.", ".shortcut.")] = value
    return named


def _fill(module: torch.nn.Module, given: dict[str, Tensor], path: Path, *, what: str) -> None:
    own = module.state_dict()
    # Checkpoints from before torch 0.4.1 have no batch counters; nothing here reads them.
    given = {k: v for k, v in own.items() if k.endswith("num_batches_tracked")} | given
    problems = key_problems(own, given)
    if problems:
        raise ArtifactError(f"{path} does not hold the {what} that are asked for: {problems}.")
    module.load_state_dict(given)


def _labels(loaded: Any) -> Tensor | None:
    found = loaded.get("L", loaded.get("labels")) if isinstance(loaded, Mapping) else None
    if not isinstance(found, Tensor) or found.is_floating_point():
        return None
    return found.view(-1, found.shape[-1])
