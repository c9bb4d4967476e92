"""The stage sela: labels found on real files, killed and resumed, exported, trained on again."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from selfsup_ray.artifacts import ShardedArray, read_done
from selfsup_ray.config import build, override
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.synthetic import write_shapes
from selfsup_ray.errors import ConfigError
from selfsup_ray.experiment import Experiment
from selfsup_ray.models.clusterer import Clusterer
from selfsup_ray.models.encoder import Encoder
from selfsup_ray.pipeline import run_experiment
from selfsup_ray.planning import stage_states
from selfsup_ray.report_html import Section
from selfsup_ray.report_run import Run
from selfsup_ray.report_sela import ordered, sela_section
from selfsup_ray.stages.ingest import IngestConfig, ingest
from selfsup_ray.stages.sela import SeLaConfig, sela
from selfsup_ray.stages.sela_labels import given_labels

VIEWS = {
    "name": "sela",
    "scale": [0.3, 1.0],
    "jitter": [0.4, 0.4, 0.4, 0.02],
    "gray_p": 0.0,
    "share": 1.0,
}
SMALL: dict[str, Any] = {
    "num_clusters": 8,
    "num_heads": 2,
    "backbone": {"name": "resnet18", "stem": "stl", "width": 8},
    "views": VIEWS,
    "events": {"name": "linear", "nopts": 8},
    "sinkhorn": {"lam": 10.0, "max_iterations": 201},
    "epochs": 6,
    "batch_size": 24,
    "optim": {"name": "sgd", "lr": 0.1, "weight_decay": 5e-4},
    "schedule": {"name": "constant"},
    "precision": "float32",
    "log_every": 8,
    "checkpoint_every": 5,
    "resources": {"workers": 0},
}
FEW: dict[str, Any] = SMALL | {"epochs": 3, "events": {"name": "linear", "nopts": 5}}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sela") / "photos"
    write_shapes(folder, 240, size=32)
    return folder


@pytest.fixture(scope="module")
def corpus(photos: Path) -> Corpus:
    config = build(IngestConfig, {"image_size": 32, "shard_size": 100, "resources": {"workers": 0}})
    return ingest(str(photos), config, out=photos.parent / "corpus")


@pytest.fixture(scope="module")
def finished(corpus: Corpus) -> Path:
    out = corpus.path.parent / "sela"
    sela(corpus, build(SeLaConfig, SMALL), out=out)
    return out


@pytest.fixture(scope="module")
def few(corpus: Corpus) -> Path:
    """A short training that nothing interrupts."""
    out = corpus.path.parent / "few"
    sela(corpus, build(SeLaConfig, FEW), out=out)
    return out


def test_relabeling_agrees_more_and_more_with_the_shapes(finished: Path, corpus: Corpus):
    events = json.loads((finished / "events.json").read_text())
    assert [(e["event"], e["head"]) for e in events] == [(i, h) for i in range(6) for h in range(2)]
    first, last = (np.mean([e["nmi"] for e in part]) for part in (events[:2], events[-2:]))
    assert last > first + 0.1, f"NMI {first:.2f} at the start, {last:.2f} at the end"
    assert read_done(finished).facts["nmi"] == pytest.approx(
        next(e["nmi"] for e in events[-2:] if e["head"] == read_done(finished).facts["head"])
    )


def test_labels_are_written_in_three_forms_that_agree(finished: Path, corpus: Corpus):
    stored = np.asarray(ShardedArray.open(finished / "labels"))
    table = pq.read_table(finished / "pseudo_labels.parquet")
    assert table.column_names == ["id", "path", "head_0", "head_1"]
    assert table["id"].to_pylist() == list(range(240))
    assert table["path"].to_pylist() == corpus.sources(np.arange(240))
    loaded = torch.load(finished / "pseudo_labels.pt", weights_only=True)["L"]
    assert loaded.shape == (2, 240) and loaded.dtype == torch.int64
    for head in range(2):
        assert table[f"head_{head}"].to_pylist() == stored[:, head].tolist()
        assert loaded[head].tolist() == stored[:, head].tolist()
    clusterer = Clusterer.open(finished)
    chosen = read_done(finished).facts["head"]
    assert np.asarray(clusterer.assignments).tolist() == stored[:, chosen].tolist()
    assert clusterer.probabilities.shape == (240, 8)


def test_the_encoder_of_the_folder_embeds_images(finished: Path, photos: Path):
    encoder = Encoder.open(finished)
    rows = encoder.embed(sorted(photos.rglob("*.png"))[:3])
    assert rows.shape == (3, 64)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("name", ["pseudo_labels.parquet", "pseudo_labels.pt"])
def test_a_fresh_network_learns_exported_labels(finished: Path, corpus: Corpus, name: str):
    fixed = {"events": {"name": "fixed", "labels": str(finished / name)}, "seed": 3}
    out = finished.parent / f"fixed-{name}"
    sela(corpus, build(SeLaConfig, FEW | fixed), out=out)
    loaded = torch.load(finished / "pseudo_labels.pt", weights_only=True)["L"]
    again = torch.load(out / "pseudo_labels.pt", weights_only=True)["L"]
    assert torch.equal(loaded, again), "given labels do not change"
    assert json.loads((out / "events.json").read_text()) == []
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[-1] < 0.97 * losses[0]


def test_labels_of_other_images_are_refused(finished: Path, corpus: Corpus, tmp_path: Path):
    events = {"name": "fixed", "labels": str(finished / "pseudo_labels.pt")}
    one_head = build(SeLaConfig, FEW | {"events": events, "num_heads": 1})
    with pytest.raises(ConfigError, match=r"labels of 2 heads and 240 images.*Set sela.num_heads"):
        sela(corpus, one_head, out=tmp_path / "a")
    fewer = build(SeLaConfig, FEW | {"events": events, "num_clusters": 3})
    with pytest.raises(ConfigError, match=r"labels from 0 to 7.*num_clusters=3. Set it to 8"):
        sela(corpus, fewer, out=tmp_path / "b")


def test_exported_labels_are_read_by_range_whatever_the_order_of_the_file(
    finished: Path, tmp_path: Path
):
    table = pq.read_table(finished / "pseudo_labels.parquet")
    order = np.random.default_rng(0).permutation(240)
    pq.write_table(table.take(order), tmp_path / "shuffled.parquet", row_group_size=50)
    wanted = np.asarray(ShardedArray.open(finished / "labels"))
    fits = {"num_heads": 2, "num_images": 240, "num_clusters": 8}
    for name in (tmp_path / "shuffled.parquet", finished / "pseudo_labels.pt"):
        between = given_labels(name, **fits)
        assert np.array_equal(between(70, 190), wanted[70:190])
    order[order == 100] = 99
    pq.write_table(table.take(order), tmp_path / "twice.parquet")
    between = given_labels(tmp_path / "twice.parquet", **fits)
    assert np.array_equal(between(0, 99), wanted[:99])
    with pytest.raises(ConfigError, match="must have each id from 0 to 239 once"):
        between(90, 110)


def test_alexnet_on_small_views_is_refused_before_any_work(corpus: Corpus, tmp_path: Path):
    wrong = SMALL | {"backbone": {"name": "alexnet"}}
    with pytest.raises(ConfigError, match=r"views of 224 pixels, got 32. Set sela.views.size"):
        sela(corpus, build(SeLaConfig, wrong), out=tmp_path / "sela")


KILLED = """
import sys, os
from pathlib import Path
import torch
torch.set_num_threads(1)
from selfsup_ray import training
from selfsup_ray.cluster import train
from selfsup_ray.config import build, read_yaml
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.models.sela import SeLa
from selfsup_ray.stages.sela import SeLaConfig, sela

