"""What must not depend on the number of ranks: 1 process against 2 and 4 gloo ranks under DDP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selfsup_ray import collectives
from selfsup_ray.models.backbones import Backbone, ResNetConfig, build_backbone
from selfsup_ray.models.clustering import Scan, SelfLabel
from selfsup_ray.models.heads import LinearHead, MLPHead
from selfsup_ray.models.insdis import NCELoss
from selfsup_ray.models.norm import (
    BatchNorm,
    LocalNorm,
    ShuffleNorm,
    SplitNorm,
    SyncNorm,
    group_size,
    set_batch_norm,
    share_running_statistics,
)
from selfsup_ray.models.objective import Objective
from selfsup_ray.models.online_probe import OnlineProbe, OnlineProbeConfig
from selfsup_ray.models.pretext import (
    BYOLConfig,
    InsDis,
    InsDisConfig,
    MoCoConfig,
    SimCLRConfig,
    build_pretext,
)
from selfsup_ray.models.probe import BackboneClassifier
from selfsup_ray.training import TrainConfig, on_all_ranks

OnRanks = Callable[..., list[Any]]
BATCH = 16  # global: 4 images a rank on 4 ranks; 6, 5 and 5 on 3, or 8, 4 and 4 in groups of 4
HEAD = MLPHead(hidden_dim=8, dim=8, batch_norm="hidden")
HEAD_WITHOUT = MLPHead(hidden_dim=8, dim=8)


def backbone() -> Backbone:
    return build_backbone(ResNetConfig(stem="stl", width=4))


def moco(**values: Any) -> Objective:
    return build_pretext(MoCoConfig(queue_size=64, momentum=0.5, **values), backbone())


def insdis(**values: Any) -> Objective:
    method = InsDisConfig(temperature=0.2, **({"batch_norm": SyncNorm()} | values))
    return build_pretext(method, backbone(), num_images=21)  # 21 rows divide among no ranks


def byol(**values: Any) -> Objective:
    heads = {"head": HEAD, "predictor": HEAD} | values
    return build_pretext(BYOLConfig(momentum=0.7, **heads), backbone())


def self_label(**values: Any) -> SelfLabel:
    head = nn.Linear(32, 4)
    nn.init.normal_(head.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    nn.init.zeros_(head.bias)
    return SelfLabel(backbone(), head, **values)


def probe(**values: Any) -> BackboneClassifier:
    labels = torch.arange(BATCH) % 3
    labels[:6] = -1  # ranks know different numbers of labels, the first of four none
    network = backbone()
    return BackboneClassifier(network, labels, dim=network.dim, num_classes=3, **values)


SPLIT, SHUFFLE = SplitNorm(group_size=4), ShuffleNorm(group_size=4)
OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "simclr": lambda: build_pretext(SimCLRConfig(head=HEAD), backbone()),
    "simclr one way, split": lambda: build_pretext(
        SimCLRConfig(head=HEAD, loss="one_way", batch_norm=SPLIT), backbone()
    ),
    "simclr cross view, split": lambda: build_pretext(
        SimCLRConfig(head=HEAD, loss="cross_view", batch_norm=SPLIT), backbone()
    ),
    "moco v2, shuffle": lambda: moco(head=MLPHead(dim=8), batch_norm=SHUFFLE),
    "moco v1, symmetric": lambda: moco(
        head=LinearHead(dim=8), temperature=0.07, symmetric=True, batch_norm=SHUFFLE
    ),
    "moco split": lambda: moco(head=HEAD, batch_norm=SPLIT),
    "moco sync": lambda: moco(head=HEAD, batch_norm=SyncNorm()),
    "insdis, split": lambda: insdis(head=HEAD, batch_norm=SPLIT),
    "insdis nce": lambda: insdis(loss=NCELoss(noise=6, partition="average")),
    "byol": lambda: byol(),
    "byol 011, split": lambda: byol(head=HEAD_WITHOUT, target_head=HEAD, batch_norm=SPLIT),
    "scan": lambda: Scan(backbone(), num_clusters=5, num_heads=2),
    "scan, frozen": lambda: Scan(backbone(), num_clusters=5, freeze_backbone=True),
    "self-label": lambda: self_label(threshold=0.6),
    "self-label, unbalanced, averaged": lambda: self_label(threshold=0.6, balance=False, ema=0.5),
    "probe": probe,
    "probe, three rates": lambda: probe(factors={"a": 1.0, "b": 0.1, "c": 10.0}),
    "fine-tuning": lambda: probe(frozen=False),
    "online probe": lambda: OnlineProbe(
        build_pretext(SimCLRConfig(head=HEAD), backbone()),
        torch.arange(BATCH) % 3,
        num_classes=3,
        config=OnlineProbeConfig(),
    ),
}

MAIN = ["simclr", "moco v2, shuffle", "byol", "scan", "self-label"]


def mine(x: Tensor, *, together: int = 1) -> Tensor:
    """This rank's rows of the global batch."""
    shares = collectives.shares(len(x), together=together)
    return x[shares.first :][: shares.mine]


