"""metrics.jsonl and MLflow hold the same numbers once, whatever was killed or unreachable."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from selfsup_ray import tracking
from selfsup_ray.config import config
from selfsup_ray.interrupts import interrupts_held
from selfsup_ray.mlflow_store import TrackingConfig, make_database
from selfsup_ray.tracking import Tracker, open_run, read_records

STORE = TrackingConfig()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds run folders: one store for all tests, since making one takes 2 s."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def folder(runs: Path, request: pytest.FixtureRequest) -> Path:
    """A run folder of the test's own."""
    return runs / re.sub(r"\W", "_", request.node.name)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also where the tests themselves run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def run_of(tracker: Tracker) -> Any:
    assert tracker.remote is not None
    opened = tracker.remote.open()
    return opened.client.get_run(opened.run_id)


def in_mlflow(tracker: Tracker, key: str) -> list[tuple[int, float]]:
    assert tracker.remote is not None
    opened = tracker.remote.open()
    history = opened.client.get_metric_history(opened.run_id, key)
    return sorted((metric.step, metric.value) for metric in history)


def records(*steps: int) -> list[dict[str, float]]:
    return [{"step": step, "loss": step / 10} for step in steps]


def test_records_are_lines_of_json_in_the_run_folder(tmp_path):
    tracker = open_run(tmp_path, name="pretext")
    tracker.log(records(1, 2))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [0.1, 0.2]
    assert not (tmp_path / "mlflow.json").exists()


def test_a_name_keeps_the_number_it_has_at_a_step(tmp_path):
    open_run(tmp_path, name="scan").log(records(1, 2))
    again = open_run(tmp_path, name="scan")
    again.log([{"step": 2, "loss": 9.0, "lr": 0.5}, {"step": 3, "loss": 0.3}])
    again.log([{"accuracy": 0.8}])
    again.log([{"nmi": 0.7}])  # another result of the stage: no step, other name
    found = [{k: v for k, v in r.items() if k != "time"} for r in read_records(again.path)]
    assert found == [
        *records(1, 2),
        {"step": 2, "lr": 0.5},
        {"step": 3, "loss": 0.3},
        {"step": 0, "accuracy": 0.8},
        {"step": 0, "nmi": 0.7},
    ]


def test_a_line_cut_short_by_a_kill_is_written_again(tmp_path):
    open_run(tmp_path, name="scan").log(records(1, 2))
    path = tmp_path / "metrics.jsonl"
    os.truncate(path, path.stat().st_size - 5)
    assert [r["step"] for r in read_records(path)] == [1]
    open_run(tmp_path, name="scan").log(records(1, 2, 3))
    assert [r["step"] for r in read_records(path)] == [1, 2, 3]


@config
class Method:
    """A nested config."""

    temperature: float = 0.2
    note: str = "x" * 9000


@config
class Stage:
    """A stage's config."""

    method: Method = Method()
    epochs: int = 3


def test_stages_are_runs_inside_the_experiments_run_with_flat_parameters(runs, folder):
    with (
        open_run(folder, STORE, name="photos") as parent,
        open_run(folder / "scan", STORE, name="scan", params=Stage(), parent=parent) as stage,
    ):
        stage.log([{"step": 5, "loss": 0.5, "head": "best"}])
        stage.artifact(stage.path)
        stage_run, parent_run = run_of(stage), run_of(parent)
    assert stage_run.data.tags["mlflow.parentRunId"] == parent_run.info.run_id
    assert stage_run.info.run_name == "scan"
    assert stage_run.data.params["method.temperature"] == "0.2"
    assert stage_run.data.params["method.note"] == "x" * 6000
    assert stage_run.data.metrics == {"loss": 0.5}
    client = MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    run_id = stage_run.info.run_id
    assert [file.path for file in client.list_artifacts(run_id)] == ["metrics.jsonl"]
    assert (runs / "mlartifacts" / run_id / "artifacts" / "metrics.jsonl").exists()
    assert client.get_run(run_id).info.status == "FINISHED"


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")]
)
def test_a_block_that_ends_badly_says_how(folder, error, status):
    with pytest.raises(error), open_run(folder, STORE, name="x") as tracker:
        raise error
    assert run_of(tracker).info.status == status


def test_a_restart_goes_on_in_the_same_run_and_logs_no_step_twice(folder):
    first = open_run(folder, STORE, name="x", params={"workers": 1})
    first.log(records(1, 2))
    again = open_run(folder, STORE, name="x", params={"workers": 2, "new": 3})
    again.log(records(1, 2, 3))
    assert run_of(again).info.run_id == run_of(first).info.run_id
    assert in_mlflow(again, "loss") == [(1, 0.1), (2, 0.2), (3, 0.3)]
    # MLflow keeps a parameter's first value: how many workers there are changes no result.
    assert run_of(again).data.params == {"workers": "1", "new": "3"}


def test_a_kill_between_the_file_and_mlflow_loses_nothing(folder):
    open_run(folder, STORE, name="x").log(records(1))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 2, "loss": 0.2, "time": 1.0}) + "\n")
    again = open_run(folder, STORE, name="x")
    again.log(records(2, 3))
    assert in_mlflow(again, "loss") == [(1, 0.1), (2, 0.2), (3, 0.3)]


