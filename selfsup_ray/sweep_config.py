"""What a sweep can be told: an experiment, the keys that vary, the number that is compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from selfsup_ray.cluster.tune import Dimension
from selfsup_ray.config import NonNegative, NonNegativeFloat, Positive, PositiveFloat, config
from selfsup_ray.mlflow_store import TrackingConfig
from selfsup_ray.report_sweep import Published
from selfsup_ray.storage import Place


@config
class Also:
    """Keys that go with a value of the space: such as a lower lr for the largest network."""

    when: dict[str, Any]
    """Keys of the space and their values, all of which a trial must have."""
    set: dict[str, Any]
    """Keys of the experiment that are then other than in its file."""


@config
class AshaConfig:
    """Asynchronous successive halving (Li et al. 2020): trials that fall behind end early.

    A stage that trains logs records; at each rung a trial goes on only if its number is among
    the best 1 / factor of the trials that got there before it.
    """

    metric: str
    """Number of the records, as `stage.name`, such as `scan.loss`. It must mean the same in all
    trials: SimCLR's loss at two temperatures does not, nor SCAN's at two entropy weights."""
    mode: Literal["min", "max"] = "min"
    """Whether low or high is good."""
    grace: PositiveFloat = 1
    """Epochs of the first rung. What counts is the first record then or later: see `log_every`."""
    factor: PositiveFloat = 3
    """Of this many trials at a rung about one goes on; the next rung is at `factor` times the
    epochs. The last epoch of a training is no rung."""

    def __post_init__(self) -> None:
        if self.factor <= 1:
            raise ValueError(f"factor must be above 1, got {self.factor:g}")
        if not all(self.metric.partition(".")):
            raise ValueError(f"metric must be `stage.name`, such as scan.loss, got {self.metric}")

    @property
    def stage(self) -> str:
        """Stage whose records are compared."""
        return self.metric.partition(".")[0]

    @property
    def name(self) -> str:
        """Name of the number in a record."""
        return self.metric.partition(".")[2]


@config
class SweepConfig:
    """A search over dotted keys of one experiment."""

    experiment: Path
    """YAML file of the experiment that the trials change."""
    out: Place
    """Folder of the sweep: stages, trials, Tune's state, trials.csv and best.yaml. When the file
    leaves it out: runs/sweeps/ and the name of the file."""
    until: str
    """Last stage of a trial; earlier stages that no key of the space touches are built once."""
    metric: str = "rankme"
    """Number that is compared: one that a stage logs, such as `scan.loss` or `scan_score`, or
    `rankme`, the effective rank of the encoder's embeddings. Neither needs labels."""
    mode: Literal["min", "max"] = "max"
    """Whether low or high is good."""
    samples: Positive = 16
    """Trials; a grid has as many as it has combinations."""
    space: dict[str, Dimension]
    """Dotted key of the experiment -> its values."""
    search: Literal["grid", "random", "optuna"] = "random"
    """`grid`: every combination of choices. `optuna` learns from finished trials."""
    asha: AshaConfig | None = None
    """Ends trials early that fall behind in a training; None: all trials run to their end."""
    seed: NonNegative = 0
    """Chooses the points; the experiment's own seed is a key like any other."""
    published: Published | None = None
    """Published numbers that the report puts beside the trials': accuracies of networks on patch
    dictionaries by k, by size, by source of the patches or over seeds; of instance discrimination
    by temperature, and of BYOL by batch size and by its batch norms; of contrastive methods beside
    each other, by linear probe (CIFAR-100) or nearest neighbors (CIFAR-10)."""
    concurrent: Positive | None = None
    """Trials at a time; None: as many as the cluster has CPUs and GPUs for."""
    changes: dict[str, Any] | None = None
    """Keys of the experiment that are other than in its file, in all trials alike."""
    also: tuple[Also, ...] = ()
    """Further keys of the trials that have certain values."""
    cpus: PositiveFloat = 1
    """CPUs of one trial, which trains in its own process."""
    gpus: NonNegativeFloat = 0
    """GPUs of one trial."""
    tracking: TrackingConfig = TrackingConfig()

    def __post_init__(self) -> None:
        if not self.space:
            raise ValueError("space must name at least one key of the experiment")
        ranges = [key for key, dimension in self.space.items() if dimension.choice is None]
        if self.search == "grid" and ranges:
            raise ValueError(
                f"search=grid needs choices, but space.{ranges[0]} is a range; list its values "
                f"under `choice`, or use search=random"
            )
        unknown = [key for rule in self.also for key in rule.when if key not in self.space]
        if unknown:
            raise ValueError(f"also.when names {unknown[0]}, which is not a key of `space`")

    @property
    def varied(self) -> tuple[str, ...]:
        """Keys of the experiment that differ between trials."""
        return (*self.space, *(key for rule in self.also for key in rule.set))

    def applied(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Return a trial's changes with the keys that go with them."""
        rules = [r for r in self.also if all(changes.get(k) == v for k, v in r.when.items())]
        return {**changes, **{key: value for rule in rules for key, value in rule.set.items()}}