def mean_over_ranks(x: Tensor, weight: float = 1.0) -> Tensor:
    return collectives.all_sum(weight * x.detach()) / collectives.world_size()


def trained(name: str, dtype: torch.dtype, steps: int) -> dict[str, Any]:
    """Loss, metrics and gradient of every step, and the final state, on this rank."""
    objective = OBJECTIVES[name]().to(dtype).train()
    together = group_size(objective)
    objective.shares = collectives.shares(BATCH, together=together)
    weight = objective.shares.mine * collectives.world_size() / BATCH
    model = on_all_ranks(objective, TrainConfig(epochs=1), torch.device("cpu"))
    optimizer = torch.optim.SGD([p for _, p in objective.trainable()], lr=0.05)
    history = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        shape = (BATCH, 3, 12, 12)
        views = [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2)]
        optimizer.zero_grad()
        views = [mine(view, together=together) for view in views]
        loss, metrics = model(views, mine(torch.arange(BATCH), together=together))
        (loss * weight).backward()
        history.append(
            {
                "loss": mean_over_ranks(loss, weight),
                "metrics": {key: mean_over_ranks(value, weight) for key, value in metrics.items()},
                "gradient": {key: p.grad.clone() for key, p in objective.trainable()},
            }
        )
        if objective.should_step():
            optimizer.step()
        objective.after_step(step / steps)
        history[-1]["numbers"] = objective.at_record()
    state = objective.state_dict()
    if isinstance(objective, InsDis):  # only rank 0's state has every row
        bank = objective.bank
        state["bank._extra_state"] = collectives.gather(bank.rows, bank.shares)
    return {"history": history, "state": state}


def relative_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-12))


def all_trained(names: list[str], dtype: torch.dtype, steps: int) -> dict[str, Any]:
    return {name: trained(name, dtype, steps) for name in names}


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("half", [0, 1])  # a rank has two minutes, on a busy machine too
def test_training_does_not_depend_on_the_number_of_ranks(
    on_ranks: OnRanks, half: int, size: int
) -> None:
    arguments = list(OBJECTIVES)[half::2], torch.float64, 2
    alone = all_trained(*arguments)
    for result in on_ranks(all_trained, *arguments, size=size):
        torch.testing.assert_close(result, alone, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("size", [2, 4])
def test_in_float32_losses_and_gradients_agree_to_1e_5(on_ranks: OnRanks, size: int) -> None:
    arguments = MAIN, torch.float32, 1
    alone = all_trained(*arguments)
    for result in on_ranks(all_trained, *arguments, size=size):
        for name in MAIN:
            found, expected = (x[name]["history"][0] for x in (result, alone))
            torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-5, atol=1e-5)
            gradients = [
                torch.cat([g.flatten() for g in x["gradient"].values()]) for x in (found, expected)
            ]
            assert relative_difference(*gradients) < 1e-5, name


def test_bfloat16_moco_shuffles_the_same_keys_on_two_ranks(on_ranks: OnRanks) -> None:
    def keys() -> Tensor:
        objective = moco(head=MLPHead(dim=8), batch_norm=SHUFFLE)
        generator = torch.Generator().manual_seed(0)
        views = [torch.randn(BATCH, 3, 12, 12, generator=generator) for _ in range(2)]
        with torch.autocast("cpu", torch.bfloat16):
            objective([mine(view) for view in views], mine(torch.arange(BATCH)))
        objective.after_step(0.0)
        return objective.queue[:BATCH]

    alone = keys()
    for found in on_ranks(keys, size=2):  # images travel in bfloat16, as the network rounds them
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-3)


def test_the_losses_under_test_are_not_trivial() -> None:
    for name in OBJECTIVES:
        history = trained(name, torch.float64, steps=2)["history"]
        losses = [record["loss"].item() for record in history]
        assert len(set(losses)) == 2, name
        assert all(g.any() for g in history[0]["gradient"].values()), name
        share = history[0]["metrics"].get("confident_share")
        assert share is None or 0 < share.item() < 1, name


