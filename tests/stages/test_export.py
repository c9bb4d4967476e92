"""The exported folder: a row per image, and weights that another process can use."""

import json
import runpy
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from selfsup_ray.artifacts import Array, ShardedArray, begin, finish
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.synthetic import corpus_of_arrays, shape_images
from selfsup_ray.errors import ConfigError
from selfsup_ray.models.backbones import PatchBackboneConfig, ResNetConfig, build_backbone
from selfsup_ray.models.clusterer import Clusterer, save_clusterer
from selfsup_ray.models.encoder import Encoder, save_encoder
from selfsup_ray.models.inputs import ImageInput
from selfsup_ray.models.portable import portable_encoder
from selfsup_ray.stages.diffuse import DiffuseConfig, Diffusion
from selfsup_ray.stages.export import ExportConfig, export, sureness

TINY = ResNetConfig(name="resnet18", stem="stl", width=4)
IMAGES = ImageInput(image_size=16)


def tiny_corpus(folder: Path, n: int) -> Corpus:
    return corpus_of_arrays(folder / "ingest", *shape_images(n, size=16), shard_size=4)


def tiny_encoder(folder: Path) -> Encoder:
    return save_encoder(folder / "pretext", backbone=build_backbone(TINY), images=IMAGES)


def tiny_clusterer(folder: Path, corpus: Corpus, probabilities: Array) -> Clusterer:
    backbone = build_backbone(TINY)
    head = nn.Linear(backbone.dim, probabilities.shape[1])
    made = save_clusterer(folder / "scan", backbone=backbone, head=head, images=IMAGES)
    for name, rows in {
        "probabilities": probabilities.astype(np.float32),
        "assignments": probabilities.argmax(axis=1).astype(np.int32),
    }.items():
        shape = {"row_shape": rows.shape[1:], "dtype": rows.dtype.name}
        array = ShardedArray.create(made.path / name, shard_rows=corpus.shard_rows, **shape)
        for i in range(array.num_shards):
            array.write_shard(i, rows[array.offsets[i] : array.offsets[i + 1]])
    return made


def test_pseudo_labels_have_a_row_per_image_in_the_order_of_ids(tmp_path: Path):
    corpus = tiny_corpus(tmp_path, 10)
    probabilities = np.random.default_rng(0).dirichlet(np.ones(3), size=10)
    clusterer = tiny_clusterer(tmp_path, corpus, probabilities)
    exported = export(corpus, tiny_encoder(tmp_path), clusterer, out=tmp_path / "export")
    assert exported.pseudo_labels is not None
    table = pq.read_table(exported.pseudo_labels).to_pydict()
    assert list(table) == ["id", "source", "cluster", "probability", "margin"]
    assert table["id"] == list(range(10))
    assert table["source"] == [f"array#{i}" for i in range(10)]
    ordered = np.sort(probabilities, axis=1)
    assert table["cluster"] == probabilities.argmax(axis=1).tolist()
    np.testing.assert_allclose(table["probability"], ordered[:, -1], rtol=1e-6)
    np.testing.assert_allclose(table["margin"], ordered[:, -1] - ordered[:, -2], atol=1e-6)


def test_the_exported_weights_embed_and_predict_as_the_run_does(tmp_path: Path):
    corpus = tiny_corpus(tmp_path, 6)
    clusterer = tiny_clusterer(tmp_path, corpus, np.eye(3)[[0, 1, 2, 0, 1, 2]])
    encoder = tiny_encoder(tmp_path)
    out = export(corpus, encoder, clusterer, out=tmp_path / "export").path
    images = corpus.images(np.arange(6))
    np.testing.assert_array_equal(Encoder.open(out).embed(images), encoder.embed(images))
    mine, theirs = Clusterer.open(out).predict(images), clusterer.predict(images)
    np.testing.assert_array_equal(mine.probabilities, theirs.probabilities)


def test_the_lines_in_use_py_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from PIL import Image

    corpus = tiny_corpus(tmp_path, 3)
    clusterer = tiny_clusterer(tmp_path, corpus, np.eye(3))
    out = export(corpus, tiny_encoder(tmp_path), clusterer, out=tmp_path / "export").path
    Image.fromarray(shape_images(1, size=40)[0][0]).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path(str(out / "use.py"))
    np.testing.assert_allclose(np.linalg.norm(found["rows"], axis=1), 1, rtol=1e-5)
    assert found["clusters"].probabilities.shape == (1, 3)


def test_without_clusters_only_the_encoder_is_exported(tmp_path: Path):
    corpus = tiny_corpus(tmp_path, 3)
    exported = export(corpus, tiny_encoder(tmp_path), out=tmp_path / "export")
    assert exported.pseudo_labels is None
    names = {path.name for path in exported.path.iterdir()}
    assert {"encoder.safetensors", "encoder.json", "use.py"} <= names
    assert not any(name.startswith("clusterer") for name in names)


