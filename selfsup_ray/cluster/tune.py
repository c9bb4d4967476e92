"""Searches on Ray Tune: a trial is a set of dotted config keys, a result a handful of numbers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from selfsup_ray.cluster.asha import EPOCH, VALUE, Halving, scheduler, without_reports
from selfsup_ray.config import Resources, config
from selfsup_ray.errors import UserError
from selfsup_ray.object_store import filesystem, place
from selfsup_ray.storage import StoredPath

log = logging.getLogger(__name__)

Changes = dict[str, Any]
Tell = Callable[[float, float], None]
"""(epoch, value) -> the search has heard; does not return when it ends the trial here."""
RunTrial = Callable[[Changes, Tell], Mapping[str, float]]


@config
class Dimension:
    """The values one dotted key may take: exactly one of the fields."""

    choice: tuple[Any, ...] | None = None
    """One of these values."""
    uniform: tuple[float, float] | None = None
    """A number between two bounds."""
    log_uniform: tuple[float, float] | None = None
    """A number between two positive bounds, its logarithm uniform."""
    int_uniform: tuple[int, int] | None = None
    """A whole number between two bounds, both included."""
    int_log_uniform: tuple[int, int] | None = None
    """A whole number between two positive bounds, both included, its logarithm uniform."""

    def __post_init__(self) -> None:
        given = self._given()
        if len(given) != 1:
            names = ", ".join(f.name for f in dataclasses.fields(self))
            raise ValueError(f"give exactly one of {names}, not {len(given)}")
        name, value = given[0]
        if name == "choice" and not value:
            raise ValueError("choice must list at least one value")
        if name != "choice" and not value[0] < value[1]:
            raise ValueError(f"{name} must be [low, high] with low < high, got {list(value)}")
        if "log" in name and value[0] <= 0:
            raise ValueError(f"{name} needs a low bound above 0, got {value[0]}")

    def _given(self) -> list[tuple[str, Any]]:
        pairs = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)]
        return [(name, value) for name, value in pairs if value is not None]

    @property
    def ends(self) -> tuple[Any, ...]:
        """All choices, or both bounds: what a check before the search should try."""
        return tuple(self._given()[0][1])

    def domain(self) -> Any:
        """Return Ray Tune's object for these values."""
        from ray import tune

        match self._given()[0]:
            case "choice", values:
                return tune.choice(list(values))
            case "uniform", (low, high):
                return tune.uniform(low, high)
            case "log_uniform", (low, high):
                return tune.loguniform(low, high)
            case "int_uniform", (low, high):
                return tune.randint(low, high + 1)
            case _, (low, high):
                return tune.lograndint(low, high + 1)


@dataclasses.dataclass(frozen=True)
class Search:
    """How trials are chosen, and which number says how good one is."""

    metric: str
    mode: Literal["min", "max"]
    algorithm: Literal["grid", "random", "optuna"] = "random"
    """`grid`: every combination of choices. `optuna`: a tree-structured Parzen estimator, which
    learns from finished trials (Bergstra et al. 2011)."""
    samples: int = 16
    """Trials; a grid has as many as it has combinations."""
    seed: int = 0
    concurrent: int | None = None
    """Trials at a time; None: as many as the cluster has room for."""
    halving: Halving | None = None
    """Ends trials that fall behind; None: all run to their end."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One point of a search: its changes, and its numbers or the error it failed with."""

    changes: Changes
    metrics: dict[str, float]
    error: str | None
    seconds: float
    stopped: float | None = None
    """Epoch at which the search ended it early; it then has no numbers. None: it ran to its end."""

    @property
    def is_complete(self) -> bool:
        """Whether it ran to its end and has its numbers."""
        return self.error is None and self.stopped is None

    @property
    def id(self) -> str:
        """A name that depends on the changes alone, so the same after a restart."""
        return trial_id(self.changes)


