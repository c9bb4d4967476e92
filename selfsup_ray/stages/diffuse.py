"""The stage `diffuse`: a few labels spread over the kNN graph to all images (Douze et al. 2018)."""

from __future__ import annotations

import hashlib
import logging
import time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from selfsup_ray.artifacts import (
    Array,
    ShardedArray,
    begin,
    finish,
    read_done,
    require_disk,
    write_json,
)
from selfsup_ray.config import (
    NonNegative,
    Positive,
    PositiveFloat,
    Resources,
    config,
)
from selfsup_ray.errors import ArtifactError, ConfigError
from selfsup_ray.ops.diffusion import DiffusionOptions
from selfsup_ray.stages.diffuse_blocks import block_results
from selfsup_ray.stages.diffuse_results import Job, Results, Stop, save, step_folder, write_results
from selfsup_ray.stages.diffuse_rows import row_results
from selfsup_ray.stages.graph import Graph, Labels, label_array
from selfsup_ray.storage import located, remove_tree

if TYPE_CHECKING:
    from selfsup_ray.tracking import Tracker

log = logging.getLogger(__name__)


@config
class OperatorConfig:
    """Variants of the diffusion operator; the defaults are the published method."""

    weights: Literal["constant", "gaussian"] = "constant"
    """A link weighs 1, or `gaussian`: exp(-|x - y|^2 / (2 sigma^2)); held in memory whole."""
    sigma: PositiveFloat = 0.5
    """Of gaussian weights, in units of the distance between unit rows."""
    reciprocal: bool = False
    """Keep only the links that both images list."""
    tau: PositiveFloat = 1.0
    """Power of the weights of A + A^T."""
    sinkhorn: NonNegative = 0
    """Times that rows and columns are normalised in turn after a step; 0 is columns alone."""
    reset_seeds: bool = False
    """Make labelled images one-hot again after each product."""
    normalize_columns: bool = True
    """Give every class the same mass after each step."""
    min_similarity: float | None = None
    """Leave out links that are less similar."""

    @property
    def options(self) -> DiffusionOptions:
        """The same as plain numbers."""
        return DiffusionOptions(**{name: getattr(self, name) for name in _OPTIONS})


_OPTIONS = (
    "weights",
    "sigma",
    "reciprocal",
    "tau",
    "sinkhorn",
    "reset_seeds",
    "normalize_columns",
    "min_similarity",
)


@config
class StopConfig:
    """When to stop before `niter` steps; the result is the best step."""

    patience: Positive
    """Steps without improvement after which it stops."""
    by: Literal["certainty", "accuracy"] = "certainty"
    """`certainty` needs no labels: the mean over sampled images of 1 - entropy / log C, 0 where no
    label arrived; it rises as labels spread and falls as they wash out. `accuracy` is that on half
    of the hidden labels of `labels_per_class`; the other half is what is reported."""


