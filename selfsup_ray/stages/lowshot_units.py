"""The units of work of the low-shot protocol: one set-up, one n, one seed, each in its own files.

`Explore` measures every hyper-parameter on the validation set-up; `Final` runs the chosen ones.
Both read what the set-up shares from the stage's folder, so that only names and numbers travel.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selfsup_ray.artifacts import Array, ShardedArray, read_json, write_json
from selfsup_ray.ops.balanced_sgd import Rate, train_balanced
from selfsup_ray.ops.completion import with_rows
from selfsup_ray.ops.fusion import balanced_vote, fused_scores
from selfsup_ray.ops.lowshot import SETUPS, Setup, hit_rates, label_ranks
from selfsup_ray.ops.neighbors import Neighbors
from selfsup_ray.stages.lowshot_choice import Chosen
from selfsup_ray.stages.lowshot_config import FUSED, LowShotConfig
from selfsup_ray.stages.lowshot_data import SetupImages
from selfsup_ray.stages.lowshot_diffusion import Diffusing
from selfsup_ray.stages.lowshot_pool import SHARD_ROWS, Pool, save_array
from selfsup_ray.storage import local_beside, remove_tree

POOLS = {"diffusion": "base", "diffusion_background": "background"}
"""The pool of shared nodes that each diffusion runs on."""


@dataclass(frozen=True)
class Unit:
    """One run of the protocol; its name is that of its files."""

    setup: str
    n: int
    seed: int

    @property
    def name(self) -> str:
        """Set-up, n and seed as they stand in file names."""
        return f"{self.setup}-n{self.n:03d}-seed{self.seed:03d}"


def save_images(folder: Path, images: SetupImages) -> None:
    """Write what units read of a set-up's images."""
    for key in ("train_ids", "train_classes", "test_ids", "test_classes"):
        save_array(folder / f"{key}.npy", getattr(images, key))
    setup = images.setup
    classes = {"classes": setup.classes.tolist(), "is_novel": setup.is_novel.tolist()}
    write_json(folder / "classes.json", classes)


def open_images(folder: Path) -> SetupImages:
    """Return what `save_images` wrote."""
    classes = read_json(folder / "classes.json")
    setup = Setup(np.array(classes["classes"], np.int64), np.array(classes["is_novel"], bool))
    keys = ("train_ids", "train_classes", "test_ids", "test_classes")
    return SetupImages(folder.name, setup, *(np.load(folder / f"{key}.npy") for key in keys))


