"""plan: which stages would run and why, and what each costs, before anything is spent."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from selfsup_ray.artifacts import Progress, progress, require_disk
from selfsup_ray.cluster.placement import Cluster, cluster_file, live_cluster
from selfsup_ray.config import Resources, load
from selfsup_ray.costs import cost
from selfsup_ray.costs_counts import Counts, counts
from selfsup_ray.costs_training import Cost
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.sources import Source
from selfsup_ray.errors import ArtifactError, ConfigError
from selfsup_ray.experiment import Experiment, require_stages, seeded
from selfsup_ray.models.encoder import Encoder
from selfsup_ray.ops.patch_sampling import num_positions
from selfsup_ray.planning_cluster import (
    Placed,
    cluster_text,
    counts_table,
    placed,
    prices_of,
    totals_text,
    where_table,
)
from selfsup_ray.planning_text import drawn, size
from selfsup_ray.progress import clock
from selfsup_ray.stages.imported_rows import imported_digest, imported_shape
from selfsup_ray.steps import Folders, open_artifact
from selfsup_ray.storage import size_below

COUNTING_S = 10.0
"""Seconds that counting the images of a source may take."""

UP_TO = {"ingest"}
"""Stages whose `workers` are an upper bound; those of all others must fit at once."""

State = Literal["current", "run", "continue", "left out"]


@dataclass(frozen=True)
class Step:
    """One stage of a plan: what happens to it, why, and what it costs."""

    stage: str
    state: State
    why: str
    resources: Resources
    cost: Cost
    counts: Counts | None = None
    """What it asks of Ray; None where that is not known beforehand, or nothing is to be done."""
    placed: Placed | None = None
    """Where it runs, when a cluster was given."""


@dataclass(frozen=True)
class Plan:
    """What a run would do; `num_images` is None before ingest when the source cannot tell."""

    out: Path
    num_images: int | None
    steps: tuple[Step, ...]
    cluster: Cluster | None = None
    prices: Mapping[str, float] = field(default_factory=dict)
    """Dollars an hour of the cluster's nodes, by type."""

    @property
    def to_run(self) -> tuple[str, ...]:
        """Names of the stages that would run, in order."""
        return tuple(step.stage for step in self.steps if step.state in ("run", "continue"))

    def json(self) -> str:
        """Return the plan as JSON: bytes and seconds, null where unknown."""
        values = asdict(self)
        if self.cluster is not None:
            del values["cluster"]["launched"]  # the user's own file, with whatever is in it
        return json.dumps(values, indent=2, default=str)

    def text(self) -> str:
        """Return the plan as a table, with totals and what the figures assume below it."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("stage", "", "why", "workers", "memory", "disk", "time"):
            figures = name in ("memory", "disk", "time")
            table.add_column(name, justify="right" if figures else "left", overflow="fold")
        for step in self.steps:
            table.add_row(*_row(step))
        images = "unknown" if self.num_images is None else f"{self.num_images:,}"
        lines = [f"{self.out}: {images} images", "", drawn(table), self._totals()]
        notes = [f"  {s.stage}: {s.cost.assumes}" for s in self.steps if s.cost.assumes]
        if notes:
            lines += ["", "The figures assume (memory is a worker's peak):", *notes]
        return "\n".join(lines + self._on_cluster())

    def _on_cluster(self) -> list[str]:
        """Return the lines about the cluster; none without one."""
        rows = {s.stage: (s.placed, s.cost) for s in self.steps if s.placed is not None}
        if self.cluster is None or not rows:
            return []
        found = {s.stage: s.counts for s in self.steps if s.placed is not None}
        warnings = [f"  {text}" for made, _ in rows.values() for text in made.warnings]
        return [
            *("", cluster_text(self.cluster), "", where_table(rows, self.cluster)),
            totals_text(rows, self.cluster, self.prices),
            *(["", "Look at:", *warnings] if warnings else []),
            *("", "What the stages ask of Ray:", counts_table(found)),
        ]

    def _totals(self) -> str:
        left = [step.cost for step in self.steps if step.stage in self.to_run]
        if not left:
            return "Nothing to run."
        seconds = sum(c.seconds or 0 for c in left)
        return (
            f"To run: about {clock(seconds)}, {size(sum(c.disk_bytes or 0 for c in left))} on disk."
        )


def plan(
    path: Path,
    changes: Mapping[str, Any] | None = None,
    *,
    only: Sequence[str] | None = None,
    until: str | None = None,
    cluster: Cluster | None = None,
    prices: Mapping[str, float] | None = None,
) -> Plan:
    """Return what `run` with the same arguments would do; nothing is written or started.

    cluster: where, from `cluster_file` or `live_cluster`; prices: dollars an hour of its node or
    machine types, besides the list prices.
    """
    experiment = seeded(load(Experiment, path, changes))
    return plan_experiment(experiment, only=only, until=until, cluster=cluster, prices=prices)


def plan_experiment(
    experiment: Experiment,
    *,
    only: Sequence[str] | None = None,
    until: str | None = None,
    cluster: Cluster | None = None,
    prices: Mapping[str, float] | None = None,
) -> Plan:
    """Return what running a seeded experiment would do, with the cost of each stage.

    Raises ConfigError for stages it does not have, ArtifactError when a folder was made with
    another config or from another input, or when an input of a selected stage is missing, and
    ResourceError when the cluster can never hold the workers of a stage.
    """
    chosen = selected(experiment, only=only, until=until)
    states = stage_states(experiment, experiment.folder, chosen)
    n = count_images(experiment)
    known = {} if cluster is None else prices_of(cluster, prices or {})
    if n is not None:
        _require_enough(experiment, n)
    steps = [
        _step(experiment, stage, state, why, n, cluster, known)
        if state in ("run", "continue")
        else Step(stage, state, why, getattr(experiment, stage).resources, Cost())
        for stage, (state, why) in states.items()
    ]
    return Plan(experiment.out, n, tuple(steps), cluster, known)


def _step(
    experiment: Experiment,
    stage: str,
    state: State,
    why: str,
    n: int | None,
    cluster: Cluster | None,
    prices: Mapping[str, float],
) -> Step:
    """Return a stage that would run, with its figures."""
    asked: Resources = getattr(experiment, stage).resources
    cpus = None if cluster is None else cluster.slots(asked) * asked.cpus
    made = cost(experiment, stage, n, experiment.folder(stage), cpus=cpus)
    if cluster is None:
        return Step(stage, state, why, asked, made)
    found = counts(experiment, stage, n)
    where = placed(
        stage,
        asked,
        cost=made,
        counts=found,
        cluster=cluster,
        prices=prices,
        at_most=stage in UP_TO,
    )
    return Step(stage, state, why, asked, made, found, where)


def cluster_of(address: str | None, file: Path | None) -> Cluster | None:
    """Return the cluster at an address or in a launcher's file; None when neither is given."""
    if file is not None:
        return cluster_file(file)
    return None if address is None else live_cluster(address)


