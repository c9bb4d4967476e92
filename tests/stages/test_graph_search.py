"""A finished graph answers for new rows: by comparing all, or by the index it was built with."""

import shutil
from pathlib import Path

import faiss
import numpy as np
import pytest

from selfsup_ray.config import Resources, build
from selfsup_ray.errors import ArtifactError, ConfigError
from selfsup_ray.stages.embed import Embeddings
from selfsup_ray.stages.graph import Graph, GraphConfig, build_graph
from selfsup_ray.stages.imported import ImportFeaturesConfig, import_features, import_graph
from selfsup_ray.stages.interop import export_graph
from selfsup_ray.stages.probe import ProbeConfig, nearest_of, probe

N, DIM, K = 900, 12, 8
METHODS = {
    "exact": {"name": "exact"},
    "cells": {"name": "cells", "by": "cell"},
    "ivf": {"name": "ivf", "num_lists": 20, "num_probes": 6, "piece_rows": 400},
    "hnsw": {"name": "hnsw", "piece_rows": 400},
}


def unit_rows(n: int, seed: int) -> np.ndarray:
    """Rows around 9 centers, which are the same for every seed."""
    generator = np.random.default_rng(seed)
    centers = np.random.default_rng(0).normal(size=(9, DIM))
    rows = centers[np.arange(n) % 9] + 0.4 * generator.normal(size=(n, DIM))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


ROWS, QUERIES = unit_rows(N, 1), unit_rows(70, 2)


def theirs(rows: np.ndarray, k: int) -> np.ndarray:
    """The ids that faiss finds by comparing every row."""
    index = faiss.IndexFlatIP(DIM)
    index.add(ROWS)
    return np.asarray(index.search(rows, k)[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings, and their graph by each method."""
    folder = tmp_path_factory.mktemp("search")
    ROWS.tofile(folder / "rows")
    config = ImportFeaturesConfig(dim=DIM, shard_rows=350, normalize=False)
    features = import_features(folder / "rows", config, out=folder / "embed")
    for name, method in METHODS.items():
        values = {"k": K, "method": method, "resources": {"workers": 0}}
        build_graph(features, build(GraphConfig, values), out=folder / name)
    return folder


@pytest.mark.parametrize("name", ["exact", "cells"])
def test_neighbors_of_new_rows_are_those_that_faiss_finds_among_all(folder: Path, name: str):
    with Graph.open(folder / name).search() as search:
        found = search.search(QUERIES, K)
    np.testing.assert_array_equal(found.ids, theirs(QUERIES, K))
    wanted = np.take_along_axis(QUERIES @ ROWS.T, found.ids, axis=1)
    np.testing.assert_allclose(found.similarity, wanted, atol=1e-6)


@pytest.mark.parametrize("name", ["ivf", "hnsw"])
def test_the_stored_index_finds_nearly_all_and_is_not_built_again(folder: Path, name: str):
    graph = Graph.open(folder / name)
    before = {path: path.stat().st_mtime_ns for path in (graph.path / "index").iterdir()}
    with graph.search() as search:
        found = search.search(QUERIES, K)
    truth = theirs(QUERIES, K)
    share = np.mean([len({*a} & {*b}) / K for a, b in zip(found.ids, truth, strict=True)])
    assert 0.9 < share <= 1
    assert {path: path.stat().st_mtime_ns for path in (graph.path / "index").iterdir()} == before


def test_actors_answer_as_this_process_does(folder: Path, ray_session: None):
    for name in ("exact", "ivf"):
        graph = Graph.open(folder / name)
        with graph.search() as here, graph.search(Resources(workers=2)) as actors:
            for found, wanted in [(actors.search(QUERIES, K), here.search(QUERIES, K))]:
                np.testing.assert_array_equal(found.ids, wanted.ids)
                np.testing.assert_array_equal(found.similarity, wanted.similarity)


def test_a_moved_run_still_finds_its_rows_and_an_imported_graph_is_given_them(
    folder: Path, tmp_path: Path
):
    shutil.copytree(folder / "embed", tmp_path / "moved" / "embed")
    graph = Graph(shutil.copytree(folder / "exact", tmp_path / "moved" / "graph"))
    with pytest.raises(ArtifactError, match="holds no finished stage"):
        Graph(shutil.copytree(folder / "exact", tmp_path / "alone" / "graph")).search()
    with graph.search() as search:
        np.testing.assert_array_equal(search.search(QUERIES, 3).ids, theirs(QUERIES, 3))
    ids, _ = export_graph(graph, tmp_path, format="int32")
    bare = import_graph(ids, out=tmp_path / "bare")
    with pytest.raises(ArtifactError, match=r"does not say where the rows are.*`features`"):
        bare.search()
    with bare.search(features=Embeddings.open(folder / "embed")) as search:
        np.testing.assert_array_equal(search.search(QUERIES, 3).ids, theirs(QUERIES, 3))


def test_what_cannot_be_answered_is_said_in_one_sentence(folder: Path, tmp_path: Path):
    with Graph.open(folder / "exact").search() as search:
        with pytest.raises(ConfigError, match=r"finite rows of 12 numbers.*got an array \(70, 5\)"):
            search.search(QUERIES[:, :5], K)
        with pytest.raises(ConfigError, match="finite rows of 12 numbers"):
            search.search(np.full((1, DIM), np.nan, np.float32), K)
    shutil.copytree(folder / "embed", tmp_path / "embed")
    graph = Graph(shutil.copytree(folder / "ivf", tmp_path / "ivf"))
    next((graph.path / "index").glob("00001.index")).unlink()
    with pytest.raises(ArtifactError, match="lacks pieces"):
        graph.search()
    shutil.rmtree(graph.path / "index")
    with pytest.raises(ArtifactError, match="holds no index"):
        graph.search()
    QUERIES.tofile(tmp_path / "rows")
    shutil.rmtree(tmp_path / "embed")
    import_features(tmp_path / "rows", ImportFeaturesConfig(dim=DIM), out=tmp_path / "embed")
    with pytest.raises(ArtifactError, match="holds other rows"):
        graph.search()


def test_the_knn_probe_takes_the_neighbors_from_the_graphs_index(folder: Path, tmp_path: Path):
    features = Embeddings.open(folder / "embed")
    labels = np.where(np.arange(N) % 5 == 0, -1, np.arange(N) % 9)
    how = {"l2": (1e-3,), "max_iterations": 5, "knn_k": 15}
    plain = probe(features, labels, ProbeConfig(**how), out=tmp_path / "plain")
    asked = ProbeConfig(knn_index="graph", **how)
    for name in ("exact", "ivf"):
        graph = Graph.open(folder / name)
        made = probe(features, labels, asked, out=tmp_path / name, graph=graph)
        assert made.knn == pytest.approx(plain.knn, abs=0 if name == "exact" else 0.03)
        assert made.metrics["knn"]["k"] == 15
    with pytest.raises(ConfigError, match=r"needs the graph of the 900 embedded images, but none"):
        probe(features, labels, asked, out=tmp_path / "none")


def test_wanted_rows_far_from_the_query_are_found_by_asking_for_more(folder: Path):
    is_wanted = np.arange(N) % 9 == 4  # all in one of nine clusters
    is_wanted[::7] = False
    with Graph.open(folder / "exact").search() as search:
        found = nearest_of(search, QUERIES, is_wanted, 6, wide=8)
    similarity = np.where(is_wanted, QUERIES @ ROWS.T, -np.inf)
    np.testing.assert_array_equal(found.ids, np.argsort(-similarity, axis=1)[:, :6])
