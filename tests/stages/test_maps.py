"""Layers of an encoder: their features, embedded and drawn, and their place in the report."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.manifold import trustworthiness
from torch import Tensor

from selfsup_ray.config import Resources
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.synthetic import corpus_of_arrays, shape_images
from selfsup_ray.errors import ConfigError
from selfsup_ray.models.backbones import PatchBackboneConfig, ResNetConfig, build_backbone
from selfsup_ray.models.encoder import Encoder, evaluation_view, save_encoder
from selfsup_ray.models.heads import Head, MLPHead
from selfsup_ray.models.inputs import ImageInput
from selfsup_ray.ops.plane import neighbors_among, opentsne_positions
from selfsup_ray.report_html import Section
from selfsup_ray.report_labelled import labelled_section, maps_section
from selfsup_ray.report_run import Run
from selfsup_ray.stages.embed import EmbedConfig, embed
from selfsup_ray.stages.finetune import finetune
from selfsup_ray.stages.labelled_config import CifarLinear, CountOfLabels, SimCLRFinetune
from selfsup_ray.stages.linear import linear
from selfsup_ray.stages.maps import MapsConfig, draw_maps, layer_rows

HERE = Resources(workers=0)
IMAGES = ImageInput(image_size=16)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    images, labels = shape_images(80, size=16)
    names = ["circle", "cross", "square", "triangle"]
    return corpus_of_arrays(tmp_path / "ingest", images, labels, class_names=names)


@pytest.fixture
def encoder(tmp_path: Path) -> Encoder:
    network = build_backbone(ResNetConfig(name="resnet50", stem="stl", width=4))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = Head(MLPHead(dim=6), network.dim)
    return save_encoder(tmp_path / "pretext", backbone=network, images=IMAGES, head=head)


@pytest.mark.parametrize("layer", ["layer1", "layer2", "layer3", "pooled", "head"])
def test_a_layers_rows_are_what_a_hook_sees_there(
    corpus: Corpus, encoder: Encoder, layer: str
) -> None:
    network, seen = encoder.backbone().eval(), list[Tensor]()
    watched = network.get_submodule("layer4" if layer in ("pooled", "head") else layer)
    watched.register_forward_hook(lambda m, x, y: seen.append(y.mean(dim=(2, 3))))
    ids = np.arange(5)
    with torch.no_grad():
        network(evaluation_view(corpus.images(ids), IMAGES))
        features = encoder.head().eval()(seen[0]) if layer == "head" else seen[0]
    expected = torch.nn.functional.normalize(features, dim=1).numpy()
    rows = layer_rows(corpus, encoder, layer, ids)  # type: ignore[arg-type]
    assert rows.shape == (5, encoder.layer_dim(layer))  # type: ignore[arg-type]
    np.testing.assert_allclose(rows, expected, atol=1e-5)


def test_embed_writes_the_rows_of_the_layer_it_is_asked_for(
    corpus: Corpus, encoder: Encoder, tmp_path: Path
) -> None:
    made = embed(corpus, encoder, EmbedConfig(layer="layer2", resources=HERE), out=tmp_path / "e")
    assert made.shape == (80, 32)
    ids = np.arange(80)
    np.testing.assert_allclose(
        np.asarray(made.array), layer_rows(corpus, encoder, "layer2", ids), atol=1e-6
    )


def test_an_encoder_without_that_layer_says_so(corpus: Corpus, tmp_path: Path) -> None:
    network = build_backbone(PatchBackboneConfig(size=8, k=2, patch_size=3))
    patches = save_encoder(tmp_path / "patches", backbone=network, images=IMAGES)
    with pytest.raises(ConfigError, match=r"has no layer2\. Choose `pooled`"):
        draw_maps(corpus, patches, out=tmp_path / "maps")


def test_opentsne_keeps_the_neighbors_it_is_given_and_is_the_same_each_time() -> None:
    centers = np.random.default_rng(1).normal(size=(4, 16))[np.arange(160) % 4]
    rows = centers + 0.3 * np.random.default_rng(0).normal(size=(160, 16))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    listed = neighbors_among(rows, 60)
    xy = opentsne_positions(rows, *listed, perplexity=20)
    assert xy is not None and xy.shape == (160, 2)
    assert trustworthiness(rows, xy, n_neighbors=10) > 0.9
    np.testing.assert_array_equal(xy, opentsne_positions(rows, *listed, perplexity=20))


def test_opentsne_that_is_not_there_is_asked_for_before_any_work(
    corpus: Corpus, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openTSNE", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'selfsup-ray\[maps\]'"):
        draw_maps(corpus, encoder, MapsConfig(tsne="opentsne"), out=tmp_path / "maps")


def test_the_report_shows_maps_probe_and_fine_tuning(
    corpus: Corpus, encoder: Encoder, tmp_path: Path
) -> None:
    made = draw_maps(
        corpus,
        encoder,
        MapsConfig(layers=("layer1", "head"), methods=("tsne",), images=60),
        out=tmp_path / "maps",
    )
    assert len(made.ids) == 60 and 0 <= made.metrics["layers"]["head"]["same_class"] <= 1
    xy = made.positions("layer1", "tsne")
    assert xy is not None and xy.shape == (60, 2)
    probe = CifarLinear(
        epochs=2, batch_size=16, validation_share=0.2, lrs=(0.1, 1.0), resources=HERE
    )
    linear(corpus, encoder, probe, out=tmp_path / "linear")
    tuning = SimCLRFinetune(epochs=1, batch_size=16, labels=CountOfLabels(count=16), resources=HERE)
    finetune(corpus, encoder, tuning, out=tmp_path / "finetune")
    run = Run.open(tmp_path)
    drawn, labelled = maps_section(run), labelled_section(run)
    assert isinstance(drawn, Section) and isinstance(labelled, Section)
    for text in ("layer1, t-SNE", "coloured by class", "same class among 15 nearest"):
        assert text in drawn.body
    for text in ("frozen encoder", "Learning rates tried", "triangle", "new network, same labels"):
        assert text in labelled.body
    assert "the test images choose it" in labelled.body and "Pre-training is worth" in labelled.body
