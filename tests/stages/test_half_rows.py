"""Rows stored as float16: every reader sees what it would see of the same numbers in float32."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selfsup_ray import cli
from selfsup_ray.artifacts import ShardedArray
from selfsup_ray.cluster import pairs
from selfsup_ray.config import Resources, build
from selfsup_ray.errors import ArtifactError, ConfigError
from selfsup_ray.stages import cell_graph
from selfsup_ray.stages.embed import Embeddings
from selfsup_ray.stages.graph import GraphConfig, build_graph
from selfsup_ray.stages.imported import ImportFeaturesConfig, import_features
from selfsup_ray.stages.lowshot_config import FolderConfig
from selfsup_ray.stages.lowshot_pool import require_fitting
from selfsup_ray.stages.reduce import ReduceConfig, reduce

N, DIM, K = 500, 16, 7
METHODS: list[dict[str, Any]] = [
    {"name": "exact"},
    {"name": "cells"},
    {"name": "cells", "by": "cell"},
    {"name": "ivf", "num_lists": 12, "num_probes": 4, "piece_rows": 300},
    {"name": "hnsw", "piece_rows": 300},
]


def unit_rows() -> np.ndarray:
    """Rows around 6 centers, some of them equal."""
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(6, DIM))[np.arange(N) % 6] + 0.5 * generator.normal(size=(N, DIM))
    rows[-20:] = rows[:20]
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def stored(folder: Path, rows: np.ndarray, dtype: str, shard_rows: int) -> Embeddings:
    folder.mkdir(parents=True)
    rows.astype("<f4").tofile(folder / "rows.float32")
    how: dict[str, Any] = {"dim": DIM, "normalize": False, "dtype": dtype}
    config = ImportFeaturesConfig(shard_rows=shard_rows, **how)
    return import_features(folder / "rows.float32", config, out=folder / "embed")


@pytest.fixture(scope="module", params=[200, N], ids=["shards", "one-shard"])
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Embeddings, Embeddings]:
    """The same numbers stored as float16, and widened as float32."""
    folder, rows = tmp_path_factory.mktemp("half"), unit_rows()
    half = stored(folder / "half", rows, "float16", request.param)
    wide = rows.astype(np.float16).astype(np.float32)
    return half, stored(folder / "wide", wide, "float32", request.param)


def test_a_half_array_takes_half_the_room_and_is_read_as_float32(
    both: tuple[Embeddings, Embeddings],
):
    half, wide = (features.array for features in both)
    assert half.shard(0).dtype == np.float16 and half.dtype == np.float16
    ids = np.array([3, 499, 3, 250])
    for found, wanted in ((half.rows(ids), wide.rows(ids)), (np.asarray(half), np.asarray(wide))):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, wanted)
    np.testing.assert_allclose(np.asarray(half), unit_rows(), atol=5e-4)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: "-".join(map(str, m.values()))[:10])
def test_a_graph_of_half_rows_is_that_of_the_widened_ones(
    tmp_path: Path, both: tuple[Embeddings, Embeddings], method: dict[str, Any]
):
    config = build(GraphConfig, {"k": K, "method": method, "resources": {"workers": 0}})
    half, wide = (
        build_graph(features, config, out=tmp_path / str(i)) for i, features in enumerate(both)
    )
    np.testing.assert_array_equal(np.asarray(half.ids), np.asarray(wide.ids))
    np.testing.assert_array_equal(np.asarray(half.similarity), np.asarray(wide.similarity))
    assert half.recall == wide.recall
    queries = unit_rows()[:40]
    with half.search() as ours, wide.search() as theirs:
        np.testing.assert_array_equal(ours.search(queries, 5).ids, theirs.search(queries, 5).ids)


@pytest.mark.parametrize("way", ["all pairs", "sorted parts"])
def test_ways_of_large_corpora_read_half_rows_too(
    tmp_path: Path,
    both: tuple[Embeddings, Embeddings],
    monkeypatch: pytest.MonkeyPatch,
    way: str,
):
    monkeypatch.setattr(pairs, "FROM_ROWS", 0)
    monkeypatch.setattr(cell_graph, "SMALL_BYTES", 0)
    method = {"name": "exact" if way == "all pairs" else "cells"}
    config = build(GraphConfig, {"k": K, "method": method, "resources": {"workers": 0}})
    half, wide = (
        build_graph(features, config, out=tmp_path / str(i)) for i, features in enumerate(both)
    )
    np.testing.assert_array_equal(np.asarray(half.ids), np.asarray(wide.ids))
    np.testing.assert_array_equal(np.asarray(half.similarity), np.asarray(wide.similarity))


def test_reduced_rows_are_stored_as_asked_and_rounded_once(
    tmp_path: Path, both: tuple[Embeddings, Embeddings]
):
    how: dict[str, Any] = {"dim": 5, "resources": Resources(workers=0)}
    plain = reduce(both[1], ReduceConfig(**how), out=tmp_path / "plain")
    half = reduce(both[0], ReduceConfig(dtype="float16", **how), out=tmp_path / "half")
    assert half.array.shard(0).dtype == np.float16
    wanted = np.asarray(plain.array).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(half.array), wanted)


def test_numbers_that_float16_cannot_hold_are_refused(tmp_path: Path):
    with pytest.raises(ArtifactError, match=r"numbers up to 70,000, but float16 ends at 65,504"):
        stored(tmp_path / "large", np.full((4, DIM), 7e4), "float16", 4)


def test_the_command_line_stores_half_rows(tmp_path: Path):
    unit_rows().tofile(tmp_path / "rows")
    arguments = [str(tmp_path / "rows"), "--dim", "16", "--dtype", "float16"]
    assert cli.main(["import-features", *arguments, "--out", str(tmp_path / "embed")]) == 0
    assert ShardedArray.open(tmp_path / "embed" / "rows").dtype == np.float16


def test_background_of_half_rows_is_refused_where_it_is_not_read(
    both: tuple[Embeddings, Embeddings],
):
    given = FolderConfig(path=both[0].path)
    with pytest.raises(ConfigError, match=r"is stored as float16.*Make it with dtype=float32"):
        require_fitting(given, dim=DIM, width=3)
