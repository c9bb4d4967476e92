"""The dictionaries of further layers: patches of the map that the layers below make of images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfsup_ray.artifacts import whole_file
from selfsup_ray.config import Resources
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.shifted import ShiftedViews
from selfsup_ray.models.locally_linear import Block, Layer
from selfsup_ray.models.patch_layers import DeeperCodeConfig
from selfsup_ray.models.weights import content_hash
from selfsup_ray.ops.whitening import whitened_covariance
from selfsup_ray.stages.classify_data import Split
from selfsup_ray.stages.classify_network import DICTIONARY, WEIGHTS, NetworkPlan
from selfsup_ray.stages.covariance_picture import write_covariances
from selfsup_ray.stages.patch_pictures import write_pictures
from selfsup_ray.stages.patches import PatchesConfig, make_dictionary
from selfsup_ray.stages.whiten import WhitenConfig, whiten_maps
from selfsup_ray.storage import remove_tree

MAPS_AT_ONCE = 64
"""Images that go through the layers below at a time."""


class LayerMaps:
    """The maps that trained layers make of the training images, as `whiten_maps` reads them.

    Images enter as the network sees them at test time: normalised, not augmented. (The released
    code gives the layers below levels in [0, 1] here, which they were not trained on.)
    """

    is_bytes = False

    def __init__(self, corpus: Corpus, plan: NetworkPlan, layers: int) -> None:
        self.corpus, self.plan, self.layers = corpus, plan, layers

    def __getstate__(self) -> dict[str, Any]:
        return {"corpus": self.corpus, "plan": self.plan, "layers": self.layers}

    @cached_property
    def blocks(self) -> list[Block]:
        """The layers below, in evaluation mode; each worker reads them once."""
        return [self.plan.trained_block(i).eval() for i in range(1, self.layers + 1)]

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the last map."""
        top = self.blocks[-1].layers[0]
        assert isinstance(top, Layer), "a block is made of layers"
        return top.out_channels, top.out_side, top.out_side

    @cached_property
    def shard_rows(self) -> tuple[int, ...]:
        """Training images in each shard of the corpus."""
        return tuple(len(self._ids(i)) for i in range(self.corpus.num_shards))

    def _ids(self, shard: int) -> np.ndarray[Any, Any]:
        ids = Split.read(self.plan.out).train
        low, high = np.searchsorted(ids, self.corpus.offsets[shard : shard + 2])
        return np.asarray(ids[low:high])

    def batches(self, shard: int) -> Iterator[Tensor]:
        """Yield the maps of a shard's training images in order: (b, C, H, W) float32."""
        ids = self._ids(shard)
        for start in range(0, len(ids), MAPS_AT_ONCE):
            yield self.maps(ids[start : start + MAPS_AT_ONCE])

    @torch.no_grad()
    def maps(self, ids: np.ndarray[Any, Any]) -> Tensor:
        """Return the maps (B, C, H, W) float32 of these images."""
        views = ShiftedViews(self.plan.config.views, self.plan.config.seed)
        x = views.evaluation(self.corpus.images(ids), torch.from_numpy(ids))
        bfloat16 = self.plan.config.precision == "bfloat16"
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            for block in self.blocks:
                x = block.maps(x)[0]
        return x.float()


def write_dictionary(corpus: Corpus, plan: NetworkPlan, layer: int) -> None:
    """Write the dictionary of a layer above the first, unless it is there; no labels are read.

    Patches of the maps below are whitened and clustered as those of images are; the sample is
    left in the layer's folder, pictures of both in that of the stage. GPUs of the training are
    k-means' too; maps are made on CPUs.
    """
    folder, config = plan.folder(layer), plan.config.deeper[layer - 2]
    if (folder / DICTIONARY).exists():
        return
    assert isinstance(config, DeeperCodeConfig), "only codes have a dictionary"
    ask, seed = plan.config.resources, plan.config.seed + layer
    on_cpus = Resources(workers=ask.fewest, cpus=ask.cpus)
    whitening = WhitenConfig(
        patches=config.patches,
        patch_size=config.patch_size,
        source="images" if config.source == "maps" else config.source,
        regularization=config.regularization,
        seed=seed,
        resources=on_cpus,
    )
    below = {"below": content_hash(plan.folder(layer - 1) / WEIGHTS)}
    maps = LayerMaps(corpus, plan, layer - 1)
    sample = whiten_maps(maps, whitening, inputs=below, out=folder / "whiten")
    clustering = PatchesConfig(
        size=config.size,
        select=config.chosen_by,
        patches_per_entry=config.patches_per_entry,
        unit_norm=config.unit_norm,
        iterations=config.iterations,
        seed=seed,
        resources=dataclasses.replace(on_cpus, gpus=ask.gpus),
    )
    made, _ = make_dictionary(sample, clustering, out=folder, stage="classify")
    after = whitened_covariance(sample.covariance, sample.matrix)
    write_covariances(sample.covariance, after, plan.out / f"layer{layer}_covariance.png")
    write_pictures(made, plan.out, prefix=f"layer{layer}_")
    _write(folder / DICTIONARY, *made.kernel)
    remove_tree(folder / "kmeans")


def _write(path: Path, kernel: np.ndarray[Any, Any], bias: np.ndarray[Any, Any]) -> None:
    from safetensors.numpy import save_file

    with whole_file(path) as temporary:
        save_file({"kernel": kernel.copy(order="C"), "bias": bias.copy(order="C")}, temporary)
