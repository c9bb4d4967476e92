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
from selfsup_ray.models.weights import inspect_foreign, load_foreign

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


NUMBERED = {"conv1": "0", "bn1": "1", **{f"layer{i}": str(3 + i) for i in range(1, 5)}}


def numbered(weights: Weights, prefix: str) -> Weights:
    """A Sequential of torchvision's children: SeLa's, lightly's and a PyTorch BYOL's encoders."""
    parts = ((key.partition("."), x) for key, x in body(weights).items())
    return {f"{prefix}{NUMBERED[first]}.{rest}": x for (first, _, rest), x in parts}


def below(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}{key}": x for key, x in weights.items()}


def other(weights: Weights) -> Weights:
    return {key: torch.zeros_like(x) for key, x in body(weights).items()}


HEAD = {"head.0.weight": torch.zeros(4, 4), "head.0.bias": torch.zeros(4)}
LAYOUTS: dict[str, Callable[[Weights], object]] = {
    "torchvision and timm": lambda w: w,
    "moco v1": lambda w: {
        "epoch": 200,
        "arch": "resnet18",
        "state_dict": below("module.encoder_q.", w) | below("module.encoder_k.", other(w)),
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": []},
    },
    "moco v2": lambda w: {"state_dict": as_moco(w)},
    "moco's notebook": lambda w: {"state_dict": numbered(w, "encoder_q.net.")},
    "simclr, convnet": lambda w: {"state_dict": below("convnet.", body(w)) | below("p.", HEAD)},
    "simclr, backbone with its mlp": lambda w: below("backbone.", body(w) | HEAD),
    "byol, online_encoder": lambda w: (
        below("target_encoder.net.", other(w)) | below("online_encoder.net.", w)
    ),
    "byol, online_network": lambda w: {
        "online_network_state_dict": numbered(w, "encoder.") | below("projetion.net.", HEAD),
        "target_network_state_dict": numbered(other(w), "encoder."),
    },
    "dino, whole": lambda w: {
        "student": below("module.backbone.", other(w)),
        "teacher": below("backbone.", body(w)) | HEAD,
        "dino_loss": {"center": torch.zeros(1, 4)},
    },
    "dino, student alone": lambda w: {"student": below("module.backbone.", body(w))},
    "sela": lambda w: {"state_dict": numbered(w, "features.module.") | below("top_layer0.", HEAD)},
    "sela, parallel": lambda w: {"state_dict": numbered(w, "module.features.")},
    "solo-learn": lambda w: {
        "state_dict": below("momentum_backbone.", other(w)) | below("backbone.", body(w)) | HEAD
    },
    "lightly": lambda w: {"state_dict": numbered(w, "backbone.") | below("projection_", HEAD)},
    "vissl": lambda w: {
        "classy_state_dict": {"base_model": {"model": {"trunk": below("_feature_blocks.", w)}}}
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_computes_what_torchvisions_network_does(
    tmp_path: Path, resnet18: Weights, layout: str
) -> None:
    network = torchvision.models.resnet18(weights=None)
    network.load_state_dict(resnet18)
    network.fc = torch.nn.Identity()  # type: ignore[assignment]
    torch.save(LAYOUTS[layout](resnet18), tmp_path / "x.pth")
    loaded = load_foreign(tmp_path / "x.pth", ResNetConfig(name="resnet18"))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = loaded.backbone.eval()(images), network.eval()(images)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_resnet50_with_bottlenecks_computes_what_torchvisions_does(tmp_path: Path) -> None:
    network = torchvision.models.resnet50(weights=None)
    torch.save({"state_dict": below("module.encoder_q.", network.state_dict())}, tmp_path / "x.pt")
    network.fc = torch.nn.Identity()  # type: ignore[assignment]
    loaded = load_foreign(tmp_path / "x.pt", ResNetConfig(name="resnet50"))
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = loaded.backbone.eval()(images), network.eval()(images)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_the_report_names_what_was_found_where_and_what_was_left_out(
    tmp_path: Path, resnet18: Weights
) -> None:
    torch.save({"state_dict": as_moco(resnet18)}, tmp_path / "moco.pth.tar")
    text = load_foreign(tmp_path / "moco.pth.tar", ResNetConfig()).text()
    assert text.startswith("all 120 weights of a resnet18 (stem=imagenet, width=64) found at")
    assert "state_dict.module.encoder_q; 122 keys left out" in text
    assert "module.encoder_k.* (120)" in text and "module.queue" in text


def test_inspecting_a_checkpoint_says_how_to_ask_for_it(tmp_path: Path, resnet18: Weights) -> None:
    torch.save(LAYOUTS["dino, whole"](resnet18), tmp_path / "dino.pth")
    text = inspect_foreign(tmp_path / "dino.pth")
    assert "resnet18, 120 keys at teacher.backbone" in text
    assert "another network: student.module.backbone" in text
    assert "backbone: {name: resnet18, stem: imagenet, width: 64}" in text


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            lambda w: {
                k.replace("conv1.weight", "conv1.0.weight", 1) if k == "conv1.weight" else k: x
                for k, x in w.items()
            },
            r"single `conv1\.weight`, but there is conv1\.0\.weight, a stem of several layers",
        ),
        (lambda w: {k: x for k, x in w.items() if k != "conv1.weight"}, "but there is none"),
        (
            lambda w: {
                "features.0.weight": w["conv1.weight"],
                "features.2.0.bn1.weight": w["bn1.bias"],
            },
            "is a pre-activation ResNet",
        ),
        (lambda w: HEAD, r"no key ends in `layer1\.0\.conv1\.weight`; there are head"),
    ],
    ids=["deep-stem", "no-stem", "pre-activation", "no-resnet"],
)
def test_a_checkpoint_without_a_plain_resnet_is_refused_in_a_sentence(
    tmp_path: Path, resnet18: Weights, written: Callable[[Weights], Weights], message: str
) -> None:
    torch.save(written(resnet18), tmp_path / "x.pt")
    with pytest.raises(ArtifactError, match=message):
        load_foreign(tmp_path / "x.pt", ResNetConfig())


def test_an_error_says_what_the_checkpoint_holds_instead(tmp_path: Path, resnet18: Weights) -> None:
    torch.save(resnet18, tmp_path / "x.pt")
    with pytest.raises(
        ArtifactError, match=r"it has \{name: resnet18, stem: imagenet, width: 64\}"
    ):
        load_foreign(tmp_path / "x.pt", ResNetConfig(name="resnet50"))


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


def test_a_checkpoint_that_lies_within_itself_is_read_all_the_same(
    tmp_path: Path, resnet18: Weights
) -> None:
    whole: dict[str, object] = {"state_dict": body(resnet18)}
    whole["again"] = whole
    torch.save(whole, tmp_path / "x.pt")
    assert load_foreign(tmp_path / "x.pt", ResNetConfig()).place.table == "state_dict"
