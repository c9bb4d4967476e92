"""sweep: trials of one experiment on Ray Tune, sharing every stage they have in common."""

from __future__ import annotations

import csv
import dataclasses
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from filelock import FileLock
from rich.table import Table

from selfsup_ray.artifacts import begin, fingerprint, finish, read_done, whole_file, write_text
from selfsup_ray.cluster.session import session
from selfsup_ray.cluster.tune import Changes, Search, Trial, search
from selfsup_ray.config import (
    Resources,
    build,
    changed,
    flatten,
    load,
    override,
    read_yaml,
    to_dict,
)
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.errors import ConfigError
from selfsup_ray.experiment import Experiment, require_stages, seeded
from selfsup_ray.models.encoder import Encoder
from selfsup_ray.ops.metrics import effective_rank
from selfsup_ray.ops.rng import permuted
from selfsup_ray.planning import drawn
from selfsup_ray.progress import clock
from selfsup_ray.report_sweep import write_sweep_report
from selfsup_ray.steps import run_stage
from selfsup_ray.sweep_config import SweepConfig
from selfsup_ray.tracking import open_run, read_records

log = logging.getLogger(__name__)

RANKME_SAMPLE = 2000
"""Images whose embeddings are compared when the metric is `rankme`."""


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
            result = trial.error or _short(trial.metrics[self.metric])
            table.add_row(trial.id, *values, result, clock(trial.seconds))
        named = {"table": "trials.csv", "best": "best.yaml", "report": "report.html"}
        files = [f"{what:6} {self.out / name}" for what, name in named.items()]
        return "\n".join([drawn(table), "", *files])


def sweep(
    path: Path, changes: Mapping[str, Any] | None = None, *, address: str | None = None
) -> Summary:
    """Run the trials of a sweep file that have not finished and return all, best first.

    changes: dotted keys; those of stages are the experiment's, the others the sweep's own. The
    same call continues a sweep that was killed. Raises UserError for a mistake in either file,
    or a value of the space that the experiment refuses, before anything is spent.
    """
    made, experiment = prepared(path, changes or {})
    trial = in_process(experiment, made)
    inputs = {stage: folder.name for stage, folder in addresses(trial, made.out).items()}
    if begin(made.out, stage="sweep", config=made, inputs=inputs):
        log.info("sweep: %s is current", made.out)
        return Summary(made.out, made.metric, _stored(made.out))
    began, name = time.monotonic(), made.out.name
    with session(address), open_run(made.out, made.tracking, name=name, params=made) as parent:
        _build_shared(experiment, trial, made)
        summary = Summary(made.out, made.metric, _ranked(_searched(trial, made), made))
        _write(summary, experiment, made)
        page = write_sweep_report(
            made.out, summary.trials, metric=made.metric, published=made.published
        )
        parent.artifact(made.out / "trials.csv")
        parent.artifact(made.out / "best.yaml")
        parent.artifact(page)
    facts = {"trials": [dataclasses.asdict(one) for one in summary.trials]}
    seconds = time.monotonic() - began
    finish(made.out, stage="sweep", config=made, inputs=inputs, seconds=seconds, facts=facts)
    return summary


def prepared(path: Path, changes: Mapping[str, Any]) -> tuple[SweepConfig, Experiment]:
    """Return a sweep and its experiment, checked at every choice and bound of the space.

    Raises UserError for a mistake in either file or a value that the experiment refuses.
    """
    made = load_sweep(path, changes)
    experiment = seeded(load(Experiment, made.experiment, made.changes))
    require_stages(experiment, [made.until])
    for key, dimension in made.space.items():
        for value in dimension.ends:
            override(experiment, {key: value})
    for rule in made.also:
        override(experiment, {**rule.when, **rule.set})
    return made, experiment


