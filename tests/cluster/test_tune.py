"""Sweeps on Ray Tune: shared stages, ranked trials, and a driver that is killed in between."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient

from selfsup_ray.artifacts import read_done
from selfsup_ray.cluster.tune import Dimension, trial_id
from selfsup_ray.config import build, load, override
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.synthetic import write_shapes
from selfsup_ray.errors import ConfigError
from selfsup_ray.experiment import Experiment
from selfsup_ray.models.encoder import Encoder
from selfsup_ray.sweep_config import SweepConfig
from selfsup_ray.sweep_trial import addresses, in_process, rankme, run_trial, shared_stages
from selfsup_ray.sweeping import load_sweep, prepared, sweep

HERE = {"workers": 0}
SMALL = {"epochs": 1, "batch_size": 16, "precision": "float32", "resources": HERE}


def write_sweep(folder: Path, **values: Any) -> Path:
    """Write a tiny experiment and a sweep over it; return the sweep's file."""
    write_shapes(folder / "photos", 40, size=16)
    experiment = {
        "out": str(folder / "runs" / "tiny"),
        "ingest": {"source": str(folder / "photos"), "image_size": 16, "resources": HERE},
        "pretext": {**SMALL, "backbone": {"name": "resnet18", "stem": "stl", "width": 4}},
        "embed": {"resources": HERE},
        "graph": {"k": 5, "resources": HERE},
        "scan": {**SMALL, "num_clusters": 4, "num_neighbors": 5},
        "evaluate": {},
        "export": {},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(experiment))
    made = {"experiment": str(folder / "tiny.yaml"), "out": str(folder / "sweep"), **values}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(made))
    return folder / "sweep.yaml"


def untold(epoch: float, value: float) -> None:
    """What a trial tells a search that ends no trial early: it must not."""
    raise AssertionError((epoch, value))


def stage_folders(out: Path) -> dict[str, int]:
    """Return how many finished folders there are of each stage."""
    stages = [read_done(path.parent).stage for path in out.glob("stages/*/done.json")]
    return {stage: stages.count(stage) for stage in sorted(set(stages))}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "give exactly one of choice, uniform, log_uniform, int_uniform, int_log_uniform"),
        ({"choice": [1], "uniform": [0, 1]}, "not 2"),
        ({"choice": []}, "choice must list at least one value"),
        ({"uniform": [2, 1]}, r"uniform must be \[low, high\] with low < high"),
        ({"log_uniform": [0, 1]}, "log_uniform needs a low bound above 0"),
        ({"int_uniform": [1.5, 3]}, "int_uniform"),
    ],
)
def test_a_dimension_that_makes_no_sense_is_refused(values: Mapping[str, Any], says: str):
    with pytest.raises(ConfigError, match=says):
        build(Dimension, values)


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ({"uniform": [2.0, 3.0]}, 2.0, 3.0),
        ({"log_uniform": [0.001, 0.1]}, 0.001, 0.1),
        ({"int_uniform": [3, 5]}, 3, 5),
        ({"int_log_uniform": [1, 4]}, 1, 4),
    ],
)
def test_draws_stay_between_the_bounds_and_whole_numbers_reach_both(
    values: Mapping[str, Any], low: float, high: float
):
    dimension = build(Dimension, values)
    assert dimension.ends == (low, high)
    domain = dimension.domain()
    draws = [domain.sample(random_state=np.random.default_rng(i)) for i in range(200)]
    assert min(draws) >= low and max(draws) <= high
    if next(iter(values)).startswith("int"):
        assert set(draws) == set(range(int(low), int(high) + 1))
    if "log" in next(iter(values)):
        middle = (low * high) ** 0.5
        assert 60 <= sum(draw <= middle for draw in draws) <= 140, "half of them below sqrt(ab)"


def test_a_trials_name_depends_on_its_changes_and_not_on_their_order():
    assert trial_id({"a.b": 1, "c": 0.5}) == trial_id({"c": 0.5, "a.b": 1})
    assert trial_id({"a.b": 1}) != trial_id({"a.b": 2})


