"""sweep: trials of one experiment on Ray Tune, sharing every stage they have in common."""

from __future__ import annotations

import csv
import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from selfsup_ray.artifacts import begin, finish, read_done, whole_file, write_text
from selfsup_ray.cluster.session import require_resources, session
from selfsup_ray.cluster.tune import Search, Trial, search
from selfsup_ray.cluster.turns import open_turns
from selfsup_ray.config import Resources, build, changed, load, override, read_yaml, to_dict
from selfsup_ray.errors import ConfigError
from selfsup_ray.experiment import Experiment, require_stages, seeded
from selfsup_ray.planning_text import drawn
from selfsup_ray.progress import clock
from selfsup_ray.report_sweep import StageCost, write_sweep_report
from selfsup_ray.sweep_config import SweepConfig
from selfsup_ray.sweep_trial import (
    Score,
    addresses,
    build_stage,
    halving,
    in_process,
    run_trial,
    shared_stages,
    starts_file,
)
from selfsup_ray.tracking import Status, Tracker, open_run, read_records

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """All trials of a finished sweep, best first; failed ones last."""

    out: Path
    metric: str
    trials: tuple[Trial, ...]

    def text(self) -> str:
        """Return the trials as a table, and where the files are."""
        keys = list(self.trials[0].changes)
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("trial", *keys, self.metric, "time"):
            table.add_column(name, justify="left" if name == "trial" else "right")
        for trial in self.trials:
            values = [_short(trial.changes[key]) for key in keys]
            result = outcome(trial, self.metric)
            table.add_row(trial.id, *values, result, clock(trial.seconds))
        named = {"table": "trials.csv", "best": "best.yaml", "report": "report.html"}
        files = [f"{what:6} {self.out / name}" for what, name in named.items()]
        return "\n".join([drawn(table), "", *files])


def sweep(
    what: Path | SweepConfig,
    changes: Mapping[str, Any] | None = None,
    *,
    address: str | None = None,
    score: Score | None = None,
) -> Summary:
    """Run the trials of a sweep that have not finished and return all, best first.

    what: a sweep's file, or its config made in Python. changes: dotted keys; those of stages are
    the experiment's, the others the sweep's own. score: further numbers of a trial, one of which
    `metric` may name; give `out` another name when the function changes, since it travels to the
    trials but is not part of the config. The same call continues a sweep that was killed. Raises
    UserError for a mistake in either config, or a value of the space that the experiment refuses,
    before anything is spent.
    """
    made, experiment = prepared(what, changes or {})
    trial = in_process(experiment, made)
    inputs = {stage: folder.name for stage, folder in addresses(trial, made.out).items()}
    if begin(made.out, stage="sweep", config=made, inputs=inputs):
        log.info("sweep: %s is current", made.out)
        return Summary(made.out, made.metric, _stored(made.out))
    began, name = time.monotonic(), made.out.name
    with session(address), open_run(made.out, made.tracking, name=name, params=made) as parent:
        require_resources(_of_a_trial(made), stage="sweep")
        turns = open_turns(made.out)
        _build_shared(experiment, trial, made)
        summary = Summary(made.out, made.metric, _ranked(_searched(trial, made, score), made))
        _write(summary, experiment, made)
        page = write_sweep_report(
            made.out,
            summary.trials,
            metric=made.metric,
            mode=made.mode,
            published=made.published,
            costs=costs(trial, made, summary.trials),
        )
        for stage in shared_stages(trial, made.varied):
            _attach(parent, addresses(trial, made.out)[stage])
        parent.artifact(made.out / "trials.csv")
        parent.artifact(made.out / "best.yaml")
        parent.artifact(page)
        del turns  # held so far
    facts = {"trials": [dataclasses.asdict(one) for one in summary.trials]}
    seconds = time.monotonic() - began
    finish(made.out, stage="sweep", config=made, inputs=inputs, seconds=seconds, facts=facts)
    return summary


