"""Trials that fall behind end early: which, when, what stays of them, and after a restart."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient

from selfsup_ray.cluster.asha import EPOCH, VALUE, Climb, Halving, scheduler
from selfsup_ray.cluster.tune import Dimension, Search, Trial, search
from selfsup_ray.config import Resources, build
from selfsup_ray.data.synthetic import write_shapes
from selfsup_ray.errors import ConfigError
from selfsup_ray.sweep_config import AshaConfig, SweepConfig
from selfsup_ray.sweep_trial import Watched, rungs
from selfsup_ray.sweeping import prepared, sweep

HERE = {"workers": 0}
SMALL = {"epochs": 4, "batch_size": 20, "log_every": 1, "precision": "float32", "resources": HERE}
ASHA = {"metric": "scan.loss", "mode": "min", "grace": 1, "factor": 2}


def made(folder: Path, **values: Any) -> SweepConfig:
    """Return a sweep of SCAN's entropy weight over a tiny experiment, made in Python."""
    write_shapes(folder / "photos", 40, size=16)
    experiment = {
        "out": str(folder / "runs" / "tiny"),
        "ingest": {"source": str(folder / "photos"), "image_size": 16, "resources": HERE},
        "pretext": {
            **{**SMALL, "epochs": 1},
            "backbone": {"name": "resnet18", "stem": "stl", "width": 4},
        },
        "embed": {"resources": HERE},
        "graph": {"k": 5, "resources": HERE},
        "scan": {**SMALL, "num_clusters": 4, "num_neighbors": 5},
        "evaluate": {},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(experiment))
    given = {
        "experiment": str(folder / "tiny.yaml"),
        "out": str(folder / "sweep"),
        "until": "evaluate",
        "metric": "scan_score",
        "mode": "min",
        "search": "grid",
        "concurrent": 1,
        "space": {"scan.entropy_weight": {"choice": [5.0, 1.0]}},
        "asha": ASHA,
        **values,
    }
    return build(SweepConfig, given)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"metric": "graph.recall"}, r"ended in graph, which logs no records.*pretext, scan"),
        ({"metric": "selflabel.loss"}, r"ended in selflabel, which logs no records"),
        ({"metric": "pretext.loss"}, r"same in all trials.*touches pretext.*in each trial: scan"),
        ({"grace": 4}, r"asha\.grace=4 is no less than scan\.epochs=4"),
        ({"metric": "loss"}, r"metric must be `stage\.name`"),
        ({"factor": 1}, r"factor must be above 1"),
    ],
)
def test_trials_that_could_not_be_ended_early_are_refused_before_the_search(
    tmp_path: Path, values: dict[str, Any], says: str
):
    with pytest.raises(ConfigError, match=says):
        prepared(made(tmp_path, asha={**ASHA, **values}), {})


def test_an_end_is_possible_in_any_stage_that_trains_and_differs(tmp_path: Path):
    longer = {"space": {"scan.epochs": {"choice": [2, 8]}}, "asha": {**ASHA, "grace": 4}}
    prepared(made(tmp_path, **longer), {})
    space = {"pretext.epochs": {"choice": [2, 8]}}
    prepared(made(tmp_path, space=space, asha={**ASHA, "metric": "pretext.loss"}), {})


def test_the_first_record_at_each_rung_is_compared_and_the_last_epoch_never():
    asha = AshaConfig(metric="scan.loss", grace=1, factor=3)
    assert rungs(asha, 10) == (1, 3, 9) and rungs(asha, 9) == (1, 3) and rungs(asha, 1) == ()
    climb = Climb(rungs(asha, 10), epochs=10)
    epochs = [0.5, 0.9, 1.2, 1.7, 2.9, 3.0, 9.9, 10.0]
    assert [epoch for epoch in epochs if climb.is_due(epoch)] == [1.2, 3.0, 9.9]
    rare = Climb(rungs(asha, 10), epochs=10)
    assert [epoch for epoch in (5.0, 10.0) if rare.is_due(epoch)] == [5.0], "two rungs at once"


def test_records_of_an_earlier_start_are_told_again_and_each_rung_once(tmp_path: Path):
    asha = AshaConfig(metric="scan.loss", grace=1, factor=2)
    told = list[tuple[float, float]]()

    def start() -> Watched:
        return Watched(tmp_path, asha, 4, lambda *pair: told.append(pair))

    start().log([{"step": s, "epoch": s / 2, "loss": 10.0 - s} for s in (1, 2, 3)])
    assert told == [(1.0, 8.0)]
    again = start()
    assert told == [(1.0, 8.0)] * 2
    again.log([{"step": s, "epoch": s / 2, "loss": 10.0 - s} for s in (2, 3, 4, 5)])
    assert told == [(1.0, 8.0), (1.0, 8.0), (2.0, 6.0)]
    with pytest.raises(ConfigError, match=r"asha\.metric=scan\.loss is not in the records.*lr"):
        again.log([{"step": 9, "epoch": 3.0, "lr": 0.1}])
    with pytest.raises(ConfigError, match="one layer after the other"):
        again.log([{"step": 9, "layer1.epoch": 3.0, "layer1.loss": 0.1}])