def load_sweep(path: Path, changes: Mapping[str, Any]) -> SweepConfig:
    """Return a sweep file's config with changes applied to it or to its experiment.

    A key that both have, such as `out` or `seed`, is the sweep's.
    """
    own = {field.name for field in dataclasses.fields(SweepConfig)}
    theirs = {field.name for field in dataclasses.fields(Experiment)} - own
    for_sweep = {key: v for key, v in changes.items() if key.split(".")[0] not in theirs}
    values = changed({"out": f"runs/sweeps/{path.stem}", **read_yaml(path)}, for_sweep)
    for_experiment = {key: value for key, value in changes.items() if key not in for_sweep}
    if for_experiment:
        values["changes"] = {**(values.get("changes") or {}), **for_experiment}
    try:
        return build(SweepConfig, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def in_process(experiment: Experiment, made: SweepConfig) -> Experiment:
    """Return the experiment as a trial runs it: up to `until`, all in the trial's process."""
    stages = experiment.stages
    kept = stages[: stages.index(made.until) + 1]
    ask = {"workers": 0, "cpus": made.cpus, "gpus": made.gpus}
    changes: dict[str, Any] = {f"{stage}.resources": ask for stage in kept}
    changes |= {stage: None for stage in stages if stage not in kept}
    return override(experiment, changes)


def addresses(experiment: Experiment, out: Path) -> dict[str, Path]:
    """Return the folder of each stage, named by what decides its result: equal means shared.

    The name holds the fingerprint of the stage's config and of its inputs' names.
    """
    folders: dict[str, Path] = {}
    for stage in experiment.stages:
        inputs = {name: folders[name].name for name in experiment.inputs(stage)}
        digest = fingerprint(getattr(experiment, stage), inputs)
        folders[stage] = out / "stages" / f"{stage}-{digest[:16]}"
    return folders


def run_trial(changes: Changes, *, experiment: Experiment, made: SweepConfig) -> dict[str, float]:
    """Run the stages of one trial that no other trial has run, and return its numbers.

    Two trials that need the same unfinished stage meet at a lock; the second finds it finished.
    Raises ConfigError when no stage of the trial has the metric.
    """
    trial, metric = override(experiment, made.applied(changes)), made.metric
    folders = addresses(trial, made.out)
    for stage in trial.stages:
        _build(stage, trial, folders)
    found = numbers({stage: folders[stage] for stage in trial.stages})
    if metric == "rankme":
        found["rankme"] = rankme(*_inputs_of_rankme(trial, folders))
    matching = [key for key in found if f".{key}".endswith(f".{metric}")]
    if not matching:
        raise ConfigError(
            f"No stage up to {trial.stages[-1]} has the number metric={metric}. There are: "
            f"rankme, {', '.join(sorted(found))}."
        )
    return found | {metric: found[matching[-1]]}


def _inputs_of_rankme(trial: Experiment, folders: Mapping[str, Path]) -> tuple[Corpus, Encoder]:
    if trial.encoder is None:
        raise ConfigError("metric=rankme is of an encoder: add the stage pretext or patches.")
    return Corpus.open(folders["ingest"]), Encoder.open(folders[trial.encoder])


def rankme(corpus: Corpus, encoder: Encoder) -> float:
    """Return the effective rank of the embeddings of at most 2,000 images (RankMe: Garrido 2023).

    It needs no labels; between 1 and the dimension, and higher is better for the same images.
    """
    n = len(corpus)
    ids = np.sort(permuted(np.arange(min(n, RANKME_SAMPLE)), n=n, seed=0, epoch=0))
    return effective_rank(encoder.embed(corpus.images(ids)))


def _build(stage: str, trial: Experiment, folders: Mapping[str, Path]) -> None:
    folder = folders[stage]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        tracker = open_run(folder, None, name=stage)  # metrics.jsonl: trials do not call MLflow
        run_stage(stage, trial, lambda name: folders[name], tracker)


def numbers(folders: Mapping[str, Path]) -> dict[str, float]:
    """Return the last value of every number that stages logged or stamped, as `stage.name`."""
    found: dict[str, float] = {}
    for stage, folder in folders.items():
        records = read_records(folder / "metrics.jsonl")
        for values in (*records, flatten(read_done(folder).facts)):
            for name, value in values.items():
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                if is_number and name not in ("step", "time"):
                    found[f"{stage}.{name}"] = float(value)
    return found


def shared_stages(experiment: Experiment, space: Iterable[str]) -> tuple[str, ...]:
    """Return the stages that are the same in all trials: no key touches them or their inputs."""
    touched = {key.split(".")[0] for key in space}
    for stage in experiment.stages:
        if touched & set(experiment.inputs(stage)):
            touched.add(stage)
    return tuple(stage for stage in experiment.stages if stage not in touched)


def _build_shared(experiment: Experiment, trial: Experiment, made: SweepConfig) -> None:
    """Run the stages that all trials share, with the experiment's own workers."""
    folders = addresses(trial, made.out.absolute())
    for stage in shared_stages(trial, made.varied):
        _build(stage, experiment, folders)


def _searched(trial: Experiment, made: SweepConfig) -> list[Trial]:
    out = made.out.absolute()
    how = Search(
        metric=made.metric,
        mode=made.mode,
        algorithm=made.search,
        samples=made.samples,
        seed=made.seed,
        concurrent=made.concurrent,
    )
    return search(
        partial(run_trial, experiment=trial, made=dataclasses.replace(made, out=out)),
        made.space,
        how=how,
        resources=Resources(workers=1, cpus=made.cpus, gpus=made.gpus),
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
    tracker.log([trial.metrics])
    stages = {stage: str(folder.relative_to(made.out)) for stage, folder in folders.items()}
    text = {"changes": params, "metrics": trial.metrics, "error": trial.error, "stages": stages}
    write_text(folder / "trial.yaml", yaml.safe_dump(text, sort_keys=False))
    tracker.artifact(folder / "trial.yaml")
    tracker.finish("FAILED" if trial.error else "FINISHED")


def _renamed(values: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """Return one record of a stage's curve under the stage's name; step and time keep theirs."""
    kept = ("step", "time")
    return {key if key in kept else f"{stage}/{key}": item for key, item in values.items()}


def _ranked(trials: Sequence[Trial], made: SweepConfig) -> tuple[Trial, ...]:
    """Return the trials best first, ties by id, failed ones last.

    Raises ConfigError when every trial failed, or none has the metric.
    """
    good = [trial for trial in trials if trial.error is None]
    if not good:
        reasons = "; ".join(dict.fromkeys(str(trial.error) for trial in trials))
        raise ConfigError(f"All {len(trials)} trials failed: {reasons}")
    sign = 1 if made.mode == "min" else -1
    good.sort(key=lambda trial: (sign * trial.metrics[made.metric], trial.id))
    return (*good, *(trial for trial in trials if trial.error is not None))


def _write(summary: Summary, experiment: Experiment, made: SweepConfig) -> None:
    """Write trials.csv, and best.yaml: the experiment of the best trial, ready for `run`."""
    keys = list(summary.trials[0].changes)
    with whole_file(summary.out / "trials.csv") as path, open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["trial", *keys, summary.metric, "seconds", "error"])
        for trial in summary.trials:
            values = [trial.changes[key] for key in keys]
            number = trial.metrics.get(summary.metric, "")
            rows.writerow([trial.id, *values, number, round(trial.seconds, 2), trial.error or ""])
    changes = made.applied(summary.trials[0].changes) | {"out": str(summary.out / "best")}
    best = override(experiment, changes)
    text = yaml.safe_dump(to_dict(best), sort_keys=False)
    write_text(summary.out / "best.yaml", text)


def _stored(out: Path) -> tuple[Trial, ...]:
    return tuple(Trial(**values) for values in read_done(out).facts["trials"])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