corpus, config, out, step = sys.argv[1:]
before = SeLa.before_step

def killed_after_an_event(self, samples_seen, dataset):
    before(self, samples_seen, dataset)
    if samples_seen == int(step) * self.method.batch_size:
        os.kill(os.getpid(), 9)

SeLa.before_step = killed_after_an_event
sela(Corpus.open(corpus), build(SeLaConfig, read_yaml(Path(config))), out=out)
"""


@pytest.mark.parametrize("step", [11, 17])
def test_a_killed_training_ends_with_the_same_labels_and_weights(
    corpus: Corpus, few: Path, tmp_path: Path, step: int
):
    """Events come before steps 0, 11 and 21, checkpoints after 5, 10, 15, ...: the first kill is
    right after an event that no checkpoint holds, the second within an epoch."""
    (tmp_path / "config.yaml").write_text(json.dumps(FEW))
    command = [sys.executable, "-c", KILLED, str(corpus.path), str(tmp_path / "config.yaml")]
    killed = subprocess.run([*command, str(tmp_path / "killed"), str(step)], timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "killed" / "checkpoint.pt").exists()
    sela(corpus, build(SeLaConfig, FEW), out=tmp_path / "killed")
    folders = [tmp_path / "killed", few]
    one, other = (
        torch.load(folder / "pseudo_labels.pt", weights_only=True)["L"] for folder in folders
    )
    assert torch.equal(one, other)
    assert Clusterer.open(folders[0]).fingerprint == Clusterer.open(few).fingerprint
    events = [json.loads((folder / "events.json").read_text()) for folder in folders]
    assert events[0] == events[1]
    assert {event["samples_seen"] for event in events[0]} == {0, 11 * 24, 21 * 24}


def experiment(photos: Path, out: Path, **changes: Any) -> Experiment:
    values = {
        "out": str(out),
        "ingest": {
            "source": str(photos),
            "image_size": 32,
            "shard_size": 100,
            "resources": {"workers": 0},
        },
        "sela": FEW,
        "embed": {"resources": {"workers": 0}},
        "probe": {"knn_k": 10},
        "evaluate": {},
        "export": {},
    }
    return override(build(Experiment, values), changes)


def test_a_run_goes_from_sela_to_probe_scores_and_export(photos: Path, tmp_path: Path):
    made = experiment(photos, tmp_path / "run")
    assert made.encoder == "sela" and made.inputs("embed") == ("ingest", "sela")
    run_experiment(made)
    metrics = json.loads((tmp_path / "run" / "evaluate" / "metrics.json").read_text())
    assert metrics["nmi"] == pytest.approx(read_done(tmp_path / "run" / "sela").facts["nmi"])
    section = sela_section(Run.open(tmp_path / "run"))
    assert isinstance(section, Section)
    assert "2 heads of 8 clusters; labels were optimized 3 times" in section.body
    assert section.body.count("<svg") == 5
    states = stage_states(made, made.folder, made.stages)  # sela's folder: an encoder, a clusterer
    assert {state for state, _ in states.values()} == {"current"}
    assert "The 8 first by purity" in section.body and "8 clusters drawn at random" in section.body


def test_without_labels_the_browser_goes_by_tightness(finished: Path, corpus: Corpus):
    run = Run.open(finished.parent)
    assert run.clusters is not None
    blind = dataclasses.replace(run.clusters, classes=None)
    embeddings = Encoder.open(finished).embed(corpus.images(np.arange(240)))
    array = ShardedArray.create(
        finished.parent / "rows", shard_rows=[240], row_shape=(64,), dtype="float32"
    )
    array.write_shard(0, embeddings)
    run.embeddings = namedtuple("Embeddings", ["array"])(array)
    order, words = ordered(run, blind)
    assert run.clustering is not None
    assigned = np.asarray(run.clustering[1].assignments)
    lengths = [np.linalg.norm(embeddings[assigned == c].mean(axis=0)) for c in order]
    assert words == "tightness" and lengths == sorted(lengths, reverse=True)


@pytest.mark.slow
def test_two_ray_workers_label_as_one_process(ray_session: None, corpus: Corpus, tmp_path: Path):
    """One epoch with an event at its start: rounding has no time to grow."""
    one_epoch = FEW | {"epochs": 1, "events": {"name": "every", "every_epochs": 2}}
    clean = one_epoch | {"label_pass": {"name": "clean"}}
    found = []
    for workers in (0, 2):
        config = build(SeLaConfig, clean | {"resources": {"workers": workers}})
        sela(corpus, config, out=tmp_path / str(workers))
        found.append(torch.load(tmp_path / str(workers) / "pseudo_labels.pt", weights_only=True))
    assert torch.equal(found[0]["L"], found[1]["L"])