def test_an_export_that_is_current_is_not_written_again(tmp_path: Path):
    corpus, encoder = tiny_corpus(tmp_path, 3), tiny_encoder(tmp_path)
    first = export(corpus, encoder, out=tmp_path / "export")
    time = (first.path / "use.py").stat().st_mtime_ns
    second = export(corpus, encoder, out=tmp_path / "export")
    assert second.fingerprint == first.fingerprint
    assert (first.path / "use.py").stat().st_mtime_ns == time


def test_the_margin_of_a_tie_is_zero_and_of_a_single_cluster_the_probability():
    own, margin = sureness(np.array([[0.5, 0.5]], np.float32), np.array([0]))
    assert (own.item(), margin.item()) == (0.5, 0.0)
    own, margin = sureness(np.ones((2, 1), np.float32), np.array([0, 0]))
    assert torch.equal(torch.from_numpy(margin), torch.ones(2))
    assert own.tolist() == [1.0, 1.0]


def made_diffusion(folder: Path, corpus: Corpus, arrays: dict[str, Array]) -> Diffusion:
    config, inputs = DiffuseConfig(), {"graph": "none"}
    begin(folder, stage="diffuse", config=config, inputs=inputs)
    for name, values in arrays.items():
        shape = {"row_shape": values.shape[1:], "dtype": values.dtype.name}
        array = ShardedArray.create(folder / name, shard_rows=corpus.shard_rows, **shape)
        for i in range(array.num_shards):
            array.write_shard(i, values[array.offsets[i] : array.offsets[i + 1]])
    finish(folder, stage="diffuse", config=config, inputs=inputs, seconds=0)
    return Diffusion.open(folder)


def test_labels_that_a_diffusion_spread_have_a_row_per_image(tmp_path: Path):
    corpus = tiny_corpus(tmp_path, 10)
    classes = np.tile(np.array([[1, 0]], np.int32), (10, 1))
    scores = np.tile(np.array([[0.75, 0.25]], np.float32), (10, 1))
    labels = np.ones(10, np.int32)
    labels[4] = 0  # it was given this label
    labels[9], scores[9] = -1, 0  # nothing arrived
    arrays = {"classes": classes, "scores": scores, "predictions": labels}
    diffusion = made_diffusion(tmp_path / "diffuse", corpus, arrays)
    encoder, out = tiny_encoder(tmp_path), tmp_path / "export"
    exported = export(corpus, encoder, out=out, diffusion=diffusion)
    assert exported.labels is not None and exported.pseudo_labels is None
    table = pq.read_table(exported.labels).to_pydict()
    assert list(table) == ["id", "source", "label", "class_name", "score", "margin"]
    assert table["label"] == labels.tolist()
    names = corpus.class_names
    assert table["class_name"] == [names[i] if names and i >= 0 else None for i in labels]
    assert table["score"] == [0.75] * 4 + [0.25] + [0.75] * 4 + [0.0]
    assert table["margin"] == [0.5] * 4 + [-0.5] + [0.5] * 4 + [0.0]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own: torch.jit.load goes on to exist
def test_torchscript_and_onnx_compute_what_the_run_does_for_any_batch(tmp_path: Path):
    import onnxruntime

    corpus = tiny_corpus(tmp_path, 6)
    clusterer = tiny_clusterer(tmp_path, corpus, np.eye(3)[[0, 1, 2, 0, 1, 2]])
    encoder = tiny_encoder(tmp_path)
    config = ExportConfig(formats=("torchscript", "onnx"))
    out = export(corpus, encoder, clusterer, config, out=tmp_path / "export").path
    described = json.loads((out / "preprocessing.json").read_text())
    assert described["encoder"]["mean"] == list(IMAGES.mean)
    assert described["clusterer"]["output"] == "float32 (batch, 3) probabilities"
    for size in (1, 5):
        images = corpus.images(np.arange(size))
        levels = images.float().contiguous() / 255
        expected = {
            "encoder": encoder.embed(images),
            "clusterer": clusterer.predict(images).probabilities,
        }
        for name, want in expected.items():
            extra = {"preprocessing.json": ""}
            script = torch.jit.load(out / f"{name}.torchscript.pt", _extra_files=extra)
            np.testing.assert_allclose(script(levels).numpy(), want, rtol=0, atol=1e-5)
            assert json.loads(extra["preprocessing.json"]) == described[name]
            onnx = onnxruntime.InferenceSession(
                out / f"{name}.onnx", providers=["CPUExecutionProvider"]
            )
            (found,) = onnx.run(None, {"images": levels.numpy()})
            np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)
            inside = onnx.get_modelmeta().custom_metadata_map["preprocessing"]
            assert json.loads(inside) == described[name]


def test_an_encoder_of_patches_has_no_onnx_and_says_so(tmp_path: Path):
    network = build_backbone(PatchBackboneConfig(size=8, k=2, patch_size=3))
    encoder = save_encoder(tmp_path / "patches", backbone=network, images=IMAGES)
    with pytest.raises(ConfigError, match=r"export\.formats writes ResNets"):
        portable_encoder(encoder)
