"""The low-shot stage inside an experiment: four shapes, from images to the report's section."""

from pathlib import Path
from typing import Any

import pytest

from selfsup_ray.config import build
from selfsup_ray.data.synthetic import write_shapes
from selfsup_ray.errors import ConfigError
from selfsup_ray.experiment import Experiment
from selfsup_ray.pipeline import run_experiment
from selfsup_ray.planning import plan_experiment
from selfsup_ray.report import write_report
from selfsup_ray.stages.lowshot import LowShot
from selfsup_ray.steps import open_artifact

HERE = {"workers": 0}


def shapes(folder: Path) -> dict[str, Any]:
    return {
        "out": str(folder / "runs" / "shapes"),
        "ingest": {"source": str(folder / "photos"), "image_size": 32, "resources": HERE},
        "pretext": {
            "backbone": {"name": "resnet18", "stem": "stl", "width": 8},
            "views": {"name": "scan_simclr"},
            "precision": "float32",
            "epochs": 1,
            "batch_size": 60,
            "resources": HERE,
        },
        "embed": {"resources": HERE},
        "reduce": {"dim": 16, "resources": HERE},
        "lowshot": {
            "classes": {"num_base": 2},
            "test": {"name": "source", "pattern": "*[05].png"},
            "shots": [1, 4],
            "seeds": [1, 2],
            "methods": ["diffusion", "diffusion_background", "logistic", "knn", "fused"],
            "criterion": "top1_all",
            "k": 5,
            "niter": 3,
            "background": {"in_domain": True},
            "logistic": {"lr": [0.1], "batch_size": [16], "iterations": 60, "eval_every": 30},
            "knn": {"k": [1, 5]},
        },
    }


@pytest.mark.slow
def test_an_experiment_runs_the_protocol_plans_it_and_reports_it(tmp_path: Path):
    write_shapes(tmp_path / "photos", 240, size=32)
    made = build(Experiment, shapes(tmp_path))
    run_experiment(made)
    found = open_artifact(made.folder("lowshot"))
    assert isinstance(found, LowShot)
    assert set(found.table["test"]) == {"1", "4"}
    assert found.mean("diffusion_background", n=4, number="top1_all") > 0.5
    assert plan_experiment(made).to_run == ()
    page = write_report(made.out).read_text()
    assert "Low-shot classification" in page
    assert "base class has all its labels, 1 novel class n of them" in page
    with pytest.raises(ConfigError, match="lowshot needs embed"):
        unfit = {k: v for k, v in shapes(tmp_path).items() if k not in ("embed", "reduce")}
        build(Experiment, unfit)