def test_changes_of_a_sweep_go_to_the_file_that_has_the_key(tmp_path: Path):
    path = write_sweep(
        tmp_path,
        until="scan",
        changes={"graph.k": 6},
        space={"scan.entropy_weight": {"choice": [1.0, 2.0]}},
    )
    made = load_sweep(path, {"samples": 3, "pretext.epochs": 2, "seed": 7})
    assert (made.samples, made.seed) == (3, 7)
    assert made.changes == {"graph.k": 6, "pretext.epochs": 2}
    _, experiment = prepared(path, {"pretext.epochs": 2})
    assert experiment.pretext and experiment.graph
    assert (experiment.pretext.epochs, experiment.graph.k) == (2, 6)
    with pytest.raises(ConfigError, match="Unknown key `sample`: did you mean `samples`"):
        load_sweep(path, {"sample": 3})


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"space": {}}, "space must name at least one key"),
        ({"space": {"scan.entropy": {"choice": [1]}}}, "Unknown key `scan.entropy`"),
        ({"space": {"scan.num_neighbors": {"choice": [5, 6]}}}, "num_neighbors=6 is more than"),
        ({"until": "selflabel"}, "has no stage `selflabel`"),
        ({"search": "grid", "space": {"scan.entropy_weight": {"uniform": [1, 2]}}}, "is a range"),
    ],
)
def test_a_value_that_the_experiment_would_refuse_is_found_before_the_search(
    tmp_path: Path, values: dict[str, Any], says: str
):
    space = {"scan.entropy_weight": {"choice": [1.0, 2.0]}}
    path = write_sweep(tmp_path, **{"until": "scan", "space": space, **values})
    with pytest.raises(ConfigError, match=says):
        sweep(path)
    assert not (tmp_path / "sweep").exists()


def test_keys_that_go_with_a_value_are_changed_in_its_trials_alone(tmp_path: Path):
    also = [{"when": {"graph.k": 7}, "set": {"scan.epochs": 3}}]
    values = {"until": "scan", "space": {"graph.k": {"choice": [5, 7]}}, "also": also}
    made, experiment = prepared(write_sweep(tmp_path, **values), {})
    assert made.applied({"graph.k": 5}) == {"graph.k": 5}
    assert made.applied({"graph.k": 7}) == {"graph.k": 7, "scan.epochs": 3}
    assert made.varied == ("graph.k", "scan.epochs")
    trial = in_process(experiment, made)
    assert shared_stages(trial, made.varied) == ("ingest", "pretext", "embed")
    encoder = {**values, "also": [{"when": {"graph.k": 7}, "set": {"pretext.epochs": 2}}]}
    made, _ = prepared(write_sweep(tmp_path, **encoder), {})
    assert shared_stages(trial, made.varied) == ("ingest",), "not shared by all trials"
    for rule, says in (
        ({"when": {"graph.q": 7}, "set": {}}, r"also.when names graph.q, which is not a key"),
        ({"when": {"graph.k": 7}, "set": {"scan.epoch": 1}}, "Unknown key `scan.epoch`"),
    ):
        with pytest.raises(ConfigError, match=says):
            prepared(write_sweep(tmp_path, **{**values, "also": [rule]}), {})


def test_stages_have_the_same_folder_exactly_when_config_and_inputs_are_the_same(tmp_path: Path):
    made, experiment = prepared(
        write_sweep(tmp_path, until="scan", space={"graph.k": {"choice": [5, 7]}}), {}
    )
    trial = in_process(experiment, made)
    assert trial.stages == ("ingest", "pretext", "embed", "graph", "scan")
    assert shared_stages(trial, made.space) == ("ingest", "pretext", "embed")
    one = addresses(trial, tmp_path)
    for key, same in {
        "graph.k": {"ingest", "pretext", "embed"},
        "scan.epochs": {"ingest", "pretext", "embed", "graph"},
        "pretext.epochs": {"ingest"},
        "scan.resources.cpus": set(trial.stages),
    }.items():
        other = addresses(override(trial, {key: 7}), tmp_path)
        assert {stage for stage in one if one[stage] == other[stage]} == same, key


@pytest.mark.slow
@pytest.mark.parametrize("search", ["grid", "optuna"])
def test_a_search_runs_every_trial_once_and_ranks_them(
    ray_session: None, tmp_path: Path, search: str
):
    space = {"ingest.image_size": {"choice": [12, 16, 20]}}
    path = write_sweep(
        tmp_path, until="ingest", metric="ingest.kept", space=space, search=search, samples=3
    )
    summary = sweep(path)
    tried = [trial.changes["ingest.image_size"] for trial in summary.trials]
    assert len(tried) == 3 and set(tried) <= {12, 16, 20}
    assert [trial.metrics["ingest.kept"] for trial in summary.trials] == [40.0] * 3
    assert stage_folders(tmp_path / "sweep") == {"ingest": len(set(tried))}
    if search == "grid":
        assert set(tried) == {12, 16, 20}
    assert sweep(path) == summary, "a finished sweep is read, not run"


