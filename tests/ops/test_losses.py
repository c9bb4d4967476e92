"""ops/losses.py against slow loops, the papers' closed forms, published fixtures and lightly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss
from torch import Tensor

from selfsup_ray.ops.losses import (
    confident_cross_entropy,
    cross_view_nt_xent,
    info_nce,
    nt_xent,
    one_way_nt_xent,
    scan_loss,
)

VIEW_LOSSES = {"nt_xent": nt_xent, "one_way": one_way_nt_xent, "cross_view": cross_view_nt_xent}


def fixture_rows() -> tuple[Tensor, Tensor, Tensor]:
    """The rows of the specification's fixtures: a, b (4, 8) and a queue of 16 unit rows."""
    random = np.random.RandomState(0)
    a, b, q = (torch.from_numpy(random.randn(*shape)) for shape in [(4, 8), (4, 8), (8, 16)])
    return F.normalize(a, dim=1), F.normalize(b, dim=1), F.normalize(q, dim=0).T


def unit(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def logits(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, generator=generator, dtype=torch.float64)


def simclr_by_loops(z0: Tensor, z1: Tensor, temperature: float, *, both_ways: bool) -> float:
    """Equation 1 of SimCLR, anchor by anchor; only first views as anchors unless both_ways."""
    z = [*z0.tolist(), *z1.tolist()]
    n = len(z0)

    def similarity(i: int, j: int) -> float:
        return math.exp(sum(x * y for x, y in zip(z[i], z[j], strict=True)) / temperature)

    losses = []
    for i in range(2 * n if both_ways else n):
        others = sum(similarity(i, j) for j in range(2 * n) if j != i)
        losses.append(-math.log(similarity(i, (i + n) % (2 * n)) / others))
    return sum(losses) / len(losses)


@pytest.mark.parametrize(("temperature", "expected"), [(0.5, 2.401411), (0.1, 7.022668)])
def test_nt_xent_has_the_published_value(temperature: float, expected: float) -> None:
    a, b, _ = fixture_rows()
    assert nt_xent(a, b, temperature=temperature).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_nt_xent_is_the_papers_equation(temperature: float) -> None:
    z0, z1 = unit(5, 3, seed=0), unit(5, 3, seed=1)
    expected = simclr_by_loops(z0, z1, temperature, both_ways=True)
    assert nt_xent(z0, z1, temperature=temperature).item() == pytest.approx(expected)


def test_nt_xent_and_its_gradient_are_those_of_lightly() -> None:
    z0, z1 = unit(6, 4, seed=0).float(), unit(6, 4, seed=1).float()
    ours, theirs = (z0.clone().requires_grad_() for _ in range(2))
    loss = nt_xent(ours, z1, temperature=0.3)
    expected = NTXentLoss(temperature=0.3)(theirs, z1)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    # lightly normalises inside, so only the part of the gradient along the sphere is its.
    expected.backward()
    assert ours.grad is not None
    radial = (ours.grad * z0).sum(dim=1, keepdim=True) * z0
    torch.testing.assert_close(ours.grad - radial, theirs.grad)


def test_one_way_nt_xent_counts_only_first_views_as_anchors() -> None:
    z0, z1 = unit(5, 3, seed=0), unit(5, 3, seed=1)
    expected = simclr_by_loops(z0, z1, 0.2, both_ways=False)
    assert one_way_nt_xent(z0, z1, temperature=0.2).item() == pytest.approx(expected)


@pytest.mark.parametrize(("n", "expected"), [(4, 1.94591), (512, 6.93049)])
def test_nt_xent_of_identical_rows_is_the_log_of_their_number(n: int, expected: float) -> None:
    z = torch.full((n, 4), 0.5)
    for loss in (nt_xent, one_way_nt_xent):
        assert loss(z, z, temperature=0.1).item() == pytest.approx(expected, abs=1e-5)


def test_one_way_nt_xent_of_orthogonal_images_has_the_published_value() -> None:
    z = torch.eye(8, dtype=torch.float64)
    assert one_way_nt_xent(z, z, temperature=0.1).item() == pytest.approx(6.354e-4, abs=1e-7)


def test_cross_view_nt_xent_has_the_published_value() -> None:
    a, b, _ = fixture_rows()
    assert cross_view_nt_xent(a, b, temperature=0.5).item() == pytest.approx(1.249689, abs=1e-6)


def test_cross_view_nt_xent_is_its_formula() -> None:
    z0, z1 = unit(5, 3, seed=0), unit(5, 3, seed=1)
    s = (z0 @ z1.T).numpy()
    scores = (s + s.T - np.diag(np.diag(s))) / 0.3
    expected = [np.log(np.exp(row).sum()) - row[i] for i, row in enumerate(scores)]
    assert cross_view_nt_xent(z0, z1, temperature=0.3).item() == pytest.approx(np.mean(expected))


def test_info_nce_is_lightlys_loss_against_a_memory_bank() -> None:
    q, k, queue = (unit(n, 8, seed=i).float() for i, n in enumerate((4, 4, 16)))
    reference = NTXentLoss(temperature=0.2, memory_bank_size=(16, 8))
    reference.memory_bank.bank = queue.clone()
    reference.memory_bank.bank_ptr = torch.zeros(1, dtype=torch.int64)
    ours, theirs = q.clone().requires_grad_(), q.clone().requires_grad_()
    loss, expected = info_nce(ours, k, queue, temperature=0.2), reference(theirs, k)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    assert ours.grad is not None
    # lightly normalises inside, so only the part of the gradient along the sphere is its.
    radial = (ours.grad * q).sum(dim=1, keepdim=True) * q
    torch.testing.assert_close(ours.grad - radial, theirs.grad)


@pytest.mark.parametrize("name", VIEW_LOSSES)
def test_the_mean_over_slices_of_anchors_is_the_loss_of_the_batch(name: str) -> None:
    z0, z1 = unit(6, 4, seed=0), unit(6, 4, seed=1)
    parts = [
        VIEW_LOSSES[name](
            *(z0[i : i + 2], z1[i : i + 2]), temperature=0.2, contrast=(z0, z1), first=i
        )
        for i in (0, 2, 4)
    ]
    torch.testing.assert_close(
        torch.stack(parts).mean(), VIEW_LOSSES[name](z0, z1, temperature=0.2)
    )


@pytest.mark.parametrize("name", VIEW_LOSSES)
def test_view_losses_do_not_depend_on_the_order_of_the_images(name: str) -> None:
    z0, z1 = unit(6, 4, seed=0), unit(6, 4, seed=1)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    loss = VIEW_LOSSES[name]
    permuted = loss(z0[order], z1[order], temperature=0.2)
    torch.testing.assert_close(permuted, loss(z0, z1, temperature=0.2))


def test_nt_xent_in_float32_at_a_tiny_temperature_neither_overflows_nor_drifts() -> None:
    z0, z1 = unit(8, 4, seed=0), unit(8, 4, seed=1)
    exact = nt_xent(z0, z1, temperature=1e-3)
    single = nt_xent(z0.float(), z1.float(), temperature=1e-3)
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("temperature", "expected"), [(0.07, 12.998953), (0.2, 5.165367)])
def test_info_nce_has_the_published_value(temperature: float, expected: float) -> None:
    a, b, queue = fixture_rows()
    loss = info_nce(a, b, queue, temperature=temperature)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_info_nce_is_a_cross_entropy_with_the_own_key_first() -> None:
    q, k, queue = unit(5, 4, seed=0), unit(5, 4, seed=1), unit(7, 4, seed=2)
    expected = []
    for query, key in zip(q.numpy(), k.numpy(), strict=True):
        scores = np.exp(np.array([query @ key, *(query @ row for row in queue.numpy())]) / 0.1)
        expected.append(-np.log(scores[0] / scores.sum()))
    loss = info_nce(q, k, queue, temperature=0.1)
    assert loss.item() == pytest.approx(np.mean(expected))


