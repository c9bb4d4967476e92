"""The stage linear, layer by layer: SeLa's protocol on real files, its numbers and its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from selfsup_ray.artifacts import read_done
from selfsup_ray.config import Resources
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.synthetic import corpus_of_arrays, shape_images
from selfsup_ray.errors import ConfigError
from selfsup_ray.models.backbones import AlexNetConfig, BackboneConfig, ResNetConfig, build_backbone
from selfsup_ray.models.encoder import Encoder, save_encoder
from selfsup_ray.models.inputs import ImageInput
from selfsup_ray.models.layer_maps import LayerMaps, MapProbe, map_shapes
from selfsup_ray.ops.augment import ten_crops
from selfsup_ray.optim import SGDConfig, lr_ratio
from selfsup_ray.report_layers import layers_part
from selfsup_ray.stages.labelled_config import LayersLinear
from selfsup_ray.stages.linear import Linear, linear
from selfsup_ray.stages.lowshot_config import HeldOutRows

N, TRAIN = 60, 40
LAYERS = ["layer1", "layer2", "layer3", "layer4"]


def corpus_of(folder: Path, n: int, size: int) -> Corpus:
    images, labels = shape_images(n, size=size)
    return corpus_of_arrays(folder / "ingest", images, labels, shard_size=25)


def encoder_of(folder: Path, config: BackboneConfig, images: ImageInput) -> Encoder:
    return save_encoder(folder / "encoder", backbone=build_backbone(config), images=images)


def made_with(**values: Any) -> LayersLinear:
    standard = {"epochs": 4, "batch_size": 20, "test": HeldOutRows(first=TRAIN), "test_from": 2}
    resources = Resources(workers=0)
    return LayersLinear(optim=SGDConfig(lr=0.1), resources=resources, **(standard | values))


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, Encoder, Linear]:
    folder = tmp_path_factory.mktemp("layers")
    corpus = corpus_of(folder, N, 16)
    images = ImageInput(image_size=16, share=0.5)
    encoder = encoder_of(folder, ResNetConfig(stem="stl", width=4), images)
    return corpus, encoder, linear(corpus, encoder, made_with(), out=folder / "linear")


def test_the_protocol_has_the_published_numbers() -> None:
    made = LayersLinear()
    assert (made.epochs, made.batch_size, made.ten_crop, made.test_from) == (36, 192, True, 26)
    optim = made.optim
    assert isinstance(optim, SGDConfig)
    assert (optim.lr, optim.momentum, optim.weight_decay) == (0.01, 0.9, 1e-5)
    assert (made.crop, made.flip_p, made.center) == ((0.08, 1.0), 0.5, 0.875)
    ratios = [
        lr_ratio(made.schedule, progress=epoch / 36, epochs=36)
        for epoch in (0, 9, 10, 19, 20, 29, 30, 35)
    ]
    assert ratios == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3])


def test_each_layer_has_its_accuracy_on_ten_crops_by_hand(
    probed: tuple[Corpus, Encoder, Linear],
) -> None:
    corpus, encoder, made = probed
    weights, network = load_file(made.path / "probes.safetensors"), encoder.backbone().eval()
    ids = np.arange(TRAIN, N)
    options = {"size": 16, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    views = list(ten_crops(corpus.images(ids), share=0.875, **options))  # type: ignore[arg-type]
    assert list(made.metrics["layers"]) == LAYERS
    for i, (name, (channels, side)) in enumerate(map_shapes(network.config, 16).items()):
        probe = MapProbe(channels, side, made.metrics["num_classes"]).eval()
        own = {k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(name)}
        probe.load_state_dict(own)
        with torch.no_grad():
            logits = torch.stack([probe(LayerMaps(network)(view)[i]) for view in views]).mean(dim=0)
        share = float((logits.argmax(dim=1).numpy() == corpus.labels(ids)).mean())
        assert made.metrics["layers"][name]["last_accuracy"] == pytest.approx(share, abs=0.051)
    best = max(one["last_accuracy"] for one in made.metrics["layers"].values())
    assert best > 0.3, "four shapes: 0.25 is chance"


def test_the_numbers_are_in_file_stamp_and_curve(probed: tuple[Corpus, Encoder, Linear]) -> None:
    made = probed[2]
    stored = json.loads((made.path / "metrics.json").read_text())
    assert [point["epoch"] for point in stored["curve"]] == [3, 4], "measured from epoch 2 on"
    facts = read_done(made.path).facts
    for name in LAYERS:
        one = stored["layers"][name]
        assert facts[f"last_accuracy_{name}"] == one["last_accuracy"]
        assert one["last_accuracy"] == stored["curve"][-1][f"test_accuracy_{name}"]
        assert one["interval"][0] <= one["last_accuracy"] <= one["interval"][1]
    assert stored["classifier"] == "_layer4" and not stored["tried"]
    assert made.last_accuracy == stored["layers"]["layer4"]["last_accuracy"]


def test_the_report_shows_a_bar_a_layer_and_published_ones_beside_alexnets(
    probed: tuple[Corpus, Encoder, Linear],
) -> None:
    made = dict(probed[2].metrics)
    drawn = layers_part(made)
    assert drawn.count("<svg") == 1 and "published" not in drawn
    one = made["layers"]["layer1"]
    drawn = layers_part({"layers": {f"conv{i}": one for i in range(1, 6)}})
    assert "published, 10 heads of 3,000" in drawn and "47.1" in drawn


def test_small_images_go_through_alexnets_large_views(tmp_path: Path) -> None:
    """Images of 32 pixels are enlarged to 224, as the published CIFAR runs do."""
    corpus = corpus_of(tmp_path, 24, 32)
    images = ImageInput(image_size=32, view_size=224)
    encoder = encoder_of(tmp_path, AlexNetConfig(size="small"), images)
    config = made_with(epochs=1, batch_size=16, test=HeldOutRows(first=16), ten_crop=False)
    made = linear(corpus, encoder, config, out=tmp_path / "linear")
    assert list(made.metrics["layers"]) == ["conv1", "conv2", "conv3", "conv4", "conv5"]
    assert all(0 <= one["last_accuracy"] <= 1 for one in made.metrics["layers"].values())


def test_options_that_do_not_go_with_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="features=embeddings stores only its output"):
        LayersLinear(features="embeddings")
    with pytest.raises(ConfigError, match="trains all layers at one rate"):
        LayersLinear(lrs=(0.1, 1.0), validation_share=0.1)
    with pytest.raises(ConfigError, match="starts from Xavier's weights"):
        LayersLinear(start="zero")
