"""Notice to the workers of a training that they will be ended: they write a checkpoint before.

Ray Train's controller calls `Notice`: when it is about to start the workers anew because there is
room for more, and when a node of theirs is drained, as spot nodes are before they are taken away.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

log = logging.getLogger(__name__)

Why = Literal["resize", "drain"]

RECORD_S = 120.0
"""Longest wait for the next record of a training, after which it writes the checkpoint."""
LOOK_EVERY_S = 0.2


class _Told:
    """What a worker's process was told, and whether it has done it."""

    def __init__(self) -> None:
        self.why: Why | None = None
        self.is_saved = threading.Event()


_told = _Told()
"""Of this process: written by calls of the controller, read by the thread that trains."""


def tell(why: Why) -> None:
    """Note in rank 0's process that the workers will be ended; it stops the others with it."""
    _told.why = why


def is_told() -> bool:
    """Return whether the workers will be ended, so that every record is a checkpoint from now on.

    A node that is drained lives on for minutes, and so does the training until then.
    """
    return _told.why is not None


def is_saved() -> bool:
    """Return whether this worker has written a checkpoint after it was told."""
    return _told.is_saved.is_set()


def saved() -> None:
    """Note that a checkpoint is written; before a resize, wait for the end."""
    if _told.why is None:
        return
    _told.is_saved.set()
    if _told.why == "resize":  # what is trained from here on would be trained again
        time.sleep(RECORD_S)


class Notice(WorkerGroupCallback, ControllerCallback):
    """Tells rank 0, in Ray Train's controller; before a resize it waits for the checkpoint."""

    def __init__(self) -> None:
        self._group: Any = None
        self._is_draining = False

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        """Note whom to tell."""
        self._group, self._is_draining = worker_group, False

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        """Note that nobody is there."""
        self._group = None

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Tell once that a node of theirs will be taken away."""
        if self._is_draining or worker_group_status.get_preemption_info() is None:
            return
        self._is_draining = True
        log.warning("a node is being drained: from now on every record is a checkpoint")
        self._group.execute_single_async(0, tell, "drain")

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Tell that other workers take their place, and wait until these have saved."""
        from ray.train.v2._internal.execution.controller.state import ResizingState

        if not isinstance(current_state, ResizingState) or self._group is None:
            return
        try:
            self._group.execute_single(0, tell, "resize")
            if not within(RECORD_S, lambda: bool(self._group.execute_single(0, is_saved))):
                log.warning("no record within %.0f s: steps are trained again", RECORD_S)
        except ray.exceptions.RayError as error:  # a worker died just now: as if without notice
            log.warning("no checkpoint before the resize: %s", error)


def within(seconds: float, true: Callable[[], bool]) -> bool:
    """Return whether a condition came true in so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(LOOK_EVERY_S)
    return False
