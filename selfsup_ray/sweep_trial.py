"""One trial of a sweep: its stages in folders that equal trials share, and its numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from selfsup_ray.artifacts import fingerprint, read_done
from selfsup_ray.cluster.asha import Climb, Curve, Halving
from selfsup_ray.cluster.tune import Changes, Tell
from selfsup_ray.cluster.turns import in_turn
from selfsup_ray.config import flatten, override
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.errors import ConfigError
from selfsup_ray.experiment import Experiment
from selfsup_ray.models.encoder import Encoder
from selfsup_ray.ops.metrics import effective_rank
from selfsup_ray.ops.rng import permuted
from selfsup_ray.steps import run_stage
from selfsup_ray.storage import AppendedFile
from selfsup_ray.sweep_config import AshaConfig, SweepConfig
from selfsup_ray.tracking import Tracker, read_records
from selfsup_ray.training import TrainConfig

RANKME_SAMPLE = 2000
"""Images whose embeddings are compared when the metric is `rankme`."""

Folders = Mapping[str, Path]
"""Stage name -> the folder with its result."""
Score = Callable[[Experiment, Folders], Mapping[str, float]]
"""A user's own numbers of a finished trial, read from the folders of its stages."""


def in_process(experiment: Experiment, made: SweepConfig) -> Experiment:
    """Return the experiment as a trial runs it: up to `until`, all in the trial's process.

    A stage that works on CPUs alone is given none of the trial's GPUs.
    """
    stages = experiment.stages
    kept = stages[: stages.index(made.until) + 1]
    changes: dict[str, Any] = {stage: None for stage in stages if stage not in kept}
    for stage in kept:
        ask = {"workers": 0, "cpus": made.cpus, "gpus": made.gpus}
        if made.gpus and not _takes(experiment, stage, ask):
            ask["gpus"] = 0
        changes[f"{stage}.resources"] = ask
    return override(experiment, changes)


def _takes(experiment: Experiment, stage: str, ask: Mapping[str, Any]) -> bool:
    """Return whether the config of a stage allows these resources."""
    try:
        override(experiment, {f"{stage}.resources": ask})
    except ConfigError:
        return False
    return True


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


def shared_stages(experiment: Experiment, space: Iterable[str]) -> tuple[str, ...]:
    """Return the stages that are the same in all trials: no key touches them or their inputs."""
    touched = {key.split(".")[0] for key in space}
    for stage in experiment.stages:
        if touched & set(experiment.inputs(stage)):
            touched.add(stage)
    return tuple(stage for stage in experiment.stages if stage not in touched)


def run_trial(
    changes: Changes,
    tell: Tell,
    *,
    experiment: Experiment,
    made: SweepConfig,
    score: Score | None = None,
) -> dict[str, float]:
    """Run the stages of one trial that no other trial has run, and return its numbers.

    Two trials that need the same unfinished stage meet at a lock; the second finds it finished.
    Raises ConfigError when no stage of the trial has the metric.
    """
    trial, metric = override(experiment, made.applied(changes)), made.metric
    folders = addresses(trial, made.out)
    for stage in trial.stages:
        watched = made.asha is not None and made.asha.stage == stage
        build_stage(stage, trial, folders, made.asha if watched else None, tell)
    found = numbers(folders)
    if metric == "rankme":
        found["rankme"] = rankme(*_inputs_of_rankme(trial, folders))
    if score is not None:
        found |= {name: float(value) for name, value in score(trial, folders).items()}
    matching = [key for key in found if f".{key}".endswith(f".{metric}")]
    if not matching:
        raise ConfigError(
            f"No stage up to {trial.stages[-1]} has the number metric={metric}. There are: "
            f"rankme, {', '.join(sorted(found))}."
        )
    return found | {metric: found[matching[-1]]}


def build_stage(
    stage: str,
    trial: Experiment,
    folders: Folders,
    asha: AshaConfig | None = None,
    tell: Tell | None = None,
) -> None:
    """Run one stage unless its folder is finished; with `asha`, tell of its training's records.

    Each start leaves a line in the file `.starts` beside the folder.
    """
    folder = folders[stage]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with in_turn(folder):
        if not (folder / "done.json").exists():
            starts = AppendedFile(starts_file(folder))
            starts.append(f"{stage}\n")
            starts.publish()
        folder.mkdir(exist_ok=True)
        tracker = Tracker(folder, None)  # metrics.jsonl: trials do not call MLflow
        if asha is not None and tell is not None:
            tracker = Watched(folder, asha, getattr(trial, stage).epochs, tell)
        run_stage(stage, trial, lambda name: folders[name], tracker)


