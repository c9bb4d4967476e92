"""The cell join finds what exact search finds, out of core, in any number of pieces."""

import itertools
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from selfsup_ray.artifacts import ShardedArray
from selfsup_ray.config import Resources
from selfsup_ray.errors import ArtifactError, ConfigError
from selfsup_ray.ops.neighbors import drop_self, exact_topk
from selfsup_ray.stages import cell_graph
from selfsup_ray.stages.cell_graph import CellJoin, CellsConfig
from selfsup_ray.stages.graph import Graph, GraphConfig, build_graph

Features = namedtuple("Features", ["array", "fingerprint"])
K = 7
SMALL = {"cell_size": 64, "probes": 4, "extra": 8, "sample_per_cell": 16}
ALL = CellsConfig(cell_size=32, probes=10_000, extra=64)


def unit_rows(n: int, d: int = 24, seed: int = 0) -> np.ndarray:
    """Rows around twenty directions: (n, d) float32 unit rows."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(20, d))[rng.integers(0, 20, n)] + 0.6 * rng.normal(size=(n, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def stored(folder: Path, rows: np.ndarray, size: int = 100) -> Features:
    sizes = [len(rows[a : a + size]) for a in range(0, len(rows), size)]
    array = ShardedArray.create(folder, shard_rows=sizes, row_shape=rows.shape[1:], dtype="float32")
    for i, (a, b) in enumerate(itertools.pairwise(array.offsets)):
        array.write_shard(i, rows[a:b])
    return Features(array, "rows")


def built(
    folder: Path, rows: np.ndarray, method: CellsConfig = ALL, k: int = K, **resources
) -> Graph:
    ask = Resources(**({"workers": 0} | resources))
    features = stored(folder / "rows", rows)
    config = GraphConfig(k=k, method=method, min_recall=0, resources=ask)
    return build_graph(features, config, out=folder / "graph")


def exact(rows: np.ndarray, k: int = K) -> np.ndarray:
    own = np.arange(len(rows))
    wide = exact_topk(rows, rows, k=len(rows))
    return drop_self(wide, own).ids[:, :k]


@pytest.mark.parametrize("by", ["row", "cell"])
def test_with_every_cell_probed_the_lists_are_the_exact_ones(tmp_path, by: str):
    rows = unit_rows(700)
    graph = built(tmp_path, rows, CellsConfig(cell_size=32, probes=10_000, extra=64, by=by))
    np.testing.assert_array_equal(np.asarray(graph.ids), exact(rows))
    best = exact_topk(rows, rows, k=K + 1)
    np.testing.assert_array_equal(
        np.asarray(graph.similarity), drop_self(best, np.arange(700)).similarity
    )
    assert graph.recall == 1.0


@pytest.mark.parametrize("by", ["row", "cell"])
def test_equal_rows_find_each_other_and_ties_go_to_the_lower_id(tmp_path, by: str):
    rows = unit_rows(600)
    rows[50:90] = rows[3]  # more than k blank images
    rows[200:203] = rows[100]
    rows[[0, 599]] = rows[300]
    graph = built(tmp_path, rows, CellsConfig(cell_size=32, probes=10_000, extra=64, by=by))
    np.testing.assert_array_equal(np.asarray(graph.ids), exact(rows))


def test_a_corpus_of_one_image_repeated_is_a_graph_too(tmp_path):
    rows = np.repeat(unit_rows(1), 30, axis=0)
    graph = built(tmp_path, rows)
    np.testing.assert_array_equal(np.asarray(graph.ids), exact(rows))


@pytest.mark.parametrize("by", ["row", "cell"])
@pytest.mark.parametrize("n", [2, 9, 33])
def test_few_images_get_exact_lists(tmp_path, n: int, by: str):
    rows, k = unit_rows(n), min(K, n - 1)
    graph = built(tmp_path, rows, CellsConfig(cell_size=4, probes=2, by=by), k=k)
    assert {len(set(own)) for own in np.asarray(graph.ids)} == {k}
    if n < 33:
        np.testing.assert_array_equal(np.asarray(graph.ids), exact(rows, k))


def test_memory_and_threads_change_nothing(tmp_path):
    rows, method = unit_rows(20_000), CellsConfig(**SMALL)
    whole = built(tmp_path / "whole", rows, method)
    small = CellsConfig(**SMALL, memory_mb=2)
    cut = built(tmp_path / "cut", rows, small, cpus=2)
    assert cut.order.num_shards > 3 and whole.order.num_shards < cut.order.num_shards
    for name in ("ids", "similarity", "order"):
        np.testing.assert_array_equal(
            np.asarray(getattr(whole, name)), np.asarray(getattr(cut, name))
        )
    assert 0.6 < cut.recall < 1


def test_neighbors_lie_close_in_the_order_of_the_cells(tmp_path):
    graph = built(tmp_path, unit_rows(4000), CellsConfig(cell_size=32))
    order = np.asarray(graph.order)
    assert np.array_equal(np.sort(order), np.arange(4000))
    place = np.empty(4000, int)
    place[order] = np.arange(4000)
    distance = np.abs(place[np.asarray(graph.ids)] - place[:, None])
    assert np.median(distance) < 150  # of 1333 between two random places


def test_a_build_that_was_stopped_anywhere_ends_with_the_same_bytes(tmp_path, monkeypatch):
    rows = unit_rows(20_000)
    method = CellsConfig(**SMALL, memory_mb=2)
    whole = built(tmp_path / "whole", rows, method)

    class StoppedError(Exception):
        pass

    for step, after in (("sort", 1), ("gather", 2), ("join", 2), ("scatter", 1)):
        calls, run = itertools.count(), getattr(CellJoin, step)

        def stop(self, i, *, run=run, calls=calls, after=after):
            if next(calls) == after:
                raise StoppedError
            run(self, i)

        with monkeypatch.context() as patch:
            patch.setattr(CellJoin, step, stop)
            with pytest.raises(StoppedError):
                built(tmp_path / "cut", rows, method)
    cut = built(tmp_path / "cut", rows, method)
    for name in ("ids", "similarity", "order"):
        for file in sorted((whole.path / name).iterdir()):
            assert file.read_bytes() == (cut.path / name / file.name).read_bytes()
    left = {path.name for path in (cut.path / "cells").iterdir()}
    assert left == {"tree.npz", "borders.npy", "ranges.json"}


def test_ray_tasks_write_the_same_files(tmp_path, ray_session):
    rows, method = unit_rows(6000), CellsConfig(**SMALL, memory_mb=2)
    here, tasks = (
        built(tmp_path / "0", rows, method),
        built(tmp_path / "2", rows, method, workers=2),
    )
    np.testing.assert_array_equal(np.asarray(here.ids), np.asarray(tasks.ids))


def test_a_row_that_is_not_finite_is_named(tmp_path):
    rows = unit_rows(300)
    rows[123, 5] = np.nan
    with pytest.raises(ArtifactError, match="row 123"):
        built(tmp_path, rows)


def test_a_recall_below_the_least_wanted_fails_the_stage(tmp_path):
    features = stored(tmp_path / "rows", unit_rows(3000))
    method = CellsConfig(cell_size=16, probes=1, extra=0)
    config = GraphConfig(k=20, method=method, min_recall=0.99, resources=Resources(workers=0))
    with pytest.raises(ConfigError, match=r"graph\.min_recall=0.99"):
        build_graph(features, config, out=tmp_path / "graph")
    shutil.rmtree(tmp_path / "graph")


def test_the_cell_join_refuses_a_gpu_it_would_not_use():
    with pytest.raises(ConfigError, match="works on CPUs"):
        GraphConfig(method=CellsConfig(), resources=Resources(gpus=1))


def test_a_corpus_that_is_sorted_by_part_first_gives_the_same_graph(tmp_path, monkeypatch):
    rows = unit_rows(900)
    rows[::7] = rows[3]  # followers, in many parts
    direct = built(tmp_path / "direct", rows, CellsConfig(**SMALL))
    monkeypatch.setattr(cell_graph, "SMALL_BYTES", 0)
    sorted_first = built(tmp_path / "sorted", rows, CellsConfig(**SMALL, memory_mb=1))
    for name in ("ids", "similarity"):
        np.testing.assert_array_equal(
            np.asarray(getattr(direct, name)), np.asarray(getattr(sorted_first, name))
        )
