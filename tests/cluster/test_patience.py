"""A training is given up after failures in a row, not after failures in all."""

from __future__ import annotations

import pickle

import pytest
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, WorkerGroupError

from selfsup_ray.cluster.patience import GivenUpError, Patience, worker_errors

BUG = {0: ValueError("a bug"), 1: RuntimeError("connection closed by peer")}


def test_failures_without_a_checkpoint_between_them_end_a_training():
    patience = Patience(max_failures=2)
    for _ in range(2):
        patience.after_exception(None, BUG)
    with pytest.raises(GivenUpError, match=r"3 failures without a new checkpoint.*a bug"):
        patience.after_exception(None, BUG)


def test_any_number_of_failures_with_checkpoints_between_them_is_forgiven():
    patience = Patience(max_failures=1)
    for _ in range(20):
        patience.after_exception(None, BUG)
        patience.after_report(run_context=None, metrics=[], checkpoint=None)


def test_a_node_taken_back_with_notice_is_no_failure():
    drained = ActorDiedError()
    drained._preempted = True
    patience = Patience(max_failures=0)
    patience.after_exception(None, {0: drained, 1: RuntimeError("connection closed by peer")})
    with pytest.raises(GivenUpError):
        patience.after_exception(None, BUG)


def test_what_the_workers_raised_is_found_in_what_ray_train_raises():
    given_up = ControllerError(GivenUpError(3, BUG))
    assert worker_errors(pickle.loads(pickle.dumps(given_up))).keys() == BUG.keys()
    assert worker_errors(WorkerGroupError("both", BUG)) == BUG
    assert worker_errors(ControllerError(OSError("no disk"))) == {}
