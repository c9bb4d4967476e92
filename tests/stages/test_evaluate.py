"""Evaluation with all, some and no labels, against scikit-learn and slow loops."""

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from sklearn import metrics as sk
from sklearn.cluster import KMeans
from sklearn.neighbors import KNeighborsClassifier

from selfsup_ray.artifacts import ShardedArray, begin, finish
from selfsup_ray.config import Resources
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.synthetic import corpus_of_arrays, shape_images
from selfsup_ray.errors import ArtifactError, ConfigError
from selfsup_ray.stages.embed import EmbedConfig, Embeddings
from selfsup_ray.stages.evaluate import EvaluateConfig, Evaluation, evaluate, evaluate_run
from selfsup_ray.stages.graph import Graph, GraphConfig, build_graph
from selfsup_ray.stages.scores import kmeans, pixel_rows
from selfsup_ray.tracking import open_run

N, NUM_CLUSTERS = 240, 4
SHARDS = [100, 140]


@dataclass(frozen=True)
class World:
    """A corpus with embeddings, graph, and a clustering that is right for most images."""

    corpus: Corpus
    features: Embeddings
    graph: Graph
    labels: np.ndarray
    clusters: np.ndarray
    probabilities: np.ndarray


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    images, labels = shape_images(N, size=16)
    corpus = corpus_of_arrays(folder / "corpus", images, labels, class_names=list("abcd"))
    rows = np.eye(8, dtype=np.float32)[labels] + rng.normal(size=(N, 8)).astype(np.float32) * 0.3
    features = embeddings(folder / "embed", rows / np.linalg.norm(rows, axis=1, keepdims=True))
    config = GraphConfig(k=9, resources=Resources(workers=0))
    graph = build_graph(features, config, out=folder / "graph")
    wrong = rng.random(N) < 0.15
    clusters = np.where(wrong, rng.integers(0, 4, N), np.array([2, 0, 3, 1])[labels])
    scores = rng.normal(size=(N, 4)) + 4 * np.eye(4)[clusters]
    probabilities = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    clusters = probabilities.argmax(axis=1)
    return World(corpus, features, graph, labels, clusters, probabilities.astype(np.float32))


def embeddings(folder: Path, rows: np.ndarray) -> Embeddings:
    config = EmbedConfig()
    begin(folder, stage="embed", config=config, inputs={})
    sharded(folder / "rows", rows)
    facts = {"corpus": "../corpus"}
    finish(folder, stage="embed", config=config, inputs={}, seconds=0, facts=facts)
    return Embeddings.open(folder)


def sharded(folder: Path, rows: np.ndarray) -> ShardedArray:
    array = ShardedArray.create(
        folder, shard_rows=SHARDS, row_shape=rows.shape[1:], dtype=rows.dtype.name
    )
    for i, part in enumerate(np.split(rows, [100])):
        array.write_shard(i, part)
    return array


def everything(world: World) -> dict:
    return {
        "probabilities": world.probabilities,
        "features": world.features,
        "graph": world.graph,
        "corpus": world.corpus,
    }


def hungarian(clusters: np.ndarray, labels: np.ndarray) -> float:
    counts = sk.cluster.contingency_matrix(clusters, labels)
    return counts[linear_sum_assignment(-counts)].sum() / len(labels)


def test_labelled_scores_are_scikit_learns(world: World):
    scores = evaluate(world.clusters, world.labels).metrics
    assert scores["accuracy"] == hungarian(world.clusters, world.labels)
    assert scores["nmi"] == pytest.approx(
        sk.normalized_mutual_info_score(world.labels, world.clusters), abs=1e-12
    )
    assert scores["ari"] == pytest.approx(sk.adjusted_rand_score(world.labels, world.clusters))
    assert scores["ami"] == pytest.approx(
        sk.adjusted_mutual_info_score(world.labels, world.clusters)
    )
    assert (scores["num_images"], scores["num_labelled"], scores["notes"]) == (N, N, [])


def test_only_labelled_images_count_when_some_are_unknown(world: World):
    labels = np.where(np.arange(N) % 5 == 0, world.labels, -1)
    found = evaluate(world.clusters, labels, graph=world.graph)
    known = labels >= 0
    assert found.accuracy == hungarian(world.clusters[known], labels[known])
    assert found.confusion.sum() == known.sum() == found.metrics["num_labelled"]
    assert found.metrics["notes"] == [
        "48 of 240 images have a label: accuracy, NMI and ARI rest on those."
    ]
    assert found.metrics["label_free"]["neighbor_agreement"] == pytest.approx(
        (world.clusters[:, None] == world.clusters[np.asarray(world.graph.ids)]).mean()
    )


