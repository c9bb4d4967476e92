"""The command line: parsing, exit codes, and runs that are stopped in every way and go on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from selfsup_ray import cli
from selfsup_ray.config import build
from selfsup_ray.data.synthetic import write_shapes
from selfsup_ray.experiment import Experiment
from selfsup_ray.last_word import SENTENCE
from selfsup_ray.pipeline import run_experiment

HERE = {"workers": 0}


def slow_training(folder: Path, name: str) -> dict[str, Any]:
    """Return an experiment with 40 steps of pretext and a checkpoint at every second one."""
    return {
        "out": str(folder / name),
        "ingest": {"source": str(folder / "photos"), "image_size": 16, "resources": HERE},
        "pretext": {
            "backbone": {"name": "resnet18", "stem": "cifar", "width": 16},
            "epochs": 20,
            "batch_size": 32,
            "precision": "float32",
            "log_every": 1,
            "checkpoint_every": 2,
            "resources": HERE,
        },
    }


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    write_shapes(tmp_path / "photos", 64, size=16)
    path = tmp_path / "exp.yaml"
    path.write_text(yaml.safe_dump(slow_training(tmp_path, "stopped")))
    return path


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        (["run", "x.yaml", "a.b=1", "--until", "graph"], [("a.b", 1)]),
        (["run", "x.yaml", "--until", "graph", "a.b=1"], [("a.b", 1)]),
        (["plan", "x.yaml", "a=[1, 2]", "--json", "c=x=y"], [("a", [1, 2]), ("c", "x=y")]),
        (["sweep", "s.yaml", "samples=3", "--address", "auto"], [("samples", 3)]),
    ],
)
def test_changes_may_stand_before_and_after_the_options(arguments: list[str], changes: list[Any]):
    assert cli.parsed(arguments).changes == changes


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "x.yaml", "epochs"], "`epochs` is not of the form key=value"),
        (["run", "x.yaml", "--unti", "graph", "--what"], "unrecognized arguments: --what"),
        (["run", "x.yaml", "--only", "grap"], "invalid choice: 'grap'"),
        (["report", "runs/x", "a=1"], "unrecognized arguments: a=1"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_refused(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as caught:
        cli.parsed(arguments)
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["pretext.epoch=3"], "Unknown key `pretext.epoch`: did you mean `epochs`?"),
        (["pretext.epochs=-1"], "`pretext.epochs`: Input should be greater than or equal to 0"),
        (["pretext.batch_size=65"], "pretext.batch_size=65, but there are only 64 images"),
        (["graph={}"], "graph needs embed: add the key `embed: {}`"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    experiment: Path, changes: list[str], says: str, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["run", str(experiment), *changes]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"selfsup-ray: {says}")
    assert captured.err.count("\n") == 1


def test_a_missing_file_and_a_folder_without_a_run_are_users_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["run", str(tmp_path / "absent.yaml")]) == 2
    assert cli.main(["report", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["selfsup-ray"] * 2


def test_plan_prints_a_table_or_json(experiment: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["plan", str(experiment)]) == 0
    table = capsys.readouterr().out
    assert "64 images" in table and "not made yet" in table
    assert cli.main(["plan", str(experiment), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"][1]["state"] == "run"


def start(experiment: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "selfsup_ray", "run", str(experiment)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for_step(process: subprocess.Popen[str], log: Path, step: int) -> None:
    """Wait until the training has logged a step; fail when the process ends before."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stderr and process.stderr.read()
        if len(log.read_text().splitlines() if log.exists() else []) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"no step {step} within two minutes")


def statuses(store: str) -> dict[str, tuple[str, str]]:
    """Return (run id, status) by run name; asserts that names are unique."""
    client = MlflowClient(tracking_uri=store)
    [experiment] = [e for e in client.search_experiments() if e.name == "selfsup_ray"]
    runs = client.search_runs([experiment.experiment_id])
    found = {str(run.info.run_name): (run.info.run_id, run.info.status) for run in runs}
    assert len(found) == len(runs), "a restart began a second run of the same name"
    return found


@pytest.mark.slow
def test_a_run_stopped_by_ctrl_c_and_by_kill_9_ends_with_the_weights_of_one_never_stopped(
    experiment: Path,
):
    folder = experiment.parent
    log, store = folder / "stopped/pretext/metrics.jsonl", f"sqlite:///{folder / 'mlflow.db'}"

    interrupted = start(experiment)
    wait_for_step(interrupted, log, 5)
    interrupted.send_signal(signal.SIGINT)
    _, errors = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 130, errors
    assert "the same command continues from here" in errors and "Traceback" not in errors
    first = statuses(store)
    assert {name: status for name, (_, status) in first.items()} == {
        "stopped": "KILLED",
        "stopped/ingest": "FINISHED",
        "stopped/pretext": "KILLED",
    }

    killed = start(experiment)
    wait_for_step(killed, log, 15)
    killed.kill()
    _, errors = killed.communicate()
    assert errors.count(SENTENCE) == 1
    assert not (folder / "stopped/pretext/done.json").exists()

    finished = start(experiment)
    _, errors = finished.communicate(timeout=120)
    assert finished.returncode == 0, errors
    last = statuses(store)
    assert {name: run_id for name, (run_id, _) in last.items()} == {
        name: run_id for name, (run_id, _) in first.items()
    }
    assert {status for _, status in last.values()} == {"FINISHED"}
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, 41)), "no step is missing and none is logged twice"

    whole = build(Experiment, slow_training(folder, "whole"))
    run_experiment(whole)
    name = "pretext/encoder.safetensors"
    assert (folder / "stopped" / name).read_bytes() == (folder / "whole" / name).read_bytes()