class Run:
    """The labelled images of one unit, and the classifiers that learn from them."""

    def __init__(
        self, out: Path, features: Path, linear: Path, config: LowShotConfig, unit: Unit
    ) -> None:
        self.out, self.config, self.unit = out, config, unit
        self.rows = ShardedArray.open(features)
        self.linear_rows = ShardedArray.open(linear)
        self.images = open_images(out / unit.setup)
        chosen = self.images.novel(n=unit.n, seed=unit.seed, draw=config.draw)
        self.novel_ids = self.images.train_ids[chosen]
        self.novel_classes = self.images.train_classes[chosen]
        self.is_novel = self.images.setup.is_novel
        self.num_classes = self.images.setup.num_classes
        self.threads = max(1, int(config.resources.cpus))
        self.device = "cuda" if config.resources.gpus else "cpu"

    @cached_property
    def test_rows(self) -> Array:
        """(n_t, d) unit rows."""
        return self.rows.rows(self.images.test_ids)

    def pool(self, name: str) -> Pool:
        """Return the nodes shared by all runs: `base`, or `background`, which holds base too."""
        return Pool(self.out / self.unit.setup / name)

    def rates(self, scores: Array) -> dict[str, float]:
        """Return the hit rates of scores (n_t, C)."""
        classes = self.images.test_classes
        return hit_rates(label_ranks(scores, classes), classes, self.is_novel)

    def diffused(self, method: str, niter: int) -> Iterator[Array]:
        """Yield the (n_t, C) scores of the test images after 0..niter steps."""
        pool, config = self.pool(POOLS[method]), self.config
        nodes, is_node = _places(pool.images, self.novel_ids)
        new = self.rows.rows(self.novel_ids[~is_node])
        seeds = np.empty(len(pool) + len(new), np.int32)
        seeds[: len(pool)] = pool.classes
        seeds[nodes[is_node]] = self.novel_classes[is_node]
        seeds[len(pool) :] = self.novel_classes[~is_node]
        test = with_rows(pool.test, self.test_rows, new, first=len(pool)) if len(new) else pool.test
        near = test.ids[:, : config.k].astype(np.int32)
        folder = local_beside(self.out) / "scratch" / f"{self.unit.name}-{method}"
        remove_tree(folder)  # a killed run's
        memory = int(config.memory_gb * 1e9)
        how = Diffusing(folder, config.diffusion.options, memory, self.threads, self.device)
        try:
            graph = how.adjacency(pool, new)
            yield from how.scores(graph, seeds, near, num_classes=self.num_classes, niter=niter)
        finally:
            remove_tree(folder)

    @property
    def labelled(self) -> tuple[Array, Array]:
        """(n_l, d) unit rows of all labelled images, base first, and their classes (n_l,)."""
        places = self.images.base
        ids = np.concatenate([self.images.train_ids[places], self.novel_ids])
        classes = np.concatenate([self.images.train_classes[places], self.novel_classes])
        return self.linear_rows.rows(ids), classes

    @property
    def _scale(self) -> float:
        root = self.config.logistic.scale == "root_dim"
        return float(np.sqrt(self.linear_rows.shape[1])) if root else 1.0

    def linear(self, rates: list[Rate], batch_size: int, iterations: int) -> Iterator[Array]:
        """Yield the (n_t, G, C) log-probabilities of the test images at every evaluation."""
        rows, classes = self.labelled
        test = self.linear_rows.rows(self.images.test_ids) * np.float32(self._scale)
        unit = self.unit
        states = train_balanced(
            rows * np.float32(self._scale),
            classes,
            rates,
            num_classes=self.num_classes,
            batch_size=batch_size,
            iterations=iterations,
            eval_every=self.config.logistic.eval_every,
            seed=(self.config.seed, SETUPS.index(unit.setup), unit.n, unit.seed),
            device=self.device,
        )
        for state in states:
            yield np.concatenate([part.cpu().numpy() for part in state.log_probabilities(test)])

    @cached_property
    def _labelled_neighbors(self) -> tuple[Neighbors, Array, Array]:
        """Nearest labelled images of each test image, their classes, images of each class."""
        pool = self.pool("base")
        new = self.rows.rows(self.novel_ids)
        found = with_rows(pool.test, self.test_rows, new, first=len(pool))
        classes = np.concatenate([pool.classes, self.novel_classes])
        return found, classes[found.ids], np.bincount(classes, minlength=self.num_classes)

    def votes(self, k: int, *, balanced: bool) -> Array:
        """Return the (n_t, C) vote of the k nearest labelled images."""
        found, classes, counts = self._labelled_neighbors
        temperature = self.config.knn.temperature
        return balanced_vote(
            found.similarity[:, :k],
            classes[:, :k],
            counts,
            temperature=temperature,
            balanced=balanced,
        )


def _places(images: Array, wanted: Array) -> tuple[Array, Array]:
    """Return where each wanted image id is in `images`, and whether it is there."""
    order = np.argsort(wanted, kind="stable")
    nodes = np.full(len(wanted), -1, np.int64)
    for start in range(0, len(images) if len(wanted) else 0, SHARD_ROWS):
        part = images[start : start + SHARD_ROWS]
        at = np.minimum(np.searchsorted(wanted[order], part), len(wanted) - 1)
        here = np.flatnonzero(wanted[order[at]] == part)
        nodes[order[at[here]]] = start + here
    return nodes, nodes >= 0


