"""Which failures of a training's workers it goes on after, and when it is given up."""

from __future__ import annotations

from typing import Any

from ray.exceptions import RayActorError
from ray.train import ControllerError, UserCallback, WorkerGroupError


class GivenUpError(Exception):
    """Too many failures in a row, without a checkpoint between them."""

    def __init__(self, failures: int, errors: dict[int, Exception]) -> None:
        super().__init__(failures, errors)
        self.failures, self.errors = failures, errors

    def __str__(self) -> str:
        shown = "; ".join(f"worker {rank}: {error!r}" for rank, error in self.errors.items())
        notes = [note for error in self.errors.values() for note in getattr(error, "__notes__", ())]
        last = f"{self.failures} failures without a new checkpoint between them; the last: {shown}"
        return "\n".join([last, *notes[:1]])


class Patience(UserCallback):
    """Counts failures since the last checkpoint, in Ray Train's controller.

    Every checkpoint starts the count anew: a training of weeks may lose any number of nodes, and an
    error that comes back at the same step stops it soon. A node that was given back with notice is
    no failure.
    """

    def __init__(self, max_failures: int) -> None:
        self.max_failures, self.failures = max_failures, 0

    def after_report(self, *context: Any, **report: Any) -> None:
        """Start anew: the workers report when they have written a checkpoint."""
        self.failures = 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Count a failure; raise GivenUpError when it is one too many."""
        if any(map(_was_drained, worker_exceptions.values())):
            return
        self.failures += 1
        if self.failures > self.max_failures:
            raise GivenUpError(self.failures, worker_exceptions)


def _was_drained(error: Exception) -> bool:
    """Return whether a worker died with a node that its owner had said it would take back."""
    cause = getattr(error, "health_check_failure", error)
    return isinstance(cause, RayActorError) and bool(cause.preempted)


def worker_errors(error: Exception) -> dict[int, Exception]:
    """Return what the workers of a training that was given up raised, by rank."""
    if isinstance(error, ControllerError) and isinstance(error.controller_failure, GivenUpError):
        return error.controller_failure.errors
    if isinstance(error, WorkerGroupError):
        return dict(error.worker_failures)
    return {}