def test_info_nce_of_a_useless_encoder_is_the_log_of_queue_size_plus_one() -> None:
    same = torch.full((3, 4), 0.5)
    loss = info_nce(same, same, torch.full((4096, 4), 0.5), temperature=0.07)
    assert loss.item() == pytest.approx(math.log(4097), abs=1e-5)


def scan_by_loops(p: np.ndarray, q: np.ndarray, weight: float) -> float:
    consistency = np.mean([-math.log(float(a @ b)) for a, b in zip(p, q, strict=True)])
    mean = p.mean(axis=0)
    return float(consistency - weight * -sum(m * math.log(m) for m in mean))


def test_scan_loss_is_the_papers_equation() -> None:
    a, b = logits(7, 5, seed=0), logits(7, 5, seed=1)
    expected = scan_by_loops(a.softmax(dim=1).numpy(), b.softmax(dim=1).numpy(), 5.0)
    assert scan_loss(a, b, entropy_weight=5.0).total.item() == pytest.approx(expected)


def test_scan_loss_of_uniform_predictions_has_the_logged_value() -> None:
    parts = scan_loss(torch.zeros(6, 10), torch.zeros(6, 10), entropy_weight=5.0)
    assert parts.consistency.item() == pytest.approx(2.302585, abs=1e-6)
    assert parts.entropy.item() == pytest.approx(2.302585, abs=1e-6)
    assert parts.total.item() == pytest.approx(-9.210340, abs=1e-5)