@config
class DiffuseConfig:
    """How labels spread."""

    niter: NonNegative = 3
    """Steps; more as there are fewer labels and more images (published: 1 to 7)."""
    stop: StopConfig | None = None
    """Stop earlier, at the best step. With several blocks of classes all steps are made first."""
    keep_steps: Literal["last", "all"] | tuple[NonNegative, ...] = "last"
    """Steps whose classes and scores are kept too, in `steps/`, of those that were made."""
    labels_per_class: Positive | None = None
    """Hide all labels but so many of each class, to measure low-shot accuracy on the rest."""
    top: Positive = 5
    """Classes whose scores are kept for every image."""
    full_scores: bool = False
    """Also keep the (N, C) scores of all classes, float32."""
    mode: Literal["classes", "rows"] = "classes"
    """What workers share: `classes`, each with the whole graph and nothing to exchange, or `rows`
    of a graph that no node can hold."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """How labels are stored between steps; sums are float32 and float64 either way. `bfloat16`
    takes half the memory; scores are off by up to 0.5 % of the class's largest."""
    operator: OperatorConfig = OperatorConfig()
    sample: Positive = 10_000
    """Images that entropy and coverage of every step are measured on."""
    memory_gb: PositiveFloat = 4.0
    """Of a worker, for the labels of its block; the graph, 4 bytes a link, comes on top once."""
    seed: NonNegative = 0
    """Chooses the labels that are kept and the sample."""
    resources: Resources = Resources(workers=0)
    """`workers` Ray tasks take blocks in turn; 0 works in this process, on `cpus` threads. With
    `gpus` the steps run on a GPU by torch."""

    def __post_init__(self) -> None:
        options = self.operator.options
        if self.mode == "rows" and options != DiffusionOptions(
            reciprocal=options.reciprocal, min_similarity=options.min_similarity
        ):
            raise ValueError(
                "`mode` is rows, which knows of `operator` only reciprocal and min_similarity; "
                "use mode=classes for the others"
            )
        if isinstance(self.keep_steps, tuple) and max(self.keep_steps, default=0) > self.niter:
            raise ValueError(
                f"`keep_steps` has {max(self.keep_steps)}, beyond the last step, "
                f"`niter`={self.niter}; raise that"
            )
        if self.stop and self.stop.by == "accuracy" and self.labels_per_class is None:
            raise ValueError(
                "`stop.by` is accuracy, which needs hidden labels; set `labels_per_class`, or "
                "stop.by=certainty"
            )
        if self.dtype == "bfloat16" and not options.is_constant:
            raise ValueError(
                "`dtype` is bfloat16, which needs constant `operator.weights` and "
                "`operator.tau`=1; use dtype=float32"
            )
        if self.mode == "rows" and self.resources.gpus:
            raise ValueError("`mode` is rows, which runs on CPUs; set `resources.gpus` to 0")

    @property
    def kept(self) -> tuple[int, ...]:
        """Steps whose scores `keep_steps` asks for."""
        if isinstance(self.keep_steps, tuple):
            return tuple(sorted(set(self.keep_steps)))
        return tuple(range(self.niter + 1)) if self.keep_steps == "all" else ()

    @property
    def num_held(self) -> int:
        """Steps beside the result whose scores are on disk at a time, at most."""
        return self.niter + 1 if self.stop else len(self.kept)


