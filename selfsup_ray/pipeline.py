"""Runs an experiment: its stages in order, what is current skipped, all of it tracked."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from selfsup_ray.artifacts import read_json, write_text
from selfsup_ray.config import load, to_dict
from selfsup_ray.credentials import masked
from selfsup_ray.experiment import Experiment, seeded
from selfsup_ray.mlflow_store import Store
from selfsup_ray.planning import UP_TO, plan_experiment, require_room
from selfsup_ray.report import write_report
from selfsup_ray.run_lock import alone
from selfsup_ray.steps import require_packages, run_stage
from selfsup_ray.tracking import Tracker, is_recorded, open_run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What a run leaves, for a person to open next."""

    out: Path
    report: Path
    store: str
    """URI of the MLflow store."""
    pseudo_labels: Path | None
    scores: str | None
    """The result in one line; None when nothing was evaluated."""

    def text(self) -> str:
        """Return the lines that end a run."""
        lines = [] if self.scores is None else [f"result         {self.scores}"]
        lines += [
            f"report         {self.report}",
            f"MLflow store   {self.store}   (mlflow ui --backend-store-uri {self.store})",
        ]
        if self.pseudo_labels is not None:
            lines.append(f"pseudo-labels  {self.pseudo_labels}")
        return "\n".join(lines)


def run(
    path: Path,
    changes: Mapping[str, Any] | None = None,
    *,
    only: Sequence[str] | None = None,
    until: str | None = None,
    address: str | None = None,
) -> Result:
    """Run the stages of an experiment file that are not current, then write the report.

    changes: dotted config keys, e.g. {"pretext.epochs": 10}. A run that was killed continues
    where it was. Raises UserError for a mistake in the file, before anything is spent.
    """
    return run_experiment(load(Experiment, path, changes), only=only, until=until, address=address)


def run_experiment(
    experiment: Experiment,
    *,
    only: Sequence[str] | None = None,
    until: str | None = None,
    address: str | None = None,
) -> Result:
    """Run an experiment that was made in Python; see `run`."""
    experiment = seeded(experiment)
    made = plan_experiment(experiment, only=only, until=until)
    require_packages(experiment, made.to_run)
    require_room(made)
    for step in made.steps:
        if step.state == "current":
            log.info("%s: %s is current", step.stage, experiment.folder(step.stage))
    with alone(experiment.out):
        if made.to_run or not is_recorded(experiment.out) or _unrecorded(experiment):
            _run_stages(made.to_run, experiment, address)
        else:
            write_report(experiment.out)
    pseudo_labels = experiment.folder("export") / "pseudo_labels.parquet"
    store = masked(Store.beside(experiment.out, experiment.tracking).uri)
    scores = _scores(experiment.folder("evaluate") / "metrics.json")
    return Result(
        out=experiment.out,
        report=experiment.out / "report.html",
        store=store,
        pseudo_labels=pseudo_labels if pseudo_labels.exists() else None,
        scores=scores,
    )


def _scores(path: Path) -> str | None:
    """Return what an evaluation's metrics.json says of the clusters, in one line."""
    metrics = read_json(path) if path.exists() else {}
    if "accuracy" in metrics:
        names = {"accuracy": "ACC", "nmi": "NMI", "ari": "ARI"}
        values = ", ".join(f"{short} {metrics[name]:.3f}" for name, short in names.items())
        return f"{values} over {metrics['num_labelled']:,} labelled images"
    if "scan_score" in metrics.get("label_free", {}):
        score, clusters = metrics["label_free"]["scan_score"], metrics["label_free"]["num_clusters"]
        return f"{clusters} clusters, SCAN score {score:.3f} (no labels to compare with)"
    return None


def _run_stages(stages: Sequence[str], experiment: Experiment, address: str | None) -> None:
    """Run stages in one Ray session, each as a child of the experiment's MLflow run."""
    out, tracking = experiment.out, experiment.tracking
    text = yaml.safe_dump(to_dict(experiment), sort_keys=False)
    with (
        _workers(stages, experiment, address),
        open_run(out, tracking, name=out.name, params=experiment) as parent,
    ):
        write_text(out / "experiment.yaml", text)
        for stage in set(_unrecorded(experiment)) - set(stages):
            _open_stage(stage, experiment, parent).finish()  # opening it sent the numbers
        for i, stage in enumerate(stages, start=1):
            log.info("%s: stage %d of the %d to run", stage, i, len(stages))
            _run_tracked(stage, experiment, parent)
        _catch_up(experiment, parent)
        parent.artifact(out / "experiment.yaml")
        parent.artifact(write_report(out))


@contextmanager
def _workers(stages: Sequence[str], experiment: Experiment, address: str | None) -> Iterator[None]:
    """Be connected to Ray while stages run; not at all when every one runs in this process.

    Raises ResourceError when Ray can never place the workers of a stage.
    """
    asked = {stage: getattr(experiment, stage).resources for stage in stages}
    here = all(resources.workers == 0 for resources in asked.values())
    if not stages or (address is None and here):
        yield
        return
    from selfsup_ray.cluster.session import require_resources, session

    with session(address):
        for stage in asked.keys() - UP_TO:
            require_resources(asked[stage], stage=stage)
        yield


def _run_tracked(stage: str, experiment: Experiment, parent: Tracker) -> None:
    with _open_stage(stage, experiment, parent) as tracker:
        run_stage(stage, experiment, experiment.folder, tracker)


def _open_stage(stage: str, experiment: Experiment, parent: Tracker) -> Tracker:
    folder, name = experiment.folder(stage), f"{experiment.out.name}/{stage}"
    params, tracking = getattr(experiment, stage), experiment.tracking
    return open_run(folder, tracking, name=name, params=params, parent=parent)


def _catch_up(experiment: Experiment, parent: Tracker) -> None:
    """Send what an MLflow lacks that was away while a stage ended, if it is back."""
    for stage in _unrecorded(experiment):
        _open_stage(stage, experiment, parent).finish()
        if stage in _unrecorded(experiment):  # still away: not a wait for every stage
            return


def _unrecorded(experiment: Experiment) -> tuple[str, ...]:
    """Return the finished stages that MLflow lacks in part or believes to be still at work."""
    folders = {stage: experiment.folder(stage) for stage in experiment.stages}
    return tuple(
        stage
        for stage, folder in folders.items()
        if (folder / "done.json").exists() and not is_recorded(folder)
    )