@pytest.mark.parametrize("labels", [None, np.full(N, -1)])
def test_without_labels_only_label_free_scores_are_given_and_that_is_said(world: World, labels):
    found = evaluate(world.clusters, labels, **everything(world))
    assert found.accuracy is None
    assert found.confusion is None
    assert not {"accuracy", "nmi", "ari", "knn_accuracy"} & flat_keys(found.metrics)
    assert "None of the 240 images has a label" in found.metrics["notes"][0]
    assert found.metrics["label_free"]["silhouette"] > 0.2
    assert "None of the 240 images" in str(found)


def test_baselines_without_labels_are_left_out_and_that_is_said(world: World):
    config = EvaluateConfig(baselines=("embeddings",))
    found = evaluate(world.clusters, None, config, **everything(world)).metrics
    assert found["baselines"] == {}
    assert "k-means" in found["notes"][1]


def flat_keys(values: dict) -> set[str]:
    nested = [flat_keys(item) for item in values.values() if isinstance(item, dict)]
    return set(values).union(*nested)


def test_labels_change_no_label_free_score(world: World):
    with_labels = evaluate(world.clusters, world.labels, **everything(world)).metrics
    without = evaluate(world.clusters, **everything(world)).metrics
    assert with_labels["label_free"] == without["label_free"]


def test_label_free_scores_equal_slow_loops(world: World):
    scores = evaluate(world.clusters, **everything(world)).metrics["label_free"]
    sizes = np.bincount(world.clusters, minlength=4) / N
    assert scores["size_balance"] == pytest.approx(-(sizes * np.log(sizes)).sum() / math.log(4))
    assert scores["largest_cluster"] == sizes.max()
    best = world.probabilities.max(axis=1)
    assert scores["mean_confidence"] == pytest.approx(best.mean(), abs=1e-6)
    assert scores["confident_share"] == (best > 0.99).mean()
    rows = np.asarray(world.features.array)
    assert scores["silhouette"] == pytest.approx(
        sk.silhouette_score(rows.astype(float), world.clusters, metric="cosine")
    )
    p, ids = world.probabilities.astype(float), np.asarray(world.graph.ids)
    pairs = [-math.log(p[i] @ p[j]) for i in range(N) for j in [i, *ids[i]]]
    mean = p.mean(axis=0)
    wanted = np.mean(pairs) + (mean * np.log(mean)).sum()
    assert scores["scan_score"] == pytest.approx(wanted, abs=1e-6)


def test_knn_accuracy_is_scikit_learns_leave_one_out_vote(world: World):
    config = EvaluateConfig(knn_temperature=0.2)
    scores = evaluate(world.clusters, world.labels, config, **everything(world)).metrics
    rows = np.asarray(world.features.array)
    hits = 0
    for i in range(N):
        others = np.arange(N) != i
        vote = KNeighborsClassifier(
            9, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.2)
        )
        vote.fit(rows[others], world.labels[others])
        hits += vote.predict(rows[i : i + 1])[0] == world.labels[i]
    assert scores["embeddings"]["knn_accuracy"] == hits / N
    assert scores["embeddings"]["knn_neighbors"] == 9


def test_top_accuracy_counts_the_matched_classes_of_the_most_probable_clusters(world: World):
    config = EvaluateConfig(top=2)
    scores = evaluate(world.clusters, world.labels, config, **everything(world)).metrics
    class_of = {int(c): "abcd".index(n) for c, n in matched_classes(world).items()}
    hits = [
        label in [class_of[c] for c in np.argsort(-p)[:2]]
        for p, label in zip(world.probabilities, world.labels, strict=True)
    ]
    assert scores["accuracy_top2"] == np.mean(hits)


def matched_classes(world: World) -> dict[str, str]:
    counts = sk.cluster.contingency_matrix(world.clusters, world.labels)
    return {str(c): "abcd"[j] for c, j in zip(*linear_sum_assignment(-counts), strict=True)}


def test_more_clusters_than_classes_are_scored_many_to_one_too(world: World):
    halves = world.labels * 2 + np.arange(N) // 4 % 2
    scores = evaluate(halves, world.labels).metrics
    assert (scores["accuracy"], scores["accuracy_many_to_one"]) == (0.5, 1.0)


