"""What SeLa can be told: when labels are optimized, from which view, and how large clusters are."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from selfsup_ray.artifacts import Array
from selfsup_ray.config import NonNegative, Positive, PositiveFloat, Share, config
from selfsup_ray.data.views import ViewsConfig
from selfsup_ray.ops.sinkhorn_rows import Precision
from selfsup_ray.storage import Place


@config
class QuadraticEvents:
    """Labels are optimized densely at first, sparsely at the end (published code for ImageNet).

    Event i of 0..n-1 comes after (epochs + 0.01) (i / (n-1))^2 epochs, so the last does not come.
    """

    name: Literal["quadratic"] = "quadratic"
    nopts: Annotated[int, Field(ge=2)] = 100
    """n. The published 100 give 99 events; their 400 epochs are 401 in the code and here."""

    def epochs(self, epochs: int) -> Array:
        """Return when events happen in a training of so many epochs, in epochs, ascending."""
        return np.asarray((epochs + 0.01) * (np.arange(self.nopts) / (self.nopts - 1)) ** 2)


@config
class LinearEvents:
    """Labels are optimized at equal distances (published code for CIFAR).

    Event i of 0..n-1 comes after (epochs + 1.0001) i / (n-1) epochs.
    """

    name: Literal["linear"] = "linear"
    nopts: Annotated[int, Field(ge=2)] = 400
    """n. 400 in 400 epochs give 399 events, about one an epoch."""

    def epochs(self, epochs: int) -> Array:
        """Return when events happen in a training of so many epochs, in epochs, ascending."""
        return np.asarray((epochs + 1.0001) * np.arange(self.nopts) / (self.nopts - 1))


@config
class RegularEvents:
    """Labels are optimized at the start and every so many epochs."""

    name: Literal["every"] = "every"
    every_epochs: PositiveFloat = 1.0

    def epochs(self, epochs: int) -> Array:
        """Return when events happen in a training of so many epochs, in epochs, ascending."""
        return np.arange(math.ceil(epochs / self.every_epochs)) * self.every_epochs


@config
class FixedLabels:
    """No events: labels that another run exported, for training a network on them."""

    name: Literal["fixed"] = "fixed"
    labels: Place
    """pseudo_labels.parquet (columns head_0, head_1, ...) or pseudo_labels.pt (key `L` or
    `labels`) of the same images in the same order."""

    def epochs(self, epochs: int) -> Array:
        """Return no times."""
        return np.empty(0)


Events = Annotated[
    QuadraticEvents | LinearEvents | RegularEvents | FixedLabels, Field(discriminator="name")
]


@config
class AugmentedPass:
    """As published: random views and the network in training mode, with dropout and batch norms
    over the batch, whose running statistics the pass moves."""

    name: Literal["augmented"] = "augmented"
    views: ViewsConfig | None = None
    """Other views than those that are trained on."""


@config
class CleanPass:
    """The evaluation view of each image, and the network in evaluation mode."""

    name: Literal["clean"] = "clean"


LabelPass = Annotated[AugmentedPass | CleanPass, Field(discriminator="name")]


@config
class UniformPrior:
    """All clusters are of equal size (the paper)."""

    name: Literal["uniform"] = "uniform"


@config
class GivenPrior:
    """Clusters of given sizes."""

    name: Literal["given"] = "given"
    shares: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
    """One for each cluster, in any unit."""


@config
class EstimatedPrior:
    """Cluster sizes that follow the network, for corpora whose classes are of unequal size.

    At an event the soft counts s_k = mean_i softmax_k(sharpness l_i) are the sizes that the network
    gives the clusters without balance. A moving average, e <- keep e + (1 - keep) s, enters the
    marginals as (1 - a) / K + a e, where a grows linearly from 0 to `strength`; none falls below
    smallest / K.
    """

    name: Literal["estimated"] = "estimated"
    strength: Share = 0.8
    """a, once it has grown; 0 is the uniform prior."""
    anneal: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the training in which a grows."""
    keep: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of the moving average that an event leaves."""
    sharpness: PositiveFloat = 1.0
    """1: the network's own probabilities. Sinkhorn's lambda would be the counts of an unbalanced
    labelling, in which large clusters grow until they hold nearly everything."""
    smallest: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Least share of a cluster, in units of 1 / K."""


Prior = Annotated[UniformPrior | GivenPrior | EstimatedPrior, Field(discriminator="name")]


@config
class SinkhornConfig:
    """How the balanced assignment is solved."""

    lam: PositiveFloat = 25.0
    """lambda: 25 for ImageNet, 10 for CIFAR; larger is closer to the plain optimal transport."""
    tolerance: PositiveFloat = 2e-5
    """Of the mean relative change of an image's scale; the published codes have its sum over the
    images (0.1 and 0.01)."""
    check_every: Positive = 10
    """Iterations between two looks at the change."""
    max_iterations: Positive = 1000
    """Bound on the iterations of one head at one event; a log line says when it was reached."""
    precision: Precision = "bfloat16"
    """Of the stored matrix P^lambda, divided by each image's largest entry."""
    warm_start: bool = False
    """Start from the scales of the head's last event, in place of the published start."""
    on_disk: bool = False
    """Keep the matrix in a temporary folder and read it once an iteration; needs device=cpu."""
    device: Literal["network", "cpu"] = "network"
    """Where the matrix lies: with the network, or in main memory beside a GPU."""

    def __post_init__(self) -> None:
        if self.on_disk and (self.device != "cpu" or self.precision == "float64"):
            raise ValueError(
                "sinkhorn.on_disk=true needs sinkhorn.device=cpu and a precision of bfloat16 or "
                "float32: set them, or leave on_disk out"
            )


def marginals(
    prior: UniformPrior | GivenPrior | EstimatedPrior, estimate: Array, *, progress: float
) -> Array | None:
    """Return the shares of the clusters (K,) at an event, None when they are equal.

    estimate: (K,) moving average of the soft counts; progress: of the training, in [0, 1].
    """
    match prior:
        case UniformPrior():
            return None
        case GivenPrior(shares=shares):
            given = np.asarray(shares, np.float64)
            return np.asarray(given / given.sum())
        case EstimatedPrior():
            k, a = len(estimate), prior.strength * min(1.0, progress / prior.anneal)
            mixed = np.maximum((1 - a) / k + a * estimate, prior.smallest / k)
            return np.asarray(mixed / mixed.sum())


@config
class SeLaMethod:
    """What the objective needs to know of a SeLa training, besides network, images and views."""

    num_clusters: Positive
    num_heads: Positive
    events: Events
    heads_per_event: Literal["all", "one"]
    label_pass: LabelPass
    prior: Prior
    sinkhorn: SinkhornConfig
    epochs: NonNegative
    batch_size: Positive
    precision: Literal["float32", "bfloat16"]
    channels_last: bool
    seed: int
    rotation: bool = False
