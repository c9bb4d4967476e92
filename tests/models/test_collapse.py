"""models/collapse.py: the numbers, when they mean a collapse, and who is told; on real digits."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from selfsup_ray.artifacts import Array
from selfsup_ray.cluster.train import train
from selfsup_ray.config import Resources
from selfsup_ray.data.views import MoCoV2Views, Views
from selfsup_ray.models.backbones import ResNetConfig, build_backbone
from selfsup_ray.models.byol import BYOLConfig
from selfsup_ray.models.collapse import collapse_warning, effective_rank, mark_collapse
from selfsup_ray.models.heads import MLPHead
from selfsup_ray.models.pretext import Pretraining, build_pretext
from selfsup_ray.optim import ConstantSchedule, SGDConfig
from selfsup_ray.tracking import Tracker, read_records
from selfsup_ray.training import TrainConfig, TrainJob


def rows(n: int, d: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(0.2, 3, d, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) * spread + 5


@pytest.mark.parametrize(("n", "d"), [(40, 6), (6, 40), (30, 600)])
def test_the_effective_rank_is_the_entropy_of_the_covariances_eigenvalues(n: int, d: int) -> None:
    z = rows(n, d).numpy()
    values = np.linalg.eigvalsh(np.cov(z.T))
    p = values[values > 1e-9] / values.sum()
    assert effective_rank(torch.from_numpy(z)) == pytest.approx(np.exp(-(p * np.log(p)).sum()))


def test_the_effective_rank_counts_directions() -> None:
    corners = torch.cat([torch.eye(8), -torch.eye(8)])
    assert effective_rank(corners) == pytest.approx(8)
    line = torch.linspace(-1, 1, 9)[:, None] * torch.ones(1, 5)
    assert effective_rank(line) == pytest.approx(1)
    assert effective_rank(torch.ones(7, 5)) == 1


def history(*stds: float, rank: float = 20.0) -> list[dict[str, float]]:
    return [
        {"step": 20.0 * (i + 1), "embedding_std": std, "effective_rank": rank}
        for i, std in enumerate(stds)
    ]


@pytest.mark.parametrize(
    ("stds", "marked"),
    [
        ((0.9, 0.05, 0.04, 0.03, 0.02), 3),  # once, at the third in a row
        ((0.05, 0.06, 0.07, 0.2, 0.5), None),  # so a deep network may begin
        ((0.5, 0.05, 0.5, 0.05, 0.5), None),
        ((0.9, 0.7, 0.6, 0.6, 0.6), None),
    ],
)
def test_a_collapse_is_three_low_records_that_do_not_rise(
    stds: tuple[float, ...], marked: int | None
) -> None:
    records = history(*stds)
    for stop in range(1, len(records) + 1):
        newest = records[:stop]
        mark_collapse(newest)
    assert [i for i, r in enumerate(records) if "collapsed" in r] == (
        [] if marked is None else [marked]
    )


def test_embeddings_on_a_line_are_a_collapse_however_far_they_spread() -> None:
    records = history(0.9, 0.9, 0.9, rank=1.2)
    mark_collapse(records)
    assert records[-1]["collapsed"] == 1


def test_methods_without_these_numbers_never_collapse() -> None:
    records = [{"step": float(step), "loss": 1.0} for step in range(5)]
    mark_collapse(records)
    assert not any("collapsed" in record for record in records)


class Digits:
    """The 1,797 real digits of scikit-learn, 16 x 16 pixels in three channels."""

    def __init__(self) -> None:
        small = torch.from_numpy(load_digits().images).float()[:, None] * (255 / 16)
        self.images = F.interpolate(small, size=16).byte().expand(-1, 3, -1, -1)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, ids: Array, *, epoch: int) -> list[Tensor]:
        """Return these digits."""
        return [self.images[torch.from_numpy(ids)]]


def byol(bits: str) -> tuple[Pretraining, Digits, Views]:
    """BYOL whose projector, predictor and target projector have batch norms where bits say."""
    heads = [
        MLPHead(hidden_dim=32, dim=16, batch_norm="hidden" if bit == "1" else None) for bit in bits
    ]
    method = BYOLConfig(head=heads[0], predictor=heads[1], target_head=heads[2], momentum=0.99)
    backbone = build_backbone(ResNetConfig(stem="stl", width=4))
    views = Views(MoCoV2Views(), image_size=16, seed=0)
    return build_pretext(method, backbone), Digits(), views


def run(bits: str, out: Path) -> list[dict[str, float]]:
    """The records of a short training."""
    config = TrainConfig(
        epochs=1,
        batch_size=32,
        optim=SGDConfig(lr=0.1, weight_decay=5e-4),
        schedule=ConstantSchedule(),
        precision="float32",
        log_every=4,
        resources=Resources(workers=0),
    )
    job = TrainJob(partial(byol, bits), config)
    train(job, out=out, tracker=Tracker(out, None), label="pretext")
    return read_records(out / "metrics.jsonl")


def test_byol_collapses_without_batch_norms_and_says_so_once_and_early(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        records = run("000", tmp_path)
    marked = [record for record in records if "collapsed" in record]
    assert len(marked) == 1 and marked[0]["step"] < records[-1]["step"]
    said = [r.message for r in caplog.records if "collapsed by step" in r.message]
    assert said == [f"pretext: {collapse_warning(marked[0])}"]
    assert f"by step {marked[0]['step']:.0f}" in said[0] and "lower optim.lr" in said[0]


def test_byol_with_batch_norms_keeps_its_embeddings_apart(tmp_path: Path) -> None:
    records = run("111", tmp_path)
    assert not any("collapsed" in record for record in records)
    assert min(record["embedding_std"] for record in records) > 0.3
    assert records[-1]["effective_rank"] > 3
