"""Other libraries take the graph as it is, and find in it what they find in the vectors."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
from sklearn.cluster import DBSCAN, SpectralClustering
from sklearn.exceptions import EfficiencyWarning
from sklearn.manifold import TSNE, trustworthiness
from sklearn.neighbors import KNeighborsClassifier, KNeighborsTransformer, kneighbors_graph

from selfsup_ray.artifacts import ShardedArray, begin, finish
from selfsup_ray.config import Resources
from selfsup_ray.data.published import write_feature_block, write_rows
from selfsup_ray.errors import ArtifactError, ConfigError
from selfsup_ray.stages.embed import Embeddings
from selfsup_ray.stages.graph import Graph, GraphConfig, build_graph
from selfsup_ray.stages.imported import (
    ImportFeaturesConfig,
    ImportGraphConfig,
    import_features,
    import_graph,
)
from selfsup_ray.stages.interop import (
    export_graph,
    to_csr,
    to_opentsne,
    to_scikit_learn,
    to_umap,
)

HERE = Resources(workers=0)
N, K = 240, 20


def clustered(n: int = N) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows around 4 centers, and the center of each."""
    generator = np.random.default_rng(0)
    labels = np.arange(n) % 4
    rows = np.eye(8)[labels] + 0.3 * generator.normal(size=(n, 8))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), labels


ROWS, LABELS = clustered()


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    folder = tmp_path_factory.mktemp("graph")
    ROWS.tofile(folder / "rows.float32")
    config = ImportFeaturesConfig(dim=8, shard_rows=100)
    features = import_features(folder / "rows.float32", config, out=folder / "embed")
    return build_graph(features, GraphConfig(k=K, resources=HERE), out=folder / "graph")


def test_csr_holds_the_neighbors_of_scikit_learn(graph: Graph):
    theirs = kneighbors_graph(ROWS, K, metric="cosine", mode="distance", include_self=False)
    dense = theirs.toarray()
    np.testing.assert_allclose(to_csr(graph, values="distance").toarray(), dense, atol=1e-6)
    np.testing.assert_array_equal(to_csr(graph, values="connectivity").toarray(), dense > 0)
    similarity = np.where(dense > 0, 1 - dense, 0)
    np.testing.assert_allclose(to_csr(graph).toarray(), similarity, atol=1e-6)
    made = to_csr(graph)
    assert made.has_canonical_format and made.indices.dtype == np.int32


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_the_precomputed_matrix_is_that_of_kneighborstransformer(graph: Graph, metric):
    made = to_scikit_learn(graph, metric=metric)
    theirs = KNeighborsTransformer(
        mode="distance", n_neighbors=K, metric=metric, algorithm="brute"
    ).fit_transform(ROWS)
    np.testing.assert_array_equal(made.indptr, theirs.indptr)
    np.testing.assert_array_equal(made.indices, theirs.indices)
    np.testing.assert_allclose(made.data, theirs.data, atol=3e-4 if metric == "euclidean" else 1e-6)


def test_scikit_learns_classifier_votes_as_on_the_vectors(graph: Graph):
    made = to_scikit_learn(graph)
    noisy = np.where(np.arange(N) % 5 == 0, (LABELS + 1) % 4, LABELS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EfficiencyWarning)  # raised where rows are not sorted
        ours = KNeighborsClassifier(n_neighbors=7, metric="precomputed").fit(made, noisy)
        votes = ours.predict_proba(made)
    theirs = KNeighborsClassifier(n_neighbors=7, metric="cosine").fit(ROWS, noisy)
    np.testing.assert_array_equal(votes, theirs.predict_proba(ROWS))


# DBSCAN sets the diagonal of any sparse matrix, which puts the columns in order, and then warns.
@pytest.mark.filterwarnings("ignore:Precomputed sparse input was not sorted")
def test_dbscan_finds_the_same_clusters_within_the_reach_of_the_graph(graph: Graph):
    reach = 0.99 * float((1 - np.asarray(graph.similarity)[:, -1]).min())
    ours = DBSCAN(eps=reach, min_samples=3, metric="precomputed").fit(to_scikit_learn(graph))
    theirs = DBSCAN(eps=reach, min_samples=3, metric="cosine").fit(ROWS)
    np.testing.assert_array_equal(ours.labels_, theirs.labels_)
    assert ours.labels_.max() > 1


