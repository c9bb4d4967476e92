"""Saved encoders and clusterers against the networks they were saved from, and torchvision."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms import v2

from selfsup_ray.errors import ArtifactError
from selfsup_ray.models.backbones import Backbone, ResNetConfig, build_backbone
from selfsup_ray.models.clusterer import Clusterer, save_clusterer
from selfsup_ray.models.encoder import Encoder, save_encoder
from selfsup_ray.models.heads import Head, MLPHead
from selfsup_ray.models.inputs import ImageInput

INPUT = ImageInput(image_size=20, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def trained_backbone() -> Backbone:
    """A backbone whose batch norms have seen images, so that their buffers matter too."""
    backbone = build_backbone(ResNetConfig(stem="stl", width=4), seed=5)
    backbone(torch.randn(8, 3, 20, 20, generator=torch.Generator().manual_seed(0)))
    return backbone


def pixels(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size=(n, 20, 20, 3), dtype=np.uint8)


def stored(n: int) -> Tensor:
    return torch.from_numpy(pixels(n)).permute(0, 3, 1, 2)


def network_input(n: int) -> Tensor:
    """What torchvision makes of the pixels."""
    steps = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(INPUT.mean, INPUT.std),
    ]
    return torch.stack([v2.Compose(steps)(Image.fromarray(image)) for image in pixels(n)])


def test_an_opened_encoder_gives_the_unit_rows_of_what_was_saved(tmp_path: Path) -> None:
    backbone = trained_backbone()
    save_encoder(tmp_path, backbone=backbone, images=INPUT)
    encoder = Encoder.open(tmp_path)
    expected = F.normalize(backbone.eval()(network_input(5)), dim=1)
    rows = encoder.module("cpu")(stored(5))
    assert rows.dtype == torch.float32 and not rows.requires_grad
    torch.testing.assert_close(rows, expected.detach(), rtol=1e-4, atol=1e-5)
    assert (encoder.dim, encoder.image_size) == (32, 20)


def test_the_output_of_the_head_can_be_the_embedding(tmp_path: Path) -> None:
    backbone = trained_backbone()
    head = Head(MLPHead(hidden_dim=6, dim=5, batch_norm="all"), backbone.dim)
    head(torch.randn(8, backbone.dim, generator=torch.Generator().manual_seed(0)))
    save_encoder(tmp_path, backbone=backbone, images=INPUT, head=head, output="head")
    encoder = Encoder.open(tmp_path)
    expected = F.normalize(head.eval()(backbone.eval()(network_input(4))), dim=1)
    assert encoder.dim == 5
    np.testing.assert_allclose(encoder.embed(stored(4)), expected.detach(), rtol=1e-4, atol=1e-5)


def test_embedding_files_is_embedding_their_pixels(tmp_path: Path) -> None:
    encoder = save_encoder(tmp_path / "encoder", backbone=trained_backbone(), images=INPUT)
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for path, image in zip(paths, pixels(5), strict=True):
        Image.fromarray(image).save(path)
    rows = encoder.embed(stored(5))
    np.testing.assert_allclose(encoder.embed(paths, batch_size=2), rows, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(encoder.embed(str(paths[3])), rows[3:4], rtol=1e-5, atol=1e-6)
    assert encoder.embed([]).shape == (0, 32)


def test_the_view_may_be_smaller_than_the_stored_image(tmp_path: Path) -> None:
    images = ImageInput(image_size=20, view_size=10, mean=INPUT.mean, std=INPUT.std)
    backbone = trained_backbone()
    encoder = save_encoder(tmp_path, backbone=backbone, images=images)
    resized = v2.functional.resize(stored(4).float(), [10, 10], antialias=True)
    resized = resized.round() / 255  # views are made of whole levels, like stored images
    view = v2.functional.normalize(resized, list(INPUT.mean), list(INPUT.std))
    expected = F.normalize(backbone.eval()(view), dim=1)
    np.testing.assert_allclose(encoder.embed(stored(4)), expected.detach(), rtol=1e-3, atol=1e-4)


def test_an_unreadable_file_is_a_user_error_that_names_it(tmp_path: Path) -> None:
    encoder = save_encoder(tmp_path / "encoder", backbone=trained_backbone(), images=INPUT)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    with pytest.raises(ArtifactError, match=r"broken\.jpg"):
        encoder.embed([tmp_path / "broken.jpg"])


def test_the_backbone_comes_back_for_training_with_every_weight(tmp_path: Path) -> None:
    backbone = trained_backbone().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    save_encoder(tmp_path, backbone=backbone, images=INPUT)
    again = Encoder.open(tmp_path).backbone()
    torch.testing.assert_close(again.state_dict(), backbone.state_dict(), rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_the_fingerprint_follows_the_weights_and_not_the_place(tmp_path: Path) -> None:
    encoder = save_encoder(tmp_path / "a", backbone=trained_backbone(), images=INPUT)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert Encoder.open(tmp_path / "b").fingerprint == encoder.fingerprint
    weights = load_file(tmp_path / "b" / "encoder.safetensors")
    weights["backbone.conv1.weight"][0, 0, 0, 0] += 1
    save_file(weights, tmp_path / "b" / "encoder.safetensors")
    assert Encoder.open(tmp_path / "b").fingerprint != encoder.fingerprint


def spoil(path: Path, change: str) -> None:
    weights = load_file(path)
    match change:
        case "missing":
            del weights["backbone.layer2.0.conv1.weight"]
        case "unexpected":
            weights["backbone.layer9.weight"] = torch.zeros(2)
        case "another shape":
            weights["backbone.bn1.bias"] = torch.zeros(7)
    save_file(weights, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"missing: layer2\.0\.conv1\.weight"),
        ("unexpected", r"unexpected: layer9\.weight"),
        ("another shape", r"of another shape: bn1\.bias \(7, wants 4\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, change: str, message: str
) -> None:
    encoder = save_encoder(tmp_path, backbone=trained_backbone(), images=INPUT)
    spoil(tmp_path / "encoder.safetensors", change)
    with pytest.raises(ArtifactError, match=message):
        encoder.module()


def test_damaged_and_missing_files_are_refused_by_path(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"encoder\.json"):
        Encoder.open(tmp_path)
    encoder = save_encoder(tmp_path, backbone=trained_backbone(), images=INPUT)
    (tmp_path / "encoder.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ArtifactError, match=r"encoder\.safetensors cannot be read"):
        encoder.backbone()
    values = json.loads((tmp_path / "encoder.json").read_text())
    (tmp_path / "encoder.json").write_text(json.dumps(values | {"colour": 1}))
    with pytest.raises(ArtifactError, match=r"encoder\.json .*colour"):
        Encoder.open(tmp_path)


def test_a_head_that_was_not_saved_cannot_be_asked_for(tmp_path: Path) -> None:
    encoder = save_encoder(tmp_path, backbone=trained_backbone(), images=INPUT)
    with pytest.raises(ArtifactError, match="without its head"):
        encoder.head()


def test_a_clusterer_predicts_the_softmax_of_what_was_saved(tmp_path: Path) -> None:
    backbone, head = trained_backbone(), nn.Linear(32, 6)
    nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))
    features = backbone.eval()(network_input(9))
    head.bias.data = -head.weight @ features.mean(dim=0)  # so that clusters differ
    save_clusterer(tmp_path, backbone=backbone, head=head, images=INPUT)
    clusterer = Clusterer.open(tmp_path)
    prediction = clusterer.predict(stored(9), batch_size=4)
    expected = head(features).softmax(dim=1).detach().numpy()
    np.testing.assert_allclose(prediction.probabilities, expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(prediction.clusters, expected.argmax(axis=1))
    assert prediction.clusters.dtype == np.int32 and clusterer.num_clusters == 6
    assert len(set(prediction.clusters.tolist())) > 1


def test_a_clusterers_parts_come_back_for_training(tmp_path: Path) -> None:
    backbone, head = trained_backbone(), nn.Linear(32, 6)
    clusterer = save_clusterer(tmp_path, backbone=backbone, head=head, images=INPUT)
    for again, saved in ((clusterer.backbone(), backbone), (clusterer.head(), head)):
        torch.testing.assert_close(again.state_dict(), saved.state_dict(), rtol=0, atol=0)
        assert all(parameter.requires_grad for parameter in again.parameters())


def test_equally_probable_clusters_go_to_the_lower_id(tmp_path: Path) -> None:
    head = nn.Linear(32, 4)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    clusterer = save_clusterer(tmp_path, backbone=trained_backbone(), head=head, images=INPUT)
    assert clusterer.predict(stored(3)).clusters.tolist() == [0, 0, 0]
