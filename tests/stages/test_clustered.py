"""Clusters of the whole corpus, predicted by the workers that trained the network."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selfsup_ray.artifacts import ShardedArray
from selfsup_ray.config import build, override
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.synthetic import write_shapes
from selfsup_ray.models.clusterer import Clusterer
from selfsup_ray.models.encoder import Encoder
from selfsup_ray.stages.embed import EmbedConfig, embed
from selfsup_ray.stages.graph import Graph, GraphConfig, build_graph
from selfsup_ray.stages.ingest import IngestConfig, ingest
from selfsup_ray.stages.pretext import PretextConfig, pretrain
from selfsup_ray.stages.scan import ScanConfig, scan
from selfsup_ray.stages.selflabel import SelfLabelConfig, self_label

HERE: dict[str, Any] = {"resources": {"workers": 0}}
TRAINED: dict[str, Any] = {"epochs": 1, "batch_size": 20, "precision": "float32", **HERE}
NUM_IMAGES, SHARD = 110, 20


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, Encoder, Graph]:
    """A corpus of six shards, the last one short, an encoder of it, and its neighbors."""
    folder = tmp_path_factory.mktemp("clustered")
    write_shapes(folder / "photos", NUM_IMAGES, size=32)
    asked = build(IngestConfig, {"image_size": 32, "shard_size": SHARD, **HERE})
    corpus = ingest(str(folder / "photos"), asked, out=folder / "corpus")
    backbone = {"name": "resnet18", "stem": "stl", "width": 8}
    encoder = pretrain(
        corpus, build(PretextConfig, {"backbone": backbone, **TRAINED}), out=folder / "pretext"
    )
    rows = embed(corpus, encoder, build(EmbedConfig, HERE), out=folder / "embed")
    graph = build_graph(rows, build(GraphConfig, {"k": 5, **HERE}), out=folder / "graph")
    return corpus, encoder, graph


SCAN = build(ScanConfig, {"num_clusters": 4, "num_heads": 2, "num_neighbors": 5, **TRAINED})


@pytest.fixture(scope="module")
def here(made: tuple[Corpus, Encoder, Graph]) -> Clusterer:
    corpus, encoder, graph = made
    return scan(corpus, encoder, graph, SCAN, out=corpus.path.parent / "here")


def whole(array: ShardedArray) -> np.ndarray:
    return np.concatenate([array.shard(i) for i in range(array.num_shards)])


def test_every_image_has_what_the_written_network_says_of_it(
    made: tuple[Corpus, Encoder, Graph], here: Clusterer
):
    corpus, *_ = made
    said = here.predict(corpus.images(np.arange(NUM_IMAGES)))
    np.testing.assert_allclose(whole(here.probabilities), said.probabilities, atol=1e-5)
    np.testing.assert_array_equal(whole(here.assignments), said.clusters)


@pytest.mark.slow
def test_workers_write_what_one_process_does(
    ray_session: None, made: tuple[Corpus, Encoder, Graph], here: Clusterer, tmp_path: Path
):
    corpus, encoder, graph = made
    alone = override(SCAN, {"resources.workers": 1})
    one = scan(corpus, encoder, graph, alone, out=tmp_path / "one")
    assert one.fingerprint == here.fingerprint
    np.testing.assert_array_equal(whole(one.probabilities), whole(here.probabilities))
    pair = override(SCAN, {"resources.workers": 2})
    two = scan(corpus, encoder, graph, pair, out=tmp_path / "two")
    said = two.predict(corpus.images(np.arange(NUM_IMAGES)))
    np.testing.assert_allclose(whole(two.probabilities), said.probabilities, atol=1e-5)
    np.testing.assert_array_equal(whole(two.assignments), said.clusters)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_killed_between_two_predictions_writes_only_what_is_missing(
    workers: int,
    ray_session: None,
    made: tuple[Corpus, Encoder, Graph],
    here: Clusterer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    corpus, *_ = made
    config = SelfLabelConfig(
        epochs=1,
        batch_size=20,
        threshold=0.3,
        precision="float32",
        resources=dataclasses.replace(SCAN.resources, workers=workers),
    )
    out = tmp_path / "selflabel"
    monkeypatch.setattr("selfsup_ray.stages.selflabel.finish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        self_label(corpus, here, config, out=out)
    monkeypatch.undo()
    before = Clusterer.open(out)
    weights, wanted = before.fingerprint, whole(before.probabilities)
    (out / "probabilities" / "00003.npy").unlink()  # as if killed before these
    (out / "assignments" / "00004.npy").unlink()
    kept = (out / "probabilities" / "00002.npy").stat().st_mtime_ns
    caplog.set_level("INFO", logger="selfsup_ray")
    again = self_label(corpus, here, config, out=out)
    assert (out / "probabilities" / "00002.npy").stat().st_mtime_ns == kept
    assert again.fingerprint == weights
    np.testing.assert_array_equal(whole(again.probabilities), wanted)
    np.testing.assert_array_equal(whole(again.assignments), wanted.argmax(axis=1))
    said = [record.getMessage() for record in caplog.records]
    assert any("predict: 110 images" in line for line in said), said


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt
