"""A sweep on object storage: its machine is lost, and another one goes on where it stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from selfsup_ray.data.synthetic import write_shapes
from selfsup_ray.storage import located
from selfsup_ray.sweep_trial import in_process, run_trial
from selfsup_ray.sweeping import prepared

HERE = {"workers": 0}
WEIGHTS = (0.5, 2.0, 5.0)
TRIES = 8


def write_sweep(folder: Path) -> Path:
    """Write a tiny experiment and a sweep of three trials over it; return the sweep's file."""
    write_shapes(folder / "photos", 40, size=16)
    small = {"epochs": 1, "batch_size": 16, "precision": "float32", "resources": HERE}
    backbone = {"name": "resnet18", "stem": "stl", "width": 4}
    stages = {
        "ingest": {"source": str(folder / "photos"), "image_size": 16, "resources": HERE},
        "pretext": {**small, "backbone": backbone},
        "embed": {"resources": HERE},
        "graph": {"k": 5, "min_recall": 0, "resources": HERE},
        "scan": {**small, "num_clusters": 4, "num_neighbors": 5},
        "evaluate": {},
    }
    experiment = {"out": str(folder / "runs" / "tiny"), **stages}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(experiment))
    sweep = {
        **{"experiment": str(folder / "tiny.yaml"), "out": str(folder / "alone")},
        **{"until": "evaluate", "metric": "scan_score", "mode": "min", "search": "grid"},
        **{"concurrent": 1, "space": {"scan.entropy_weight": {"choice": list(WEIGHTS)}}},
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    return folder / "sweep.yaml"


def scores_alone(path: Path) -> dict[float, float]:
    """Return the score of each trial, run one after the other here, without Ray, on a disk."""
    made, experiment = prepared(path, {})
    trial = in_process(experiment, made)

    def untold(epoch: float, value: float) -> None:
        raise AssertionError((epoch, value))

    found = {}
    for weight in WEIGHTS:
        changes = {"scan.entropy_weight": weight}
        numbers = run_trial(changes, untold, experiment=trial, made=made)
        found[weight] = numbers["scan_score"]
    return found


def start(path: Path, out: str, cache: Path) -> subprocess.Popen[Any]:
    """Start the sweep as on a machine with this cache, in a group of processes of its own."""
    with open(f"{cache}.log", "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "selfsup_ray", "sweep", str(path), f"out={out}"],
            env={**os.environ, "SELFSUP_RAY_CACHE": str(cache)},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def started(path: Path, out: str, cache: Path, until: Callable[[], bool]) -> subprocess.Popen[Any]:
    """Start the sweep and return it once something holds, or it has ended well.

    Again where the machine is too busy: Ray gives its processes half a minute to come up.
    """
    log = Path(f"{cache}.log")
    for _ in range(TRIES):
        driver = start(path, out, cache)
        while driver.poll() is None and not until():
            time.sleep(0.1)
        if not driver.returncode:
            return driver
        if "while it started" not in log.read_text():
            break
    raise AssertionError(log.read_text()[-3000:])


def killed_with_its_ray(driver: subprocess.Popen[Any]) -> None:
    """SIGKILL a driver and every process that it has started, itself first."""
    from ray._private.services import psutil  # Ray's own copy

    family = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
    for process in family:
        with suppress(psutil.NoSuchProcess):  # it ended just now
            process.send_signal(signal.SIGKILL)
    driver.wait()
    assert len(family) > 3, "its Ray was to be killed, too"
    psutil.wait_procs(family, timeout=60)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_sweep_on_a_store_whose_machine_is_lost_is_restored_by_another_to_the_same_best_trial(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    path, out = write_sweep(tmp_path), f"{bucket}/sweeps/x"

    def ended() -> int:
        return len(list(located(out).glob("trials/*/trial.yaml")))

    first = started(path, out, tmp_path / "first", lambda: ended() > 0)
    killed_with_its_ray(first)
    assert 1 <= ended() < len(WEIGHTS) and not (located(out) / "done.json").is_file()
    stamps = {p.url: p.read_text() for p in located(out).glob("stages/*/done.json")}

    again = started(path, out, tmp_path / "second", lambda: False)
    assert again.returncode == 0
    assert {url: located(url).read_text() for url in stamps} == stamps, "finished stages were kept"
    rows = [line.split(",") for line in (located(out) / "trials.csv").read_text().splitlines()]
    names = rows[0]
    table = [dict(zip(names, row, strict=True)) for row in rows[1:]]
    got = {float(row["scan.entropy_weight"]): float(row["scan_score"]) for row in table}
    expected = scores_alone(path)
    assert got == pytest.approx(expected)
    best = min(expected, key=lambda weight: expected[weight])
    text = (located(out) / "best.yaml").read_text()
    assert yaml.safe_load(text)["scan"]["entropy_weight"] == best
    assert (located(out) / "report.html").is_file()
    check_mlflow(store)


def check_mlflow(store: str) -> None:
    """One parent, and one finished child with its numbers for each trial."""
    client = MlflowClient(tracking_uri=store)
    [found] = [e for e in client.search_experiments() if e.name == "selfsup_ray"]
    runs = client.search_runs([found.experiment_id])
    [parent] = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run is not parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    weights = sorted(float(run.data.params["scan.entropy_weight"]) for run in children)
    assert weights == sorted(WEIGHTS)
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert all("scan_score" in run.data.metrics for run in children)
