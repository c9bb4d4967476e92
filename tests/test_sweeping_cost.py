"""What a sweep costs: how often each stage ran, and sweeps that are written in Python."""

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from selfsup_ray.config import build
from selfsup_ray.data.synthetic import write_shapes
from selfsup_ray.sweep_config import SweepConfig
from selfsup_ray.sweep_trial import in_process
from selfsup_ray.sweeping import costs, prepared, sweep

ROOT = Path(__file__).parent.parent
HERE = {"workers": 0}
VIEWS = {"name": "scan_simclr", "mean": [0.5] * 3, "std": [0.5] * 3}
SCAN = {"epochs": 1, "batch_size": 20, "precision": "float32", "num_clusters": 4}


def write_experiment(folder: Path, **stages: Any) -> Path:
    """Write a tiny experiment that ends with SCAN on the given encoder; return its file."""
    write_shapes(folder / "photos", 24, size=16)
    experiment = {
        "out": str(folder / "runs" / "tiny"),
        "ingest": {"source": str(folder / "photos"), "image_size": 16, "resources": HERE},
        **stages,
        "embed": {"resources": HERE},
        "graph": {"k": 6, "resources": HERE},
        "scan": {**SCAN, "num_neighbors": 5, "resources": HERE},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(experiment))
    return folder / "tiny.yaml"


@pytest.mark.slow
def test_27_trials_over_k_dictionary_size_and_entropy_weight_run_no_stage_twice(
    ray_session: None, tmp_path: Path
):
    shipped, _ = prepared(ROOT / "experiments/sweeps/k-dictionary-entropy.yaml", {})
    path = write_experiment(
        tmp_path,
        whiten={"patches": 1024, "resources": HERE},
        patches={"size": 16, "patches_per_entry": 16, "resources": HERE},
    )
    made = build(
        SweepConfig,
        {
            **{"experiment": str(path), "out": str(tmp_path / "sweep"), "until": "scan"},
            **{"metric": "scan.consistency", "search": "grid", "concurrent": 3},
            "changes": {"scan.views": VIEWS, "scan.freeze_backbone": True},
            "space": {
                "patches.size": {"choice": [8, 12, 16]},
                "scan.num_neighbors": {"choice": [2, 4, 6]},
                "scan.entropy_weight": {"choice": [1.0, 2.0, 5.0]},
            },
        },
    )
    assert list(made.space) == list(shipped.space), "the sweep of experiments/, on a tiny corpus"
    summary = sweep(made)
    assert len({trial.id for trial in summary.trials if trial.is_complete}) == 27
    _, experiment = prepared(made, {})
    found = {one.stage: one for one in costs(in_process(experiment, made), made, summary.trials)}
    assert {stage: (one.results, one.starts) for stage, one in found.items()} == {
        **{"ingest": (1, 1), "whiten": (1, 1)},
        **{"patches": (3, 3), "embed": (3, 3), "graph": (3, 3)},
        "scan": (27, 27),
    }
    alone = {"ingest", "whiten", "patches", "embed", "graph"}
    assert all(found[stage].alone > 2 * found[stage].seconds for stage in alone)
    # In seconds: all starts together against each different result once; the bar is 1.5.
    needed = sum(one.seconds for one in found.values())
    spent = sum(one.seconds * one.starts / one.results for one in found.values())
    assert spent <= 1.5 * needed
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert "time without sharing" in page and "parallel coordinates" in page
    assert all(f"scan.consistency by {key}" in page for key in ("size", "num neighbors"))


@pytest.mark.slow
def test_a_sweep_written_in_python_compares_by_its_own_number(tmp_path: Path):
    backbone = {"name": "resnet18", "stem": "stl", "width": 4}
    pretext = {"epochs": 1, "batch_size": 20, "precision": "float32", "backbone": backbone}
    path = write_experiment(tmp_path, pretext={**pretext, "resources": HERE})
    command = [sys.executable, str(ROOT / "experiments/sweeps/own_sweep.py")]
    command += [f"experiment={path}", f"out={tmp_path / 'own'}"]
    command += ["space={scan.entropy_weight: {choice: [2.0, 5.0]}}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "own" / "trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    scores = [float(row["sure_and_even"]) for row in rows]
    assert len(rows) == 2 and scores == sorted(scores, reverse=True)
    assert all(0 < score <= 1 for score in scores)
    assert rows[0]["trial"] in done.stdout