def test_scan_loss_is_least_for_confident_balanced_agreement() -> None:
    certain = 200 * torch.eye(10)
    total = scan_loss(certain, certain, entropy_weight=5.0).total
    assert total.item() == pytest.approx(-11.512925, abs=1e-5)


def test_scan_loss_of_a_collapse_into_one_cluster_is_zero_with_a_finite_gradient() -> None:
    collapsed = torch.zeros(4, 10)
    collapsed[:, 3] = 500
    collapsed.requires_grad_()
    total = scan_loss(collapsed, collapsed, entropy_weight=5.0).total
    total.backward()
    assert total.item() == pytest.approx(0, abs=1e-6)
    assert collapsed.grad is not None and collapsed.grad.isfinite().all()


def test_scan_loss_of_certain_disagreement_grows_with_the_logits_without_a_ceiling() -> None:
    a, b = 300 * torch.eye(2), 300 * torch.eye(2).flip(0)
    consistency = scan_loss(a, b, entropy_weight=0.0).consistency
    # -log(2 exp(-300)), which underflows to -log(0) outside log space.
    assert consistency.item() == pytest.approx(300 - math.log(2), rel=1e-6)


def test_scan_loss_gradient_is_that_of_finite_differences() -> None:
    a, b = logits(4, 3, seed=0).requires_grad_(), logits(4, 3, seed=1).requires_grad_()

    def total(x: Tensor, y: Tensor) -> Tensor:
        return scan_loss(x, y, entropy_weight=2.0).total

    assert torch.autograd.gradcheck(total, (a, b))


def test_scan_entropy_over_two_ranks_is_that_of_their_common_mean() -> None:
    # Rank r puts everything into cluster r: alone its entropy is 0, together ln 2.
    ranks = [40 * F.one_hot(torch.full((3,), r), 2).double() for r in (0, 1)]
    assert scan_loss(ranks[0], ranks[0], entropy_weight=1.0).entropy.item() == pytest.approx(0)
    sums: list[Tensor] = []

    def remember(x: Tensor) -> Tensor:
        sums.append(x)
        return x

    for rank in ranks:
        scan_loss(rank, rank, entropy_weight=1.0, all_sum=remember)
    together = scan_loss(*ranks[:1] * 2, entropy_weight=1.0, all_sum=lambda _: sums[0] + sums[1])
    assert together.entropy.item() == pytest.approx(math.log(2))


TOY_STRONG = torch.tensor([[2.0, 0, 0], [0, 0, 0], [0, 1, 0]], dtype=torch.float64)
TOY_WEAK = 20 * F.one_hot(torch.tensor([0, 0, 1]), 3).double()


