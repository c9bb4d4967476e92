"""The stage `voc07`: Pascal VOC 2007 classification by linear SVMs on frozen embeddings.

Protocol (Goyal et al. 2019, which SeLa and others report): for each of the 20 classes a linear SVM
on the trainval images; its cost has the best average precision over three folds of them; then it is
fitted on all of trainval and scores the test images. Images that show a class only in objects
marked difficult are left out for that class. The result is the mean over the classes of VOC 2007's
average precision, the mean of the largest precision at recalls of 0, 0.1, ..., 1.
"""

from __future__ import annotations

import hashlib
import logging
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from selfsup_ray.artifacts import Array, begin, finish, read_done, read_json, write_json
from selfsup_ray.cluster.shards import map_shards
from selfsup_ray.config import Positive, PositiveFloat, Resources, config
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.voc import Lists, read_lists
from selfsup_ray.errors import ArtifactError
from selfsup_ray.stages.embed import Embeddings
from selfsup_ray.storage import Place, located
from selfsup_ray.tracking import Tracker

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 65_536
COSTS = tuple(sorted([*(2.0**n for n in range(-19, -3)), *(10.0**n for n in range(-7, 3))]))


@config
class Voc07Config:
    """How the SVMs are fitted."""

    folder: Place
    """The VOC2007 folder, of which ingest has read JPEGImages; lists are in ImageSets/Main."""
    costs: tuple[PositiveFloat, ...] = COSTS
    """Costs tried for each class."""
    folds: Positive = 3
    """Parts of trainval, each of which is scored once by an SVM fitted on the others."""
    max_iterations: Positive = 2000
    """Bound on the iterations of one SVM."""
    resources: Resources = Resources(workers=0)
    """`workers` tasks each fit one class at a time; 0 fits in this process."""

    def __post_init__(self) -> None:
        if not self.costs or self.folds < 2:
            raise ValueError("`costs` needs at least one value and `folds` at least 2")


@dataclass(frozen=True)
class Voc07:
    """Handle on a finished evaluation: average precision by class, and their mean."""

    metrics: dict[str, Any]
    path: Path

    @classmethod
    def open(cls, path: Path | str) -> Voc07:
        """Return the finished evaluation in a folder.

        Raises ArtifactError when the stage has not finished there.
        """
        read_done(located(path))
        return cls(read_json(located(path) / "metrics.json"), located(path))

    @property
    def fingerprint(self) -> str:
        """Hash of the config and the inputs."""
        return read_done(self.path).fingerprint

    @property
    def mean_average_precision(self) -> float:
        """Mean over the classes of VOC 2007's average precision, in [0, 1]."""
        return float(self.metrics["map"])


def voc07(
    corpus: Corpus,
    features: Embeddings,
    config: Voc07Config,
    *,
    out: Path | str,
    tracker: Tracker | None = None,
) -> Voc07:
    """Return the mean average precision of linear SVMs on the embeddings of VOC 2007's images.

    The corpus may hold other images too. Raises ArtifactError when it lacks a listed one.
    """
    out, began = located(out), time.monotonic()
    parts = {part: read_lists(config.folder, part) for part in ("trainval", "test")}
    inputs = {"features": features.fingerprint, "lists": _digest(parts)}
    if begin(out, stage="voc07", config=config, inputs=inputs):
        log.info("voc07: %s is current", out)
        return Voc07.open(out)
    places = _places(corpus, config.folder)
    ids = {part: _found(lists, places, config.folder) for part, lists in parts.items()}
    work = partial(_class, features.path.absolute(), ids, parts, config)
    todo = range(len(parts["test"].classes))
    found = dict(map_shards(work, todo, config.resources, label="voc07"))
    classes = {name: found[i] for i, name in enumerate(parts["test"].classes)}
    for name, scores in classes.items():
        if not scores["is_converged"]:
            log.warning("voc07: the SVM of %s stopped at its %s iterations", name,
                        config.max_iterations)  # fmt: skip
    mean = {
        key: float(np.mean([scores[of] for scores in classes.values()]))
        for key, of in (("map", "average_precision"), ("map_area", "average_precision_area"))
    }
    write_json(out / "metrics.json", {**mean, "classes": classes})
    if tracker is not None:
        tracker.log([mean])
    seconds = time.monotonic() - began
    finish(out, stage="voc07", config=config, inputs=inputs, seconds=seconds, facts=mean)
    log.info("voc07: mAP %.4f over %d classes, %.1f s", mean["map"], len(classes), seconds)
    return Voc07.open(out)


