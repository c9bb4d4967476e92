"""Joining and starting Ray, and saying at once what it lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from selfsup_ray.cluster.session import (
    connect,
    most_added,
    object_store_bytes,
    require_resources,
    session,
    workers_that_fit,
)
from selfsup_ray.config import Resources
from selfsup_ray.errors import ResourceError
from selfsup_ray.resources import TrainResources


def test_asking_for_more_than_ray_has_fails_at_once_and_names_both(ray_session):
    with pytest.raises(ResourceError, match=r"pretext asks for 3 workers with 2 CPUs.* room for 2"):
        require_resources(Resources(workers=3, cpus=2), stage="pretext")
    with pytest.raises(ResourceError, match=r"1 GPUs each.*1 nodes with \(4 CPUs, 0 GPUs\)"):
        require_resources(Resources(workers=1, gpus=1), stage="pretext")


def test_an_elastic_stage_needs_room_for_its_fewest_workers_only(ray_session, caplog):
    elastic = TrainResources(workers=9, min_workers=2, cpus=2)
    with caplog.at_level("INFO"):
        require_resources(elastic, stage="pretext")
    assert "pretext: room for 2 of 9 workers now; it starts with these" in caplog.text
    three = TrainResources(workers=9, min_workers=3, cpus=2)
    with pytest.raises(ResourceError, match=r"at least 3 workers with 2 CPUs.* room for 2"):
        require_resources(three, stage="pretext")


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


def launched(max_workers: int, **kinds: dict[str, object]) -> dict[str, object]:
    head = {"head": {"resources": {"CPU": 64}}}
    types = {name: {"resources": {"CPU": 4}, **kind} for name, kind in kinds.items()}
    return {
        "max_workers": max_workers,
        "head_node_type": "head",
        "available_node_types": {**head, **types},
    }


@pytest.mark.parametrize(
    ("cluster", "fit"),
    [
        (launched(3, data={"max_workers": 2}), 4),  # two workers a node
        (launched(3, data={"max_workers": 8}), 6),  # the bound on all nodes
        (launched(3, data={"max_workers": 1}, graph={"max_workers": 9}), 6),
        (launched(3, graph={}), 6),  # a type without its own bound
        (launched(3, data={}, gpu={"resources": {"GPU": 4}, "min_workers": 2}), 2),
        (launched(3, large={"resources": {"CPU": 9}, "max_workers": 1}, small={}), 8),
        (launched(3, data={"resources": {"CPU": 1}}), 0),  # two nodes do not make one worker
    ],
)
def test_an_autoscaler_adds_nodes_up_to_the_bounds_of_each_type_and_of_all(cluster, fit):
    assert most_added(cluster, Resources(workers=1, cpus=2)) == fit


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
from selfsup_ray.resources import TrainResources
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
