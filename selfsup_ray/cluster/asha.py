"""Early ends of trials that fall behind: asynchronous successive halving on Ray Tune."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

EPOCH, VALUE = "asha_epoch", "asha_value"
"""Names under which a trial reports how far it is; its last report, the result, has neither."""

Curve = list[tuple[float, float]]
"""(epoch, value), in order of the epochs."""


@dataclasses.dataclass(frozen=True)
class Halving:
    """Asynchronous successive halving (ASHA, Li et al. 2020).

    At each rung, an epoch, a trial ends whose value is not among the best 1 / factor of those
    that reached the rung so far. A trial that has trained all its epochs is never ended.
    """

    mode: Literal["min", "max"]
    factor: float
    rungs: tuple[float, ...]
    """Epochs at which trials are compared, each `factor` times the one before."""
    reached: Callable[[Mapping[str, Any]], Curve]
    """What the trial with these changes has reported; read again after a restart."""


class Climb:
    """Which records of one trial are to be compared: the first at or after each rung."""

    def __init__(self, rungs: tuple[float, ...], *, epochs: float) -> None:
        self.left, self.epochs = list(rungs), epochs

    def is_due(self, epoch: float) -> bool:
        """Return whether a record at `epoch` is the first at a rung; the trial's last never is."""
        due = bool(self.left) and epoch >= self.left[0] and epoch < self.epochs
        while due and self.left and epoch >= self.left[0]:
            self.left.pop(0)
        return due


def scheduler(halving: Halving) -> Any:
    """Return Ray Tune's scheduler, which after a restart knows what ended trials had reached."""
    from ray.tune.schedulers import ASHAScheduler

    class Scheduler(ASHAScheduler):
        """ASHA on reports of its own, beside the number that the search compares."""

        def set_search_properties(self, metric: Any, mode: Any, **spec: Any) -> bool:
            return True

        def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
            super().on_trial_add(tune_controller, trial)
            if trial.status != "TERMINATED":  # one that runs again reports all again
                return
            sign = 1.0 if halving.mode == "max" else -1.0
            for epoch, value in halving.reached(trial.config):
                self._trial_info[trial.trial_id].on_result(trial, epoch, sign * value)

    return Scheduler(
        time_attr=EPOCH,
        metric=VALUE,
        mode=halving.mode,
        grace_period=halving.rungs[0],  # type: ignore[arg-type]  # any number does
        reduction_factor=halving.factor,
        max_t=halving.rungs[-1] * halving.factor**0.5,  # below a next rung
        stop_last_trials=False,
    )


def without_reports(searcher: type[Any]) -> type[Any]:
    """Return a searcher class that learns from results alone, not from reports on the way."""

    class ResultsOnly(searcher):  # type: ignore[misc]  # a base chosen by the caller
        def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
            if VALUE not in result:
                super().on_trial_result(trial_id, result)

    return ResultsOnly