def test_kmeans_baselines_are_scikit_learns_start_with_the_lowest_inertia(world: World):
    config = EvaluateConfig(baselines=("pixels", "embeddings"), baseline_starts=3, seed=5)
    scores = evaluate(world.clusters, world.labels, config, **everything(world)).metrics
    pixels = world.corpus.images(np.arange(N)).numpy().reshape(N, -1).astype(np.float32) / 255
    for name, rows in (("pixels", pixels), ("embeddings", np.asarray(world.features.array))):
        models = [KMeans(4, n_init=1, random_state=5 + i).fit(rows) for i in range(3)]
        accuracies = [hungarian(model.labels_, world.labels) for model in models]
        best = min(range(3), key=lambda i: models[i].inertia_)
        baseline = scores["baselines"][name]
        assert baseline["accuracy"] == accuracies[best]
        assert baseline["accuracy_mean"] == pytest.approx(np.mean(accuracies))
        assert baseline["accuracy_std"] == pytest.approx(np.std(accuracies))
        assert (baseline["images"], baseline["n_init"], baseline["seed"]) == (N, 3, 5)
        assert baseline["accuracy_here"] == scores["accuracy"]


def test_kmeans_on_one_channel_of_grey_images_finds_the_same_clusters(tmp_path: Path):
    grey = shape_images(80, size=8)[0].mean(axis=3, keepdims=True).astype(np.uint8)
    corpus = corpus_of_arrays(tmp_path / "corpus", grey.repeat(3, axis=3))
    rows = pixel_rows(corpus, np.arange(80))
    assert rows.shape == (80, 64)
    (one,) = kmeans(rows, num_clusters=4, starts=1, seed=0)
    (three,) = kmeans(np.tile(rows, 3), num_clusters=4, starts=1, seed=0)
    np.testing.assert_array_equal(one, three)


def test_a_baseline_on_some_images_scores_the_clustering_on_the_same_ones(world: World):
    labels = np.where(np.arange(N) < 120, world.labels, -1)
    config = EvaluateConfig(baselines=("embeddings",), baseline_sample=50)
    here = evaluate(world.clusters, labels, config, **everything(world)).metrics
    assert here["baselines"]["embeddings"]["images"] == 50
    assert here["baselines"]["embeddings"]["accuracy_here"] != here["accuracy"]


def test_large_images_are_averaged_down_for_kmeans_on_pixels(tmp_path: Path, world: World):
    images, labels = shape_images(12, size=64)
    corpus = corpus_of_arrays(tmp_path / "corpus", images, labels)
    rows = pixel_rows(corpus, np.arange(12)).reshape(12, 3, 32, 32)
    wanted = images.reshape(12, 32, 2, 32, 2, 3).mean(axis=(2, 4)).transpose(0, 3, 1, 2) / 255
    np.testing.assert_allclose(rows, wanted, atol=1e-6)


def test_a_baseline_without_its_input_is_an_error_before_any_work(world: World):
    config = EvaluateConfig(baselines=("pixels",))
    with pytest.raises(ConfigError, match=r"evaluate.baselines.*'pixels'.*needs `corpus`"):
        evaluate(world.clusters, world.labels, config)


def test_more_clusters_than_images_to_cluster_is_no_crash():
    (found,) = kmeans(np.ones((3, 2), np.float32), num_clusters=9, starts=1, seed=0)
    np.testing.assert_array_equal(found, found[0])


def test_files_hold_the_scores_and_the_confusion_matrix_with_names(tmp_path: Path, world: World):
    out = tmp_path / "evaluate"
    with open_run(out, name="evaluate") as tracker:
        made = evaluate(
            world.clusters, world.corpus.labels, out=out, tracker=tracker, **everything(world)
        )
    assert json.loads((out / "metrics.json").read_text()) == made.metrics
    counts = sk.cluster.contingency_matrix(world.clusters, world.labels)
    np.testing.assert_array_equal(np.load(out / "confusion.npy"), counts)
    with open(out / "confusion.csv", newline="") as file:
        head, *lines = csv.reader(file)
    assert head == ["cluster", "matched_class", "a", "b", "c", "d"]
    for i, line in enumerate(lines):
        assert line == [str(i), matched_classes(world)[str(i)], *map(str, counts[i])]
    record = json.loads((out / "metrics.jsonl").read_text())
    assert record["accuracy"] == made.accuracy
    opened = Evaluation.open(out)
    assert opened.metrics == made.metrics
    np.testing.assert_array_equal(opened.confusion, counts)
    assert opened.fingerprint == made.fingerprint