@pytest.mark.parametrize(("balance", "expected"), [(True, 0.610262), (False, 0.629867)])
def test_confident_cross_entropy_has_the_published_toy_value(
    balance: bool, expected: float
) -> None:
    result = confident_cross_entropy(TOY_WEAK, TOY_STRONG, threshold=0.99, balance=balance)
    assert result.loss.item() == pytest.approx(expected, abs=1e-6)
    assert result.counts.tolist() == [2, 1, 0]


@pytest.mark.parametrize("balance", [True, False])
def test_confident_cross_entropy_is_torchs_weighted_cross_entropy(balance: bool) -> None:
    weak, strong = logits(30, 4, seed=0), logits(30, 4, seed=1)
    confidence, label = weak.softmax(dim=1).max(dim=1)
    chosen = confidence > 0.8
    counts = torch.bincount(label[chosen], minlength=4)
    weights = torch.ones(4, dtype=torch.float64)
    if balance:
        weights[counts > 0] = chosen.sum() / counts[counts > 0].double()
    assert 0 < chosen.sum() < 30
    expected = F.cross_entropy(strong[chosen], label[chosen], weight=weights)
    result = confident_cross_entropy(weak, strong, threshold=0.8, balance=balance)
    torch.testing.assert_close(result.loss, expected)
    assert result.counts.tolist() == counts.tolist()


def test_balance_gives_every_cluster_the_same_mass() -> None:
    label = torch.tensor([0] * 9 + [2])
    strong = torch.zeros(10, 3, dtype=torch.float64)
    strong[label == 2] = torch.tensor([0.0, 0, 1.5], dtype=torch.float64)
    weak = 20 * F.one_hot(label, 3).double()
    losses = F.cross_entropy(strong, label, reduction="none")
    expected = (losses[label == 0].mean() + losses[label == 2].mean()) / 2
    result = confident_cross_entropy(weak, strong, threshold=0.5, balance=True)
    torch.testing.assert_close(result.loss, expected)


@pytest.mark.parametrize("balance", [True, False])
def test_nobody_confident_gives_loss_zero_and_gradient_zero(balance: bool) -> None:
    strong = logits(5, 4, seed=0).requires_grad_()
    weak = torch.zeros(5, 4, dtype=torch.float64)
    result = confident_cross_entropy(weak, strong, threshold=0.99, balance=balance)
    result.loss.backward()
    assert result.loss.item() == 0
    assert result.counts.tolist() == [0, 0, 0, 0]
    assert strong.grad is not None and not strong.grad.any()


def test_the_threshold_is_strict() -> None:
    weak = torch.tensor([[0.0, 0.0]])
    assert confident_cross_entropy(weak, weak, threshold=0.5, balance=False).counts.sum() == 0


def test_no_gradient_reaches_the_weak_view() -> None:
    weak = TOY_WEAK.clone().requires_grad_()
    strong = TOY_STRONG.clone().requires_grad_()
    confident_cross_entropy(weak, strong, threshold=0.9, balance=True).loss.backward()
    assert weak.grad is None and strong.grad is not None


def test_confident_loss_over_ranks_is_the_loss_of_their_common_batch() -> None:
    weak, strong = logits(12, 3, seed=2), logits(12, 3, seed=3)
    whole = confident_cross_entropy(weak, strong, threshold=0.7, balance=True)
    halves = [slice(0, 6), slice(6, 12)]
    queues: list[list[Tensor]] = [[], []]
    for i, half in enumerate(halves):  # each all_sum of a rank first sees its own part alone

        def remember(x: Tensor, i: int = i) -> Tensor:
            queues[i].append(x)
            # The counts must already be global when the weights are made of them.
            return whole.counts if len(queues[i]) == 1 else x

        part = weak[half], strong[half]
        confident_cross_entropy(*part, threshold=0.7, balance=True, all_sum=remember)
    torch.testing.assert_close(queues[0][0] + queues[1][0], whole.counts)
    summed = queues[0][1] + queues[1][1]
    present = (whole.counts > 0).sum()
    torch.testing.assert_close(summed / (whole.counts.sum() * present), whole.loss)