def prepared(
    what: Path | SweepConfig, changes: Mapping[str, Any]
) -> tuple[SweepConfig, Experiment]:
    """Return a sweep and its experiment, checked at every choice and bound of the space.

    Raises UserError for a mistake in either config or a value that the experiment refuses.
    """
    made = load_sweep(what, changes)
    experiment = seeded(load(Experiment, made.experiment, made.changes))
    require_stages(experiment, [made.until])
    for key, dimension in made.space.items():
        for value in dimension.ends:
            override(experiment, {key: value})
    for rule in made.also:
        override(experiment, {**rule.when, **rule.set})
    halving(in_process(experiment, made), made)
    return made, experiment


def load_sweep(what: Path | SweepConfig, changes: Mapping[str, Any]) -> SweepConfig:
    """Return a sweep's config with changes applied to it or to its experiment.

    A key that both have, such as `out` or `seed`, is the sweep's.
    """
    own = {field.name for field in dataclasses.fields(SweepConfig)}
    theirs = {field.name for field in dataclasses.fields(Experiment)} - own
    for_sweep = {key: v for key, v in changes.items() if key.split(".")[0] not in theirs}
    given = to_dict(what) if isinstance(what, SweepConfig) else _read(what)
    values = changed(given, for_sweep)
    for_experiment = {key: value for key, value in changes.items() if key not in for_sweep}
    if for_experiment:
        values["changes"] = {**(values.get("changes") or {}), **for_experiment}
    try:
        return build(SweepConfig, values)
    except ConfigError as error:
        where = "SweepConfig" if isinstance(what, SweepConfig) else what
        raise ConfigError(f"{where}: {error}") from None


def _read(path: Path) -> dict[str, Any]:
    return {"out": f"runs/sweeps/{path.stem}", **read_yaml(path)}


def _build_shared(experiment: Experiment, trial: Experiment, made: SweepConfig) -> None:
    """Run the stages that all trials share, with the experiment's own workers."""
    folders = addresses(trial, made.out.absolute())
    for stage in shared_stages(trial, made.varied):
        build_stage(stage, experiment, folders)


def _of_a_trial(made: SweepConfig) -> Resources:
    """Return what one trial asks of the cluster."""
    return Resources(workers=1, cpus=made.cpus, gpus=made.gpus)


def _searched(trial: Experiment, made: SweepConfig, score: Score | None) -> list[Trial]:
    out = made.out.absolute()
    how = Search(
        metric=made.metric,
        mode=made.mode,
        algorithm=made.search,
        samples=made.samples,
        seed=made.seed,
        concurrent=made.concurrent,
        halving=halving(trial, made),
    )
    placed = dataclasses.replace(made, out=out)
    return search(
        partial(run_trial, experiment=trial, made=placed, score=score),
        made.space,
        how=how,
        resources=_of_a_trial(made),
        out=out / "tune",
        on_trial=partial(record, experiment=trial, made=made),
    )


def record(trial: Trial, *, experiment: Experiment, made: SweepConfig) -> None:
    """Track one trial that ended as a child of the sweep's run, with the curves it trained.

    All is found again from the folder, so that a sweep restored in another process can call it.
    """
    parent = open_run(made.out, made.tracking, name=made.out.name)
    folder, label = made.out / "trials" / trial.id, f"{made.out.name}/{trial.id}"
    params = to_dict(trial.changes)
    tracker = open_run(folder, made.tracking, name=label, params=params, parent=parent)
    own = override(experiment, made.applied(trial.changes))
    folders = addresses(own, made.out)
    for stage in own.stages:
        if stage in shared_stages(own, made.varied):
            continue
        curve = read_records(folders[stage] / "metrics.jsonl")
        tracker.log([_renamed(values, stage) for values in curve])
        _attach(tracker, folders[stage])
    tracker.log([trial.metrics])
    stages = {stage: str(folder.relative_to(made.out)) for stage, folder in folders.items()}
    text = {
        **{"changes": params, "metrics": trial.metrics, "error": trial.error},
        **{"stopped": trial.stopped, "stages": stages},
    }
    write_text(folder / "trial.yaml", yaml.safe_dump(text, sort_keys=False))
    tracker.artifact(folder / "trial.yaml")
    ended: Status = "FINISHED" if trial.is_complete else "KILLED"
    tracker.finish("FAILED" if trial.error else ended)