def checked_prices(given: Mapping[str, Any]) -> dict[str, float]:
    """Return prices as numbers. Raises ConfigError for one that is none."""
    for name, price in given.items():
        if isinstance(price, bool) or not isinstance(price, int | float) or not 0 <= price < 1e6:
            raise ConfigError(
                f"--price {name}={price}: a price is dollars an hour, e.g. {name}=1.61."
            )
    return {name: float(price) for name, price in given.items()}


def selected(
    experiment: Experiment, *, only: Sequence[str] | None, until: str | None
) -> tuple[str, ...]:
    """Return the stages that `--only` and `--until` leave, in order.

    Raises ConfigError naming a stage the experiment does not have.
    """
    require_stages(experiment, [*(only or ()), *([until] if until else ())])
    stages = experiment.stages
    if until is not None:
        stages = stages[: stages.index(until) + 1]
    return stages if only is None else tuple(stage for stage in stages if stage in only)


def stage_states(
    experiment: Experiment, at: Folders, chosen: Sequence[str]
) -> dict[str, tuple[State, str]]:
    """Return state and reason of every stage of an experiment whose stages live at `at`.

    Raises ArtifactError when a folder was made otherwise, or a chosen stage's input is missing.
    """
    states: dict[str, tuple[State, str]] = {}
    for stage in experiment.stages:
        found = progress(at(stage), stage=stage, config=getattr(experiment, stage))
        if stage not in chosen:
            states[stage] = ("left out", f"not asked for; {found.state}")
            continue
        for name in experiment.inputs(stage):
            _require_input(stage, name, states[name], at)
        states[stage] = _state(experiment, stage, at, found, states)
    return states


def _require_input(stage: str, name: str, state: tuple[State, str], at: Folders) -> None:
    if state[0] == "left out" and not (at(name) / "done.json").exists():
        raise ArtifactError(
            f"{stage} reads {at(name)}, which has not finished. Run {name} too: leave out --only, "
            f"or add {name} to it."
        )


