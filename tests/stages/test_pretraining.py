"""The stage pretext with instance discrimination and BYOL, on real digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from selfsup_ray.config import Resources
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.stream import StreamFeed
from selfsup_ray.data.synthetic import corpus_of_arrays, shape_images
from selfsup_ray.data.views import InsDisViews
from selfsup_ray.errors import ConfigError
from selfsup_ray.models.backbones import ResNetConfig
from selfsup_ray.models.heads import LinearHead, MLPHead
from selfsup_ray.models.norm import SyncNorm
from selfsup_ray.models.pretext import BYOLConfig, InsDisConfig
from selfsup_ray.stages.ingest import IngestConfig, ingest
from selfsup_ray.stages.pretext import PretextConfig, pretrain
from selfsup_ray.training import load_state

SMALL = MLPHead(hidden_dim=8, dim=8, batch_norm="hidden")
INSDIS = InsDisConfig(head=LinearHead(dim=8), batch_norm=SyncNorm(), temperature=0.2)
BYOL = BYOLConfig(head=SMALL, predictor=SMALL)


def digits(folder: Path, *, kept: int, left: int = 0) -> Corpus:
    """A corpus of the first digits of scikit-learn, 16 x 16, in the folders kept and left."""
    images = (load_digits().images[: kept + left] * 15).astype(np.uint8)
    names = [f"kept/{i:02d}" for i in range(kept)] + [f"left/{i:02d}" for i in range(left)]
    for name, image in zip(names, images, strict=True):
        path = folder / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).resize((16, 16), Image.Resampling.NEAREST).save(path)
    config = IngestConfig(image_size=16, resources=Resources(workers=0), shard_size=8)
    return ingest(folder / "images", config, out=folder / "corpus")


def settings(method: InsDisConfig | BYOLConfig, **values: Any) -> PretextConfig:
    return PretextConfig(
        method=method,
        backbone=ResNetConfig(stem="stl", width=4),
        views=InsDisViews(),
        batch_size=6,
        precision="float32",
        resources=Resources(workers=0),
        **({"epochs": 2} | values),
    )


def weights(corpus: Corpus, config: PretextConfig, out: Path) -> torch.Tensor:
    encoder = pretrain(corpus, config, out=out)
    return torch.cat([p.detach().flatten() for p in encoder.backbone().parameters()])


@pytest.mark.parametrize("method", [INSDIS, BYOL], ids=["insdis", "byol"])
def test_images_that_are_left_out_change_nothing(
    method: InsDisConfig | BYOLConfig, tmp_path: Path
) -> None:
    more = digits(tmp_path / "more", kept=20, left=10)
    less = digits(tmp_path / "less", kept=20)
    found = weights(more, settings(method, without="*/left/*"), tmp_path / "a")
    assert torch.equal(found, weights(less, settings(method), tmp_path / "b"))
    assert not torch.equal(found, weights(more, settings(method), tmp_path / "c"))


def test_a_pattern_must_leave_out_some_images_and_not_all(tmp_path: Path) -> None:
    corpus = digits(tmp_path, kept=12)
    for pattern, count in (("test/*", 0), ("*/kept/*", 12)):
        with pytest.raises(ConfigError, match=rf"{count} of the 12 images; .*/kept/00"):
            pretrain(corpus, settings(BYOL, without=pattern), out=tmp_path / str(count))


def test_instance_discrimination_and_missing_images_cannot_be_streamed() -> None:
    with pytest.raises(ConfigError, match=r"method\.name=insdis looks them up by their ids"):
        settings(INSDIS, feed=StreamFeed())
    with pytest.raises(ConfigError, match=r"feed\.name=stream reads whole shards, .*'a\*'"):
        settings(BYOL, feed=StreamFeed(lanes=2), without="a*")


def test_instance_discrimination_takes_one_view_and_remembers_every_image(tmp_path: Path) -> None:
    corpus = digits(tmp_path, kept=20)
    seen: list[Any] = []
    config = settings(INSDIS, checkpoint_every=2, epochs=1)
    original = torch.save

    def keep(state: Any, path: Path) -> None:
        seen.append(state["objective"]["bank._extra_state"].clone())
        original(state, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", keep)
        pretrain(corpus, config, out=tmp_path / "out")
    assert [rows.shape for rows in seen] == [(20, 8)] * 2
    moved = (seen[0] != seen[1]).any(dim=1).sum()
    assert moved == 6  # the one step between them
    assert load_state(tmp_path / "out" / "checkpoint.pt") is None


def test_a_corpus_made_of_arrays_is_trained_on_like_one_of_files(tmp_path: Path):
    images, labels = shape_images(12, size=16)
    corpus = corpus_of_arrays(tmp_path / "corpus", images, labels, shard_size=5)
    config = settings(INSDIS, epochs=1)
    encoder = pretrain(corpus, config, out=tmp_path / "pretext")
    assert encoder.description.images.fit == "crop"
    assert encoder.embed(corpus.images(np.arange(12))).shape == (12, encoder.dim)
