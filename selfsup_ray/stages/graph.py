"""The stage `graph`: the k nearest neighbors of every image, with the recall that was measured."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from selfsup_ray.artifacts import ShardedArray, read_done
from selfsup_ray.config import NonNegative, Positive, Resources, Share, config


@config
class GraphConfig:
    """How the kNN graph is built."""

    k: Positive = 20
    """Neighbors kept per image, the image itself excluded."""
    index: Literal["exact"] = "exact"
    """`exact` compares every pair of images."""
    recall_sample: Positive = 1000
    """Images whose lists are checked against a separate float64 search."""
    min_recall: Share = 0.95
    """The stage stops with an error when the recall measured on the sample is lower."""
    seed: NonNegative = 0
    """Chooses the images of the recall sample."""
    resources: Resources = Resources()


class Graph:
    """Handle on a graph folder: k neighbors per image, best first, the image itself excluded."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.ids = ShardedArray.open(self.path / "ids")
        self.similarity = ShardedArray.open(self.path / "similarity")

    @classmethod
    def open(cls, path: Path | str) -> Graph:
        """Return the finished graph in a folder.

        Raises ArtifactError when the stage has not finished there.
        """
        graph = cls(Path(path))
        assert graph.facts is not None
        return graph

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def k(self) -> int:
        """Neighbors per image."""
        return self.ids.shape[1]

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the stage measured: recall, recall_interval, recall_sample, neighbor_accuracy."""
        return read_done(self.path).facts

    @property
    def fingerprint(self) -> str:
        """Hash of the config and the inputs that made the graph."""
        return read_done(self.path).fingerprint

    @property
    def recall(self) -> float:
        """Share of the true k nearest neighbors that the lists hold, on a sample of images."""
        return float(self.facts["recall"])

    @property
    def neighbor_accuracy(self) -> float | None:
        """Share of neighbors with their image's class where both are known; None without labels."""
        value = self.facts.get("neighbor_accuracy")
        return None if value is None else float(value)
