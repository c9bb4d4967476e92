"""Object storage: a path that is a URL, and its copies in a bounded cache."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from selfsup_ray import object_store, storage, storage_cache
from selfsup_ray.artifacts import (
    ShardedArray,
    begin,
    finish,
    read_done,
    read_json,
    whole_file,
    write_json,
    write_text,
)
from selfsup_ray.config import build, to_dict
from selfsup_ray.errors import ConfigError, StorageError
from selfsup_ray.experiment import Experiment
from selfsup_ray.object_store import version_of
from selfsup_ray.storage import StoredPath, fetched, located, reached, relative, remove_tree
from selfsup_ray.tracking import Tracker, read_records


def test_a_local_path_is_handed_back_as_it_is(tmp_path: Path):
    assert located(tmp_path) is tmp_path
    assert type(located("runs/x")) is type(Path("runs/x"))


def test_a_stored_path_keeps_its_type_and_its_url():
    path = located("s3://bucket/runs/x")
    relatives = [path / "a" / "b.npy", (path / "a").parent, path.with_name("y"), path.parents[0]]
    assert all(type(each) is StoredPath for each in [path, *relatives])
    assert [str(each) for each in relatives] == [
        *("s3://bucket/runs/x/a/b.npy", "s3://bucket/runs/x"),
        *("s3://bucket/runs/y", "s3://bucket/runs"),
    ]
    assert f"{path}" == str(path.resolve()) == str(path.absolute()) == "s3://bucket/runs/x"
    assert str(path / ".." / "y" / "c.txt") == "s3://bucket/runs/x/../y/c.txt"
    assert (path / ".." / "y" / "c.txt").url == "s3://bucket/runs/y/c.txt"
    assert str((path / "a" / "b").relative_to(path)) == "a/b"


def test_a_stored_path_survives_pickling_plain_paths_and_configs():
    path = located("s3://bucket/runs/x")
    assert pickle.loads(pickle.dumps(path)) == path
    assert type(pickle.loads(pickle.dumps(path))) is StoredPath
    assert type(located(Path("s3://bucket/runs/x"))) is StoredPath
    made = build(Experiment, {"out": "s3://bucket/runs/x", "ingest": {"source": "photos"}})
    assert type(made.out) is StoredPath and type(made.folder("embed")) is StoredPath
    assert to_dict(made)["out"] == "s3://bucket/runs/x"
    assert type(build(Experiment, to_dict(made)).out) is StoredPath


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://key:secret@bucket/x", r"s3://\*\*\*@bucket/x must be s3://bucket/folder alone"),
        ("s3://bucket/x?endpoint_override=localhost", "AWS_ENDPOINT_URL"),
        ("s3://", "names no bucket"),
    ],
)
def test_a_url_with_credentials_a_query_or_no_bucket_is_refused(url: str, message: str):
    with pytest.raises(ConfigError, match=message):
        located(url)


def test_ways_between_folders_are_relative_on_one_store_and_whole_between_two(tmp_path: Path):
    corpus, embed = located("s3://bucket/runs/x/ingest"), located("s3://bucket/runs/x/embed")
    assert relative(corpus, embed) == "../ingest"
    assert reached(embed, "../ingest").resolve() == corpus
    assert relative(tmp_path / "a", tmp_path / "b") == "../a"
    assert relative(tmp_path / "a", embed) == str(tmp_path / "a")
    assert reached(embed, str(tmp_path / "a")) == tmp_path / "a"
    assert reached(tmp_path, str(corpus)) == corpus


def test_what_is_written_is_read_back_listed_and_removed(bucket: str):
    out = located(f"{bucket}/runs/x")
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    array = ShardedArray.create(out / "rows", shard_rows=[2, 2], row_shape=(3,), dtype="float32")
    assert array.unwritten() == [0, 1] and not array.is_written(0)
    array.write_shard(1, rows[2:])
    assert array.unwritten() == [0] and array.is_written(1)
    array.write_shard(0, rows[:2])
    again = ShardedArray.open(out / "rows")
    assert np.array_equal(np.asarray(again), rows) and isinstance(again.shard(0), np.memmap)
    assert (out / "rows").is_dir() and not (out / "rows").is_file()
    assert (out / "rows" / "00000.npy").stat().st_size == os.stat(
        out / "rows" / "00000.npy"
    ).st_size
    assert [str(p.name) for p in out.glob("rows/*.npy")] == ["00000.npy", "00001.npy"]
    assert [p.parent.name for p in out.glob("*/array.json")] == ["rows"]
    assert storage.size_below(out) == sum(p.stat().st_size for p in (out / "rows").iterdir())
    (out / "rows" / "00000.npy").unlink()
    assert not (out / "rows" / "00000.npy").exists()
    with pytest.raises(FileNotFoundError):
        (out / "rows" / "00000.npy").unlink()
    with pytest.raises(FileNotFoundError):
        fetched(f"{bucket}/runs/x/rows/00000.npy")
    remove_tree(out)
    assert not out.exists() and list(out.iterdir()) == []


def test_a_file_is_not_there_before_it_is_whole(bucket: str):
    path = located(f"{bucket}/a.txt")
    with pytest.raises(ZeroDivisionError), whole_file(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert not path.exists()
    with whole_file(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    with pytest.raises(AssertionError, match="whole_file"):
        path.open("w")


def test_another_node_never_sees_a_stale_copy(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = located(f"{bucket}/state.json")
    for i in range(3):  # texts of one length: the size alone tells nothing
        monkeypatch.setenv("SELFSUP_RAY_CACHE", str(tmp_path / "one"))
        write_json(path, {"step": i})
        monkeypatch.setenv("SELFSUP_RAY_CACHE", str(tmp_path / "two"))
        assert read_json(path) == {"step": i}
    path.unlink()
    monkeypatch.setenv("SELFSUP_RAY_CACHE", str(tmp_path / "one"))
    assert not path.exists()


def test_copies_stay_below_the_bound_the_least_recently_used_go_and_open_maps_stay(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SELFSUP_RAY_CACHE_GB", "0.001")
    monkeypatch.setattr(storage_cache, "IN_USE_S", 0.0)
    array = ShardedArray.create(
        located(f"{bucket}/rows"), shard_rows=[1000] * 8, row_shape=(50,), dtype="float32"
    )
    opened = None
    for i in range(8):
        array.write_shard(i, np.full((1000, 50), i))
        opened = array.shard(0) if i == 0 else opened  # 0.2 MB, mapped while its file goes
        if i < 3:
            os.utime(storage_cache.copy_of(*_of(array.shard_path(0))))
        assert _taken(tmp_path / "cache") <= 1_000_000
    here = {p.name for p in (tmp_path / "cache" / "copies").rglob("*.npy")}
    assert "00007.npy" in here and "00001.npy" not in here
    assert opened is not None and (opened == 0).all()
    for i in range(8):
        assert (array.shard(i) == i).all()
        assert _taken(tmp_path / "cache") <= 1_000_000


def _of(path: Path) -> tuple[str, object_store.Version]:
    assert isinstance(path, StoredPath)
    version = version_of(path.url)
    assert version is not None
    return path.url, version


def _taken(cache: Path) -> int:
    return sum(p.stat().st_size for p in (cache / "copies").rglob("*") if p.is_file())


def test_a_file_larger_than_the_bound_is_written_but_reading_it_says_what_to_do(
    bucket: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SELFSUP_RAY_CACHE_GB", "0.0001")
    path = located(f"{bucket}/large.txt")
    write_text(path, "x" * 200_000)
    with pytest.raises(StorageError, match="Set SELFSUP_RAY_CACHE_GB higher on every node"):
        path.read_text()
    monkeypatch.setenv("SELFSUP_RAY_CACHE_GB", "many")
    with pytest.raises(ConfigError, match="SELFSUP_RAY_CACHE_GB must be a positive number"):
        path.read_text()


def test_copies_that_were_just_asked_for_are_not_dropped_for_others(
    bucket: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SELFSUP_RAY_CACHE_GB", "0.0003")
    monkeypatch.setattr(storage_cache, "IN_USE_S", 60.0)
    monkeypatch.setattr(storage_cache, "PATIENCE_S", 0.1)
    first, second = located(f"{bucket}/first"), located(f"{bucket}/second")
    write_text(first, "1" * 200_000)
    write_text(second, "2" * 200_000)
    assert first.read_text()[0] == "1"
    with pytest.raises(StorageError, match="finds no room: the copies in use on this node"):
        second.read_text()


def test_a_stage_that_is_stamped_has_all_its_records_on_the_store(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = located(f"{bucket}/x/embed")
    assert not begin(out, stage="embed", config={}, inputs={})
    tracker = Tracker(out, None)
    for step in range(5):
        tracker.log([{"step": step, "loss": 1.0}])
    finish(out, stage="embed", config={}, inputs={}, seconds=1.0)
    monkeypatch.setenv("SELFSUP_RAY_CACHE", str(tmp_path / "another"))
    assert [record["step"] for record in read_records(out / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    again = Tracker(out, None)
    again.log([{"step": 4, "loss": 2.0}, {"step": 5, "loss": 3.0}])
    again.finish()
    monkeypatch.setenv("SELFSUP_RAY_CACHE", str(tmp_path / "third"))
    assert [r["loss"] for r in read_records(out / "metrics.jsonl")] == [1.0] * 5 + [3.0]
    assert read_done(out).stage == "embed" and begin(out, stage="embed", config={}, inputs={})