def starts_file(folder: Path) -> Path:
    """Return the file that has a line for every start of the stage in `folder`."""
    return folder.with_name(f"{folder.name}.starts")


class Watched(Tracker):
    """A stage's records, told to the search at the rungs; those of an earlier start come first."""

    def __init__(self, folder: Path, asha: AshaConfig, epochs: float, tell: Tell) -> None:
        super().__init__(folder, None)
        self.asha, self.tell = asha, tell
        self.climb = Climb(rungs(asha, epochs), epochs=epochs)
        self._show(read_records(self.path))

    def log(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add records, and tell of the first at or after each rung."""
        kept = list(records)
        super().log(kept)
        self._show(kept)

    def _show(self, records: Iterable[Mapping[str, Any]]) -> None:
        for epoch, value in _due(records, self.climb, self.asha):
            self.tell(epoch, value)


def rungs(asha: AshaConfig, epochs: float) -> tuple[float, ...]:
    """Return the epochs at which trials are compared, all below `epochs`."""
    found, at = [], asha.grace
    while at < epochs:
        found.append(at)
        at *= asha.factor
    return tuple(found)


def _due(records: Iterable[Mapping[str, Any]], climb: Climb, asha: AshaConfig) -> Iterable[Any]:
    for record in records:
        if "epoch" not in record:
            if any(key.endswith(".epoch") for key in record):
                raise ConfigError(
                    f"asha.metric={asha.metric}: {asha.stage} trains one layer after the other, "
                    f"so no one curve says how good a trial is; leave asha out."
                )
            continue  # facts that a stage logs at its end
        if asha.name not in record:
            has = sorted(key for key in record if key not in ("step", "time", "epoch"))
            raise ConfigError(
                f"asha.metric={asha.metric} is not in the records of {asha.stage}, which have "
                f"{', '.join(has)}; name one of these."
            )
        if climb.is_due(record["epoch"]):
            yield float(record["epoch"]), float(record[asha.name])


def reached(changes: Mapping[str, Any], *, experiment: Experiment, made: SweepConfig) -> Curve:
    """Return what a trial has told the search, found again from its records."""
    asha = made.asha
    assert asha is not None
    trial = override(experiment, made.applied(changes))
    folder, epochs = addresses(trial, made.out)[asha.stage], getattr(trial, asha.stage).epochs
    climb = Climb(rungs(asha, epochs), epochs=epochs)
    return list(_due(read_records(folder / "metrics.jsonl"), climb, asha))


def halving(experiment: Experiment, made: SweepConfig) -> Halving | None:
    """Return how trials that fall behind end; None when the sweep does not ask for it.

    experiment: as a trial runs it. Raises ConfigError when the stage logs nothing while it
    works, is the same in all trials, or is over before the first rung.
    """
    asha = made.asha
    if asha is None:
        return None
    trained = [s for s in experiment.stages if isinstance(getattr(experiment, s), TrainConfig)]
    if asha.stage not in trained:
        raise ConfigError(
            f"asha.metric={asha.metric}: trials cannot be ended in {asha.stage}, which logs no "
            f"records by epoch or is not run. Stages up to {made.until} that train: "
            f"{', '.join(trained) or 'none; leave asha out'}."
        )
    common = shared_stages(experiment, made.varied)
    if asha.stage in common:
        rest = ", ".join(s for s in trained if s not in common) or "none; leave asha out"
        raise ConfigError(
            f"asha.metric={asha.metric} is the same in all trials, since no key of `space` touches "
            f"{asha.stage}. Trained in each trial: {rest}."
        )
    epochs = _most_epochs(experiment, made, f"{asha.stage}.epochs")
    if not rungs(asha, epochs):
        raise ConfigError(
            f"asha.grace={asha.grace:g} is no less than {asha.stage}.epochs={epochs:g}, so no "
            f"trial could be ended early; lower it."
        )
    again = dataclasses.replace(made, out=made.out.absolute())
    return Halving(
        mode=asha.mode,
        factor=asha.factor,
        rungs=rungs(asha, epochs),
        reached=partial(reached, experiment=experiment, made=again),
    )


def _most_epochs(experiment: Experiment, made: SweepConfig, key: str) -> float:
    """Return the most epochs that a trial trains the stage of `key`."""
    stage = key.split(".")[0]
    every = [getattr(experiment, stage).epochs, *(rule.set.get(key, 0) for rule in made.also)]
    if key in made.space:
        every += made.space[key].ends
    return float(max(every))


def _inputs_of_rankme(trial: Experiment, folders: Folders) -> tuple[Corpus, Encoder]:
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


def numbers(folders: Folders) -> dict[str, float]:
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