def test_spectral_clustering_builds_the_same_affinity(graph: Graph):
    settings = {"n_clusters": 4, "n_neighbors": K, "random_state": 0}
    ours = SpectralClustering(affinity="precomputed_nearest_neighbors", **settings)
    theirs = SpectralClustering(affinity="nearest_neighbors", **settings)
    ours.fit(to_scikit_learn(graph, metric="euclidean"))
    theirs.fit(ROWS)
    assert (ours.affinity_matrix_ != theirs.affinity_matrix_).nnz == 0
    np.testing.assert_array_equal(ours.labels_, theirs.labels_)


def test_scikit_learns_tsne_is_as_good_from_the_graph_as_from_the_vectors(graph: Graph):
    settings = {"perplexity": 6.0, "init": "random", "random_state": 0, "max_iter": 400}
    ours = TSNE(metric="precomputed", **settings)
    theirs = TSNE(metric="cosine", **settings)
    xy, other = ours.fit_transform(to_scikit_learn(graph)), theirs.fit_transform(ROWS)
    assert ours.kl_divergence_ == pytest.approx(theirs.kl_divergence_, rel=0.1)
    good = trustworthiness(ROWS, other, n_neighbors=10)
    assert trustworthiness(ROWS, xy, n_neighbors=10) > good - 0.02


@pytest.mark.filterwarnings("ignore:Tensorflow not installed:ImportWarning")
@pytest.mark.filterwarnings("ignore:precomputed_knn.2.*:UserWarning")  # it cannot place new rows
def test_umap_weighs_the_same_edges_as_from_the_vectors(graph: Graph):
    from umap import UMAP

    settings = {"n_neighbors": 15, "n_epochs": 20, "random_state": 0, "n_jobs": 1}
    settings["init"] = "random"
    ours = UMAP(precomputed_knn=to_umap(graph, n_neighbors=15), **settings).fit(ROWS)
    theirs = UMAP(metric="cosine", **settings).fit(ROWS)
    difference = np.abs((ours.graph_ - theirs.graph_).toarray())
    assert difference.max() < 2e-3 and ours.graph_.nnz == theirs.graph_.nnz
    assert trustworthiness(ROWS, ours.embedding_, n_neighbors=10) > 0.8


def test_opentsne_finds_the_same_affinities_as_from_the_vectors(graph: Graph):
    from openTSNE.affinity import PerplexityBasedNN
    from openTSNE.nearest_neighbors import PrecomputedNeighbors

    index = PrecomputedNeighbors(*to_opentsne(graph))
    ours = PerplexityBasedNN(knn_index=index, perplexity=6)
    theirs = PerplexityBasedNN(ROWS, perplexity=6, metric="cosine", method="exact")
    assert ours.P.shape == theirs.P.shape == (N, N)
    # Theirs has 18 neighbors, three times the perplexity, ours all 20.
    np.testing.assert_allclose(ours.P.toarray(), theirs.P.toarray(), atol=1e-4)
    np.testing.assert_array_equal(ours.P.argmax(axis=1), theirs.P.argmax(axis=1))


def sparse_graph(folder: Path) -> Graph:
    """A graph of 3 images of which one has a single neighbor."""
    ids = np.array([[1, 2], [0, -1], [1, 0]], np.int32)
    similarity = np.array([[0.5, -0.25], [0.5, np.nan], [1.0000001, -0.25]], np.float32)
    begin(folder, stage="graph", config={}, inputs={})
    for name, values in (("ids", ids), ("similarity", similarity)):
        array = ShardedArray.create(
            folder / name, shard_rows=[3], row_shape=(2,), dtype=values.dtype.name
        )
        array.write_shard(0, values)
    finish(folder, stage="graph", config={}, inputs={}, seconds=0)
    return Graph.open(folder)


def test_an_entry_without_a_neighbor_is_left_out(tmp_path: Path):
    graph = sparse_graph(tmp_path)
    assert to_csr(graph, values="connectivity").toarray().tolist() == [
        [0, 1, 1],
        [1, 0, 0],
        [1, 1, 0],
    ]
    assert to_csr(graph, values="distance").data.tolist() == [0.5, 1.25, 0.5, 1.25, 0]
    assert to_scikit_learn(graph).indices.tolist() == [0, 1, 2, 1, 0, 2, 1, 0]
    ids, distance = to_umap(graph)
    assert ids.tolist() == [[0, 1, 2], [1, 0, -1], [2, 1, 0]]
    assert distance[1].tolist() == [0, 0.5, np.inf]
    with pytest.raises(ConfigError, match="1 images have fewer than 2 neighbors"):
        to_opentsne(graph)