def _digest(parts: dict[str, Lists]) -> str:
    hashed = hashlib.blake2b(digest_size=16)
    for lists in parts.values():
        hashed.update(repr((lists.names, lists.classes)).encode())
        hashed.update(lists.marks.tobytes())
    return hashed.hexdigest()


def _places(corpus: Corpus, folder: Path) -> dict[str, int]:
    """Return the id of each image of the corpus by its name without folder and extension."""
    places: dict[str, int] = {}
    for a in range(0, len(corpus), ROWS_AT_ONCE):
        ids = np.arange(a, min(a + ROWS_AT_ONCE, len(corpus)))
        for id, source in zip(ids.tolist(), corpus.sources(ids), strict=True):
            if Path(source).stem in places:
                raise ArtifactError(
                    f"Two images of the corpus are called {Path(source).stem}, so the lists of "
                    f"{folder} cannot tell them apart. Ingest JPEGImages alone."
                )
            places[Path(source).stem] = id
    return places


def _found(lists: Lists, places: dict[str, int], folder: Path) -> Array:
    missing = [name for name in lists.names if name not in places]
    if missing:
        raise ArtifactError(
            f"{len(missing):,} of the {len(lists.names):,} images listed in {folder} are not in "
            f"the corpus, e.g. {missing[0]}. Give its JPEGImages to ingest."
        )
    return np.array([places[name] for name in lists.names], np.int64)


def _class(
    features: Path, ids: dict[str, Array], parts: dict[str, Lists], config: Voc07Config, i: int
) -> dict[str, Any]:
    """Return the scores of one class: choose the cost, fit on trainval, score test."""
    array = Embeddings.open(features).array
    known = {part: parts[part].marks[:, i] != 0 for part in parts}
    rows = {part: array.rows(ids[part][known[part]]) for part in parts}
    shows = {part: parts[part].marks[known[part], i] == 1 for part in parts}
    by_cost = {
        cost: _cross_validated(rows["trainval"], shows["trainval"], cost, config)
        for cost in config.costs
    }
    cost = max(by_cost, key=lambda cost: by_cost[cost])  # the lower on ties
    scores, is_converged = _fitted(
        rows["trainval"], shows["trainval"], rows["test"], cost, config.max_iterations
    )
    return {
        "average_precision": eleven_point(shows["test"], scores),
        "average_precision_area": area(shows["test"], scores),
        "cost": cost,
        "cross_validated": by_cost[cost],
        "num_positive": int(shows["test"].sum()),
        "is_converged": is_converged,
    }


def _cross_validated(rows: Array, shows: Array, cost: float, config: Voc07Config) -> float:
    """Return the mean over folds of the average precision on the fold that was left out."""
    from sklearn.model_selection import StratifiedKFold

    precisions = []
    for fit, left in StratifiedKFold(config.folds).split(rows, shows):
        scores, _ = _fitted(rows[fit], shows[fit], rows[left], cost, config.max_iterations)
        precisions.append(area(shows[left], scores))
    return float(np.mean(precisions))


def _fitted(
    rows: Array, shows: Array, others: Array, cost: float, max_iterations: int
) -> tuple[Array, bool]:
    """Return the scores of other rows by an SVM, and whether its fit converged."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import LinearSVC

    # Class weights and loss of the published protocol.
    svm = LinearSVC(
        C=cost, class_weight={True: 2, False: 1}, max_iter=max_iterations, random_state=0
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        svm.fit(rows, shows)
    stopped = any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    return np.asarray(svm.decision_function(others)), not stopped


def area(shows: Array, scores: Array) -> float:
    """Return the area under the precision-recall steps: sum of precision times recall gained."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(shows, scores))


def eleven_point(shows: Array, scores: Array) -> float:
    """Return VOC 2007's average precision: mean of the largest precision at 11 recalls or above.

    shows: (n,) bool; scores: (n,), higher is surer.
    """
    from sklearn.metrics import precision_recall_curve

    precision, recall, _ = precision_recall_curve(shows, scores)
    # The curve's last point, precision 1 at recall 0, is no threshold's.
    precision, recall = precision[:-1], recall[:-1]
    reached = [precision[recall >= level] for level in np.linspace(0, 1, 11)]
    return float(np.mean([best.max() if len(best) else 0.0 for best in reached]))