def test_a_rank_without_a_confident_image_takes_part(on_ranks: OnRanks) -> None:
    def gradient() -> Tensor:
        objective = (
            self_label(threshold=0.6).double().eval()
        )  # eval: confidence of each image alone
        generator = torch.Generator().manual_seed(0)
        strong = torch.randn(BATCH, 3, 12, 12, generator=generator, dtype=torch.float64)
        weak = strong.clone()
        weak[BATCH // 2 :] = 0  # zero images: features 0, so probabilities 1 / 4 each
        model = on_all_ranks(objective, TrainConfig(epochs=1), torch.device("cpu"))
        loss, metrics = model([mine(weak), mine(strong)], mine(torch.arange(BATCH)))
        loss.backward()
        assert 0 < metrics["confident_share"].item() <= 0.5
        assert objective.should_step()
        assert objective.backbone.conv1.weight.grad is not None
        return objective.backbone.conv1.weight.grad

    alone = gradient()
    assert alone.any()
    for found in on_ranks(gradient, size=2):
        torch.testing.assert_close(found, alone)


def norm_results(dtype: torch.dtype, layout: torch.memory_format) -> dict[str, Tensor]:
    """Output, gradients and statistics of synced batch norm for this rank's rows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, 4, 4, generator=generator, dtype=torch.float64)
    # Ranks far from each other and from zero: E[x^2] - E[x]^2 would cancel.
    x = (x + 1e4 + 50 * torch.arange(8).view(8, 1, 1, 1)).to(dtype)
    target = torch.randn(8, 3, 4, 4, generator=generator, dtype=torch.float64).to(dtype)
    x = mine(x).to(memory_format=layout).requires_grad_()
    layer = BatchNorm(3).to(torch.float32 if dtype == torch.bfloat16 else dtype)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(1))
    set_batch_norm(layer, SyncNorm())
    out = layer(x)  # 3, 3 and 2 images on three ranks
    (out * mine(target)).sum().backward()
    assert out.is_contiguous(memory_format=layout) and x.grad is not None
    statistics = torch.stack([layer.running_mean, layer.running_var])
    weights = collectives.all_sum(torch.stack([layer.weight.grad, layer.bias.grad]))
    return {"out": out.detach(), "x": x.grad, "weights": weights, "statistics": statistics}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_synced_batch_norm_is_torchs_of_the_whole_batch(
    on_ranks: OnRanks, layout: torch.memory_format, size: int
) -> None:
    alone = norm_results(torch.float64, layout)
    ranks = on_ranks(norm_results, torch.float64, layout, size=size)
    for key in ("out", "x"):
        torch.testing.assert_close(torch.cat([found[key] for found in ranks]), alone[key])
    for found in ranks:
        torch.testing.assert_close(found["weights"], alone["weights"])
        torch.testing.assert_close(found["statistics"], alone["statistics"])


def test_synced_batch_norm_in_bfloat16_is_as_exact_as_in_one_process(on_ranks: OnRanks) -> None:
    arguments = torch.bfloat16, torch.channels_last
    alone = norm_results(*arguments)
    for rank, found in enumerate(on_ranks(norm_results, *arguments, size=2)):
        for key in ("out", "x"):
            expected = alone[key][rank * 4 :][:4]
            torch.testing.assert_close(found[key], expected, rtol=2e-2, atol=1e-3)
        torch.testing.assert_close(found["statistics"], alone["statistics"], rtol=1e-4, atol=0)


def test_local_statistics_are_averaged_over_ranks_after_a_step(on_ranks: OnRanks) -> None:
    def statistics() -> Tensor:
        layer = BatchNorm(2)
        set_batch_norm(layer, LocalNorm())
        for offset in (0.0, 7.0):
            layer(torch.arange(8.0).view(4, 2) * (1 + collectives.rank()) + offset)
            share_running_statistics(layer)
        return torch.stack([layer.running_mean, layer.running_var])

    expected = []
    for rank in range(2):
        layer = nn.BatchNorm1d(2)
        for offset in (0.0, 7.0):
            layer(torch.arange(8.0).view(4, 2) * (1 + rank) + offset)
        expected.append(torch.stack([layer.running_mean, layer.running_var]))
    for found in on_ranks(statistics, size=2):
        torch.testing.assert_close(found, torch.stack(expected).mean(dim=0))


def test_statistics_of_a_frozen_layer_are_not_touched_by_averaging(on_ranks: OnRanks) -> None:
    def statistics() -> Tensor:
        layer = BatchNorm(2).eval()
        layer.running_mean.fill_(1 / 3)
        share_running_statistics(layer)
        return layer.running_mean

    for found in on_ranks(statistics, size=3):
        torch.testing.assert_close(found, torch.full((2,), 1 / 3), rtol=0, atol=0)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("total", "together"), [(5, 1), (16, 1), (17, 1), (40, 8)])
def test_shares_are_contiguous_and_differ_by_one_group_at_most(
    monkeypatch: pytest.MonkeyPatch, size: int, total: int, together: int
) -> None:
    monkeypatch.setattr(collectives, "world_size", lambda: size)
    found = []
    for rank in range(size):
        monkeypatch.setattr(collectives, "rank", lambda rank=rank: rank)
        shares = collectives.shares(total, together=together)
        found += range(shares.first, shares.first + shares.mine)
        assert shares.total == total
    assert found == list(range(total))
    assert all(rows % together == 0 for rows in shares.rows)
    assert max(shares.rows) - min(shares.rows) <= together
    assert list(shares.rows) == sorted(shares.rows, reverse=True)


def test_gather_of_unequal_pieces_has_the_gradient_of_the_global_sum(on_ranks: OnRanks) -> None:
    everything = torch.arange(1.0, 6.0).view(5, 1)

    def gathered() -> list[Tensor]:
        shares = collectives.shares(5)  # 2, 2 and 1 rows
        x = mine(everything).clone().requires_grad_()
        rows = collectives.gather(x, shares)
        ((1 + collectives.rank()) * everything * rows.square()).sum().backward()
        return [rows.detach(), x.grad]

    ranks = on_ranks(gathered, size=3)
    for rows, _ in ranks:
        assert torch.equal(rows, everything)
    gradient = torch.cat([x_grad for _, x_grad in ranks])
    torch.testing.assert_close(gradient, (1 + 2 + 3) * 2 * everything.square())


def test_local_statistics_of_unequal_pieces_are_weighed_by_their_images(on_ranks: OnRanks) -> None:
    def statistics() -> Tensor:
        layer = BatchNorm(2)
        set_batch_norm(layer, SplitNorm(group_size=4))
        shares = collectives.shares(24, together=4)  # 8, 8, 4 and 4
        rows = torch.arange(48.0).view(24, 2).square()
        layer(rows[shares.first :][: shares.mine])
        share_running_statistics(layer, shares)
        return torch.stack([layer.running_mean, layer.running_var])

    alone = statistics()
    for found in on_ranks(statistics, size=4):
        torch.testing.assert_close(found, alone)


def test_gather_and_all_sum_have_the_gradient_of_the_global_sum(on_ranks: OnRanks) -> None:
    def gradients() -> list[Tensor]:
        x = (torch.arange(3.0) + 3 * collectives.rank()).view(3, 1).requires_grad_()
        weights = torch.arange(1.0, 7.0).view(6, 1)
        rows = collectives.gather(x)
        # Each rank's own function of all rows; the sum over ranks is what is differentiated.
        ((1 + collectives.rank()) * weights * rows.square()).sum().backward()
        y = torch.tensor(2.0 + collectives.rank(), requires_grad=True)
        ((1 + collectives.rank()) * collectives.all_sum(y).square()).backward()
        return [rows.detach(), x.grad, y.grad]

    for rank, (rows, x_grad, y_grad) in enumerate(on_ranks(gradients, size=2)):
        x = torch.arange(6.0).view(6, 1)
        torch.testing.assert_close(rows, x)
        weights = torch.arange(1.0, 7.0).view(6, 1)
        torch.testing.assert_close(x_grad, ((1 + 2) * 2 * weights * x)[rank * 3 :][:3])
        torch.testing.assert_close(y_grad, torch.tensor((1 + 2) * 2 * (2.0 + 3.0)))


def test_gather_keeps_the_values_of_channels_last_images(on_ranks: OnRanks) -> None:
    images = torch.arange(2.0 * 2 * 3 * 4 * 4).view(4, 3, 4, 4)

    def gathered() -> Tensor:
        return collectives.gather(mine(images).to(memory_format=torch.channels_last))

    for found in on_ranks(gathered, size=2):
        torch.testing.assert_close(found, images)


def test_broadcast_gives_everyone_the_first_ranks_values(on_ranks: OnRanks) -> None:
    def received() -> Tensor:
        return collectives.broadcast(torch.full((2,), 5.0 + collectives.rank()))

    for found in on_ranks(received, size=2):
        assert found.tolist() == [5.0, 5.0]


def test_in_one_process_every_collective_is_the_identity() -> None:
    x = torch.arange(3.0)
    assert collectives.gather(x) is x
    assert collectives.all_sum(x) is x
    assert collectives.broadcast(x) is x
    assert (collectives.rank(), collectives.world_size()) == (0, 1)
