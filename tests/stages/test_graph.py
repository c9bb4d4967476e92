"""The graph stage: right lists, honest recall, resumable, clear about what it cannot do."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.neighbors import NearestNeighbors

from selfsup_ray.artifacts import ShardedArray, begin, finish
from selfsup_ray.config import Resources, build
from selfsup_ray.errors import ArtifactError, ConfigError
from selfsup_ray.report_neighbors import in_degrees, near_duplicates, outliers
from selfsup_ray.stages.diffuse import DiffuseConfig, diffuse
from selfsup_ray.stages.embed import EmbedConfig, Embeddings
from selfsup_ray.stages.graph import Graph, GraphConfig, build_graph, measure_recall
from selfsup_ray.stages.interop import export_graph, to_csr, to_opentsne, to_scikit_learn, to_umap
from selfsup_ray.tracking import open_run

HERE = Resources(workers=0)


def embeddings(folder: Path, rows: np.ndarray, *, shard_rows: list[int]) -> Embeddings:
    """A finished embed stage that holds these rows."""
    config, inputs = EmbedConfig(), {"corpus": str(rows.tobytes())}
    begin(folder, stage="embed", config=config, inputs=inputs)
    array = ShardedArray.create(
        folder / "rows", shard_rows=shard_rows, row_shape=rows.shape[1:], dtype="float32"
    )
    for i, part in enumerate(np.split(rows, np.cumsum(shard_rows)[:-1])):
        array.write_shard(i, part)
    finish(folder, stage="embed", config=config, inputs=inputs, seconds=0, facts={"corpus": "."})
    return Embeddings.open(folder)


def unit_rows(n: int, d: int = 16, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def clustered(n: int = 240) -> tuple[np.ndarray, np.ndarray]:
    """Rows around 4 well separated centers, and the center of each."""
    labels = np.arange(n) % 4
    rows = np.eye(16, dtype=np.float32)[labels] + unit_rows(n) * 0.5
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), labels


@pytest.fixture
def features(tmp_path: Path) -> Embeddings:
    return embeddings(tmp_path / "embed", clustered()[0], shard_rows=[100, 100, 40])


def test_the_lists_are_scikit_learns_without_the_image_itself(tmp_path: Path, features: Embeddings):
    graph = build_graph(features, GraphConfig(k=7, resources=HERE), out=tmp_path / "graph")
    rows = np.asarray(features.array)
    brute = NearestNeighbors(n_neighbors=8, algorithm="brute", metric="cosine").fit(rows)
    distance, ids = brute.kneighbors(rows)
    np.testing.assert_array_equal(np.asarray(graph.ids), ids[:, 1:])
    np.testing.assert_allclose(np.asarray(graph.similarity), 1 - distance[:, 1:], atol=1e-6)
    assert (len(graph), graph.k, graph.ids.dtype) == (240, 7, np.int32)
    assert graph.ids.shard_rows == features.array.shard_rows


def test_an_exact_graph_has_recall_one_with_its_interval(tmp_path: Path, features: Embeddings):
    config = GraphConfig(k=5, recall_sample=90, resources=HERE)
    graph = Graph.open(build_graph(features, config, out=tmp_path / "graph").path)
    wanted = binomtest(90, 90).proportion_ci(method="wilson")
    assert graph.recall == 1.0
    assert graph.facts["recall_sample"] == 90
    np.testing.assert_allclose(graph.facts["recall_interval"], [wanted.low, wanted.high], atol=1e-5)


def test_recall_is_the_share_of_true_neighbors_in_the_lists(tmp_path: Path, features: Embeddings):
    graph = build_graph(features, GraphConfig(k=5, resources=HERE), out=tmp_path / "graph")
    truth = np.asarray(graph.ids)
    damaged = truth.copy()
    damaged[:, 3:] = (np.arange(240)[:, None] + [1, 2]) % 240
    for i, part in enumerate(np.split(damaged, [100, 200])):
        graph.ids.write_shard(i, part)
    share = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(truth, damaged, strict=True)])
    measured = measure_recall(features.array, graph.ids, sample=240, seed=0)["recall"]
    assert measured == pytest.approx(share, abs=1e-12)
    assert measured < 0.7


def test_a_graph_below_the_wanted_recall_is_an_error(tmp_path: Path, features: Embeddings):
    config = GraphConfig(k=5, resources=HERE)
    graph = build_graph(features, config, out=tmp_path / "graph")
    (graph.path / "done.json").unlink()
    for i, n in enumerate(graph.ids.shard_rows):
        graph.ids.write_shard(i, np.tile(np.arange(5), (n, 1)))
    with pytest.raises(ConfigError, match=r"below graph.min_recall=0.95"):
        build_graph(features, config, out=graph.path)


def test_neighbor_accuracy_equals_a_loop_over_labelled_pairs(tmp_path: Path, features: Embeddings):
    labels = np.where(np.arange(240) % 3 == 0, -1, np.random.default_rng(0).integers(0, 3, 240))
    graph = build_graph(
        features, GraphConfig(k=6, resources=HERE), out=tmp_path / "graph", labels=lambda: labels
    )
    for place in (1, 5, 6):
        pairs = [
            labels[i] == labels[j]
            for i, row in enumerate(np.asarray(graph.ids)[:, :place])
            for j in row
            if labels[i] >= 0 and labels[j] >= 0
        ]
        found = graph.facts["neighbor_accuracy_at"][str(place)]
        assert found == pytest.approx(np.mean(pairs), abs=1e-12)
    assert graph.neighbor_accuracy == found


def test_labels_change_no_list_and_no_fingerprint(tmp_path: Path, features: Embeddings):
    config = GraphConfig(k=6, resources=HERE)
    bare = build_graph(features, config, out=tmp_path / "bare")
    seen = build_graph(features, config, out=tmp_path / "seen", labels=clustered()[1])
    np.testing.assert_array_equal(np.asarray(bare.ids), np.asarray(seen.ids))
    assert bare.fingerprint == seen.fingerprint
    assert bare.neighbor_accuracy is None
    assert seen.neighbor_accuracy > 0.9


def test_labels_that_are_all_unknown_give_no_neighbor_accuracy(
    tmp_path: Path, features: Embeddings
):
    graph = build_graph(
        features, GraphConfig(resources=HERE), out=tmp_path / "graph", labels=np.full(240, -1)
    )
    assert graph.neighbor_accuracy is None


def test_two_actors_write_the_same_files_as_this_process(
    tmp_path: Path, features: Embeddings, ray_session: None
):
    here = build_graph(features, GraphConfig(k=9, resources=HERE), out=tmp_path / "here")
    config = GraphConfig(k=9, resources=Resources(workers=2))
    actors = build_graph(features, config, out=tmp_path / "actors")
    for name in ("ids", "similarity"):
        for i in range(3):
            file = f"{name}/{i:05d}.npy"
            assert (here.path / file).read_bytes() == (actors.path / file).read_bytes()
    assert here.fingerprint == actors.fingerprint


def test_a_finished_graph_is_not_built_again(tmp_path: Path, features: Embeddings):
    config = GraphConfig(resources=HERE)
    first = build_graph(features, config, out=tmp_path / "graph")
    stamp = (first.path / "done.json").read_bytes()
    again = build_graph(features, config, out=tmp_path / "graph")
    assert (again.path / "done.json").read_bytes() == stamp


def test_an_interrupted_graph_keeps_the_shards_it_has(tmp_path: Path, features: Embeddings):
    config = GraphConfig(k=8, resources=HERE)
    graph = build_graph(features, config, out=tmp_path / "graph")
    whole = np.asarray(graph.ids)
    (graph.path / "done.json").unlink()
    graph.ids.shard_path(1).unlink()
    kept = graph.ids.shard_path(0).stat().st_mtime_ns
    again = build_graph(features, config, out=graph.path)
    np.testing.assert_array_equal(np.asarray(again.ids), whole)
    assert again.ids.shard_path(0).stat().st_mtime_ns == kept


def test_another_k_in_the_same_folder_is_an_error_naming_both(tmp_path: Path, features: Embeddings):
    build_graph(features, GraphConfig(k=5, resources=HERE), out=tmp_path / "graph")
    with pytest.raises(ArtifactError, match=r"graph.k=5, but this run asks for 6"):
        build_graph(features, GraphConfig(k=6, resources=HERE), out=tmp_path / "graph")


def test_other_embeddings_in_the_same_folder_are_an_error(tmp_path: Path, features: Embeddings):
    build_graph(features, GraphConfig(resources=HERE), out=tmp_path / "graph")
    others = embeddings(tmp_path / "others", unit_rows(240), shard_rows=[240])
    with pytest.raises(ArtifactError, match="was built from another features"):
        build_graph(others, GraphConfig(resources=HERE), out=tmp_path / "graph")


SMALL_METHODS = [
    {"name": "exact"},
    {"name": "cells"},
    {"name": "cells", "by": "cell"},
    {"name": "ivf"},
    {"name": "hnsw"},
]


@pytest.mark.parametrize("method", SMALL_METHODS, ids=lambda m: "-".join(m.values()))
@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_with_few_images_every_list_holds_all_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, n: int, method: dict[str, str]
):
    rows = unit_rows(n)
    cut = [n - n // 3, n // 3] if n // 3 else [n]
    features = embeddings(tmp_path / "embed", rows, shard_rows=cut)
    config = build(GraphConfig, {"k": 5, "method": method, "resources": {"workers": 0}})
    graph = build_graph(features, config, out=tmp_path / "graph", labels=np.zeros(n, int))
    truth = rows.astype(np.float64) @ rows.T
    np.fill_diagonal(truth, -np.inf)
    wanted = np.argsort(-truth, axis=1)[:, : n - 1]
    np.testing.assert_array_equal(np.asarray(graph.ids), wanted)
    assert (len(graph), graph.k, graph.recall) == (n, n - 1, 1.0)
    assert (f"{n} images have {n - 1} others each, fewer than graph.k=5" in caplog.text) == (n < 6)
    csr = to_csr(graph).toarray()
    np.testing.assert_allclose(csr, np.where(np.isinf(truth), 0, truth), atol=1e-6)
    again = build_graph(features, config, out=tmp_path / "graph")
    assert again.fingerprint == graph.fingerprint


def test_the_graph_of_one_image_is_read_by_everything_that_reads_graphs(tmp_path: Path):
    features = embeddings(tmp_path / "embed", unit_rows(1), shard_rows=[1])
    graph = build_graph(features, GraphConfig(resources=HERE), out=tmp_path / "graph")
    assert to_scikit_learn(graph).shape == to_csr(graph).shape == (1, 1)
    assert to_umap(graph)[0].tolist() == [[0]] and to_opentsne(graph)[0].shape == (1, 0)
    ids, _ = export_graph(graph, tmp_path, format="int32")
    assert np.fromfile(ids, "<i4").tolist() == [0]
    assert len(near_duplicates(graph, None).pairs) == 0
    assert (outliers(graph).scores.tolist(), in_degrees(graph).mean) == ([-1.0], 0.0)
    for mode in ("classes", "rows"):
        found = diffuse(graph, [3], DiffuseConfig(mode=mode), out=tmp_path / mode)
        assert np.asarray(found.predictions).tolist() == [3]


def test_a_graph_of_no_image_is_an_error_before_any_work(tmp_path: Path):
    features = embeddings(tmp_path / "embed", unit_rows(1)[:0], shard_rows=[0])
    with pytest.raises(ConfigError, match="the embeddings have no row"):
        build_graph(features, GraphConfig(k=5, resources=HERE), out=tmp_path / "graph")
    assert not (tmp_path / "graph").exists()


def test_duplicates_list_each_other_and_never_themselves(tmp_path: Path):
    rows = unit_rows(60)
    rows[30:] = rows[:30]
    features = embeddings(tmp_path / "embed", rows, shard_rows=[25, 35])
    graph = build_graph(features, GraphConfig(k=4, resources=HERE), out=tmp_path / "graph")
    np.testing.assert_array_equal(np.asarray(graph.ids)[:, 0], (np.arange(60) + 30) % 60)


def test_the_tracker_gets_recall_and_neighbor_accuracy(tmp_path: Path, features: Embeddings):
    out = tmp_path / "graph"
    with open_run(out, name="graph") as tracker:
        build_graph(
            features, GraphConfig(resources=HERE), out=out, labels=clustered()[1], tracker=tracker
        )
    record = json.loads((out / "metrics.jsonl").read_text())
    assert record["recall"] == 1.0
    assert record["neighbor_accuracy"] > 0.9


def test_labels_of_another_corpus_are_an_error(tmp_path: Path, features: Embeddings):
    with pytest.raises(ConfigError, match="7 labels were given for 240 images"):
        build_graph(
            features, GraphConfig(resources=HERE), out=tmp_path / "graph", labels=np.zeros(7, int)
        )


def test_an_unfinished_folder_is_not_a_graph(tmp_path: Path, features: Embeddings):
    graph = build_graph(features, GraphConfig(resources=HERE), out=tmp_path / "graph")
    (graph.path / "done.json").unlink()
    with pytest.raises(ArtifactError, match="holds no finished stage"):
        Graph.open(graph.path)


@pytest.mark.parametrize("method", [{"name": "hnsw"}, {"name": "cells", "by": "row"}])
def test_gpus_are_refused_where_the_search_would_not_use_them(method: dict[str, str]):
    with pytest.raises(ConfigError, match=r"resources.gpus.*set it to 0"):
        build(GraphConfig, {"method": method, "resources": {"gpus": 1}})


def test_the_exact_search_and_the_join_by_cells_take_a_gpu():
    for method in ({"name": "exact"}, {"name": "ivf"}, {"name": "cells", "by": "cell"}):
        assert build(GraphConfig, {"method": method, "resources": {"gpus": 1}}).resources.gpus == 1
