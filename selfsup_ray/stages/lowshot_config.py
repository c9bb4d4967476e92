"""What the stage `lowshot` can be told: classes, test images, background, methods, grids."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from selfsup_ray.cluster.methods import ExactConfig
from selfsup_ray.config import (
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Resources,
    Share,
    config,
)
from selfsup_ray.ops.diffusion import DiffusionOptions
from selfsup_ray.stages.graph import GraphMethod
from selfsup_ray.storage import Place

Method = Literal[
    "diffusion", "diffusion_background", "logistic", "knn", "fused", "fused_background"
]
Criterion = Literal["top5_all", "top5_novel", "top1_all", "top1_novel"]

FUSED: dict[str, str] = {"fused": "diffusion", "fused_background": "diffusion_background"}
"""Fused methods, and the diffusion that each puts together with the linear classifier."""


@config
class ClassesConfig:
    """Which classes are base and novel, and which of either belong to validation and test."""

    num_base: Positive | None = None
    """The first classes by ascending label are base, the others novel."""
    val_base: Positive | None = None
    """Of the base classes the first so many belong to the validation set-up; None: 193 of 389, as
    in the paper."""
    val_novel: Positive | None = None
    """The same of the novel classes; None: 300 of 611."""
    file: Place | None = None
    """A YAML or JSON file with the lists base_val, novel_val, base_test and novel_test instead:
    labels or class names; `first_class` is the number it gives to the first class (0). Or the
    published label_idx.json of ImageNet's split."""

    def __post_init__(self) -> None:
        if (self.num_base is None) == (self.file is None):
            raise ValueError("give either `num_base` or `file`: which classes are novel?")


@config
class HeldOutShare:
    """A share of every class is kept for testing, chosen by a hash of id and seed."""

    name: Literal["share"] = "share"
    share: Annotated[float, Field(gt=0, lt=1)] = 0.2


@config
class HeldOutSources:
    """The images whose source matches a pattern are for testing, such as `val/*`."""

    name: Literal["source"] = "source"
    pattern: str
    """Compared with the whole source: * stands for any text, slashes included, ? for one letter."""


@config
class HeldOutRows:
    """The images from an id on are for testing, as when test images were read last."""

    name: Literal["rows"] = "rows"
    first: Positive


HeldOutConfig = Annotated[HeldOutShare | HeldOutSources | HeldOutRows, Field(discriminator="name")]


@config
class FolderConfig:
    """Embeddings of other images, by the same encoder."""

    path: Place
    """Folder of a finished `embed` or `reduce` of another run, or of imported features."""
    graph: Place | None = None
    """Folder of a finished kNN graph of exactly these rows; None searches them here, exactly."""


@config
class BackgroundConfig:
    """Unlabelled nodes of the graph, for the methods with background."""

    unlabelled: bool = True
    """The corpus's images without label, unless they are for testing."""
    other_classes: bool = True
    """Training images of the classes that a set-up does not use; their labels are not read."""
    in_domain: bool = False
    """The unused training images of the set-up's own novel classes."""
    folders: tuple[FolderConfig, ...] = ()
    """Images of other runs."""


@config
class OperatorConfig:
    """Variants of the diffusion; the defaults are the published method (spec 2.6)."""

    weights: Literal["constant", "gaussian"] = "constant"
    """`gaussian`, and a `tau` other than 1, hold the graph in memory whole, 30 bytes a link."""
    sigma: PositiveFloat = 0.5
    """Width of the gaussian in units of |x - y|."""
    reciprocal: bool = False
    """Keep only links that both images list."""
    tau: PositiveFloat = 1.0
    """Power of the entries of the adjacency."""
    sinkhorn: NonNegative = 0
    """Times that rows and columns are normalised in turn after a step; all classes together then
    need to fit `lowshot.memory_gb`."""
    reset_seeds: bool = False
    """Labelled rows become one-hot again after each step."""
    normalize_columns: bool = True
    min_similarity: Annotated[float, Field(ge=-1, le=1)] | None = None
    """Links of lower similarity are left out."""

    @property
    def options(self) -> DiffusionOptions:
        """The same as plain values."""
        return DiffusionOptions(
            weights=self.weights,
            sigma=self.sigma,
            reciprocal=self.reciprocal,
            tau=self.tau,
            sinkhorn=self.sinkhorn,
            reset_seeds=self.reset_seeds,
            normalize_columns=self.normalize_columns,
            min_similarity=self.min_similarity,
        )


