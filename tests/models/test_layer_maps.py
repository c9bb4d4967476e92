"""models/layer_maps.py and its probes against torch's layers and optimizers, used by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsup_ray import collectives
from selfsup_ray.errors import ConfigError
from selfsup_ray.models.backbones import (
    AlexNet,
    AlexNetConfig,
    Backbone,
    PatchBackboneConfig,
    PreactResNetConfig,
    ResNetConfig,
    build_backbone,
)
from selfsup_ray.models.layer_maps import LayerMaps, MapProbe, map_shapes
from selfsup_ray.models.probe import BackboneClassifier
from selfsup_ray.ops.augment import ten_crops

OnRanks = Callable[..., list[Any]]
SIDE, CLASSES, BATCH = 16, 3, 12


def test_alexnets_maps_have_the_published_sizes() -> None:
    shapes = map_shapes(AlexNetConfig(), 224)
    assert list(shapes) == ["conv1", "conv2", "conv3", "conv4", "conv5"]
    assert list(shapes.values()) == [(96, 10), (256, 6), (384, 5), (384, 5), (256, 6)]
    sizes = [channels * side**2 for channels, side in shapes.values()]
    assert sizes == [9600, 9216, 9600, 9600, 9216]


@pytest.mark.parametrize(
    ("config", "side", "sides"),
    [
        (ResNetConfig(name="resnet50"), 224, [6, 4, 3, 2]),
        (PreactResNetConfig(), 224, [6, 4, 3, 2]),
        (ResNetConfig(stem="cifar"), 32, [12, 8, 6, 4]),
        (ResNetConfig(stem="stl"), 32, [12, 8, 5, 3]),
    ],
)
def test_stages_are_averaged_to_at_most_9600_numbers(
    config: Any, side: int, sides: list[int]
) -> None:
    shapes = map_shapes(config, side)
    assert list(shapes) == ["layer1", "layer2", "layer3", "layer4"]
    assert [found for _, found in shapes.values()] == sides
    assert all(channels * found**2 <= 9600 for channels, found in shapes.values())


def test_a_patch_code_has_no_layers() -> None:
    with pytest.raises(ConfigError, match="but the encoder is a patch code"):
        map_shapes(PatchBackboneConfig(size=4, k=1), 32)


def alexnet() -> AlexNet:
    """The small AlexNet with random weights and statistics; its linear layers have no memory."""
    with torch.device("meta"):
        network = build_backbone(AlexNetConfig(size="small"))
    assert isinstance(network, AlexNet)
    network.features.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for layer in network.features:
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.05, generator=generator)
            nn.init.normal_(layer.bias, std=0.1, generator=generator)  # type: ignore[arg-type]
    for name, values in network.features.named_buffers():
        if values.is_floating_point():
            nn.init.uniform_(values, 0.5, 1.5, generator=generator)
        assert name
    for name, values in network.features.named_parameters():
        if values.ndim == 1 and name.split(".")[0] in "1 5 9 12 15".split():
            nn.init.uniform_(values, 0.5, 1.5, generator=generator)
    return network.eval()


def test_alexnets_maps_are_those_of_convolutions_that_absorbed_their_normalization() -> None:
    network, x = alexnet(), torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        maps = LayerMaps(network)(x)
        pools = [(6, 6, 3), (4, 4, 0), (3, 3, 1), (3, 3, 1), (2, 2, 0)]
        y, layers = x, list(network.features)
        for i, layer in enumerate(layers):
            if isinstance(layer, nn.MaxPool2d):
                y = F.max_pool2d(y, 3, 2)
            if not isinstance(layer, nn.Conv2d):
                continue
            norm: Any = layers[i + 1]
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            weight = layer.weight * scale[:, None, None, None]
            bias = (layer.bias - norm.running_mean) * scale + norm.bias  # type: ignore[operator]
            y = F.conv2d(y, weight, bias, stride=layer.stride, padding=layer.padding).clamp_min(0)
            found, (side, stride, padding) = maps.pop(0), pools.pop(0)
            torch.testing.assert_close(
                found, F.max_pool2d(y, side, stride, padding), rtol=1e-3, atol=1e-3
            )
    assert not maps


def small() -> Backbone:
    return build_backbone(ResNetConfig(stem="stl", width=4)).double()


def images(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)


def test_a_resnets_maps_are_the_averages_of_its_stages() -> None:
    network, seen = small().eval(), list[Tensor]()
    for name in ("layer1", "layer2", "layer3", "layer4"):
        hook = network.get_submodule(name).register_forward_hook
        hook(lambda module, inputs, output: seen.append(output))
    features = network(images())
    stages = list(seen)
    maps = LayerMaps(network)(images())
    shapes = map_shapes(network.config, SIDE)
    for stage, found, (channels, side) in zip(stages, maps, shapes.values(), strict=True):
        assert found.shape == (BATCH, channels, side, side)
        torch.testing.assert_close(found, F.adaptive_avg_pool2d(stage, side))
    torch.testing.assert_close(maps[-1].mean(dim=(2, 3)), features)


def test_first_weights_are_xaviers_of_a_convolution_of_the_maps_size() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        probe, convolution = MapProbe(96, 5, 40), nn.Conv2d(96, 40, 5)
        nn.init.xavier_uniform_(convolution.weight)
    ours, theirs = probe.linear.weight, convolution.weight
    assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=1e-3)
    assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.02)
    assert not probe.linear.bias.any()


def probes() -> BackboneClassifier:
    network, labels = small(), torch.arange(2 * BATCH) % CLASSES
    layers = map_shapes(network.config, SIDE)
    return BackboneClassifier(
        LayerMaps(network), labels, dim=network.dim, num_classes=CLASSES, layers=layers
    ).double()


def sgd(parameters: Any) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-2)


def trained() -> dict[str, Tensor]:
    """The weights of all probes after four steps, this rank's part of each batch."""
    objective = probes().train()
    optimizer = sgd([p for _, p in objective.trainable()])
    for step in range(4):
        shares = collectives.shares(BATCH)
        mine = slice(shares.first, shares.first + shares.mine)
        ids = torch.arange(BATCH) + BATCH * (step % 2)
        optimizer.zero_grad()
        objective.shares = shares
        objective([images(step)[mine]], ids[mine])[0].backward()
        for _, p in objective.trainable():
            assert p.grad is not None
            p.grad = collectives.all_sum(p.grad) / collectives.world_size()
        optimizer.step()
        objective.after_step(0.0)
    return {key: value.clone() for key, value in objective.heads.state_dict().items()}


