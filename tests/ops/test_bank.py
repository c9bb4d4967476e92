"""ops/bank.py and the losses of instance discrimination against loops and published numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from selfsup_ray.ops import bank
from selfsup_ray.ops.bank import last_of_each, log_sum_exp, moved, similarities
from selfsup_ray.ops.losses import instance_softmax, nce

IDS = torch.tensor([3, 0, 7, 9])
NEGATIVES = torch.tensor([1, 2, 4, 5])


def fixture_rows() -> tuple[Tensor, Tensor]:
    """The rows of the published fixtures: v (4, 8) and a bank of 10 unit rows."""
    random = np.random.RandomState(0)
    shapes = [(4, 8), (4, 8), (8, 16), (10, 8)]
    a, _, _, memory = (torch.from_numpy(random.randn(*shape)) for shape in shapes)
    return F.normalize(a, dim=1), F.normalize(memory, dim=1)


def random_rows(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def softmax_loss(v: Tensor, rows: Tensor, ids: Tensor, temperature: float) -> Tensor:
    own = (v * rows[ids]).sum(dim=1) / temperature
    return instance_softmax(own, log_sum_exp(v, rows, temperature=temperature))


@pytest.mark.parametrize(
    ("temperature", "expected"), [(0.07, 7.323711), (0.1, 5.340486), (0.3, 2.782582)]
)
def test_the_full_softmax_has_the_published_value(temperature: float, expected: float) -> None:
    v, rows = fixture_rows()
    assert softmax_loss(v, rows, IDS, temperature).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("piece", [1, 24, 1 << 24])
def test_the_full_softmax_and_its_gradient_are_torchs_cross_entropy(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bank, "PIECE", piece)
    v, rows = random_rows(5, 3), random_rows(11, 3, seed=1)
    ids = torch.tensor([2, 10, 0, 4, 4])
    ours, theirs = v.clone().requires_grad_(), v.clone().requires_grad_()
    loss = softmax_loss(ours, rows, ids, 0.2)
    expected = F.cross_entropy(theirs @ rows.T / 0.2, ids)
    torch.testing.assert_close(loss, expected)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_large_similarities_do_not_overflow() -> None:
    v, rows = torch.eye(2), torch.eye(2)
    value = log_sum_exp(v, rows, temperature=0.005)
    torch.testing.assert_close(value, torch.full((2,), 200.0))


@pytest.mark.parametrize("piece", [1, 24, 1 << 24])
def test_chosen_similarities_are_those_of_a_loop_and_0_without_a_row(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bank, "PIECE", piece)
    rows, columns = random_rows(6, 3, seed=1), torch.tensor([[0, 5], [-1, 2], [3, 3], [4, -1]])
    ours, theirs = (random_rows(4, 3).requires_grad_() for _ in range(2))
    found = similarities(ours, rows, columns)
    loop = [
        torch.stack([theirs[i] @ rows[j] if j >= 0 else theirs[i].sum() * 0 for j in line])
        for i, line in enumerate(columns)
    ]
    expected = torch.stack(loop)
    torch.testing.assert_close(found, expected)
    weights = random_rows(4, 2, seed=2)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def nce_by_loops(logits: Tensor, z: float, num_images: int) -> float:
    """Equation 7 of Wu et al. with the published code's 1e-7, number by number."""
    noise = (logits.shape[1] - 1) / num_images
    total = 0.0
    for line in logits.tolist():
        p = [math.exp(value) / z for value in line]
        total += math.log(p[0] / (p[0] + noise + 1e-7))
        total += sum(math.log(noise / (one + noise + 1e-7)) for one in p[1:])
    return -total / len(logits)


def fixture_logits() -> Tensor:
    v, rows = fixture_rows()
    columns = torch.cat([IDS[:, None], NEGATIVES.expand(4, -1)], dim=1)
    return similarities(v, rows, columns) / 0.1


def test_nce_has_the_published_partition_and_value() -> None:
    logits = fixture_logits()
    partition = 10 * logits.exp().mean()
    assert partition.item() == pytest.approx(254.461, abs=1e-3)
    loss = nce(logits, log_partition=partition.log(), num_images=10)
    assert loss.item() == pytest.approx(6.242682, abs=2e-6)


def test_nce_is_the_papers_equation_in_slow_loops() -> None:
    logits = 3 * random_rows(5, 8)
    loss = nce(logits, log_partition=torch.tensor(900.0).log(), num_images=50)
    assert loss.item() == pytest.approx(nce_by_loops(logits, 900.0, 50), rel=1e-5)


def test_a_moved_row_has_the_published_values() -> None:
    v, rows = fixture_rows()
    expected = [0.317180, 0.174911, 0.785865, 0.397370, 0.083658, -0.271258, 0.048668, 0.101825]
    found = moved(rows[3:4], v[:1], momentum=0.5)[0]
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6
    )


def test_the_last_place_of_an_id_is_the_one_that_counts() -> None:
    assert last_of_each(torch.tensor([5, 2, 5, 9, 2])).tolist() == [2, 4, 2, 3, 4]
