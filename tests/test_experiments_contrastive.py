"""experiments/contrastive/ has the published tables' settings, and names their numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from selfsup_ray.artifacts import begin, finish
from selfsup_ray.config import flatten, load, override, to_dict
from selfsup_ray.costs import cost
from selfsup_ray.data.published_contrastive import (
    BATCH,
    BATCH_NORMS,
    LINEAR_RUNS,
    METHODS,
    TEMPERATURE_C100,
)
from selfsup_ray.experiment import Experiment
from selfsup_ray.models.byol import BYOLConfig
from selfsup_ray.models.heads import LinearHead, MLPHead
from selfsup_ray.models.insdis import InsDisConfig
from selfsup_ray.models.norm import SplitNorm
from selfsup_ray.optim import peak_lr
from selfsup_ray.report import write_report
from selfsup_ray.sweeping import prepared

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "experiments" / "contrastive"
CIFAR = sorted(path.stem for path in FOLDER.glob("*-c10*.yaml")) + sorted(
    path.stem for path in FOLDER.glob("byol-b*.yaml")
)
# Published: batch size -> peak lr, for each method and network.
LR = {
    ("insdis", "resnet18"): {128: 0.03, 512: 0.12},
    ("insdis", "resnet50"): {128: 0.03},
    ("simclr", "resnet18"): {1024: 0.3},
    ("byol", "resnet18"): {128: 0.03, 512: 0.12, 1024: 0.24},
    ("byol", "resnet50"): {256: 0.06},
}


def opened(name: str) -> Experiment:
    return load(Experiment, FOLDER / f"{name}.yaml")


def text(name: str) -> str:
    return (FOLDER / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", CIFAR)
def test_a_row_has_the_published_batch_lr_schedule_and_probe(name: str) -> None:
    made = opened(name)
    assert made.pretext is not None and made.linear is not None
    method, batch = made.pretext.method, made.pretext.batch_size
    lr = peak_lr(made.pretext.optim, batch_size=batch)
    assert lr == pytest.approx(LR[method.name, made.pretext.backbone.name][batch])
    # Four GPUs, each of which normalised its own images.
    assert method.batch_norm == SplitNorm(group_size=batch // 4)
    has: dict[str, Any] = flatten(to_dict(made))
    assert has["pretext.optim.momentum"] == 0.9 and has["pretext.optim.weight_decay"] == 5e-4
    if "nce" not in name:  # the method's own code: 200 epochs
        assert has["pretext.epochs"] == 201
        assert has["pretext.schedule.milestones"] == [160, 190, 200]
    assert has["pretext.backbone.stem"] == "cifar" and has["pretext.without"] == "test/*"
    assert has["linear.epochs"] == 100 and has["linear.optim.lr"] == 30
    assert has["linear.optim.weight_decay"] == 0 and has["linear.batch_size"] == 256
    assert has["linear.schedule.milestones"] == [40, 60, 80] and has["linear.schedule.rate"] == 0.2
    assert has["linear.test.pattern"] == "test/*"


@pytest.mark.parametrize("name", [n for n in CIFAR if n.startswith("byol")])
def test_byol_has_the_published_heads_momentum_and_views(name: str) -> None:
    made = opened(name).pretext
    assert made is not None and isinstance(made.method, BYOLConfig)
    method = made.method
    assert method.momentum == 0.996 and method.momentum_schedule == "fixed"
    assert isinstance(method.head, MLPHead) and method.head.dim == 256
    assert method.head.hidden_dim is None  # the backbone's: 512
    assert isinstance(method.predictor, MLPHead)
    assert (method.predictor.hidden_dim, method.predictor.dim) == (256, 256)
    plain = name in ("byol-r18-c100", "byol-r50-c100")
    assert made.views.name == ("insdis" if plain else "moco_v2")
    bits = found[1] if (found := re.search(r"-bn-([01]{3})", name)) else "111"
    heads = (method.head, method.predictor, method.target_head or method.head)
    norms = [head.batch_norm for head in heads if isinstance(head, MLPHead)]
    assert norms == ["hidden" if bit == "1" else None for bit in bits]


def test_the_files_name_the_published_numbers() -> None:
    for bits, number in BATCH_NORMS.items():
        row = "".join("1" if value == "hidden" else "0" for value in bits)
        name = "byol-augplus-r18-c100" if row == "111" else f"byol-bn-{row}"
        assert f"{100 * number:g} %" in text(name) or f"{100 * number:.2f} %" in text(name)
    for batch, number in BATCH.items():
        name = "byol-augplus-r18-c100" if batch == 512 else f"byol-batch-{batch:g}"
        assert f"{100 * number:.2f} %" in text(name)
    assert f"{100 * METHODS['simclr',]:.2f} %" in text("simclr-r18-c100")
    assert f"{100 * TEMPERATURE_C100[0.3]:.2f} %" in text("insdis-r18-c100")


@pytest.mark.parametrize("name", [n for n in CIFAR if n.startswith("insdis")])
def test_instance_discrimination_has_the_published_bank_and_head(name: str) -> None:
    made = opened(name).pretext
    assert made is not None and isinstance(made.method, InsDisConfig)
    assert made.method.momentum == 0.5 and made.views.name == "insdis"
    assert made.method.head == (
        MLPHead(dim=128, batch_norm="hidden") if "mlp" in name else LinearHead(dim=128)
    )


def test_every_trial_of_a_sweep_is_the_experiment_of_its_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)

    def same(sweep: str, changes: dict[str, Any], name: str) -> None:
        made, experiment = prepared(Path(f"experiments/sweeps/contrastive-{sweep}.yaml"), {})
        trial, row = override(experiment, made.applied(changes)).pretext, opened(name).pretext
        assert trial is not None and row is not None
        ours, theirs = flatten(to_dict(trial)), flatten(to_dict(row))
        lr = [peak_lr(one.optim, batch_size=one.batch_size) for one in (trial, row)]
        assert lr[0] == pytest.approx(lr[1])
        assert {k: v for k, v in ours.items() if v != theirs.get(k) and ".optim." not in k} == {}

    same("batch", {"pretext.batch_size": 128}, "byol-batch-128")
    same("batch", {"pretext.batch_size": 1024}, "byol-batch-1024")
    for method, name in (
        ("insdis", "insdis-r18-c100"),
        ("simclr", "simclr-r18-c100"),
        ("byol", "byol-augplus-r18-c100"),
    ):
        same("methods", {"pretext.method.name": method}, name)
    keys = [f"pretext.method.{part}.batch_norm" for part in ("head", "predictor", "target_head")]
    for bits in ("000", "010", "110"):
        values = ["hidden" if bit == "1" else None for bit in bits]
        same("bn", dict(zip(keys, values, strict=True)), f"byol-bn-{bits}")
    same("temperature-c10", {"pretext.method.temperature": 0.2}, "insdis-r18-c10")


@pytest.mark.parametrize(("workers", "copies"), [(0, 1.0), (1, 1.0), (4, 1.25)])
def test_the_plan_counts_the_bank_and_its_whole_at_a_checkpoint(
    workers: int, copies: float, tmp_path: Path
) -> None:
    ask = {"workers": workers, "cpus": 1, "gpus": 0}
    made = override(opened("insdis-r18-c10"), {"pretext.resources": ask})
    small, large = (cost(made, "pretext", n, tmp_path).memory_bytes for n in (10_000, 1_010_000))
    assert small is not None and large is not None
    assert large - small == pytest.approx(copies * 1_000_000 * 128 * 4, rel=1e-6)


def test_a_folder_of_probed_runs_is_a_table_beside_the_published_numbers(tmp_path: Path) -> None:
    for name, share in (("byol-bn-101", 0.6111), ("of-my-own", 0.5)):
        made = opened("byol-bn-101")
        for stage, facts in (
            ("pretext", {"loss": 1.0}),
            ("linear", {"max_accuracy": share, "last_accuracy": 0.4, "num_test": 10_000}),
        ):
            settings, out = getattr(made, stage), tmp_path / name / stage
            begin(out, stage=stage, config=settings, inputs={})
            finish(out, stage=stage, config=settings, inputs={}, seconds=60, facts=facts)
    page = write_report(tmp_path).read_text()
    assert "2 runs with linear probes, of 2 runs" in page and "62.66" in page and "61.11" in page
    rows = [line.split(",") for line in (tmp_path / "linear.csv").read_text().splitlines()]
    assert rows[1][:3] == ["byol-bn-101", "byol", "resnet18"] and rows[1][-4:-1] == [
        "61.11",
        "40.00",
        "62.66",
    ]
    assert rows[2][-2] == "" and rows[2][-4] == "50.00"


def test_every_published_run_is_an_experiment_whose_file_says_so() -> None:
    for name, number in LINEAR_RUNS.items():
        assert re.search(rf"\b{100 * number:.2f}".removesuffix("0") + "0? %", text(name)), name
    ours = {path.stem for path in FOLDER.glob("*.yaml")}
    unpublished = {
        "insdis-nce-r18-c10",
        "byol-bn-011-affine-off",
        "collapse-small",
        "small",
        "byol-imagenet",
    }
    assert ours == LINEAR_RUNS.keys() | unpublished