class Diffusion:
    """Handle on a finished diffusion: the best classes of every image and their scores."""

    def __init__(self, path: Path) -> None:
        self.path = located(path)
        self.predictions = ShardedArray.open(self.path / "predictions")
        self.classes = ShardedArray.open(self.path / "classes")
        self.scores = ShardedArray.open(self.path / "scores")

    @classmethod
    def open(cls, path: Path | str) -> Diffusion:
        """Return the finished diffusion in a folder.

        Raises ArtifactError when the stage has not finished there.
        """
        read_done(located(path))
        return cls(located(path))

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the stage measured: accuracy of every step where labels are known, and more."""
        return read_done(self.path).facts

    @property
    def fingerprint(self) -> str:
        """Hash of the config and the inputs."""
        return read_done(self.path).fingerprint

    @property
    def accuracy(self) -> float | None:
        """Share of known images that were no seeds with the right prediction; None without any."""
        value = self.facts.get("accuracy")
        return None if value is None else float(value)

    def step(self, t: int) -> Diffusion:
        """Return classes and scores of a step that `keep_steps` kept.

        Raises ArtifactError when it did not.
        """
        folder = step_folder(self.path, t)
        if not folder.exists():
            raise ArtifactError(
                f"{self.path} has not kept step {t}. Diffuse again into another folder with "
                f"diffuse.keep_steps=[{t}], or all; of a run that stopped earlier there is none."
            )
        return Diffusion(folder)

    @property
    def all_scores(self) -> ShardedArray | None:
        """(N, C) float32 scores of all classes, where `full_scores` was set."""
        path = self.path / "all_scores"
        return ShardedArray.open(path) if path.exists() else None


def diffuse(
    graph: Graph,
    labels: Labels,
    config: DiffuseConfig | None = None,
    *,
    out: Path | str,
    tracker: Tracker | None = None,
) -> Diffusion:
    """Spread the labels of some images over the graph; return the handle on the scores.

    labels: (N,) class or -1 = unknown; all that are known are seeds, or `labels_per_class` of each
    class, and then the others measure the accuracy of every step, and nothing else. Results do not
    depend on workers, threads, or interruptions. Raises ConfigError when no image has a label.
    """
    config, out, began = config or DiffuseConfig(), located(out), time.monotonic()
    known = label_array(labels)
    _require_labels(known, len(graph))
    inputs = {"graph": graph.fingerprint, "labels": hashlib.sha256(known.tobytes()).hexdigest()}
    if begin(out, stage="diffuse", config=config, inputs=inputs):
        log.info("diffuse: %s is current", out)
        return Diffusion.open(out)
    job = _job(graph, known, config, out)
    results = row_results(job) if config.mode == "rows" else block_results(job)
    steps = _step_facts(results, job)
    write_results(results, job)
    write_json(out / "steps.json", steps)
    facts = {
        "images": len(graph),
        "classes": job.num_classes,
        "seeds": int((job.seeds >= 0).sum()),
        "niter": results.chosen(job),
        "steps": steps,
        **_headline(steps[results.chosen(job)]),
    }
    seconds = time.monotonic() - began
    finish(out, stage="diffuse", config=config, inputs=inputs, seconds=seconds, facts=facts)
    remove_tree(out / "parts")
    if tracker is not None:
        tracker.log([{"step": t, **step} for t, step in enumerate(steps)])
    _log_result(facts, seconds)
    return Diffusion.open(out)


def _require_labels(known: Array, n: int) -> None:
    if len(known) != n:
        raise ConfigError(f"diffuse: {len(known):,} labels were given for {n:,} images.")
    if not (known >= 0).any():
        raise ConfigError(
            "diffuse: no image has a label, so there is nothing to spread. Give a few images "
            "labels (-1 for the others), or take the key `diffuse` out."
        )


def _job(graph: Graph, known: Array, config: DiffuseConfig, out: Path) -> Job:
    """Write the seeds and the adjacency, once, and return what the workers need to know."""
    seeds = choose_seeds(known, config.labels_per_class, seed=config.seed)
    num_classes = int(known.max()) + 1
    top = min(config.top, num_classes)
    each = len(graph) * (top * 16 + 4 + 4 * num_classes * 2 * config.full_scores)
    size = each * (1 + config.num_held)
    require_disk(out, size_bytes=size + len(graph) * (graph.k * 7 + 30))
    save(out / "seeds.npy", seeds)
    watched = np.flatnonzero((known >= 0) & (seeds < 0))
    save(out / "watched.npy", watched)
    save(out / "watched_labels.npy", known[watched])
    stop = config.stop
    if stop is not None and stop.by == "accuracy" and len(watched) < 2:
        raise ConfigError(
            f"diffuse: {len(watched)} labels are hidden, too few for diffuse.stop.by=accuracy. "
            f"Lower diffuse.labels_per_class, or set diffuse.stop.by=certainty."
        )
    return Job(
        out=out.absolute(),
        graph=graph.path.absolute(),
        num_classes=num_classes,
        niter=config.niter,
        top=top,
        full=config.full_scores,
        dtype=config.dtype,
        options=config.operator.options,
        sample=config.sample,
        seed=config.seed,
        memory_bytes=int(config.memory_gb * 1e9),
        resources=config.resources,
        keep=config.kept,
        stop=None if stop is None else Stop(stop.by, stop.patience),
    )


def choose_seeds(known: Array, per_class: int | None, *, seed: int) -> Array:
    """Return (N,) int32 labels of the seeds, -1 elsewhere: so many of each class, or all.

    A class with fewer labels keeps them all. The choice is a function of seed, class and the
    images of the class alone.
    """
    seeds = known.astype(np.int32)
    if per_class is None:
        return seeds
    for label in np.unique(known[known >= 0]):
        images = np.flatnonzero(known == label)
        shuffled = np.random.Generator(np.random.Philox(key=[seed, label])).permutation(images)
        seeds[shuffled[per_class:]] = -1
    return seeds


def _step_facts(results: Results, job: Job) -> list[dict[str, Any]]:
    """Return what is known of every step: without labels, and accuracy on watched images."""
    steps = []
    for t in range(len(results.mass)):
        step: dict[str, Any] = results.label_free(t)
        if job.stop is not None and job.stop.by == "certainty":
            step["certainty"] = results.certainty(t, job.num_classes)
        steps.append(step | results.accuracies(t, job.truth, job.stop))
    return steps


def _headline(last: dict[str, Any]) -> dict[str, Any]:
    return {name: last[name] for name in ("accuracy", "coverage", "entropy") if name in last}


def _log_result(facts: dict[str, Any], seconds: float) -> None:
    text = "diffuse: %s labels of %d classes spread over %s images in %d steps, %s, %.1f s"
    accuracy = facts.get("accuracy")
    result = f"{facts['coverage']:.3f} of them reached"
    if accuracy is not None:
        result = f"accuracy {accuracy:.3f} on hidden labels"
    counts = (f"{facts['seeds']:,}", facts["classes"], f"{facts['images']:,}", facts["niter"])
    log.info(text, *counts, result, seconds)