def test_exported_matrices_are_read_by_scipy(graph: Graph, tmp_path: Path):
    (path,) = export_graph(graph, tmp_path, format="csr")
    assert (scipy.sparse.load_npz(path) != to_csr(graph)).nnz == 0
    (path,) = export_graph(graph, tmp_path / "mine.npz", format="distances")
    assert path.name == "mine.npz"
    assert (scipy.sparse.load_npz(path) != to_scikit_learn(graph)).nnz == 0


def published(folder: Path, k: int, *, duplicates: int = 0) -> tuple[Path, np.ndarray]:
    """A published graph of ROWS, of which the first `duplicates` are one and the same."""
    rows = ROWS.copy()
    rows[:duplicates] = rows[0]
    similarity = rows @ rows.T
    similarity[similarity > 0.999999] = 1
    ids = np.argsort(-similarity, axis=1, kind="stable")[:, :k].astype("<i4")
    ids.tofile(folder / f"ndis{N}_k{k}_I_11.int{k}")
    values = np.take_along_axis(similarity, ids, axis=1).astype("<f4")
    values.tofile(folder / f"ndis{N}_k{k}_D_11.float{k}")
    return folder / f"ndis{N}_k{k}_I_11.int{k}", ids


@pytest.mark.parametrize("workers", [0, 2])
def test_an_imported_graph_has_the_images_left_out_and_goes_back_to_the_same_bytes(
    tmp_path: Path, ray_session: None, workers: int
):
    path, ids = published(tmp_path, 32, duplicates=40)
    assert (ids[:40, 0] != np.arange(40)).any(), "a duplicate stands first"
    assert (ids[32:40] != np.arange(32, 40)[:, None]).all(), "some lists lack their image"
    config = ImportGraphConfig(shard_rows=100, resources=Resources(workers=workers))
    graph = import_graph(path, config, out=tmp_path / "graph")
    assert (len(graph), graph.k) == (N, 31)
    for i, row in enumerate(np.asarray(graph.ids).tolist()):
        wanted = [j for j in ids[i].tolist() if j != i][:31]
        assert row == wanted
    written = export_graph(graph, tmp_path / "again", format="int32")
    assert [p.name for p in written] == ["ndis240_k32_I_11.int32", "ndis240_k32_D_11.float32"]
    for file in written:
        assert file.read_bytes() == (tmp_path / file.name).read_bytes()


def test_a_graph_of_ours_is_exported_with_each_image_first(graph: Graph, tmp_path: Path):
    ids, similarity = export_graph(graph, tmp_path, format="int32")
    assert (ids.name, ids.stat().st_size) == (f"ndis{N}_k{K + 1}_I_11.int32", N * (K + 1) * 4)
    found = np.fromfile(ids, "<i4").reshape(N, K + 1)
    np.testing.assert_array_equal(found[:, 0], np.arange(N))
    np.testing.assert_array_equal(found[:, 1:], np.asarray(graph.ids))
    again = import_graph(ids, out=tmp_path / "graph")
    np.testing.assert_array_equal(np.asarray(again.ids), np.asarray(graph.ids))
    np.testing.assert_array_equal(np.asarray(again.similarity), np.asarray(graph.similarity))
    assert similarity.name == f"ndis{N}_k{K + 1}_D_11.float32"


def test_with_the_features_an_imported_graph_has_a_recall(graph: Graph, tmp_path: Path):
    path, _ = published(tmp_path, 12)
    features = Embeddings.open(graph.path.parent / "embed")
    found = import_graph(path, out=tmp_path / "graph", features=features)
    assert found.recall == 1.0 and found.ids.shard_rows == features.array.shard_rows
    assert len(features.array) == N
    with pytest.raises(ArtifactError, match="the features 200"):
        rows = ImportFeaturesConfig(dim=8, rows=200)
        fewer = import_features(graph.path.parent / "rows.float32", rows, out=tmp_path / "fewer")
        import_graph(path, out=tmp_path / "other", features=fewer)


