"""Datasets: images by position, and a neighbor drawn from the right ones with the right chances."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from selfsup_ray.artifacts import ShardedArray
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.datasets import Images, NeighborPairs
from selfsup_ray.data.synthetic import corpus_of_arrays, shape_images
from selfsup_ray.errors import ConfigError


def made(path: Path, n: int = 12, k: int = 5) -> tuple[Corpus, ShardedArray, np.ndarray]:
    """Return a corpus and lists in which image i has the neighbors i + 1, …, i + k (modulo n)."""
    images, labels = shape_images(n, size=8)
    corpus = corpus_of_arrays(path / "corpus", images, labels, shard_size=5)
    lists = (np.arange(n)[:, None] + np.arange(1, k + 1)) % n
    stored = ShardedArray.create(
        path / "ids", shard_rows=corpus.shard_rows, row_shape=(k,), dtype="int32"
    )
    for i in range(corpus.num_shards):
        stored.write_shard(i, lists[corpus.offsets[i] : corpus.offsets[i + 1]].astype(np.int32))
    return corpus, stored, images


def test_images_are_those_of_the_corpus(tmp_path):
    corpus, _, images = made(tmp_path)
    dataset = Images(corpus)
    ids = np.array([3, 11, 0])
    [batch] = dataset.batch(ids, epoch=4)
    np.testing.assert_array_equal(batch.permute(0, 2, 3, 1), images[ids])
    assert len(dataset) == 12 and dataset.corpus_ids(ids).tolist() == [3, 11, 0]


def test_a_subset_is_indexed_by_position(tmp_path):
    corpus, _, images = made(tmp_path)
    dataset = pickle.loads(pickle.dumps(Images(corpus, np.array([7, 2, 9]))))
    [batch] = dataset.batch(np.array([2, 0]), epoch=0)
    np.testing.assert_array_equal(batch.permute(0, 2, 3, 1), images[[9, 7]])
    assert len(dataset) == 3 and dataset.corpus_ids(np.array([1])).tolist() == [2]


def test_a_pair_is_an_image_and_one_of_its_neighbors(tmp_path):
    corpus, lists, images = made(tmp_path)
    pairs = NeighborPairs(corpus, lists, num_neighbors=3, seed=5)
    ids = np.array([10, 4, 4])
    anchors, neighbors = pairs.batch(ids, epoch=1)
    np.testing.assert_array_equal(anchors.permute(0, 2, 3, 1), images[ids])
    drawn = pairs.drawn(ids, epoch=1)
    np.testing.assert_array_equal(neighbors.permute(0, 2, 3, 1), images[drawn])
    assert drawn[1] == drawn[2] and set((drawn - ids) % 12) <= {0, 1, 2, 3}


@pytest.mark.parametrize(("keep_self", "steps"), [(True, [0, 1, 2, 3]), (False, [1, 2, 3])])
def test_every_neighbor_and_perhaps_the_image_itself_has_the_same_chance(
    tmp_path, keep_self, steps
):
    corpus, lists, _ = made(tmp_path)
    pairs = NeighborPairs(corpus, lists, num_neighbors=3, seed=0, keep_self=keep_self)
    ids = np.arange(12)
    drawn = np.concatenate([(pairs.drawn(ids, epoch=e) - ids) % 12 for e in range(500)])
    found, counts = np.unique(drawn, return_counts=True)
    assert found.tolist() == steps
    assert stats.chisquare(counts).pvalue > 0.001


def test_the_draw_depends_on_seed_epoch_and_image_and_on_nothing_else(tmp_path):
    corpus, lists, _ = made(tmp_path)
    pairs = NeighborPairs(corpus, lists, num_neighbors=5, seed=3)
    whole = pairs.drawn(np.arange(12), epoch=7)
    order = np.random.default_rng(0).permutation(12)
    np.testing.assert_array_equal(pairs.drawn(order, epoch=7), whole[order])
    again = pickle.loads(pickle.dumps(pairs))
    np.testing.assert_array_equal(again.drawn(np.arange(12), epoch=7), whole)
    other = NeighborPairs(corpus, lists, num_neighbors=5, seed=4)
    assert (other.drawn(np.arange(12), epoch=7) != whole).any()
    assert (pairs.drawn(np.arange(12), epoch=8) != whole).any()


def test_a_list_that_is_too_short_is_filled_with_the_image_itself(tmp_path):
    corpus, lists, _ = made(tmp_path)
    for i in range(lists.num_shards):
        rows = np.array(lists.shard(i))
        rows[:, 1:] = -1
        lists.write_shard(i, rows)
    pairs = NeighborPairs(corpus, lists, num_neighbors=5, seed=0, keep_self=False)
    steps = {
        int(s) for e in range(40) for s in (pairs.drawn(np.arange(12), epoch=e) - range(12)) % 12
    }
    assert steps == {0, 1}


@pytest.mark.parametrize("num_neighbors", [0, 6])
def test_more_neighbors_than_the_graph_has_is_an_error(tmp_path, num_neighbors):
    corpus, lists, _ = made(tmp_path)
    with pytest.raises(ConfigError, match=rf"num_neighbors={num_neighbors}, but the graph has k=5"):
        NeighborPairs(corpus, lists, num_neighbors=num_neighbors, seed=0)
