"""The run folder: whole files, sharded arrays and stamps."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selfsup_ray.artifacts import (
    ShardedArray,
    begin,
    fingerprint,
    finish,
    progress,
    read_config,
    read_done,
    read_json,
    require_disk,
    versions,
    whole_file,
    write_json,
)
from selfsup_ray.config import Positive, Resources, config, override
from selfsup_ray.errors import ArtifactError


@config
class GraphLike:
    k: Positive = 20
    scale: tuple[float, float] = (0.2, 1.0)
    rate: float = 1e-5
    resources: Resources = Resources()


def claim(out: Path, made: Any, **inputs: str) -> bool:
    return begin(out, stage="graph", config=made, inputs=inputs)


def stamp(out: Path, made: Any, **inputs: str) -> None:
    finish(out, stage="graph", config=made, inputs=inputs, seconds=1.5, facts={"recall": 0.99})


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path: Path):
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"version": 1})
    with pytest.raises(KeyboardInterrupt), whole_file(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert read_json(path) == {"version": 1}
    assert os.listdir(path.parent) == ["x.json"]


def test_a_process_killed_in_mid_write_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "x.json"
    write_json(path, {"version": 1})
    code = (
        "import sys, time; from pathlib import Path; from selfsup_ray.artifacts import whole_file\n"
        "with whole_file(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half'); print('writing', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"writing\n"
        writer.send_signal(signal.SIGKILL)
    assert read_json(path) == {"version": 1}


def test_damaged_json_is_a_user_error_that_names_the_file(tmp_path: Path):
    (tmp_path / "x.json").write_text("{")
    for name in ("x.json", "absent.json"):
        with pytest.raises(ArtifactError, match=name):
            read_json(tmp_path / name)


@pytest.mark.parametrize("shard_rows", [[7], [3, 4], [1, 1, 5], [0, 3, 0, 4], [7, 0]])
def test_a_sharded_array_equals_the_whole_array_however_it_is_cut(
    tmp_path: Path, shard_rows: list[int]
):
    whole = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    array = ShardedArray.create(tmp_path, shard_rows=shard_rows, row_shape=(3,), dtype="float32")
    for i in range(array.num_shards):
        array.write_shard(i, whole[array.offsets[i] : array.offsets[i + 1]])
    stored = ShardedArray.open(tmp_path)
    assert stored.shape == (7, 3)
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(np.asarray(stored), whole)
    ids = np.array([6, 0, 3, 3, 2])
    np.testing.assert_array_equal(stored.rows(ids), whole[ids])
    assert stored.rows(np.array([], dtype=np.int64)).shape == (0, 3)


def test_an_array_of_rows_without_shape_and_without_rows_works(tmp_path: Path):
    array = ShardedArray.create(tmp_path / "a", shard_rows=[2, 1], row_shape=(), dtype="int64")
    array.write_shard(0, np.array([5, 6]))
    array.write_shard(1, np.array([7]))
    np.testing.assert_array_equal(array.rows(np.array([2, 0])), [7, 5])
    empty = ShardedArray.create(tmp_path / "b", shard_rows=[0], row_shape=(4,), dtype="float32")
    empty.write_shard(0, np.zeros((0, 4)))
    assert np.asarray(empty).shape == (0, 4)


def test_a_shard_is_a_read_only_map_of_its_file(tmp_path: Path):
    array = ShardedArray.create(tmp_path, shard_rows=[4], row_shape=(2,), dtype="float32")
    array.write_shard(0, np.ones((4, 2)))
    shard = array.shard(0)
    assert isinstance(shard, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        shard[0] = 2


def test_continuing_an_array_keeps_the_shards_that_are_written(tmp_path: Path):
    shape = {"shard_rows": [2, 2], "row_shape": (), "dtype": "int32"}
    ShardedArray.create(tmp_path, **shape).write_shard(1, np.array([8, 9]))
    again = ShardedArray.create(tmp_path, **shape)
    assert [again.is_written(i) for i in range(2)] == [False, True]
    with pytest.raises(ArtifactError, match=r"00000\.npy is missing"):
        again.shard(0)
    np.testing.assert_array_equal(again.shard(1), [8, 9])


@pytest.mark.parametrize("ids", [[-1], [3], [0, 7]])
def test_an_id_outside_the_array_is_an_assertion_not_another_row(tmp_path: Path, ids: list[int]):
    array = ShardedArray.create(tmp_path, shard_rows=[2, 1], row_shape=(), dtype="int64")
    array.write_shard(0, np.array([5, 6]))
    array.write_shard(1, np.array([7]))
    with pytest.raises(AssertionError, match=r"ids must lie in \[0, 3\)"):
        array.rows(np.array(ids))


def test_a_shard_of_the_wrong_shape_is_an_assertion(tmp_path: Path):
    array = ShardedArray.create(tmp_path, shard_rows=[2], row_shape=(3,), dtype="float32")
    with pytest.raises(AssertionError, match="shard 0"):
        array.write_shard(0, np.zeros((2, 4)))


def test_a_fingerprint_depends_on_config_and_inputs_and_not_on_resources():
    base = fingerprint(GraphLike(), {"a": "1", "b": "2"})
    assert base == fingerprint(GraphLike(resources=Resources(workers=8)), {"b": "2", "a": "1"})
    others = [
        fingerprint(GraphLike(k=21), {"a": "1", "b": "2"}),
        fingerprint(GraphLike(), {"a": "2", "b": "1"}),
        fingerprint(GraphLike(), {"a": "1"}),
    ]
    assert len({base, *others}) == 4


def test_a_folder_is_claimed_then_current_and_stays_so_for_other_resources(tmp_path: Path):
    made = GraphLike(k=7)
    assert claim(tmp_path / "g", made, embeddings="abc") is False
    assert claim(tmp_path / "g", made, embeddings="abc") is False
    stamp(tmp_path / "g", made, embeddings="abc")
    assert claim(tmp_path / "g", made, embeddings="abc") is True
    more = override(made, {"resources.workers": 9})
    assert claim(tmp_path / "g", more, embeddings="abc") is True
    done = read_done(tmp_path / "g")
    assert (done.stage, done.seconds, done.facts) == ("graph", 1.5, {"recall": 0.99})
    assert done.fingerprint == fingerprint(made, {"embeddings": "abc"})
    assert read_config(tmp_path / "g")["k"] == 7


def test_a_folder_from_before_a_key_was_there_is_current_at_the_default_of_the_key(tmp_path: Path):
    made = GraphLike(k=7)
    claim(tmp_path / "g", made, embeddings="abc")
    stamp(tmp_path / "g", made, embeddings="abc")
    path = tmp_path / "g" / "config.yaml"
    path.write_text(path.read_text().replace("  rate: 1.0e-05\n", ""))
    assert "rate" not in read_config(tmp_path / "g")
    assert claim(tmp_path / "g", made, embeddings="abc") is True
    assert progress(tmp_path / "g", stage="graph", config=made).state == "finished"
    with pytest.raises(ArtifactError, match=r"graph\.rate='nothing', but this run asks for 0\.1"):
        claim(tmp_path / "g", override(made, {"rate": 0.1}), embeddings="abc")


def test_a_folder_from_before_a_key_of_a_layer_was_there_is_current(tmp_path: Path):
    @config
    class Layer:
        name: str = "b"
        size: int = 4
        relu: bool = False

    @config
    class Network:
        layers: tuple[Layer, ...] = ()

    two = Network(layers=(Layer(name="a", size=5), Layer()))
    stamp(tmp_path / "g", two)
    path = tmp_path / "g" / "config.yaml"
    claim(tmp_path / "g", two)
    path.write_text(path.read_text().replace("    relu: false\n", ""))
    assert "relu" not in path.read_text()
    assert claim(tmp_path / "g", two) is True
    with pytest.raises(
        ArtifactError, match=r"layers\.1\.relu='nothing', but this run asks for True"
    ):
        claim(tmp_path / "g", Network(layers=(two.layers[0], Layer(relu=True))))
    with pytest.raises(ArtifactError, match=r"layers\.length=2, but this run asks for 3"):
        claim(tmp_path / "g", Network(layers=(*two.layers, Layer())))


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_changed_config_is_an_error_that_names_both_values(tmp_path: Path, is_finished: bool):
    claim(tmp_path / "g", GraphLike(k=20), embeddings="abc")
    if is_finished:
        stamp(tmp_path / "g", GraphLike(k=20), embeddings="abc")
    with pytest.raises(ArtifactError) as caught:
        claim(tmp_path / "g", GraphLike(k=30), embeddings="abc")
    assert "graph.k=20" in str(caught.value)
    assert "asks for 30" in str(caught.value)
    assert str(tmp_path / "g") in str(caught.value)


def test_another_input_is_an_error_that_names_the_input(tmp_path: Path):
    claim(tmp_path / "g", GraphLike(), embeddings="abc")
    with pytest.raises(ArtifactError, match=r"another embeddings \(abc, now xyz\)"):
        claim(tmp_path / "g", GraphLike(), embeddings="xyz")


def test_progress_tells_how_far_a_folder_is_and_leaves_no_trace(tmp_path: Path):
    def look(k: int = 20) -> tuple[str, dict[str, str]]:
        found = progress(tmp_path / "g", stage="graph", config=GraphLike(k=k))
        return found.state, found.inputs

    assert look() == ("absent", {})
    assert not (tmp_path / "g").exists()
    claim(tmp_path / "g", GraphLike(), embeddings="abc")
    assert look() == ("unfinished", {"embeddings": "abc"})
    stamp(tmp_path / "g", GraphLike(), embeddings="abc")
    assert look() == ("finished", {"embeddings": "abc"})
    with pytest.raises(ArtifactError, match=r"graph\.k=20, but this run asks for 30"):
        look(k=30)


def test_another_stage_in_the_folder_is_an_error(tmp_path: Path):
    claim(tmp_path, GraphLike(), embeddings="abc")
    with pytest.raises(ArtifactError, match="graph"):
        begin(tmp_path, stage="scan", config=GraphLike(), inputs={"embeddings": "abc"})


def test_floats_and_tuples_survive_the_stored_config(tmp_path: Path):
    made = GraphLike(rate=1e-5, scale=(0.08, 1))
    claim(tmp_path, made)
    assert claim(tmp_path, GraphLike(rate=0.00001, scale=(0.08, 1.0))) is False


def test_an_unfinished_or_foreign_folder_says_what_is_missing(tmp_path: Path):
    with pytest.raises(ArtifactError, match="holds no finished stage"):
        read_done(tmp_path)
    with pytest.raises(ArtifactError, match=r"has no config\.yaml"):
        read_config(tmp_path)


def test_too_small_a_disk_is_refused_with_both_amounts(tmp_path: Path):
    require_disk(tmp_path / "not" / "yet" / "there", size_bytes=1)
    with pytest.raises(ArtifactError, match=r"needs about 1000000000\.0 GB, but the disk has"):
        require_disk(tmp_path / "x", size_bytes=10**18)


def test_the_stamp_is_the_last_file_and_holds_the_time(tmp_path: Path):
    before = time.time()
    claim(tmp_path, GraphLike())
    stamp(tmp_path, GraphLike())
    values = json.loads((tmp_path / "done.json").read_text())
    assert before <= values["time"] <= time.time()
    assert versions()["torch"].startswith("2.")
    assert json.loads((tmp_path / "versions.json").read_text()) == versions()