def trial_id(changes: Mapping[str, Any]) -> str:
    """Return ten hexadecimal digits that depend on the changes alone."""
    text = json.dumps(dict(changes), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def search(
    run_trial: RunTrial,
    space: Mapping[str, Dimension],
    *,
    how: Search,
    resources: Resources,
    out: Path,
    on_trial: Callable[[Trial], None],
) -> list[Trial]:
    """Return all trials of a search over dotted keys, in Tune's order; run_trial must pickle.

    run_trial maps changes such as {"scan.entropy_weight": 5.0} to numbers, how.metric among them,
    and tells how far it is where `how` has a halving. `out` keeps Tune's state: called again after
    the driver was killed, the search goes on with the trials that had not ended. on_trial is
    called here, in the driver, for each trial that ends: once, and once more for one that ended
    in the second before a kill.
    """
    from ray import tune

    trainable = tune.with_resources(
        _trainable(run_trial), {"CPU": resources.cpus, "GPU": resources.gpus}
    )
    with _quiet():
        results = _tuner(trainable, space, how, out.absolute(), on_trial).fit()
    ended = [results[i] for i in range(len(results))]
    trials = [_trial(result.config or {}, result.metrics, result.error) for result in ended]
    for failed in (trial for trial in trials if trial.error is not None):
        on_trial(failed)  # Tune calls back before it knows the reason
    return trials


def _tuner(
    trainable: Any,
    space: Mapping[str, Dimension],
    how: Search,
    out: Path,
    on_trial: Callable[[Trial], None],
) -> Any:
    """Return Tune's search in a folder: the one that was begun there, if any."""
    from ray import tune
    from ray.tune.logger import JsonLoggerCallback

    folder, store = _storage(out)
    if tune.Tuner.can_restore(folder, storage_filesystem=store):
        log.info("sweep: continuing the search in %s", out)
        return tune.Tuner.restore(
            folder, trainable=trainable, resume_errored=True, storage_filesystem=store
        )
    return tune.Tuner(
        trainable,
        param_space=_param_space(space, how),
        tune_config=_tune_config(how),
        run_config=tune.RunConfig(
            name=out.name,
            storage_path=_storage(out.parent)[0],
            storage_filesystem=store,
            # Tune reads its results back from the JSON logger's files.
            callbacks=[_callback(on_trial), JsonLoggerCallback()],  # type: ignore[no-untyped-call]
            failure_config=tune.FailureConfig(max_failures=0),
            verbose=0,
            log_to_file=True,
        ),
    )


def _storage(folder: Path) -> tuple[str, Any]:
    """Return a folder as Tune takes it, and pyarrow's filesystem; None for the machine's own."""
    if isinstance(folder, StoredPath):
        return place(folder.url), filesystem(folder.url)
    return str(folder), None


def _trainable(run_trial: RunTrial) -> Callable[[Changes], None]:
    def trial(changes: Changes) -> None:
        from ray import tune

        def tell(epoch: float, value: float) -> None:
            tune.report({EPOCH: epoch, VALUE: value})

        tune.report(dict(run_trial(changes, tell)))

    return trial


def _param_space(space: Mapping[str, Dimension], how: Search) -> dict[str, Any]:
    from ray import tune

    if how.algorithm != "grid":
        return {key: dimension.domain() for key, dimension in space.items()}
    return {key: tune.grid_search(list(dimension.ends)) for key, dimension in space.items()}


def _tune_config(how: Search) -> Any:
    from ray import tune
    from ray.tune.search import BasicVariantGenerator

    algorithm: Any
    if how.algorithm == "optuna":
        from ray.tune.search.optuna import OptunaSearch

        algorithm = without_reports(OptunaSearch)(metric=how.metric, mode=how.mode, seed=how.seed)
    else:
        # Tune ignores max_concurrent_trials for a generator that it did not make.
        most = how.concurrent or 0
        algorithm = BasicVariantGenerator(max_concurrent=most, random_state=how.seed)
    return tune.TuneConfig(
        metric=how.metric,
        mode=how.mode,
        search_alg=algorithm,
        scheduler=scheduler(how.halving) if how.halving else None,
        num_samples=1 if how.algorithm == "grid" else how.samples,
        max_concurrent_trials=how.concurrent if how.algorithm == "optuna" else None,
        reuse_actors=True,  # a new process for every trial costs three CPU seconds
    )


def _callback(on_trial: Callable[[Trial], None]) -> Any:
    from ray import tune

    class Notify(tune.Callback):
        """Tells the driver of every trial that ends; pickled with the search and restored."""

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            on_trial(_trial(trial.config, trial.last_result, None))

    return Notify()


def _trial(changes: Mapping[str, Any], result: Mapping[str, Any] | None, error: Any) -> Trial:
    last = dict(result or {})
    seconds = float(last.get("time_total_s", 0))
    if error:
        return Trial(dict(changes), {}, _reason(error), seconds)
    if VALUE in last:
        return Trial(dict(changes), {}, None, seconds, stopped=float(last[EPOCH]))
    return Trial(dict(changes), _numbers(last), None, seconds)


def _reason(error: Any) -> str:
    """Return the sentence of a user's mistake, the last line of another error."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, UserError):
        return str(cause)
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


_TUNE_KEYS = frozenset(
    (
        *("timestamp", "done", "training_iteration", "time_this_iter_s", "time_total_s", "pid"),
        *("time_since_restore", "iterations_since_restore", "should_checkpoint"),
    )
)


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """Return what run_trial reported, less the entries that Tune adds."""
    return {
        key: float(value)
        for key, value in result.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key not in _TUNE_KEYS
    }


_SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the old output obeys verbose=0
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a report on the way has not the result's metric
    "TUNE_GLOBAL_CHECKPOINT_S": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths in an experiment are relative to where it was started
}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Tune from printing its own tables and tracebacks, and from writing TensorBoard files."""
    before = {key: os.environ.get(key) for key in _SETTINGS}
    logger = logging.getLogger("ray.tune")
    level = logger.level
    os.environ.update(_SETTINGS)
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
