"""Linear and kNN probes against scikit-learn on the same split."""

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from selfsup_ray.artifacts import ShardedArray, begin, finish
from selfsup_ray.config import Resources
from selfsup_ray.errors import ArtifactError, ConfigError
from selfsup_ray.stages.embed import EmbedConfig, Embeddings
from selfsup_ray.stages.lowshot_config import HeldOutRows, HeldOutSources
from selfsup_ray.stages.probe import Probe, ProbeConfig, probe, split_labelled
from selfsup_ray.tracking import open_run

N, DIM = 600, 12


def noisy_classes() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, N)
    rows = np.eye(DIM)[labels] + rng.normal(size=(N, DIM)) * 0.4
    rows = rows.astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), labels


@pytest.fixture
def features(tmp_path: Path) -> Embeddings:
    folder, rows = tmp_path / "embed", noisy_classes()[0]
    begin(folder, stage="embed", config=EmbedConfig(), inputs={})
    array = ShardedArray.create(
        folder / "rows", shard_rows=[400, 200], row_shape=(DIM,), dtype="float32"
    )
    for i, part in enumerate(np.split(rows, [400])):
        array.write_shard(i, part)
    facts = {"corpus": "../corpus"}
    finish(folder, stage="embed", config=EmbedConfig(), inputs={}, seconds=0, facts=facts)
    return Embeddings.open(folder)


def test_the_linear_probe_is_scikit_learns_with_the_decay_that_validation_chose(
    tmp_path: Path, features: Embeddings
):
    rows, labels = noisy_classes()
    config = ProbeConfig(l2=(1e-5, 1e-3, 1e-1, 10))
    made = probe(features, labels, config, out=tmp_path / "probe")
    split, x = split_labelled(labels, config), rows.astype(np.float64) * np.sqrt(DIM)

    def accuracy(train: np.ndarray, test: np.ndarray, l2: float) -> float:
        model = LogisticRegression(C=1 / (l2 * len(train)), tol=1e-8, max_iter=5000)
        return model.fit(x[train], labels[train]).score(x[test], labels[test])

    validation = {l2: accuracy(split.fit, split.validation, l2) for l2 in config.l2}
    found = made.metrics["linear"]
    assert found["validation_accuracy"] == pytest.approx(
        {f"{l2:g}": score for l2, score in validation.items()}
    )
    best = max(sorted(config.l2, reverse=True), key=lambda l2: validation[l2])
    assert found["l2"] == best
    assert made.linear == pytest.approx(accuracy(split.train, split.test, best))
    assert found["is_converged"]
    assert found["interval"][0] < made.linear < found["interval"][1]


def test_the_knn_probe_is_scikit_learns_weighted_vote(tmp_path: Path, features: Embeddings):
    rows, labels = noisy_classes()
    config = ProbeConfig(knn_k=15, knn_temperature=0.07)
    made = probe(features, labels, config, out=tmp_path / "probe")
    split = split_labelled(labels, config)
    vote = KNeighborsClassifier(
        15, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    )
    vote.fit(rows[split.train], labels[split.train])
    assert made.knn == pytest.approx(vote.score(rows[split.test], labels[split.test]))
    np.testing.assert_array_equal(np.load(made.path / "train_ids.npy"), split.train)


def test_the_accuracy_of_every_class_is_that_of_the_reference_predictions(
    tmp_path: Path, features: Embeddings
):
    rows, labels = noisy_classes()
    config = ProbeConfig(knn_k=15, knn_temperature=0.07)
    made = probe(features, labels, config, out=tmp_path / "probe")
    split = split_labelled(labels, config)
    vote = KNeighborsClassifier(
        15, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    )
    predicted = vote.fit(rows[split.train], labels[split.train]).predict(rows[split.test])
    truth = labels[split.test]
    by_class = [(predicted[truth == c] == c).mean() for c in range(5)]
    assert made.metrics["knn"]["per_class"] == pytest.approx(by_class)
    linear, sizes = made.metrics["linear"]["per_class"], np.bincount(truth)
    assert np.dot(linear, sizes) / len(truth) == pytest.approx(made.linear)


