"""The map of the report: t-SNE of a small corpus, UMAP of the graph of a larger one."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sklearn.manifold import trustworthiness

from selfsup_ray import report_map
from selfsup_ray.artifacts import Array, ShardedArray
from selfsup_ray.report_map import placement, tsne_positions, umap_positions
from selfsup_ray.report_run import sample_ids


def clustered(n: int) -> Array:
    generator = np.random.default_rng(0)
    rows = np.random.default_rng(1).normal(size=(4, 16))[np.arange(n) % 4]
    rows = rows + 0.3 * generator.normal(size=(n, 16))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def neighbors(rows: Array, k: int) -> tuple[Array, Array]:
    similarity = rows @ rows.T
    np.fill_diagonal(similarity, -2)
    ids = np.argsort(-similarity, axis=1)[:, :k].astype(np.int32)
    return ids, np.take_along_axis(similarity, ids, axis=1)


def test_tsne_keeps_neighbors_and_is_the_same_each_time():
    rows = clustered(160)
    xy = tsne_positions(rows)
    assert xy is not None and xy.shape == (160, 2)
    assert trustworthiness(rows, xy, n_neighbors=10) > 0.9
    np.testing.assert_array_equal(xy, tsne_positions(rows))


def test_umap_keeps_neighbors_and_is_the_same_each_time():
    rows = clustered(160)
    xy = umap_positions(rows, *neighbors(rows, 14))
    assert xy is not None and xy.shape == (160, 2)
    assert trustworthiness(rows, xy, n_neighbors=10) > 0.9
    np.testing.assert_array_equal(xy, umap_positions(rows, *neighbors(rows, 14)))


def test_the_map_follows_the_lists_not_the_rows():
    rows = clustered(160)
    apart = np.arange(160) // 40  # groups that the rows do not have
    ids = np.array(
        [[j for j in range(160) if apart[j] == apart[i] and j != i][:14] for i in range(160)]
    )
    xy = umap_positions(rows, ids, np.full((160, 14), 0.9, np.float32))
    assert xy is not None
    one_hot = np.eye(4)[apart] + 1e-6 * np.random.default_rng(0).normal(size=(160, 4))
    assert trustworthiness(one_hot, xy, n_neighbors=10) > 0.85


def test_umap_takes_images_with_fewer_neighbors():
    rows = clustered(100)
    ids, similarity = neighbors(rows, 14)
    ids[5, 3:], similarity[5, 3:] = -1, np.nan
    ids[6], similarity[6] = -1, np.nan
    xy = umap_positions(rows, ids, similarity)
    assert xy is not None and np.isfinite(np.delete(xy, 6, axis=0)).all()


def test_there_is_no_map_of_collapsed_embeddings_or_of_three_images():
    for rows in (np.full((50, 4), 0.5, np.float32), np.eye(3, dtype=np.float32)):
        assert tsne_positions(rows) is None
        listed = np.zeros((len(rows), 2), np.int32)
        assert umap_positions(rows, listed, listed.astype(np.float32)) is None


def stored(folder: Path, name: str, rows: Array) -> ShardedArray:
    array = ShardedArray.create(
        folder / name, shard_rows=[len(rows)], row_shape=rows.shape[1:], dtype=rows.dtype.name
    )
    array.write_shard(0, rows)
    return array


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """What placement reads of a run: rows and a graph of 90 images."""
    rows = clustered(90)
    ids, similarity = neighbors(rows, 20)
    array = stored(tmp_path, "rows", rows)

    class Rows:
        def __init__(self) -> None:
            self.array = array

        def __len__(self) -> int:
            return len(array)

    graph = SimpleNamespace(
        ids=stored(tmp_path, "ids", ids),
        similarity=stored(tmp_path, "similarity", similarity),
        k=20,
    )
    return SimpleNamespace(embeddings=Rows(), searched=Rows(), graph=graph)


def test_a_small_corpus_or_one_without_a_graph_is_placed_by_tsne(run: Any):
    placed = placement(run)
    assert placed is not None and "t-SNE" in placed.words
    assert placed.ids.tolist() == list(range(90))


def test_a_larger_corpus_is_placed_by_its_graph(run: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(report_map, "TSNE_IMAGES", 50)
    placed = placement(run)
    assert placed is not None and placed.words == "placed by UMAP from the stored neighbors"
    rows = clustered(90)
    np.testing.assert_array_equal(placed.xy, umap_positions(rows, *neighbors(rows, 14)))
    run.graph = None
    assert "t-SNE" in placement(run).words and len(placement(run).ids) == 50


def test_a_sample_of_a_very_large_corpus_is_placed_by_its_own_graph(
    run: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(report_map, "TSNE_IMAGES", 50)
    monkeypatch.setattr(report_map, "UMAP_IMAGES", 60)
    placed = placement(run)
    assert placed is not None and "among each other" in placed.words
    ids = sample_ids(90, 60)
    np.testing.assert_array_equal(placed.ids, ids)
    assert trustworthiness(clustered(90)[ids], placed.xy, n_neighbors=8) > 0.9