def halving(factor: float = 2, reached: Callable[..., Any] = lambda changes: []) -> Halving:
    return Halving(mode="min", factor=factor, rungs=(1, 2, 4), reached=reached)


def test_after_a_restart_trials_are_compared_with_those_that_had_ended():
    def reached(changes: dict[str, float]) -> list[tuple[float, float]]:
        return [(1, changes["loss"]), (2, changes["loss"] - 1)]

    restored = scheduler(halving(reached=reached))
    restored.on_trial_add(None, trial("old", "TERMINATED", 5.0))
    restored.on_trial_add(None, trial("better", "PENDING", 0.0))
    restored.on_trial_add(None, trial("worse", "PENDING", 0.0))
    for name, value, answer in (("better", 4.0, "CONTINUE"), ("worse", 5.5, "STOP")):
        result = {EPOCH: 1, VALUE: value}
        assert restored.on_trial_result(None, trial(name, "RUNNING", 0.0), result) == answer
    second = {EPOCH: 2, VALUE: 4.5}
    assert restored.on_trial_result(None, trial("better", "RUNNING", 0.0), second) == "STOP"


def trial(name: str, status: str, loss: float) -> Any:
    return SimpleNamespace(trial_id=name, status=status, config={"loss": loss})


def asha(curves: list[list[float]], *, at: list[int], factor: float) -> list[float | None]:
    """Return where each of several trials, one after the other, is ended: slow and plain."""
    seen: dict[int, list[float]] = {epoch: [] for epoch in at}
    ended = list[float | None]()
    for curve in curves:
        stop = None
        for epoch in at:
            value, before = curve[epoch - 1], seen[epoch]
            behind = bool(before) and -value < np.percentile(
                [-v for v in before], 100 - 100 / factor
            )
            before.append(value)
            if behind:
                stop = float(epoch)
                break
        ended.append(stop)
    return ended


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grid", "optuna"])
def test_a_search_ends_the_trials_that_a_plain_loop_ends(
    ray_session: None, tmp_path: Path, algorithm: Any
):
    def curve(start: float) -> list[float]:
        return [start - 0.3 * epoch * (start % 2) for epoch in range(1, 9)]

    def run(changes: dict[str, Any], tell: Callable[[float, float], None]) -> dict[str, float]:
        values = curve(changes["a.start"])
        for epoch in (1, 2, 4):
            tell(epoch, values[epoch - 1])
        return {"final": values[-1]}

    starts = [4.0, 3.0, 6.0, 5.0, 2.5, 2.0, 1.0, 7.0]
    ended = list[Trial]()
    found = search(
        run,
        {"a.start": build(Dimension, {"choice": starts})},
        how=Search(
            **{"metric": "final", "mode": "min", "algorithm": algorithm, "samples": 8},
            concurrent=1,
            halving=halving(),
        ),
        resources=Resources(workers=1, cpus=1, gpus=0),
        out=tmp_path / "tune",
        on_trial=ended.append,
    )
    assert found == ended and len(found) == 8, "one after the other, as `concurrent` says"
    curves = [curve(one.changes["a.start"]) for one in found]
    if algorithm == "grid":
        assert [one.changes["a.start"] for one in found] == starts
    stops = [one.stopped for one in found]
    assert stops == asha(curves, at=[1, 2, 4], factor=2)
    assert None in stops and len(set(stops)) > 1
    for one, values in zip(found, curves, strict=True):
        assert one.metrics == ({"final": values[-1]} if one.is_complete else {})


@pytest.mark.slow
def test_a_trial_that_is_behind_ends_in_its_training_and_says_so_everywhere(
    ray_session: None, tmp_path: Path
):
    config = made(tmp_path)
    summary = sweep(config)
    best, early = summary.trials
    assert best.is_complete and best.changes == {"scan.entropy_weight": 5.0}
    assert early.stopped == 1.0 and early.metrics == {}, "its loss has a lower entropy term"
    out = tmp_path / "sweep"
    stages = yaml.safe_load((out / "trials" / early.id / "trial.yaml").read_text())["stages"]
    assert (out / stages["scan"] / "metrics.jsonl").read_text().count("\n") == 2, "one epoch of 4"
    assert not (out / stages["scan"] / "done.json").exists()
    assert not (out / stages["evaluate"]).exists()
    assert "stopped, epoch 1" in summary.text()
    assert "stopped at epoch 1" in (out / "report.html").read_text()
    assert ",1.0," in (out / "trials.csv").read_text().splitlines()[2]
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    [store] = [e for e in client.search_experiments() if e.name == "selfsup_ray"]
    runs = {r.info.run_name: r for r in client.search_runs([store.experiment_id])}
    assert len(runs) == 3
    assert runs[f"sweep/{early.id}"].info.status == "KILLED"
    assert runs[f"sweep/{best.id}"].info.status == "FINISHED"
    history = client.get_metric_history(runs[f"sweep/{early.id}"].info.run_id, "scan/loss")
    assert len(history) == 2, "its curve stays"
    assert sweep(config) == summary, "a finished sweep is read, not run"