def _attach(tracker: Tracker, folder: Path) -> None:
    """Send the pictures of a stage: of dictionaries, covariances, entries that weigh most."""
    for picture in sorted(folder.glob("*.png")):
        tracker.artifact(picture)


def _renamed(values: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """Return one record of a stage's curve under the stage's name; step and time keep theirs."""
    kept = ("step", "time")
    return {key if key in kept else f"{stage}/{key}": item for key, item in values.items()}


def costs(trial: Experiment, made: SweepConfig, trials: Sequence[Trial]) -> list[StageCost]:
    """Return what each stage of a sweep cost, and what it would have cost without sharing."""
    wanted: dict[str, list[Path]] = {}
    for one in trials:
        own = override(trial, made.applied(one.changes))
        for stage, folder in addresses(own, made.out).items():
            wanted.setdefault(stage, []).append(folder)
    found = []
    for stage, folders in wanted.items():
        done = [f for f in dict.fromkeys(folders) if (f / "done.json").exists()]
        seconds = {f: read_done(f).seconds for f in done}
        files = map(starts_file, dict.fromkeys(folders))
        starts = sum(len(f.read_text().splitlines()) for f in files if f.exists())
        alone = sum(seconds.get(f, 0.0) for f in folders)
        found.append(StageCost(stage, len(done), starts, sum(seconds.values()), alone))
    return found


def _ranked(trials: Sequence[Trial], made: SweepConfig) -> tuple[Trial, ...]:
    """Return the trials best first, ties by id; then those ended early, last those that failed.

    Raises ConfigError when no trial ran to its end.
    """
    good = [trial for trial in trials if trial.is_complete]
    if not good:
        reasons = "; ".join(dict.fromkeys(str(trial.error) for trial in trials if trial.error))
        raise ConfigError(f"All {len(trials)} trials failed: {reasons}")
    sign = 1 if made.mode == "min" else -1
    good.sort(key=lambda trial: (sign * trial.metrics[made.metric], trial.id))
    early = [trial for trial in trials if trial.stopped is not None]
    early.sort(key=lambda trial: (-(trial.stopped or 0), trial.id))
    return (*good, *early, *(trial for trial in trials if trial.error is not None))


def _write(summary: Summary, experiment: Experiment, made: SweepConfig) -> None:
    """Write trials.csv, and best.yaml: the experiment of the best trial, ready for `run`."""
    keys = list(summary.trials[0].changes)
    with whole_file(summary.out / "trials.csv") as path, open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["trial", *keys, summary.metric, "seconds", "stopped_epoch", "error"])
        for trial in summary.trials:
            values = [trial.changes[key] for key in keys]
            number = trial.metrics.get(summary.metric, "")
            stopped = "" if trial.stopped is None else trial.stopped
            spent = round(trial.seconds, 2)
            rows.writerow([trial.id, *values, number, spent, stopped, trial.error or ""])
    changes = made.applied(summary.trials[0].changes) | {"out": str(summary.out / "best")}
    best = override(experiment, changes)
    text = yaml.safe_dump(to_dict(best), sort_keys=False)
    write_text(summary.out / "best.yaml", text)


def _stored(out: Path) -> tuple[Trial, ...]:
    return tuple(Trial(**values) for values in read_done(out).facts["trials"])


def outcome(trial: Trial, metric: str) -> str:
    """Return a trial's number, the epoch where it was ended, or the error it failed with."""
    if trial.error is not None:
        return trial.error
    if trial.stopped is not None:
        return f"stopped, epoch {trial.stopped:.3g}"
    return _short(trial.metrics[metric])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