def test_ray_workers_count_the_same(tmp_path: Path, world: World, ray_session: None):
    here = evaluate(world.clusters, world.labels, **everything(world))
    config = EvaluateConfig(resources=Resources(workers=1))
    there = evaluate(world.clusters, world.labels, config, **everything(world))
    assert there.metrics == here.metrics


def test_other_assignments_in_the_same_folder_are_an_error(tmp_path: Path, world: World):
    evaluate(world.clusters, world.labels, out=tmp_path / "evaluate")
    evaluate(world.clusters, world.labels, out=tmp_path / "evaluate")
    with pytest.raises(ArtifactError, match="another assignments"):
        evaluate(world.clusters[::-1], world.labels, out=tmp_path / "evaluate")


def test_inputs_of_another_corpus_are_named(world: World):
    with pytest.raises(ConfigError, match="240 images to judge, but labels has 7 rows"):
        evaluate(world.clusters, world.labels[:7])
    with pytest.raises(ConfigError, match="100 images to judge, but graph has 240 rows"):
        evaluate(world.clusters[:100], graph=world.graph)
    with pytest.raises(ConfigError, match=r"`labels` must be one integer per image.*float64"):
        evaluate(world.clusters, world.labels / 2)
    with pytest.raises(ConfigError, match=r"`assignments` must be one integer.*shape \(240, 4\)"):
        evaluate(world.probabilities, world.labels)
    with pytest.raises(ConfigError, match=r"cluster 3 is assigned.*of 2 clusters"):
        evaluate(world.clusters, probabilities=world.probabilities[:, :2])
    with pytest.raises(ConfigError, match="Number the classes from 0 on"):
        evaluate(world.clusters, world.labels + 10**9)


@dataclass(frozen=True)
class Saved:
    """A clustering on disk, as a Clusterer shows it."""

    assignments: ShardedArray
    probabilities: ShardedArray
    fingerprint: str
    num_clusters: int = NUM_CLUSTERS


def test_a_run_is_judged_by_its_last_clustering_and_names_the_others(tmp_path: Path, world: World):
    p = {"scan": world.probabilities[::-1].copy(), "selflabel": world.probabilities}
    saved = {
        name: Saved(
            sharded(tmp_path / f"{name}-a", rows.argmax(axis=1).astype(np.int32)),
            sharded(tmp_path / f"{name}-p", rows),
            name,
        )
        for name, rows in p.items()
    }
    made = evaluate_run(
        saved, world.corpus, out=tmp_path / "e", features=world.features, graph=world.graph
    )
    alone = evaluate(world.clusters, world.labels, **everything(world)).metrics
    scan = evaluate(
        world.clusters[::-1], world.labels, **everything(world) | {"probabilities": p["scan"]}
    ).metrics
    assert {k: made.metrics[k] for k in alone} == alone
    assert made.metrics["clustering"] == "selflabel"
    assert made.metrics["scan"]["accuracy"] == scan["accuracy"]
    assert made.metrics["scan"]["label_free"] == scan["label_free"]
    np.testing.assert_array_equal(
        made.confusion, sk.cluster.contingency_matrix(world.clusters, world.labels)
    )


def test_embeddings_are_judged_without_any_clustering(tmp_path: Path, world: World):
    config = EvaluateConfig(baselines=("embeddings",), baseline_starts=1)
    made = evaluate_run(
        {}, world.corpus, config, out=tmp_path / "e", features=world.features, graph=world.graph
    )
    assert made.accuracy is None
    assert made.metrics["embeddings"]["knn_accuracy"] > 0.8
    assert made.metrics["baselines"]["embeddings"]["accuracy"] > 0.5


def test_printed_scores_are_one_line_each_with_the_notes_below():
    found = evaluate(np.array([0, 1, 1, 0]), np.array([0, 1, 1, -1]))
    lines = str(found).splitlines()
    assert lines[0].split() == ["accuracy", "1.0000"]
    assert lines[-1].startswith("3 of 4 images have a label")
    assert not any("{" in line or "[" in line for line in lines)


def test_one_image_can_be_evaluated():
    found = evaluate(np.zeros(1, int), np.zeros(1, int))
    assert found.accuracy == found.metrics["nmi"] == found.metrics["ari"] == 1
