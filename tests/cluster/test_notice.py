"""A checkpoint at notice: before the workers of a training are ended, and no step is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.train.v2._internal.execution.controller.state import ResizingState, RunningState
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision

from selfsup_ray.cluster import notice
from selfsup_ray.cluster.notice import Notice


class Group:
    """Workers as the controller sees them, all in this process; rank 0 is what is asked."""

    def __init__(self) -> None:
        self.asked = list[str]()

    def execute_single(self, rank: int, function: Callable[..., Any], *arguments: Any) -> Any:
        assert rank == 0
        self.asked.append(function.__name__)
        return function(*arguments)

    execute_single_async = execute_single


class DeadGroup(Group):
    def execute_single(self, rank: int, function: Callable[..., Any], *arguments: Any) -> Any:
        raise RayActorError


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[notice._Told]:
    """What a worker that starts has been told: nothing."""
    told = notice._Told()
    monkeypatch.setattr(notice, "_told", told)
    monkeypatch.setattr(notice, "LOOK_EVERY_S", 0.01)
    yield told


def resizing() -> ResizingState:
    return ResizingState(ResizeDecision(num_workers=2, resources_per_worker={"CPU": 1}))


def test_before_a_resize_the_controller_waits_until_rank_0_has_saved_and_rank_0_for_its_end(
    worker: notice._Told, monkeypatch: pytest.MonkeyPatch
):
    ended = threading.Event()
    monkeypatch.setattr(notice.time, "sleep", lambda s: ended.wait(60) if s > 1 else None)
    steps = list[int]()

    def train() -> None:
        for step in range(1000):
            if notice.is_told():
                notice.saved()  # waits
                break
            steps.append(step)
            ended.wait(0.01)

    thread = threading.Thread(target=train)
    thread.start()
    controller, group = Notice(), Group()
    controller.after_worker_group_training_start(group)
    controller.after_controller_state_update(resizing(), RunningState())
    assert not notice.is_told(), "a start is no resize"
    controller.after_controller_state_update(RunningState(), resizing())
    assert worker.is_saved.is_set() and thread.is_alive() and len(steps) < 1000
    ended.set()
    thread.join()


def test_a_node_that_is_drained_is_told_of_once_and_training_goes_on(worker: notice._Told):
    controller, group = Notice(), Group()
    controller.after_worker_group_training_start(group)
    calm = SimpleNamespace(get_preemption_info=lambda: None)
    drained = SimpleNamespace(get_preemption_info=lambda: "a node")
    controller.after_worker_group_poll_status(calm)
    assert not notice.is_told()
    for _ in range(3):
        controller.after_worker_group_poll_status(drained)
    assert group.asked == ["tell"] and notice.is_told()
    began = time.monotonic()
    notice.saved()
    assert time.monotonic() - began < 30 and notice.is_told(), "every record is a checkpoint"
    another = Group()
    controller.after_worker_group_training_start(another)
    controller.after_worker_group_poll_status(drained)
    assert another.asked == ["tell"], "new workers are told, too"


def test_a_checkpoint_without_notice_waits_for_nothing(worker: notice._Told):
    notice.saved()
    assert not worker.is_saved.is_set()


def test_a_worker_that_dies_at_notice_or_makes_no_record_does_not_hold_a_resize_up(
    worker: notice._Told, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(notice, "RECORD_S", 0.05)
    for group, says in ((DeadGroup(), "no checkpoint before"), (Group(), "no record within")):
        controller = Notice()
        controller.after_worker_group_training_start(group)
        controller.after_controller_state_update(RunningState(), resizing())
        assert says in caplog.text
    controller = Notice()
    controller.after_controller_state_update(RunningState(), resizing())
    group = Group()
    controller.after_worker_group_training_start(group)
    controller.before_worker_group_shutdown(group)
    controller.after_controller_state_update(RunningState(), resizing())
    assert group.asked == [], "nobody is there"
