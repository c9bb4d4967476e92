"""Near duplicates, outliers and hubs against loops over the whole graph, and on the page."""

import csv
import re
from pathlib import Path

import networkx
import numpy as np
import pytest
from scipy.stats import skew

from selfsup_ray import report_neighbors
from selfsup_ray.artifacts import Array, ShardedArray, begin, finish
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.synthetic import corpus_of_arrays, shape_images
from selfsup_ray.report import write_report
from selfsup_ray.report_neighbors import (
    in_degrees,
    near_duplicates,
    outliers,
    same_file,
)
from selfsup_ray.stages.graph import Graph

N, K = 120, 6


def write_graph(folder: Path, ids: Array, similarity: Array) -> Graph:
    begin(folder, stage="graph", config={"k": ids.shape[1]}, inputs={})
    sizes = [50, len(ids) - 50]
    for name, values in (("ids", ids.astype(np.int32)), ("similarity", similarity)):
        array = ShardedArray.create(
            folder / name, shard_rows=sizes, row_shape=ids.shape[1:], dtype=values.dtype.name
        )
        array.write_shard(0, values[:50])
        array.write_shard(1, values[50:])
    finish(folder, stage="graph", config={"k": ids.shape[1]}, inputs={}, seconds=1)
    return Graph.open(folder)


def graph_of(folder: Path, rows: Array, *, k: int = K) -> Graph:
    similarity = (rows @ rows.T).astype(np.float32)
    np.fill_diagonal(similarity, -2)
    ids = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return write_graph(folder, ids, np.take_along_axis(similarity, ids, axis=1))


def unit(rows: Array) -> Array:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def made_rows() -> Array:
    """Rows in general directions; 0, 1, 2 and 7, 90 nearly the same; 20, 21 the same."""
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(N, 16))
    for group in ((0, 1, 2), (7, 90)):
        rows[list(group)] = rows[group[0]] + 0.02 * generator.normal(size=(len(group), 16))
    rows[21] = rows[20]
    return unit(rows)


def made_corpus(folder: Path) -> Corpus:
    images, labels = shape_images(N, size=16)
    images[21] = images[20]
    return corpus_of_arrays(folder, images, labels, shard_size=50)