def test_probes_side_by_side_are_what_torch_trains_one_by_one() -> None:
    start, end, network = probes(), trained(), small().eval()
    for i, (channels, side) in enumerate(map_shapes(network.config, SIDE).values()):
        norm = nn.BatchNorm2d(channels, affine=False).double()
        convolution = nn.Conv2d(channels, CLASSES, side).double()
        first: Any = start.heads[i]
        convolution.weight.data = first.linear.weight.detach().view_as(convolution.weight).clone()
        nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
        optimizer = sgd(convolution.parameters())
        for step in range(4):
            labels = (torch.arange(BATCH) + BATCH * (step % 2)) % CLASSES
            with torch.no_grad():
                x = LayerMaps(network)(images(step))[i]
            optimizer.zero_grad()
            F.cross_entropy(convolution(norm(x))[:, :, 0, 0], labels).backward()
            optimizer.step()
        torch.testing.assert_close(
            end[f"{i}.linear.weight"], convolution.weight.detach().flatten(1)
        )
        torch.testing.assert_close(end[f"{i}.norm.running_var"], norm.running_var)


def test_two_ranks_train_the_probes_of_one(on_ranks: OnRanks) -> None:
    alone = trained()
    for found in on_ranks(trained, size=2):
        for key in ("0.linear.weight", "3.linear.weight", "1.norm.running_mean"):
            torch.testing.assert_close(found[key], alone[key])


def test_a_frozen_trunk_stays_in_evaluation_mode_and_its_probes_do_not() -> None:
    objective, before = probes().train(), small().state_dict()
    objective([images()], torch.arange(BATCH))[0].backward()
    assert not any(module.training for module in objective.backbone.modules())
    assert all(head.training for head in objective.heads)
    after = {k.removeprefix("backbone."): v for k, v in objective.backbone.state_dict().items()}
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_ten_crops_are_corners_middle_and_mirror_images() -> None:
    pixels = torch.randint(0, 256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    options = {"size": 6, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "share": 0.75}
    found = list(ten_crops(pixels.byte(), **options))  # type: ignore[arg-type]
    expected = []
    for top, left in ((1, 1), (0, 0), (0, 2), (2, 0), (2, 2)):
        square = pixels[:, :, top : top + 6, left : left + 6] / 255
        expected += [square, square.flip(3)]
    torch.testing.assert_close(found, expected)
