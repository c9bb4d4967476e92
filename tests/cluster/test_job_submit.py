"""`ray job submit` of experiments and sweeps: exit status, logs, stop and go on, size."""

from __future__ import annotations

import json
import subprocess
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from selfsup_ray.data.synthetic import write_shapes

ROOT = Path(__file__).parents[2]
HERE = {"workers": 0}


@pytest.fixture(scope="module")
def head(start_head: Any) -> Any:
    return start_head("--num-cpus=2")


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """Return an experiment of 60 steps with a checkpoint at every second one."""
    write_shapes(tmp_path / "photos", 64, size=16)
    path = tmp_path / "exp.yaml"
    made = {
        "out": str(tmp_path / "run"),
        "ingest": {"source": str(tmp_path / "photos"), "image_size": 16},
        "pretext": {
            "backbone": {"name": "resnet18", "stem": "cifar", "width": 16},
            **{"epochs": 30, "batch_size": 32, "precision": "float32"},
            **{"log_every": 1, "checkpoint_every": 2, "resources": HERE},
        },
    }
    path.write_text(yaml.safe_dump(made))
    return path


def job(head: Any, verb: str, *arguments: str) -> subprocess.Popen[str]:
    """Start `ray job VERB --address …`, whose output is both streams."""
    return subprocess.Popen(
        ["ray", "job", verb, "--address", head.dashboard, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=head.environment,
    )


def submit(head: Any, name: str, *command: str) -> subprocess.Popen[str]:
    """Submit a command of selfsup-ray as README does, with an id so that it can be stopped."""
    entry = ["--", "selfsup-ray", *command]
    return job(head, "submit", "--submission-id", name, "--working-dir", ".", *entry)


def steps(log: Path) -> list[int]:
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_that_was_stopped_continues_when_it_is_submitted_again(head: Any, experiment: Path):
    log = experiment.parent / "run/pretext/metrics.jsonl"
    first = submit(head, "first", "run", str(experiment))
    deadline = time.monotonic() + 240
    while len(steps(log)) < 5:
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()[0]
        time.sleep(0.02)
    stopped = job(head, "stop", "first").communicate(timeout=120)[0]
    output = first.communicate(timeout=120)[0]
    assert "was stopped" in stopped, stopped
    assert "Job 'first' was stopped" in output and "Traceback" not in output
    said = job(head, "logs", "first").communicate(timeout=120)[0]
    assert said.count("selfsup-ray: stopped; the same command continues from here.") == 1, said
    before = max(steps(log))
    assert before < 60

    second = submit(head, "second", "run", str(experiment))
    output = second.communicate(timeout=240)[0]
    assert second.returncode == 0, output
    assert "report.html" in output and "Job 'second' succeeded" in output
    assert "ingest: " in output and "is current" in output, "the finished stage is not run again"
    assert steps(log) == list(range(1, 61)), "no step is missing and none is logged twice"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_jobs_exit_status_tells_a_mistake_and_a_sweep_runs_as_well(head: Any, experiment: Path):
    sweep = experiment.with_name("sweep.yaml")
    made = {
        "experiment": str(experiment),
        "out": str(experiment.parent / "sweep"),
        **{"until": "pretext", "metric": "pretext.loss", "mode": "min", "search": "grid"},
        "changes": {"pretext.epochs": 1},
        "space": {"pretext.optim.lr": {"choice": [0.01, 0.02]}},
    }
    sweep.write_text(yaml.safe_dump(made))
    searching = submit(head, "sweep", "sweep", str(sweep))
    wrong = submit(head, "wrong", "run", str(experiment), "pretext.epochs=many")
    output = wrong.communicate(timeout=240)[0]
    assert wrong.returncode == 1, output
    assert "selfsup-ray: " in output and "pretext.epochs" in output and "many" in output
    output = searching.communicate(timeout=240)[0]
    assert searching.returncode == 0, output
    assert "trials.csv" in output
    assert len((experiment.parent / "sweep/trials.csv").read_text().splitlines()) == 3


def test_what_a_job_ships_is_the_package_and_the_experiments_alone(tmp_path: Path):
    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "shipped.zip"
    create_package(str(ROOT), package, include_gitignore=True)
    names = zipfile.ZipFile(package).namelist()
    shipped = {name.split("/")[0] for name in names}
    assert shipped >= {"selfsup_ray", "experiments", "pyproject.toml"}
    assert not shipped & {".git", ".venv", ".ci", "tests", "runs", "selfsup_ray.egg-info"}
    assert package.stat().st_size < 25 * 2**20
