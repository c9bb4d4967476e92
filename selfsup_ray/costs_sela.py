"""What SeLa keeps and does beside its training: features, the matrix of the assignment, labels."""

from __future__ import annotations

from selfsup_ray.stages.sela import SeLaConfig


def relabeling_passes(made: SeLaConfig) -> float:
    """Return the forward passes of an image an epoch that events take, on average."""
    events = len(made.events.epochs(made.epochs)) - 1  # the last comes after the training
    return max(events, 0) / max(made.epochs, 1)


def relabeling_bytes(made: SeLaConfig, n: int) -> int:
    """Return the memory of one worker at an event: labels, stored rows, and the matrix."""
    heads = made.num_heads if made.heads_per_event == "all" else 1
    own = n / max(made.resources.workers, 1)
    stored = 4 * min(heads * made.num_clusters, made.backbone.dim)
    entry = {"bfloat16": 2, "float32": 4, "float64": 8}[made.sinkhorn.precision]
    matrix = 0 if made.sinkhorn.on_disk else entry * made.num_clusters
    labels = 4 * made.num_heads + 3 * 8  # and where each image's number goes
    return int(own * (labels + stored + matrix))


def labels_bytes(made: SeLaConfig, n: int) -> int:
    """Return the disk of clusters, probabilities, and labels in three forms, one of them twice."""
    return n * (4 * (made.num_clusters + 1) + 22 * made.num_heads + 100)