@dataclass(frozen=True)
class Work:
    """Units, and where they read and write; `map_shards` calls it with the number of a unit."""

    out: Path
    features: Path
    linear: Path
    config: LowShotConfig
    units: tuple[Unit, ...]
    chosen: dict[int, Chosen] | None = None
    """By n; None while hyper-parameters are explored."""

    @property
    def folder(self) -> Path:
        """Where the units' results are."""
        return self.out / "units" / ("explore" if self.chosen is None else "final")

    def path(self, i: int) -> Path:
        """Return the file whose existence says that unit i is done."""
        return self.folder / f"{self.units[i].name}.json"

    @property
    def missing(self) -> list[int]:
        """Units that are still to be run."""
        return [i for i in range(len(self.units)) if not self.path(i).exists()]

    def __call__(self, i: int) -> None:
        unit, threads = self.units[i], torch.get_num_threads()
        run, began = Run(self.out, self.features, self.linear, self.config, unit), time.monotonic()
        torch.set_num_threads(run.threads)  # sums may round otherwise on another number
        try:
            found = _explored(run) if self.chosen is None else _final(run, self.chosen[unit.n])
        finally:
            torch.set_num_threads(threads)
        seconds = {"seconds": round(time.monotonic() - began, 3)}
        write_json(self.folder / "seconds" / f"{unit.name}.json", seconds)
        write_json(self.path(i), found)

    def results(self) -> dict[Unit, dict[str, Any]]:
        """Return what every unit found."""
        return {unit: read_json(self.path(i)) for i, unit in enumerate(self.units)}

    def seconds(self) -> dict[Unit, float]:
        """Return how long every unit took where it was run."""
        folder = self.folder / "seconds"
        return {
            unit: float(read_json(folder / f"{unit.name}.json")["seconds"]) for unit in self.units
        }


def grid(config: LowShotConfig) -> list[Rate]:
    """Return the settings of the linear classifier that share a batch size, in order."""
    pairs = itertools.product(config.logistic.lr, config.logistic.weight_decay)
    return [Rate(lr, decay) for lr, decay in pairs]


def _explored(run: Run) -> dict[str, Any]:
    """Return the criterion of every hyper-parameter, and the curves of the diffusions."""
    config, key = run.config, run.config.criterion
    found: dict[str, Any] = {}
    for method in POOLS.keys() & set(config.methods):
        curve = [run.rates(scores) for scores in run.diffused(method, config.niter)]
        found[method] = {name: [rates[name] for rates in curve] for name in curve[0]}
    if "logistic" in config.methods:
        found["logistic"] = [
            [
                [run.rates(log_p[:, g])[key] for g in range(log_p.shape[1])]
                for log_p in run.linear(grid(config), batch_size, config.logistic.iterations)
            ]
            for batch_size in config.logistic.batch_size
        ]
    if "knn" in config.methods:
        found["knn"] = [
            [run.rates(run.votes(k, balanced=even))[key] for even in config.knn.balanced]
            for k in config.knn.k
        ]
    return dict(sorted(found.items()))


def _final(run: Run, chosen: Chosen) -> dict[str, Any]:
    """Return the hit rates of every method, and of the fusions over their grid."""
    config, name = run.config, run.unit.name
    rates: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    fusion: dict[str, Any] = {}
    log_p: Array | None = None
    if chosen.linear is not None:
        one = [Rate(chosen.linear.lr, chosen.linear.weight_decay)]
        for states in run.linear(one, chosen.linear.batch_size, chosen.linear.iterations):
            log_p = states[:, 0]
        assert log_p is not None
        save_array(run.out / "log_probabilities" / f"{name}.npy", log_p)
        rates["logistic"] = run.rates(log_p)
    for method, niter in chosen.niter.items():
        last = niter if run.unit.setup == "val" else config.niter
        curve, kept = [], None
        for t, scores in enumerate(run.diffused(method, last)):
            curve.append(run.rates(scores))
            kept = np.array(scores) if t == niter else kept
        assert kept is not None
        rates[method] = curve[niter]
        curves[method] = {key: [one[key] for one in curve] for key in curve[0]}
        for fused, diffusion in FUSED.items():
            if fused in config.methods and diffusion == method and log_p is not None:
                fusion[fused] = _fused(run, kept, log_p)
    if chosen.vote is not None:
        rates["knn"] = run.rates(run.votes(chosen.vote.k, balanced=chosen.vote.balanced))
    return {"rates": rates, "curves": curves, "fusion": fusion}


def _fused(run: Run, diffused: Array, log_p: Array) -> list[list[dict[str, float]]]:
    """Return the hit rates of the fusion: one list for each form, one entry for each weight."""
    config = run.config.fusion
    return [
        [
            run.rates(fused_scores(diffused, log_p, weight=weight, form=form, eps=config.eps))
            for weight in config.weights
        ]
        for form in config.forms
    ]
