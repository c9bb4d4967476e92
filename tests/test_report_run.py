"""What the report samples from a run: cluster extremes, the map, thinned curves."""

from pathlib import Path

import numpy as np
import pytest

from selfsup_ray.artifacts import Array, ShardedArray
from selfsup_ray.errors import ArtifactError
from selfsup_ray.report_run import (
    CHUNK,
    Clusters,
    Run,
    chunks,
    sample_ids,
    scan_clusters,
    thinned,
)


def sharded(path: Path, rows: Array, *, shard_rows: int) -> ShardedArray:
    cuts = range(0, len(rows), shard_rows)
    sizes = [len(rows[cut : cut + shard_rows]) for cut in cuts]
    array = ShardedArray.create(
        path, shard_rows=sizes, row_shape=rows.shape[1:], dtype=rows.dtype.name
    )
    for i, cut in enumerate(cuts):
        array.write_shard(i, rows[cut : cut + shard_rows])
    return array


def test_one_pass_over_chunks_finds_the_extremes_that_sorting_each_cluster_finds(tmp_path: Path):
    n, num_classes = CHUNK + 5000, 3
    generator = np.random.default_rng(0)
    p = generator.dirichlet(np.full(5, 0.3), size=n).round(2).astype(np.float32)  # many ties
    cluster = p.argmax(axis=1).astype(np.int32)
    cluster[generator.integers(0, n, 50)] = -1  # images without a cluster
    cluster[cluster == 4] = -1  # an empty cluster
    labels = generator.integers(-1, num_classes, n)
    found = scan_clusters(
        sharded(tmp_path / "a", cluster, shard_rows=9000),
        sharded(tmp_path / "p", p, shard_rows=9000),
        lambda ids: labels[ids],
        num_classes=num_classes,
        extremes=16,
    )
    assert found.histogram.sum() == found.sizes.sum() == (cluster >= 0).sum()
    assert np.isnan(found.confidence[4]) and found.majority(4) is None
    assert (found.most[4] == -1).all() and (found.least[4] == -1).all()
    for k in range(4):
        ids = np.flatnonzero(cluster == k).tolist()
        assert found.sizes[k] == len(ids)
        assert found.most[k].tolist() == sorted(ids, key=lambda i: (-p[i, k], i))[:16]
        assert found.least[k].tolist() == sorted(ids, key=lambda i: (p[i, k], i))[:16]
        np.testing.assert_array_equal(found.most_probability[k], p[found.most[k], k])
        np.testing.assert_array_equal(found.least_probability[k], p[found.least[k], k])
        assert found.confidence[k] == pytest.approx(p[ids, k].mean(dtype=np.float64))
        own = labels[ids]
        counts = [int((own == c).sum()) for c in range(num_classes)]
        assert found.classes is not None and found.classes[k].tolist() == counts
        assert found.majority(k) == (int(np.argmax(counts)), max(counts) / sum(counts))


def test_a_cluster_smaller_than_the_sheet_lists_what_it_has(tmp_path: Path):
    p = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], np.float32)
    assignments = sharded(tmp_path / "a", p.argmax(axis=1).astype(np.int32), shard_rows=2)
    found = scan_clusters(
        assignments, sharded(tmp_path / "p", p, shard_rows=2), None, num_classes=0, extremes=3
    )
    assert found.most.tolist() == [[0, 2, -1], [1, -1, -1]]
    assert found.least.tolist() == [[2, 0, -1], [1, -1, -1]]
    assert found.classes is None and found.by_size.tolist() == [0, 1]


def clusters_with(classes: Array) -> Clusters:
    empty = np.zeros((len(classes), 0))
    sizes = classes.sum(axis=1)
    return Clusters(sizes, sizes, sizes, empty, empty, empty, empty, classes)


def test_clusters_are_matched_one_to_one_and_many_to_one_when_they_outnumber_the_classes():
    square = clusters_with(np.array([[5, 4], [6, 0]])).named
    assert square is not None and not square.is_many_to_one
    assert square.class_of.tolist() == [1, 0] and square.accuracy == 10 / 15
    wide = clusters_with(np.array([[5, 4], [6, 0], [1, 3], [0, 0]])).named
    assert wide is not None and wide.is_many_to_one
    assert wide.class_of.tolist() == [0, 0, 1, -1] and wide.accuracy == 14 / 19
    assert clusters_with(np.zeros((3, 2), np.int64)).named is None


def test_chunks_cover_every_id_once():
    np.testing.assert_array_equal(np.concatenate(list(chunks(23, 5))), np.arange(23))
    assert list(chunks(0)) == []


def test_a_sample_is_distinct_ascending_and_the_same_each_time():
    ids = sample_ids(10_000, 200)
    assert len(set(ids.tolist())) == 200 and (np.diff(ids) > 0).all()
    np.testing.assert_array_equal(ids, sample_ids(10_000, 200))
    np.testing.assert_array_equal(sample_ids(7, 200), np.arange(7))


def test_thinned_values_are_means_of_consecutive_ones():
    values = np.random.default_rng(0).normal(size=1007)
    values[400:430] = np.nan
    got = thinned(values, 100)
    edges = [int(i * 1007 / 100) for i in range(101)]
    for i in range(100):
        part = [v for v in values[edges[i] : edges[i + 1]].tolist() if v == v]
        assert got[i] == pytest.approx(sum(part) / len(part)) if part else np.isnan(got[i])
    np.testing.assert_array_equal(thinned(values[:50], 100), values[:50])


def test_a_folder_without_stages_is_refused_with_what_to_give(tmp_path: Path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("a: 1\n")
    with pytest.raises(ArtifactError, match="holds no stage of a run"):
        Run.open(tmp_path)