def test_an_imported_graph_below_the_wanted_recall_is_an_error(tmp_path: Path):
    rows = np.random.default_rng(3).normal(size=(40, 6))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    by_nearness = np.argsort(-(rows @ rows.T), axis=1)
    truth = by_nearness[:, [0, 1, 2, 3, -2, -1]].astype("<i4")  # two of five neighbors are far
    path = tmp_path / "ndis40_k6_I_11.int32"
    truth.tofile(path)
    values = np.take_along_axis(rows @ rows.T, truth, axis=1)
    values.astype("<f4").tofile(tmp_path / "ndis40_k6_D_11.float32")
    rows.astype("<f4").tofile(tmp_path / "rows")
    features = import_features(
        tmp_path / "rows", ImportFeaturesConfig(dim=6), out=tmp_path / "embed"
    )
    low, high = ImportGraphConfig(min_recall=0.3), ImportGraphConfig(min_recall=0.95)
    with pytest.raises(ConfigError, match=r"true neighbors, below min_recall=0.95"):
        import_graph(path, high, out=tmp_path / "high", features=features)
    with pytest.raises(ConfigError, match=r"min_recall=0.3 is asked for, but recall is measured"):
        import_graph(path, low, out=tmp_path / "none")
    assert 0.3 < import_graph(path, low, out=tmp_path / "low", features=features).recall < 0.95
    assert import_graph(path, out=tmp_path / "unmeasured").recall is None


def test_an_interrupted_import_keeps_its_shards(tmp_path: Path):
    path, _ = published(tmp_path, 12)
    config, out = ImportGraphConfig(shard_rows=60), tmp_path / "graph"
    graph = import_graph(path, config, out=out)
    whole = {p: p.read_bytes() for p in out.rglob("*.npy")}
    (out / "done.json").unlink()
    graph.similarity.shard_path(2).unlink()
    before = graph.ids.shard_path(0).stat().st_mtime_ns
    import_graph(path, config, out=out)
    assert {p: p.read_bytes() for p in out.rglob("*.npy")} == whole
    assert graph.ids.shard_path(0).stat().st_mtime_ns == before
    values = path.with_name(f"ndis{N}_k12_D_11.float12")
    values.write_bytes(values.read_bytes()[::-1])
    with pytest.raises(ArtifactError, match="was built from another source"):
        import_graph(path, config, out=out)


def test_fewer_columns_are_the_nearest_and_one_is_none(tmp_path: Path):
    path, ids = published(tmp_path, 32)
    graph = import_graph(path, ImportGraphConfig(columns=6), out=tmp_path / "six")
    np.testing.assert_array_equal(np.asarray(graph.ids), ids[:, 1:6])
    with pytest.raises(ArtifactError, match="lists 1 image a row, itself included"):
        import_graph(path, ImportGraphConfig(columns=1), out=tmp_path / "one")


def test_imported_features_are_unit_rows_in_order(tmp_path: Path, ray_session: None):
    rows = np.random.default_rng(1).normal(size=(50, 4)).astype(np.float32)
    rows.tofile(tmp_path / "a.float32")
    wanted = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for workers in (0, 2):
        ask = Resources(workers=workers)
        config = ImportFeaturesConfig(dim=4, shard_rows=20, resources=ask)
        out = tmp_path / f"embed{workers}"
        found = import_features(tmp_path / "a.float32", config, out=out)
        np.testing.assert_allclose(np.asarray(found.array), wanted, atol=1e-7)
        assert found.array.shard_rows == (20, 20, 10)
    config = ImportFeaturesConfig(dim=4, normalize=False)
    found = import_features(tmp_path / "a.float32", config, out=tmp_path / "raw")
    np.testing.assert_array_equal(np.asarray(found.array), rows)
    write_rows(tmp_path / "again", found.array)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "a.float32").read_bytes()
    rows[33, 1] = np.inf
    rows.tofile(tmp_path / "b.float32")
    with pytest.raises(ArtifactError, match="row 33 holds a number that is not finite"):
        import_features(tmp_path / "b.float32", config, out=tmp_path / "bad")


def test_imported_blocks_bring_their_labels_and_an_index_its_vectors(tmp_path: Path):
    import faiss

    write_feature_block(tmp_path / "block0.h5", ROWS[:90], LABELS[:90], batch=64)
    write_feature_block(tmp_path / "block1.h5", ROWS[90:], LABELS[90:], batch=64)
    blocks = [tmp_path / "block1.h5", tmp_path / "block0.h5"]
    found = import_features(blocks, ImportFeaturesConfig(shard_rows=64), out=tmp_path / "embed")
    np.testing.assert_allclose(np.asarray(found.array), ROWS, atol=1e-6)
    labels = ShardedArray.open(tmp_path / "embed" / "labels")
    np.testing.assert_array_equal(np.asarray(labels), LABELS)
    index = faiss.index_factory(8, "IVF4,Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(ROWS)
    index.add(ROWS)
    faiss.write_index(index, str(tmp_path / "ndis240.index"))
    found = import_features(tmp_path / "ndis240.index", out=tmp_path / "index")
    np.testing.assert_allclose(np.asarray(found.array), ROWS, atol=1e-6)
