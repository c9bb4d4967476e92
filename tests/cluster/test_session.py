"""Joining and starting Ray, and saying at once what it lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from selfsup_ray.cluster.session import (
    connect,
    object_store_bytes,
    require_resources,
    session,
    workers_that_fit,
)
from selfsup_ray.config import Resources
from selfsup_ray.errors import ResourceError


def test_asking_for_more_than_ray_has_fails_at_once_and_names_both(ray_session):
    with pytest.raises(ResourceError, match=r"pretext asks for 3 workers with 2 CPUs.* room for 2"):
        require_resources(Resources(workers=3, cpus=2), stage="pretext")
    with pytest.raises(ResourceError, match=r"1 GPUs each.*1 nodes with \(4 CPUs, 0 GPUs\)"):
        require_resources(Resources(workers=1, gpus=1), stage="pretext")


def test_what_fits_is_not_refused(ray_session):
    require_resources(Resources(workers=4, cpus=1), stage="pretext")
    require_resources(Resources(workers=0, cpus=64), stage="pretext")  # this process, not Ray


@pytest.mark.parametrize(
    ("node", "fit"),
    [
        ({"CPU": 8.0, "GPU": 1.0}, 2),
        ({"CPU": 3.0, "GPU": 4.0}, 1),
        ({"CPU": 16.0}, 0),
    ],
)
def test_a_worker_must_fit_on_one_node(node, fit):
    assert workers_that_fit(node, Resources(workers=1, cpus=2, gpus=0.5)) == fit


def test_a_second_connection_is_the_first_one(ray_session):
    import ray

    before = ray.get_runtime_context().gcs_address
    connect()
    with session():
        assert ray.get_runtime_context().gcs_address == before
    assert ray.is_initialized()  # the block did not make the connection, so it does not end it


OFFLINE = """
import time
from selfsup_ray.cluster.session import connect
from selfsup_ray.errors import ResourceError
began = time.monotonic()
try:
    connect("127.0.0.1:1")
except ResourceError as error:
    print(error, time.monotonic() - began < 60)
"""


def test_an_address_where_nothing_answers_is_an_error_and_not_a_long_wait():
    done = subprocess.run([sys.executable, "-c", OFFLINE], capture_output=True, text=True)
    assert "No Ray cluster answers at 127.0.0.1:1" in done.stdout, done.stderr
    assert "True" in done.stdout


LOCAL = """
import os, ray
from selfsup_ray.cluster.session import session
with session(num_cpus=1):
    print(ray.get(ray.remote(lambda: os.environ["RAY_AUTH_MODE"]).remote()))
    store = ray.cluster_resources()["object_store_memory"]
    print(int(store), os.environ["RAY_USAGE_STATS_ENABLED"])
    print(len(os.environ["RAY_AUTH_TOKEN"]))
print(ray.is_initialized())
"""


@pytest.mark.slow
def test_a_local_ray_asks_for_a_token_of_its_own_and_leaves_no_trace_in_the_home(tmp_path: Path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", LOCAL], capture_output=True, text=True, env=environment
    )
    mode, store, length, connected = done.stdout.splitlines()
    assert (mode, length, connected) == ("token", "64", "False"), done.stderr
    assert store.split()[1] == "0"
    assert int(store.split()[0]) <= object_store_bytes() * 1.1
    assert not (tmp_path / ".ray" / "auth_token").exists()
    assert "Token authentication" not in done.stderr