def test_the_data_sets_own_test_images_can_be_held_out(tmp_path: Path, features: Embeddings):
    labels = noisy_classes()[1]
    rows = ProbeConfig(test=HeldOutRows(first=500))
    made = probe(features, labels, rows, out=tmp_path / "rows")
    assert made.metrics["num_test"] == 100
    np.testing.assert_array_equal(np.load(made.path / "train_ids.npy"), np.arange(500))
    by_source = ProbeConfig(test=HeldOutSources(pattern="val/*"))

    def sources(ids: np.ndarray) -> list[str]:
        return [f"{'val' if i >= 500 else 'train'}/{i}.png" for i in ids]

    same = probe(features, labels, by_source, out=tmp_path / "sources", sources=sources)
    assert same.metrics == made.metrics


def test_the_split_uses_every_labelled_image_once_and_no_other():
    labels = np.where(np.arange(5000) % 3 == 0, -1, 1)
    split = split_labelled(labels, ProbeConfig())
    together = np.concatenate([split.fit, split.validation, split.test])
    np.testing.assert_array_equal(np.sort(together), np.flatnonzero(labels >= 0))
    known = len(together)
    assert len(split.test) == pytest.approx(0.2 * known, rel=0.15)
    assert len(split.validation) == pytest.approx(0.08 * known, rel=0.2)


def test_an_image_stays_in_its_part_when_others_get_or_lose_labels():
    labels = np.arange(2000) % 7
    fewer = np.where(np.arange(2000) % 2 == 0, labels, -1)
    whole, half = (split_labelled(known, ProbeConfig()) for known in (labels, fewer))
    for part in ("fit", "validation", "test"):
        even = getattr(whole, part)
        np.testing.assert_array_equal(even[even % 2 == 0], getattr(half, part))
    other = split_labelled(labels, ProbeConfig(seed=1))
    assert set(other.test) != set(whole.test)


def test_unlabelled_images_are_neither_learned_from_nor_scored(
    tmp_path: Path, features: Embeddings
):
    labels = noisy_classes()[1]
    partly = np.where(np.arange(N) % 2 == 0, labels, -1)
    made = probe(features, lambda: partly, out=tmp_path / "probe")
    assert made.metrics["num_train"] + made.metrics["num_test"] == N // 2
    assert not np.any(np.load(made.path / "train_ids.npy") % 2)


def test_two_actors_vote_the_same(tmp_path: Path, features: Embeddings, ray_session: None):
    labels = noisy_classes()[1]
    here = probe(features, labels, out=tmp_path / "here")
    config = ProbeConfig(resources=Resources(workers=2))
    there = probe(features, labels, config, out=tmp_path / "there")
    assert there.metrics == here.metrics


def test_files_and_tracker_hold_the_scores(tmp_path: Path, features: Embeddings):
    out = tmp_path / "probe"
    with open_run(out, name="probe") as tracker:
        made = probe(features, noisy_classes()[1], out=out, tracker=tracker)
    opened = Probe.open(out)
    assert json.loads((out / "metrics.json").read_text()) == made.metrics == opened.metrics
    record = json.loads((out / "metrics.jsonl").read_text())
    assert record["linear.accuracy"] == opened.linear
    stamp = (out / "done.json").read_bytes()
    assert probe(features, noisy_classes()[1], out=out).fingerprint == opened.fingerprint
    assert (out / "done.json").read_bytes() == stamp


@pytest.mark.parametrize("labels", [np.full(N, -1), np.zeros(N, int)])
def test_fewer_than_two_classes_are_an_error_before_any_work(
    tmp_path: Path, features: Embeddings, labels: np.ndarray
):
    with pytest.raises(ConfigError, match="needs labelled images of two classes"):
        probe(features, labels, out=tmp_path / "probe")
    assert not (tmp_path / "probe").exists()


def test_other_labels_in_the_same_folder_are_an_error(tmp_path: Path, features: Embeddings):
    labels = noisy_classes()[1]
    probe(features, labels, out=tmp_path / "probe")
    with pytest.raises(ArtifactError, match="another labels"):
        probe(features, labels[::-1], out=tmp_path / "probe")
    with pytest.raises(ConfigError, match="7 labels for 600 embeddings"):
        probe(features, labels[:7], out=tmp_path / "probe")


def test_config_values_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="`l2` needs at least one value"):
        ProbeConfig(l2=())
    with pytest.raises(ConfigError, match=r"resources.workers.*resources.gpus"):
        ProbeConfig(resources=Resources(workers=2, gpus=1))