@pytest.fixture
def pieces_of_seven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read the graph in many small pieces."""
    monkeypatch.setattr(report_neighbors, "PIECE", 7)


def test_near_duplicates_are_the_pairs_above_the_threshold_by_connected_groups(
    tmp_path: Path, pieces_of_seven: None
):
    rows = made_rows()
    found = near_duplicates(graph_of(tmp_path / "graph", rows), None)
    similarity = rows @ rows.T
    wanted = [(i, j) for i in range(N) for j in range(i + 1, N) if similarity[i, j] >= found.from_]
    assert sorted(map(tuple, found.pairs.tolist())) == wanted
    links = networkx.Graph(wanted)
    groups = {frozenset(group) for group in networkx.connected_components(links)}
    members = [frozenset(found.members(g).tolist()) for g in range(found.num_groups)]
    assert set(members) == groups and len(members) == len(groups)
    assert members[0] == {20, 21}, "the most similar pair's group comes first"
    best = [found.similarity[found.group == g].max() for g in range(found.num_groups)]
    assert best == sorted(best, reverse=True) and not found.is_cut


def test_copies_of_a_file_are_no_near_duplicates_and_do_not_move_the_threshold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(report_neighbors, "NEAR_IMAGES", 2)
    rows, corpus = made_rows(), made_corpus(tmp_path / "corpus")
    graph = graph_of(tmp_path / "graph", rows)
    found = near_duplicates(graph, same_file(corpus))
    assert [20, 21] not in found.pairs.tolist()
    similarity = rows @ rows.T
    np.fill_diagonal(similarity, -2)
    similarity[20, 21] = similarity[21, 20] = -2
    nearest = np.sort(similarity.max(axis=1))[::-1]
    # The edge of a bin, 0.9 % of the distance wide, below the second image of two.
    assert nearest[1] - 0.02 * (1 - nearest[1]) <= found.from_ <= nearest[1]


def test_without_near_images_there_are_no_pairs(tmp_path: Path):
    found = near_duplicates(graph_of(tmp_path, unit(np.eye(N) + 0.1)), None)
    assert found.from_ == 0.9 and len(found.pairs) == found.num_groups == 0


def test_only_the_most_similar_pairs_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces_of_seven: None
):
    graph = graph_of(tmp_path, made_rows())
    every = near_duplicates(graph, None)
    monkeypatch.setattr(report_neighbors, "MOST_PAIRS", 2)
    found = near_duplicates(graph, None)
    assert found.is_cut and found.pairs.tolist() == every.pairs[:2].tolist()


def test_collapsed_embeddings_give_a_bounded_answer(tmp_path: Path):
    rows = unit(np.ones((N, 4)) + 1e-4 * np.random.default_rng(0).normal(size=(N, 4)))
    found = near_duplicates(graph_of(tmp_path, rows), None)
    assert 0 < len(found.pairs) <= N * K


def test_outliers_have_the_least_similar_last_neighbor(tmp_path: Path, pieces_of_seven: None):
    graph = graph_of(tmp_path, made_rows())
    last = np.asarray(graph.similarity)[:, -1]
    wanted = sorted(range(N), key=lambda i: (last[i], i))[: report_neighbors.SHOWN]
    found = outliers(graph)
    assert found.ids.tolist() == wanted
    np.testing.assert_array_equal(found.scores, last[wanted])


def test_an_image_without_neighbors_is_the_first_outlier(tmp_path: Path):
    ids, similarity = np.zeros((60, 2), np.int32), np.full((60, 2), 0.5, np.float32)
    ids[33], similarity[33] = -1, np.nan
    ids[44, 1], similarity[44] = -1, (-0.25, np.nan)
    found = outliers(write_graph(tmp_path, ids, similarity))
    assert found.ids[:3].tolist() == [33, 44, 0]
    assert found.scores[:3].tolist() == [-1, -0.25, 0.5]


def test_in_degrees_are_how_often_images_are_listed(tmp_path: Path, pieces_of_seven: None):
    graph = graph_of(tmp_path, made_rows())
    degree = np.array([(np.asarray(graph.ids) == i).sum() for i in range(N)])
    found = in_degrees(graph)
    assert found.counts.tolist() == [int((degree == d).sum()) for d in range(degree.max() + 1)]
    wanted = sorted(range(N), key=lambda i: (-degree[i], i))[: report_neighbors.SHOWN]
    assert found.hubs.ids.tolist() == wanted
    assert found.hubs.scores.tolist() == degree[wanted].tolist()
    assert (found.mean, found.never) == (K, (degree == 0).mean())
    assert found.skewness == pytest.approx(skew(degree))


def written(folder: Path) -> str:
    made_corpus(folder / "ingest")
    graph_of(folder / "graph", made_rows())
    return write_report(folder).read_text()


def tiles(text: str, section: str) -> list[int]:
    part = text.split(f'<section id="{section}">')[1].split("</section>")[0]
    return [int(id) for id in re.findall(r'title="image (\d+)', part)]


def test_the_page_shows_groups_outliers_and_hubs(tmp_path: Path):
    text = written(tmp_path)
    graph = Graph.open(tmp_path / "graph")
    found = near_duplicates(graph, same_file(Corpus.open(tmp_path / "ingest")))
    groups = [found.members(g).tolist() for g in range(found.num_groups)]
    assert tiles(text, "duplicates") == [id for group in groups for id in group]
    assert tiles(text, "outliers") == outliers(graph).ids.tolist()
    assert tiles(text, "hubs") == in_degrees(graph).hubs.ids[:12].tolist()
    assert f"{len(found.pairs)} pair" in text and "are nobody&#x27;s neighbor" in text


def test_all_pairs_are_in_a_table_that_is_written_once(tmp_path: Path):
    written(tmp_path)
    path = tmp_path / "near-duplicates.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    corpus = Corpus.open(tmp_path / "ingest")
    found = near_duplicates(Graph.open(tmp_path / "graph"), same_file(corpus))
    assert {(int(r["id"]), int(r["other_id"])) for r in rows} == set(
        map(tuple, found.pairs.tolist())
    )
    for row in rows:
        pair = np.array([int(row["id"]), int(row["other_id"])])
        assert [row["source"], row["other_source"]] == corpus.sources(pair)
    assert [int(r["group"]) for r in rows] == sorted(found.group.tolist())
    before = path.stat().st_mtime_ns
    write_report(tmp_path)
    assert path.stat().st_mtime_ns == before


def test_without_near_duplicates_a_sentence_says_so_and_no_table_is_left(tmp_path: Path):
    made_corpus(tmp_path / "ingest")
    graph_of(tmp_path / "graph", unit(np.eye(N) + 0.1))
    (tmp_path / "near-duplicates.csv").touch()
    text = write_report(tmp_path).read_text()
    assert "no two images have a similarity of 0.90 or more" in text
    assert not (tmp_path / "near-duplicates.csv").exists()