def start(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "selfsup_ray", "sweep", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def killed_after(ended: int, path: Path, out: Path) -> dict[Path, int]:
    """Run the sweep, kill -9 its driver once trials have ended; return the finished stages."""
    driver = start(path)
    deadline = time.monotonic() + 240
    while len(list(out.glob("trials/*/trial.yaml"))) < ended:
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    driver.kill()
    driver.communicate()
    assert not (out / "done.json").exists()
    return {p: p.stat().st_mtime_ns for p in out.glob("stages/*/done.json")}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_whose_driver_is_killed_twice_goes_on_and_runs_no_trial_twice(tmp_path: Path):
    path = write_sweep(
        tmp_path,
        until="evaluate",
        metric="scan_score",
        mode="min",
        search="grid",
        concurrent=1,
        space={"scan.entropy_weight": {"choice": [1.0, 5.0]}, "graph.k": {"choice": [5, 6]}},
    )
    out = tmp_path / "sweep"
    for ended in (1, 3):
        stamps = killed_after(ended, path, out)

    finished = start(path)
    printed, _ = finished.communicate(timeout=240)
    assert finished.returncode == 0
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps, "finished stages were kept"
    assert stage_folders(out) == {
        **{"ingest": 1, "pretext": 1, "embed": 1, "graph": 2, "scan": 4, "evaluate": 4},
    }
    rows = [line.split(",") for line in (out / "trials.csv").read_text().splitlines()]
    assert rows[0] == ["trial", *rows[0][1:3], "scan_score", "seconds", "stopped_epoch", "error"]
    scores = [float(row[3]) for row in rows[1:]]
    assert len(scores) == 4 and scores == sorted(scores)
    assert rows[1][0] in printed and str(out / "best.yaml") in printed
    assert rows[1][0] in (out / "report.html").read_text()
    check_best(out, dict(zip(rows[0], rows[1], strict=True)))
    check_mlflow(tmp_path / "mlflow.db")


def check_best(out: Path, row: dict[str, str]) -> None:
    """The best trial's experiment is ready to run, and its score is what evaluate wrote."""
    best = load(Experiment, out / "best.yaml")
    assert best.scan and best.graph and best.out == out / "best"
    assert best.scan.entropy_weight == float(row["scan.entropy_weight"])
    assert best.graph.k == int(row["graph.k"])
    trial = yaml.safe_load((out / "trials" / row["trial"] / "trial.yaml").read_text())
    metrics = json.loads((out / trial["stages"]["evaluate"] / "metrics.json").read_text())
    assert metrics["label_free"]["scan_score"] == pytest.approx(float(row["scan_score"]))


def check_mlflow(store: Path) -> None:
    """One parent and one finished child per trial, with its numbers and curves, after a restart."""
    client = MlflowClient(tracking_uri=f"sqlite:///{store}")
    [experiment] = [e for e in client.search_experiments() if e.name == "selfsup_ray"]
    runs = client.search_runs([experiment.experiment_id])
    [parent] = [run for run in runs if run.info.run_name == "sweep"]
    children = [run for run in runs if run is not parent]
    assert len(children) == 4
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in children:
        assert "scan_score" in run.data.metrics and "scan/loss" in run.data.metrics
        assert run.data.params["graph.k"] in ("5", "6")


def test_rankme_is_the_exponential_of_the_entropy_of_the_singular_values(tmp_path: Path):
    made, experiment = prepared(
        write_sweep(tmp_path, until="pretext", space={"pretext.epochs": {"choice": [1]}}), {}
    )
    found = run_trial(
        {"pretext.epochs": 1}, untold, experiment=in_process(experiment, made), made=made
    )
    [corpus] = map(Corpus.open, (tmp_path / "sweep/stages").glob("ingest-????????????????"))
    [encoder] = map(Encoder.open, (tmp_path / "sweep/stages").glob("pretext-????????????????"))
    rows = encoder.embed(corpus.images(np.arange(40))).astype(np.float64)
    values = np.linalg.svd(rows, compute_uv=False)
    p = values / values.sum()
    assert found["rankme"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-3)
    assert found["rankme"] == pytest.approx(rankme(corpus, encoder))


def test_a_metric_that_no_stage_has_is_refused_with_those_there_are(tmp_path: Path):
    space = {"ingest.image_size": {"choice": [16]}}
    path = write_sweep(tmp_path, until="ingest", metric="acuracy", space=space)
    made, experiment = prepared(path, {})
    assert isinstance(made, SweepConfig)
    with pytest.raises(ConfigError, match=r"metric=acuracy\. There are: rankme, .*ingest\.kept"):
        run_trial(
            {"ingest.image_size": 16}, untold, experiment=in_process(experiment, made), made=made
        )
