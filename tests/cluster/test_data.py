"""Streams of shards through Ray Data: every shard once in the results, whatever dies."""

import os
import signal
from pathlib import Path

import pytest

from selfsup_ray.cluster.data import stream_actors, stream_tasks
from selfsup_ray.config import Resources
from selfsup_ray.errors import ArtifactError, ResourceError


def square(shard: int) -> dict[str, int]:
    return {"square": shard * shard}


def test_no_workers_means_this_process_in_order():
    pids = [
        facts["pid"]
        for _, facts in stream_tasks(
            lambda shard: {"pid": os.getpid()}, [4, 2], Resources(workers=0), stage="test"
        )
    ]
    assert pids == [os.getpid()] * 2
    made = stream_actors(lambda: square, [4, 2], Resources(workers=0), stage="test")
    assert list(made) == [(4, {"square": 16}), (2, {"square": 4})]


def test_nothing_to_do_needs_no_ray():
    assert list(stream_tasks(square, [], Resources(workers=2), stage="test")) == []
    assert list(stream_actors(lambda: square, [], Resources(workers=2), stage="test")) == []


def test_tasks_answer_once_for_every_shard(ray_session):
    def work(shard):
        return {"square": shard * shard, "pid": os.getpid()}

    shards = [3, 1, 41, 7, 2]
    found = dict(stream_tasks(work, shards, Resources(workers=3), stage="test"))
    assert {shard: facts["square"] for shard, facts in found.items()} == {s: s * s for s in shards}
    assert os.getpid() not in {facts["pid"] for facts in found.values()}


def test_actors_are_made_once_and_answer_once_for_every_shard(tmp_path, ray_session):
    made = tmp_path / "made"
    made.mkdir()

    def make():
        (made / str(os.getpid())).touch()
        return lambda shard: {"pid": os.getpid()}

    found = dict(stream_actors(make, range(9), Resources(workers=2), stage="test"))
    assert sorted(found) == list(range(9))
    assert len(list(made.iterdir())) <= 2
    assert {str(facts["pid"]) for facts in found.values()} <= {p.name for p in made.iterdir()}


def test_a_killed_worker_is_replaced_and_its_shard_done_again(tmp_path, ray_session):
    killed: Path = tmp_path / "killed"

    def work(shard):
        if shard == 5 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"square": shard * shard}

    found = list(stream_tasks(work, range(8), Resources(workers=2), stage="test"))
    assert killed.exists()
    assert sorted(found) == [(shard, {"square": shard * shard}) for shard in range(8)]


def test_an_error_of_the_work_arrives_as_itself(ray_session):
    def work(shard):
        raise ArtifactError(f"shard {shard} is not there")

    with pytest.raises(ArtifactError, match="shard 6 is not there"):
        list(stream_tasks(work, [6], Resources(workers=1), stage="test"))


def test_a_hiccup_of_the_file_system_is_tried_again(tmp_path, ray_session):
    tried = tmp_path / "tried"

    def work(shard):
        if not tried.exists():
            tried.touch()
            raise OSError(116, "Stale file handle")
        return {"shard": shard}

    found = list(stream_tasks(work, [6], Resources(workers=1), stage="test"))
    assert found == [(6, {"shard": 6})] and tried.exists()


def test_more_than_the_cluster_has_is_said_at_once(ray_session):
    with pytest.raises(ResourceError, match="embed asks for"):
        list(stream_actors(lambda: square, [1], Resources(workers=99), stage="embed"))
    with pytest.raises(ResourceError, match="ingest asks for"):
        list(stream_tasks(square, [1], Resources(gpus=1), stage="ingest"))


def test_a_stream_may_be_left_early(tmp_path, ray_session):
    def work(shard):
        (tmp_path / str(shard)).touch()
        return {}

    for _ in stream_tasks(work, range(500), Resources(workers=2), stage="test"):
        break
    assert dict(stream_tasks(square, [3], Resources(workers=2), stage="test")) == {3: {"square": 9}}
    assert len(list(tmp_path.iterdir())) < 500