def test_a_kill_before_the_file_is_written_doubles_nothing(folder):
    open_run(folder, STORE, name="x").log(records(1, 2))
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n")  # MLflow has step 2, the file not
    again = open_run(folder, STORE, name="x")
    again.log(records(2, 3))
    assert in_mlflow(again, "loss") == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert [r["step"] for r in read_records(path)] == [1, 2, 3]


def test_a_kill_before_the_run_id_is_stored_makes_no_second_run(folder):
    first = open_run(folder, STORE, name="x")
    ids = folder / "mlflow.json"
    ids.write_text(json.dumps(json.loads(ids.read_text()) | {"run_id": None}))
    again = open_run(folder, STORE, name="x")
    assert run_of(again).info.run_id == run_of(first).info.run_id


def test_a_store_that_was_deleted_is_filled_again_from_the_run_folder(folder, tmp_path):
    open_run(folder, STORE, name="x").log(records(1, 2))
    other = TrackingConfig(uri=f"sqlite:///{tmp_path / 'other.db'}")
    again = open_run(folder, other, name="x")
    again.log(records(3))
    assert in_mlflow(again, "loss") == [(1, 0.1), (2, 0.2), (3, 0.3)]


def test_a_kill_while_mlflow_makes_its_database_leaves_none(folder, tmp_path):
    place = tmp_path / "runs" / "mlflow.db"
    program = (
        f"from selfsup_ray.mlflow_store import make_database; make_database('sqlite:///{place}')"
    )
    (tmp_path / "elsewhere").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=os.environ | {"TMPDIR": str(tmp_path / "elsewhere")}
    )
    while not any(p.stat().st_size for p in tmp_path.glob("elsewhere/*/mlflow.db")):
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not place.exists()
    tracker = open_run(folder, TrackingConfig(uri=f"sqlite:///{place}"), name="x")
    tracker.log(records(1))
    assert in_mlflow(tracker, "loss") == [(1, 0.1)]


def test_of_two_processes_that_make_the_database_one_does_and_nothing_is_left_over(tmp_path):
    place = tmp_path / "mlflow.db"
    makers = [threading.Thread(target=make_database, args=(f"sqlite:///{place}",)) for _ in "ab"]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]
    made = place.stat()
    make_database(f"sqlite:///{place}")
    assert place.stat() == made
    assert MlflowClient(f"sqlite:///{place}").search_experiments()


def test_an_unreachable_mlflow_warns_once_and_is_caught_up_with_later(folder, caplog):
    with socket.socket() as closed:  # a port where nothing listens
        closed.bind(("127.0.0.1", 0))
        away = TrackingConfig(uri=f"http://127.0.0.1:{closed.getsockname()[1]}")
        with (
            caplog.at_level(logging.WARNING, logger="selfsup_ray.tracking"),
            open_run(folder, away, name="x") as tracker,
        ):
            tracker.log(records(1))
            tracker.log(records(2))
            tracker.artifact(tracker.path)
    assert [r["step"] for r in read_records(tracker.path)] == [1, 2]
    [warning] = caplog.messages
    assert "cannot be reached" in warning and str(tracker.path) in warning
    again = open_run(folder, STORE, name="x")
    assert in_mlflow(again, "loss") == [(1, 0.1), (2, 0.2)]


def test_an_mlflow_that_comes_back_gets_what_it_missed(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "RETRY_AFTER_S", 0.0)
    place = tmp_path / "store"
    late = TrackingConfig(uri=f"sqlite:///{place / 'late.db'}")
    place.write_text("in the way of the folder")
    tracker = open_run(folder, late, name="x")
    tracker.log(records(1, 2))
    tracker.artifact(tracker.path)
    place.unlink()
    place.mkdir()
    monkeypatch.chdir(tmp_path)  # MLflow's default place for artifacts is the working folder
    tracker.log(records(3))
    assert in_mlflow(tracker, "loss") == [(1, 0.1), (2, 0.2), (3, 0.3)]
    opened = tracker.remote.open()
    assert [f.path for f in opened.client.list_artifacts(opened.run_id)] == ["metrics.jsonl"]


def test_ctrl_c_within_a_transaction_waits_for_its_end(folder, monkeypatch, ctrl_c):
    tracker, log_batch = open_run(folder, STORE, name="x"), MlflowClient.log_batch

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        log_batch(*args, **kwargs)

    monkeypatch.setattr(MlflowClient, "log_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tracker.log(records(1))
    assert in_mlflow(tracker, "loss") == [(1, 0.1)]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_does_not_wait(ctrl_c):
    reached = []
    with pytest.raises(KeyboardInterrupt), interrupts_held():
        signal.raise_signal(signal.SIGINT)
        reached.append(1)
        signal.raise_signal(signal.SIGINT)
        reached.append(2)
    assert reached == [1]


def test_numbers_that_are_not_finite_stay_in_the_file_only(folder):
    tracker = open_run(folder, STORE, name="x")
    tracker.log([{"step": 1, "loss": float("nan"), "lr": 0.1, "loss per head/é": 2}])
    assert run_of(tracker).data.metrics == {"lr": 0.1, "loss per head/é": 2.0}
    assert "NaN" in tracker.path.read_text()


def test_a_thousand_steps_of_many_metrics_fit_in_mlflows_batches(folder):
    tracker = open_run(folder, STORE, name="x")
    tracker.log([{"step": i, "a": i, "b": -i, "c": 2 * i} for i in range(1200)])
    assert in_mlflow(tracker, "b") == [(i, float(-i)) for i in range(1200)]
