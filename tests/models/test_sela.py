"""models/sela.py against the published numbers, slow loops, and itself on several ranks."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsup_ray import collectives
from selfsup_ray.errors import ArtifactError, ConfigError, TrainingError
from selfsup_ray.models.alexnet import Dropout, DropoutKey
from selfsup_ray.models.backbones import (
    AlexNetConfig,
    Backbone,
    PreactResNetConfig,
    ResNetConfig,
    build_backbone,
)
from selfsup_ray.models.sela import SeLa, first_labels
from selfsup_ray.models.sela_config import (
    AugmentedPass,
    CleanPass,
    EstimatedPrior,
    GivenPrior,
    LinearEvents,
    QuadraticEvents,
    RegularEvents,
    SeLaMethod,
    SinkhornConfig,
    UniformPrior,
    marginals,
)
from selfsup_ray.models.sela_weights import fill_published
from selfsup_ray.optim import SGDConfig
from selfsup_ray.training import State, TrainConfig, fit, load_state, save_state

OnRanks = Callable[..., list[Any]]
N, K = 60, 5
SMALL = ResNetConfig(stem="stl", width=4)


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("config", "features", "whole", "num_heads", "num_clusters"),
    [
        (AlexNetConfig(), 3_749_952, 70_575_096, 1, 3000),
        (AlexNetConfig(), 3_749_952, 181_194_096, 10, 3000),
        (AlexNetConfig(), 3_749_952, 63_528_256, 10, 128),
        (AlexNetConfig(size="small"), 2_472_000, 69_297_144, 1, 3000),
        (PreactResNetConfig(), 23_496_256, 84_966_256, 10, 3000),
        (ResNetConfig(name="resnet50"), 23_508_032, 29_655_032, 1, 3000),
        (ResNetConfig(name="resnet50"), 23_508_032, 84_978_032, 10, 3000),
    ],
)
def test_networks_have_the_published_numbers_of_parameters(
    config: Any, features: int, whole: int, num_heads: int, num_clusters: int
):
    with torch.device("meta"):
        network = build_backbone(config)
    own = network.features if isinstance(config, AlexNetConfig) else network
    assert num_parameters(own) == features
    heads = num_heads * (network.dim + 1) * num_clusters
    assert num_parameters(network) + heads == whole


def test_alexnet_has_the_published_maps_and_refuses_other_views():
    with torch.device("meta"):
        network, x = build_backbone(AlexNetConfig()), torch.empty(2, 3, 224, 224)
    shapes = []
    for layer in network.features:
        x = layer(x)
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d):
            shapes.append(tuple(x.shape[1:]))
    convolved = [shapes[i] for i in (0, 2, 4, 5, 6, 7)]
    assert convolved[:2] == [(96, 55, 55), (256, 27, 27)]
    assert convolved[2:] == [(384, 13, 13), (384, 13, 13), (256, 13, 13), (256, 6, 6)]
    with pytest.raises(ConfigError, match=r"views of 224 pixels, got 32. Set views.size=224"):
        network(torch.empty(2, 3, 32, 32, device="meta"))


def test_a_block_of_the_preactivation_network_equals_its_formula():
    block = build_backbone(PreactResNetConfig(width=4)).stages[1][0].double().train()
    x = torch.randn(3, 16, 8, 8, dtype=torch.float64)

    def normalized(y: Tensor) -> Tensor:
        mean, var = y.mean(dim=(0, 2, 3), keepdim=True), y.var((0, 2, 3), False, keepdim=True)
        return ((y - mean) / (var + 1e-5).sqrt()).clamp_min(0)

    active = normalized(x)
    y = F.conv2d(active, block.conv1.weight)
    y = F.conv2d(normalized(y), block.conv2.weight, stride=2, padding=1)
    y = F.conv2d(normalized(y), block.conv3.weight)
    expected = y + F.conv2d(active, block.shortcut.weight, stride=2)
    torch.testing.assert_close(block(x), expected)


def test_the_quadratic_schedule_has_the_published_times():
    times = QuadraticEvents(nopts=100).epochs(401)
    assert times[:6].round(3).tolist() == [0, 0.041, 0.164, 0.368, 0.655, 1.023]
    assert times[-3:-1].round(2).tolist() == [384.97, 392.95]
    assert (times < 401).sum() == 99


def test_the_linear_schedule_has_the_published_times():
    times = LinearEvents(nopts=400).epochs(400)
    assert times[:3].round(3).tolist() == [0, 1.005, 2.010]
    assert (times < 400).sum() == 399
    assert RegularEvents(every_epochs=2.5).epochs(10).tolist() == [0, 2.5, 5, 7.5]


def test_first_labels_are_balanced_and_other_ones_for_each_head():
    between = first_labels(103, 3, 10, seed=0)
    labels = between(0, 103).T
    assert np.array_equal(between(40, 70).T, labels[:, 40:70])
    for row in labels:
        assert sorted(np.bincount(row, minlength=10).tolist()) == [10] * 7 + [11] * 3
    assert not (labels[0] == labels[1]).all() and not (labels[0][:20] == np.arange(20) % 10).all()


def test_dropout_masks_are_functions_of_step_and_image():
    layer, x = Dropout(0.5, stream=1).train(), torch.ones(6, 400)
    layer.key = DropoutKey(0, 3, torch.arange(6))
    whole = layer(x)
    layer.key = DropoutKey(0, 3, torch.tensor([4, 1]))
    assert torch.equal(layer(x[:2]), whole[[4, 1]])
    assert set(whole.unique().tolist()) == {0.0, 2.0} and 0.45 < (whole > 0).float().mean() < 0.55
    layer.key = DropoutKey(0, 4, torch.arange(6))
    assert not torch.equal(layer(x), whole)
    assert torch.equal(layer.eval()(x), x)


class Stripes:
    """N images of K kinds of stripes with noise; the kind of image i is i mod K."""

    def __init__(self, n: int = N) -> None:
        generator = torch.Generator().manual_seed(0)
        phase = torch.arange(12)[None, :] * (1 + torch.arange(n) % K)[:, None] * 0.5
        waves = 127 + 90 * phase.sin()[:, None, None, :].expand(n, 3, 12, 12)
        noise = 15 * torch.randn(n, 3, 12, 12, generator=generator)
        self.images = (waves + noise).clamp(0, 255).byte()
        self.kinds = (torch.arange(n) % K).numpy()
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, ids: np.ndarray, *, epoch: int) -> list[Tensor]:
        self.read += ids.tolist() if epoch < 0 else []
        return [self.images[torch.from_numpy(ids)]]


def plain_views(images: list[Tensor], ids: Tensor, epoch: int) -> list[Tensor]:
    return [images[0] / 127.5 - 1]


METHOD = SeLaMethod(
    num_clusters=K,
    num_heads=2,
    events=RegularEvents(every_epochs=0.5),
    heads_per_event="all",
    label_pass=AugmentedPass(),
    prior=UniformPrior(),
    sinkhorn=SinkhornConfig(lam=10.0, precision="float32", tolerance=1e-5, max_iterations=101),
    epochs=4,
    batch_size=12,
    precision="float32",
    channels_last=False,
    seed=0,
)
TRAIN = TrainConfig(
    epochs=METHOD.epochs,
    batch_size=METHOD.batch_size,
    optim=SGDConfig(lr=0.05),
    precision="float32",
    channels_last=False,
    log_every=5,
    checkpoint_every=3,
)


def sela(data: Stripes | None = None, backbone: Backbone | None = None, **values: Any) -> SeLa:
    data, method = data or Stripes(), dataclasses.replace(METHOD, **values)
    network = backbone or build_backbone(SMALL)
    return SeLa(
        method,
        network,
        num_images=len(data),
        pass_views=plain_views,
        truth=lambda ids: data.kinds[ids],
    )


def labels_of(objective: SeLa) -> Tensor:
    """(T, N) labels of all images, wherever they are."""
    return collectives.gather(objective.labels.mine(), objective.labels.shares).T.contiguous()


def trained(objective: SeLa, **options: Any) -> State:
    state = fit(objective, Stripes(), plain_views, TRAIN, device="cpu", **options)
    return copy.deepcopy(state)


def test_the_loss_is_the_mean_over_heads_of_cross_entropies_by_image_id():
    objective = sela().double()
    data = Stripes()
    ids = torch.tensor([7, 3, 55, 20])
    view = plain_views(data.batch(ids.numpy(), epoch=0), ids, 0)[0].double()
    loss, metrics = objective([view], ids)
    features, expected = objective.backbone(view), 0.0
    for head, labels in zip(objective.heads, labels_of(objective), strict=True):
        for row, image in zip(features, ids, strict=True):
            p = head(row).softmax(dim=0)
            expected -= p[labels[image]].log().item() / (len(ids) * 2)
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    assert metrics["loss"].item() == pytest.approx(expected, rel=1e-9)


def test_an_event_gives_the_labels_of_the_published_loop():
    """Clean pass, published start: argmax of diag(r) P^lambda in float64."""
    data = Stripes()
    objective = sela(data, label_pass=CleanPass())
    objective.before_step(0, data)
    assert sorted(data.read) == list(range(N)), "each image is read exactly once"
    assert objective.training and int(objective.passed) == 1
    objective.eval()
    with torch.no_grad():
        features = objective.backbone(data.images / 127.5 - 1)
        for head, found in zip(objective.heads, labels_of(objective), strict=True):
            a = head(features).double().softmax(dim=1).pow(10).T.numpy()
            c = np.full(N, 1 / N)
            for _ in range(500):
                r = 1 / K / (a @ c)
                c = 1 / N / (a.T @ r)
            expected = (a * r[:, None]).argmax(axis=0)
            assert (found.numpy() == expected).mean() >= 0.98


def test_events_come_by_samples_seen_and_several_at_once_are_one():
    data = Stripes()
    objective = sela(data, events=QuadraticEvents(nopts=50))
    calls: list[int] = []
    objective._relabel = lambda event, seen, dataset: calls.append(event)  # type: ignore[method-assign]
    for step in range(20):
        objective.before_step(step * 12, data)
    times = QuadraticEvents(nopts=50).epochs(4) * 60
    due = [int((times <= step * 12).sum()) - 1 for step in range(20)]
    assert calls == due, "every step has an event here, the last one that is due"


def test_one_head_an_event_is_that_of_the_epoch():
    objective = sela(num_heads=3, heads_per_event="one")
    assert [list(objective.due_heads(60 * e)) for e in range(5)] == [[0], [1], [2], [0], [1]]


def test_relabeling_finds_the_kinds_of_images():
    objective = sela(label_pass=CleanPass())
    state = trained(objective)
    curve = objective.events[:, :, -3]
    assert curve.shape[0] == 8 and not curve.isnan().any()
    assert curve[-1].mean() > curve[0].mean() + 0.15
    last = state["history"][-1]
    assert last["events"] == 8 and last["nmi"] == pytest.approx(curve[-1].mean().item())
    sizes = torch.bincount(labels_of(objective)[0])
    assert sizes.max() <= 2 * N / K


def assert_same(one: State, other: State) -> None:
    assert one["step"] == other["step"]
    for key, value in one["objective"].items():
        torch.testing.assert_close(value, other["objective"][key], rtol=0, atol=0, equal_nan=True)


def test_a_training_that_was_stopped_anywhere_ends_with_the_same_labels():
    """Checkpoints after every third step: before, between and right after events."""
    states: list[State] = []
    whole = trained(sela(), on_checkpoint=lambda state: states.append(copy.deepcopy(state)))
    assert [state["step"] for state in states] == [3, 6, 9, 12, 15, 18, 20]
    for state in states[:3]:
        again = sela()
        assert_same(trained(again, state=state), whole)
        assert int(again.passed) == 8


def test_a_diverged_network_ends_with_a_message():
    data = Stripes()
    objective = sela(data)
    with torch.no_grad():
        objective.backbone.conv1.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="Features of 60 images are not finite at event 0"):
        objective.before_step(0, data)


def events_and_labels(mode: str) -> dict[str, Tensor]:
    objective = sela(label_pass=CleanPass() if mode == "clean" else AugmentedPass())
    objective.before_step(0, Stripes())
    return {"labels": labels_of(objective), "log_r": objective.log_r}


def double_views(images: list[Tensor], ids: Tensor, epoch: int) -> list[Tensor]:
    return [view.double() for view in plain_views(images, ids, epoch)]


def trained_in_64_bits() -> dict[str, Tensor]:
    """In 32 bits rounding grows from event to event, as in any training of fresh networks."""
    objective = sela().double()
    objective.pass_views = double_views
    fit(objective, Stripes(), double_views, TRAIN, device="cpu")
    return {"labels": labels_of(objective), "weight": objective.backbone.conv1.weight.detach()}


@pytest.mark.parametrize("size", [2, 4])
def test_labels_do_not_depend_on_the_number_of_ranks(on_ranks: OnRanks, size: int):
    for mode in ("clean", "augmented"):
        alone = events_and_labels(mode)
        for found in on_ranks(events_and_labels, mode, size=size):
            assert torch.equal(found["labels"], alone["labels"])
            torch.testing.assert_close(found["log_r"], alone["log_r"], rtol=0, atol=1e-4)


def test_two_ranks_train_to_the_weights_of_one(on_ranks: OnRanks):
    alone = trained_in_64_bits()
    for found in on_ranks(trained_in_64_bits, size=2):
        assert torch.equal(found["labels"], alone["labels"])
        torch.testing.assert_close(found["weight"], alone["weight"], rtol=0, atol=1e-8)


def continued_in_64_bits(path: Path, last: int) -> dict[str, Tensor]:
    """Train up to a step, from the checkpoint in a file if there is one, and write the next."""
    objective = sela().double()
    objective.pass_views = double_views

    def keep(state: State) -> None:
        if state["step"] == last and collectives.rank() == 0:
            save_state(path, state)
            assert len(state["objective"]["labels._extra_state"]) == N

    options: dict[str, Any] = {"state": load_state(path), "on_checkpoint": keep}
    fit(objective, Stripes(), double_views, TRAIN, device="cpu", **options)
    return {"labels": labels_of(objective), "weight": objective.backbone.conv1.weight.detach()}


def test_a_checkpoint_of_two_ranks_ends_on_three_with_the_labels_of_one(
    on_ranks: OnRanks, tmp_path: Path
):
    """The checkpoint at step 9 of 20 lies between the events before steps 8 and 10."""
    alone, path = trained_in_64_bits(), tmp_path / "checkpoint.pt"
    on_ranks(continued_in_64_bits, path, 9, size=2)
    for found in on_ranks(continued_in_64_bits, path, -1, size=3):
        assert torch.equal(found["labels"], alone["labels"])
        torch.testing.assert_close(found["weight"], alone["weight"], rtol=0, atol=1e-8)


def test_given_features_labels_are_the_same_on_any_number_of_ranks(on_ranks: OnRanks):
    """Features of a table are the same bits everywhere, and so must be log r."""
    alone = from_table()
    for size in (2, 4):
        for found in on_ranks(from_table, size=size):
            assert torch.equal(found["labels"], alone["labels"])
            assert torch.equal(found["log_r"], alone["log_r"])


class Table(Backbone):
    """Features that are looked up, by the number in an image's first pixel."""

    def __init__(self, n: int = N) -> None:
        super().__init__(SMALL)
        self.rows = torch.randn(n, self.dim, generator=torch.Generator().manual_seed(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.rows[((images[:, 0, 0, 0] + 1) * 127.5).round().long()]


def looked_up(n: int = N, **values: Any) -> SeLa:
    """An objective on a table, after its first event."""
    data = Stripes(n)
    data.images[:, 0, 0, 0] = torch.arange(n).byte()
    objective = sela(data, backbone=Table(n), **values)
    for head in objective.heads:
        nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(2))
    objective.before_step(0, data)
    return objective


def from_table() -> dict[str, Tensor]:
    objective = looked_up(num_clusters=64)  # more than the features, which are stored then
    return {"labels": labels_of(objective), "log_r": objective.log_r}


def test_given_shares_are_those_of_the_labels():
    shares = (0.4, 0.3, 0.15, 0.1, 0.05)
    objective = looked_up(240, prior=GivenPrior(shares=shares), num_heads=1)
    found = torch.bincount(labels_of(objective)[0], minlength=K) / 240
    np.testing.assert_allclose(found.numpy(), shares, atol=0.03)


def test_an_estimated_prior_grows_from_uniform_to_the_soft_counts():
    prior, counts = EstimatedPrior(strength=0.8, anneal=0.5), np.array([0.7, 0.3, 0.0, 0.0])
    np.testing.assert_allclose(marginals(prior, counts, progress=0), [0.25] * 4)
    half = marginals(prior, counts, progress=0.25)
    np.testing.assert_allclose(half, 0.6 * 0.25 + 0.4 * counts, atol=1e-12)
    full = np.maximum(0.2 * 0.25 + 0.8 * counts, 0.1 / 4)
    np.testing.assert_allclose(marginals(prior, counts, progress=0.9), full / full.sum())
    assert marginals(UniformPrior(), counts, progress=1) is None


class LongTail(Stripes):
    """Stripes whose kinds have 96, 48, 24, 12 and 6 images."""

    def __init__(self) -> None:
        super().__init__(96 * K)
        counts = [96 // 2**kind for kind in range(K)]
        kept = np.concatenate([np.flatnonzero(self.kinds == c)[:n] for c, n in enumerate(counts)])
        kept.sort()
        self.images, self.kinds = self.images[torch.from_numpy(kept)], self.kinds[kept]


def largest_cluster(prior: Any) -> float:
    """Mean over heads of the images in the largest cluster, after eight epochs on a long tail."""
    data = LongTail()
    values = {"prior": prior, "epochs": 8, "events": RegularEvents(every_epochs=1), "num_heads": 3}
    objective = sela(data, label_pass=CleanPass(), **values)
    fit(objective, data, plain_views, dataclasses.replace(TRAIN, epochs=8), device="cpu")
    return max_size(labels_of(objective))


def max_size(labels: Tensor) -> float:
    return float(np.mean([torch.bincount(row).max().item() for row in labels]))


def test_on_a_long_tail_estimated_sizes_grow_apart_without_a_collapse():
    """The kinds have 96, 48, 24, 12 and 6 of 186 images; equal clusters would have 37."""
    equal = largest_cluster(UniformPrior())
    estimated = largest_cluster(EstimatedPrior(strength=0.8, anneal=0.3))
    assert 1.15 * equal < estimated < 150, f"{equal:.0f}, {estimated:.0f}"


def published(objective: SeLa, names: Callable[[str], str]) -> dict[str, Any]:
    """A checkpoint as the original code writes it."""
    state = {names(key): x for key, x in objective.backbone.state_dict().items()}
    for i, head in enumerate(objective.heads):
        place = f"top_layer{i}" if len(objective.heads) > 1 else "top_layer"
        state |= {f"module.{place}.{key}": x for key, x in head.state_dict().items()}
    return {"epoch": 3, "arch": "net", "state_dict": state, "L": labels_of(objective).long() % 2}


def as_sequential(key: str) -> str:
    key = key.replace("stem.", "features.0.").replace("shortcut.", "shortcut.0.")
    for i in range(4):
        key = key.replace(f"stages.{i}.", f"features.{i + 2}.")
    return f"module.{key.replace('norm', 'bn')}"


@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("kind", ["alexnet", "resnet50v2", "resnet18"])
def test_a_published_checkpoint_fills_network_heads_and_labels(
    tmp_path: Any, kind: str, num_heads: int
):
    config = {"resnet50v2": PreactResNetConfig(width=4), "resnet18": SMALL}.get(kind)
    names = {"resnet50v2": as_sequential, "resnet18": lambda key: f"module.features.{key}"}
    if config is None:
        if num_heads > 1:
            pytest.skip("one AlexNet of 200 MB is enough")
        config = AlexNetConfig(size="small")
    source = sela(backbone=build_backbone(config, seed=5), num_heads=num_heads)
    name = names.get(kind, lambda key: f"module.{key}")
    torch.save(published(source, name), tmp_path / "checkpoint.pth")
    filled = sela(backbone=build_backbone(config, seed=6), num_heads=num_heads)
    text = fill_published(filled, tmp_path / "checkpoint.pth")
    assert "labels of all 60 images" in text
    for own, other in zip(filled.parameters(), source.parameters(), strict=True):
        assert torch.equal(own, other)
    assert torch.equal(labels_of(filled), labels_of(source) % 2)
    wrong = sela(backbone=build_backbone(config), num_heads=num_heads, num_clusters=7)
    with pytest.raises(ArtifactError, match="heads"):
        fill_published(wrong, tmp_path / "checkpoint.pth")


def test_sinkhorn_on_disk_needs_main_memory():
    with pytest.raises(ConfigError, match=r"needs sinkhorn.device=cpu"):
        SinkhornConfig(on_disk=True)


def test_labels_on_disk_are_those_in_memory():
    found = []
    for on_disk in (False, True):
        data = Stripes()
        options = dataclasses.replace(METHOD.sinkhorn, on_disk=on_disk, device="cpu")
        objective = sela(data, sinkhorn=options)
        objective.before_step(0, data)
        found.append(labels_of(objective))
    assert torch.equal(*found)