@config
class LogisticConfig:
    """Grid of the linear classifier; each combination is tried on the validation classes."""

    lr: tuple[PositiveFloat, ...] = (1e-2, 1e-3, 1e-4)
    weight_decay: tuple[NonNegativeFloat, ...] = (0.0, 0.01, 0.1)
    batch_size: tuple[Positive, ...] = (16, 64, 128)
    iterations: Positive = 75_000
    eval_every: Positive = 500
    """Every so many iterations are a candidate for the number of iterations."""
    scale: Literal["none", "root_dim"] = "root_dim"
    """`root_dim` multiplies unit rows by sqrt(d), to about the length of raw ResNet features;
    `none` for rows that are raw features."""

    def __post_init__(self) -> None:
        for key in ("lr", "weight_decay", "batch_size"):
            if not getattr(self, key):
                raise ValueError(f"`{key}` needs at least one value")


@config
class VoteConfig:
    """Grid of the kNN vote."""

    k: tuple[Positive, ...] = (1, 10, 30, 100)
    """Labelled neighbors that vote."""
    temperature: PositiveFloat = 0.1
    """A vote weighs exp(similarity / temperature)."""
    balanced: tuple[bool, ...] = (False, True)
    """Whether a vote is divided by the number of labelled images of its class."""

    def __post_init__(self) -> None:
        for key in ("k", "balanced"):
            if not getattr(self, key):
                raise ValueError(f"`{key}` needs at least one value")


@config
class FusionConfig:
    """Grid of the late fusion of diffusion and linear classifier."""

    weights: tuple[Share, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    """Shares of the diffusion."""
    forms: tuple[Literal["log", "linear"], ...] = ("log", "linear")
    """Weighted mean of log-probabilities, or of probabilities."""
    eps: PositiveFloat = 1e-6
    """Added to the diffusion's probabilities before the logarithm."""

    def __post_init__(self) -> None:
        for key in ("weights", "forms"):
            if not getattr(self, key):
                raise ValueError(f"`{key}` needs at least one value")


@config
class LowShotConfig:
    """The low-shot protocol: some classes have all their labels, the novel ones n each."""

    classes: ClassesConfig
    test: HeldOutConfig = HeldOutShare()
    shots: tuple[Positive, ...] = (1, 2, 5, 10, 20)
    """n: labelled images of each novel class."""
    seeds: tuple[NonNegative, ...] = (1, 2, 3, 4, 5)
    """Each chooses other images of the novel classes."""
    draw: Literal["legacy", "modern"] = "legacy"
    """`legacy`: the published runs' choice of images (numpy's RandomState)."""
    methods: tuple[Method, ...] = ("diffusion", "logistic", "knn", "fused")
    """With `_background`, unlabelled images are nodes of the graph too."""
    criterion: Criterion = "top5_all"
    """What hyper-parameters are chosen by: mean over the seeds on the validation classes."""
    k: Annotated[int, Field(ge=2)] = 30
    """Neighbors of each node, the node itself included as in the paper, and of each test image."""
    niter: NonNegative = 40
    """Most steps of the diffusion; the number is chosen in 0..niter."""
    diffusion: OperatorConfig = OperatorConfig()
    background: BackgroundConfig = BackgroundConfig()
    logistic: LogisticConfig = LogisticConfig()
    knn: VoteConfig = VoteConfig()
    fusion: FusionConfig = FusionConfig()
    search: GraphMethod = ExactConfig()
    """How shared images find their neighbors among themselves: `exact` holds the rows in memory,
    over all workers; `cells` works from files, for more than about a million."""
    memory_gb: PositiveFloat = 4.0
    """Of a worker, for the labels of the classes that it spreads at a time, and for rows that it
    searches; the graph, 4 bytes a link, comes on top from files."""
    seed: NonNegative = 0
    """Of the share kept for testing and of the linear classifier's batches."""
    resources: Resources = Resources(workers=0)
    """`workers` tasks run at a time, one for each (set-up, n, seed); 0 runs in this process."""

    def __post_init__(self) -> None:
        for key in ("shots", "seeds", "methods"):
            values = getattr(self, key)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"`{key}` needs at least one value and each once, got {values}")
        for method in self.methods:
            needed = [FUSED[method], "logistic"] if method in FUSED else []
            if missing := [name for name in needed if name not in self.methods]:
                raise ValueError(f"`methods` has {method}, which needs {missing[0]} too")

    @property
    def headline(self) -> str:
        """The method whose validation accuracy stands for the stage in a sweep."""
        for method in ("diffusion_background", "diffusion"):
            if method in self.methods:
                return method
        return self.methods[0]

    @property
    def widest(self) -> int:
        """Neighbors that are looked up for a test image among the labelled ones."""
        return max(self.k, *self.knn.k) if "knn" in self.methods else self.k
