"""models/weights.py on checkpoints as torchvision, MoCo, SCAN and DataParallel write them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor

from selfsup_ray.errors import ArtifactError
from selfsup_ray.models.backbones import ResNetConfig, build_backbone
from selfsup_ray.models.weights import load_foreign

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def resnet18() -> Weights:
    torch.manual_seed(0)
    return torchvision.models.resnet18(weights=None).state_dict()


def body(weights: Weights) -> Weights:
    return {key: x for key, x in weights.items() if not key.startswith("fc.")}


def as_moco(weights: Weights) -> Weights:
    """MoCo's checkpoint: query and key encoders below `module.`, the query's MLP head, a queue."""
    query = {f"module.encoder_q.{key}": x for key, x in body(weights).items()}
    key_net = {f"module.encoder_k.{key}": x * 0 for key, x in body(weights).items()}
    rest = {"module.encoder_q.fc.0.weight": torch.zeros(4, 4), "module.queue": torch.zeros(4, 8)}
    return query | key_net | rest


def as_scan(weights: Weights) -> Weights:
    """SCAN's checkpoint: a CIFAR ResNet with `shortcut`, below `backbone.`, and a head."""
    renamed = {key.replace(".downsample.", ".shortcut."): x for key, x in body(weights).items()}
    return {f"backbone.{key}": x for key, x in renamed.items()} | {
        "contrastive_head.0.weight": torch.zeros(4, 4)
    }


@pytest.mark.parametrize(
    ("written", "unused"),
    [
        (lambda w: w, {"fc.weight", "fc.bias"}),
        (lambda w: {"state_dict": as_moco(w), "epoch": 800}, None),
        (lambda w: {"model": as_scan(w)}, {"contrastive_head.0.weight"}),
        (lambda w: {f"module.{key}": x for key, x in body(w).items()}, set()),
        (lambda w: {k: x for k, x in body(w).items() if "num_batches" not in k}, set()),
    ],
    ids=["torchvision", "moco", "scan", "data-parallel", "without-counters"],
)
def test_every_known_form_gives_the_same_weights(
    tmp_path: Path, resnet18: Weights, written: Callable[[Weights], object], unused: set[str] | None
) -> None:
    torch.save(written(resnet18), tmp_path / "checkpoint.pth.tar")
    loaded = load_foreign(tmp_path / "checkpoint.pth.tar", ResNetConfig(name="resnet18"))
    torch.testing.assert_close(loaded.backbone.state_dict(), body(resnet18), rtol=0, atol=0)
    if unused is not None:
        assert set(loaded.unused) == unused


def test_moco_reports_its_head_key_network_and_queue_as_unused(
    tmp_path: Path, resnet18: Weights
) -> None:
    save_file(as_moco(resnet18), tmp_path / "moco.safetensors")
    unused = load_foreign(tmp_path / "moco.safetensors", ResNetConfig()).unused
    assert "module.queue" in unused and "module.encoder_q.fc.0.weight" in unused
    assert len(unused) == 2 + len(body(resnet18))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ResNetConfig(name="resnet34"), r"resnet34 .*missing: .*layer"),
        (ResNetConfig(stem="cifar"), r"of another shape: conv1\.weight \(64x3x7x7, wants 64x3x3x3"),
        (ResNetConfig(width=32), r"width=32: of another shape"),
    ],
)
def test_another_network_than_the_checkpoints_is_refused(
    tmp_path: Path, resnet18: Weights, config: ResNetConfig, message: str
) -> None:
    torch.save(resnet18, tmp_path / "x.pt")
    with pytest.raises(ArtifactError, match=message):
        load_foreign(tmp_path / "x.pt", config)


def test_a_deeper_network_is_not_cut_to_fit(tmp_path: Path) -> None:
    # Every weight of a ResNet-18 is in a ResNet-34, in the same shape.
    deeper = build_backbone(ResNetConfig(name="resnet34", width=4)).state_dict()
    torch.save(deeper, tmp_path / "x.pt")
    with pytest.raises(ArtifactError, match=r"unexpected: layer1\.2"):
        load_foreign(tmp_path / "x.pt", ResNetConfig(width=4))


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"args": argparse.Namespace(lr=1)}, tmp_path / "x.pt")
    with pytest.raises(ArtifactError, match="cannot be loaded as plain tensors"):
        load_foreign(tmp_path / "x.pt", ResNetConfig())


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2]])
def test_a_file_without_weights_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ArtifactError, match="holds"):
        load_foreign(tmp_path / "x.pt", ResNetConfig())


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"nowhere\.pt"):
        load_foreign(tmp_path / "nowhere.pt", ResNetConfig())
