"""map_shards against a plain loop, with dying workers and failing shards."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from selfsup_ray.cluster.shards import map_shards
from selfsup_ray.config import Resources
from selfsup_ray.errors import ArtifactError, ResourceError


@pytest.fixture(scope="module")
def by_value(ray_session: None) -> Iterator[None]:
    """Send this module's functions to workers by value: they cannot import it."""
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def square_in_file(folder: Path, shard: int) -> int:
    """Note begin and end of the shard's work as files, for the test to count."""
    (folder / f"{shard}-{time.monotonic()}.begin").touch()
    time.sleep(0.05)
    (folder / f"{shard}-{time.monotonic()}.end").touch()
    return shard * shard


def most_at_once(folder: Path) -> int:
    names = [path.name.rsplit("-", 1)[1] for path in folder.iterdir()]
    events = sorted((float(n.rsplit(".", 1)[0]), n.endswith("begin")) for n in names)
    running = most = 0
    for _, begins in events:
        running += 1 if begins else -1
        most = max(most, running)
    return most


@pytest.mark.parametrize("workers", [0, 2])
def test_every_shard_gives_its_result_once_with_at_most_so_many_in_flight(
    by_value, tmp_path, workers
):
    fn = partial(square_in_file, tmp_path)
    results = list(map_shards(fn, range(3, 14), Resources(workers=workers)))
    assert sorted(results) == [(shard, shard * shard) for shard in range(3, 14)]
    assert most_at_once(tmp_path) <= max(workers, 1)


def die_once(folder: Path, shard: int) -> int:
    mark = folder / f"{shard}"
    if shard == 2 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return shard


def test_a_killed_worker_changes_nothing(by_value, tmp_path):
    results = map_shards(partial(die_once, tmp_path), range(5), Resources(workers=2))
    assert sorted(results) == [(shard, shard) for shard in range(5)]
    assert (tmp_path / "2").exists()


def unreadable_once(folder: Path, shard: int) -> int:
    mark = folder / f"{shard}"
    if not mark.exists():
        mark.touch()
        raise OSError("the file system hiccups")
    return shard


def test_a_file_that_cannot_be_read_is_tried_again(by_value, tmp_path):
    results = map_shards(partial(unreadable_once, tmp_path), range(3), Resources(workers=2))
    assert sorted(results) == [(shard, shard) for shard in range(3)]


def refuse_third(folder: Path, shard: int) -> int:
    (folder / f"{shard}").touch()
    if shard == 3:
        raise ArtifactError(f"shard {shard} belongs to another corpus")
    time.sleep(0.2)
    return shard


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_function_arrives_as_itself_and_stops_the_rest(by_value, tmp_path, workers):
    with pytest.raises(ArtifactError, match=r"^shard 3 belongs to another corpus$"):
        list(map_shards(partial(refuse_third, tmp_path), range(50), Resources(workers=workers)))
    assert len(list(tmp_path.iterdir())) < 10


def test_no_shards_give_no_results_and_need_no_ray():
    assert list(map_shards(abs, [], Resources(workers=3))) == []


def test_too_many_cpus_are_refused_by_name(ray_session):
    with pytest.raises(ResourceError, match="graph asks for 9 workers"):
        list(map_shards(abs, range(3), Resources(workers=9), label="graph"))