def _state(
    experiment: Experiment,
    stage: str,
    at: Folders,
    found: Progress,
    states: Mapping[str, tuple[State, str]],
) -> tuple[State, str]:
    if found.state == "absent":
        return "run", "not made yet"
    if found.state == "unfinished":
        return "continue", "was interrupted"
    inputs = experiment.inputs(stage)
    remade = [name for name in inputs if states[name][0] in ("run", "continue")]
    if remade:
        return "current", f"finished; {remade[0]} is made again and must come out the same"
    known = {open_artifact(at(name)).fingerprint for name in inputs}
    if experiment.encoder in inputs:  # sela's folder holds one beside its clusterer
        known.add(Encoder.open(at(experiment.encoder)).fingerprint)
    if stage == "embed" and experiment.embed is not None and experiment.embed.imported is not None:
        known.add(imported_digest(experiment.embed.imported))
    _require_same_inputs(at(stage), found, known)
    return "current", "finished, same config and inputs"


def _require_same_inputs(folder: Path, found: Progress, known: set[str]) -> None:
    for name, fingerprint in found.inputs.items():
        # `labels` is a digest of the corpus's, which the embeddings' own check covers; `background`
        # is of other runs.
        if name not in ("labels", "background") and fingerprint not in known:
            raise ArtifactError(
                f"{folder} was built from another {name} ({fingerprint[:12]}) than is there now. "
                f"Choose another `out`, or delete the folder to rebuild it."
            )


def count_images(experiment: Experiment) -> int | None:
    """Return how many images the corpus has, or the source lists; None when that takes too long.

    Raises ArtifactError when the source does not exist or holds no image.
    """
    if experiment.embed is not None and experiment.embed.imported is not None:
        return imported_shape(experiment.embed.imported)[0]
    folder, ingest = experiment.folder("ingest"), experiment.ingest
    if (folder / "done.json").exists():
        return len(Corpus.open(folder))
    if ingest is None or ingest.source is None:
        return None
    deadline, count = time.monotonic() + COUNTING_S, 0
    for count, _ in enumerate(Source(ingest.source, ingest.columns).items(), start=1):  # noqa: B007
        if time.monotonic() > deadline:
            return None
    return count


def _require_enough(experiment: Experiment, n: int) -> None:
    """Raise ConfigError when the corpus is too small for what is asked of it."""
    for stage in ("pretext", "sela", "scan", "selflabel", "classify", "linear", "finetune"):
        config = getattr(experiment, stage)
        if config is not None and config.epochs and config.batch_size > n:
            raise ConfigError(
                f"{stage}.batch_size={config.batch_size}, but there are only {n:,} images. "
                f"Lower it to {n} or less."
            )
    _require_patches(experiment, n)
    if experiment.scan is not None and experiment.scan.num_neighbors >= n:
        raise ConfigError(
            f"scan.num_neighbors={experiment.scan.num_neighbors}, but there are only {n:,} images, "
            f"each with {max(n - 1, 0):,} others. Lower it."
        )


def _require_patches(experiment: Experiment, n: int) -> None:
    whiten, ingest = experiment.whiten, experiment.ingest
    if whiten is None or ingest is None or whiten.source != "images":
        return
    side = ingest.image_size
    total = n * num_positions(side, side, patch_size=whiten.patch_size)
    if whiten.patches > total:
        raise ConfigError(
            f"whiten.patches={whiten.patches}, but {n:,} images of {side} x {side} pixels have "
            f"only {total:,} patches. Lower it."
        )


def require_room(plan: Plan) -> None:
    """Raise ArtifactError unless the disk has room for what a plan's stages leave.

    What an interrupted stage has written already is not asked for again.
    """
    asked = {step.stage: step.cost.disk_bytes or 0 for step in plan.steps}
    wanted = sum(max(0, asked[name] - size_below(plan.out / name)) for name in plan.to_run)
    require_disk(plan.out, size_bytes=wanted)


def _row(step: Step) -> tuple[str, ...]:
    ask, made = step.resources, step.cost
    if step.state not in ("run", "continue"):
        return step.stage, step.state, step.why, "", "", "", ""
    each = f"{ask.cpus:g} CPU" + (f" + {ask.gpus:g} GPU" if ask.gpus else "")
    count = f"{ask.workers}" if ask.fewest == ask.workers else f"{ask.fewest} to {ask.workers}"
    workers = "in this process" if ask.workers == 0 else f"{count} x {each}"
    seconds = "" if made.seconds is None else clock(made.seconds)
    figures = (size(made.memory_bytes), size(made.disk_bytes), seconds)
    return step.stage, step.state, step.why, workers, *figures
