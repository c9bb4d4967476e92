"""ops/rng.py against scalar Python, scipy's tests of fit, and brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from selfsup_ray.ops.rng import normals, permuted, uniforms

MASK = (1 << 64) - 1


def splitmix64(state: int) -> tuple[int, int]:
    """Reference SplitMix64 step on Python integers: (new state, output)."""
    state = (state + 0x9E3779B97F4A7C15) & MASK
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return state, z ^ (z >> 31)


def scalar_uniforms(seed: int, epoch: int, id_: int, draws: int, stream: int) -> list[float]:
    """The documented construction, one number at a time in Python integers."""
    key = 0
    for part in (1, seed, epoch, stream):
        _, key = splitmix64((key + part) & MASK)
    _, state = splitmix64((id_ * 0x9E3779B97F4A7C15 + key - 0x9E3779B97F4A7C15) & MASK)
    values = []
    for _ in range(draws):
        state, output = splitmix64(state)
        values.append((output >> 40) / 2**24)
    return values


def test_splitmix64_reference_gives_the_published_sequence():
    state, outputs = 1234567, []
    for _ in range(3):
        state, output = splitmix64(state)
        outputs.append(output)
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_uniforms_equal_scalar_splitmix64():
    ids = torch.tensor([0, 1, 7, 2**31, 2**40 + 3])
    got = uniforms(seed=-5, epoch=3, ids=ids, draws=4, stream=2)
    expected = [scalar_uniforms(-5 & MASK, 3, int(i), 4, 2) for i in ids]
    np.testing.assert_array_equal(got.numpy(), np.array(expected, dtype=np.float32))


def test_uniforms_do_not_depend_on_batch_split_order_or_number_of_draws():
    ids = torch.arange(50)
    whole = uniforms(seed=1, epoch=2, ids=ids, draws=6)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniforms(seed=1, epoch=2, ids=ids[order], draws=6), whole[order])
    assert torch.equal(uniforms(seed=1, epoch=2, ids=ids[17:18], draws=3), whole[17:18, :3])
    assert torch.equal(
        normals(seed=1, epoch=2, ids=ids[17:18], draws=3),
        normals(seed=1, epoch=2, ids=ids, draws=6)[17:18, :3],
    )


def test_every_argument_changes_almost_every_number():
    ids = torch.arange(1000)
    base = uniforms(seed=1, epoch=2, ids=ids, draws=5, stream=3)
    others = [
        uniforms(seed=2, epoch=2, ids=ids, draws=5, stream=3),
        uniforms(seed=1, epoch=3, ids=ids, draws=5, stream=3),
        uniforms(seed=1, epoch=2, ids=ids + 1000, draws=5, stream=3),
        uniforms(seed=1, epoch=2, ids=ids, draws=5, stream=4),
        uniforms(seed=2, epoch=1, ids=ids, draws=5, stream=3),
    ]
    for other in others:
        assert (other == base).float().mean() < 1e-3
        assert abs(np.corrcoef(base.flatten(), other.flatten())[0, 1]) < 0.05


def test_uniforms_pass_kolmogorov_smirnov_in_rows_columns_and_over_epochs():
    ids = torch.arange(4000)
    table = uniforms(seed=0, epoch=0, ids=ids, draws=25).double().numpy()
    over_epochs = torch.cat(
        [uniforms(seed=0, epoch=e, ids=torch.tensor([12]), draws=5) for e in range(2000)]
    )
    assert 0 <= table.min() and table.max() < 1
    columns = [stats.kstest(table[:, j], "uniform").pvalue for j in range(25)]
    assert stats.kstest(columns, "uniform").pvalue > 1e-3
    assert stats.kstest(table.ravel(), "uniform").pvalue > 1e-3
    assert stats.kstest(over_epochs.double().ravel().numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("pair", ["draws", "ids", "streams", "epochs"])
def test_neighbouring_uniforms_are_independent_by_chi_square(pair):
    ids = torch.arange(60_000)
    first = uniforms(seed=0, epoch=0, ids=ids, draws=2)
    second = {
        "draws": lambda: first[:, 1],
        "ids": lambda: uniforms(seed=0, epoch=0, ids=ids + 1, draws=1)[:, 0],
        "streams": lambda: uniforms(seed=0, epoch=0, ids=ids, draws=1, stream=1)[:, 0],
        "epochs": lambda: uniforms(seed=0, epoch=1, ids=ids, draws=1)[:, 0],
    }[pair]()
    counts, _, _ = np.histogram2d(first[:, 0], second, bins=16, range=[[0, 1], [0, 1]])
    assert stats.chisquare(counts.ravel()).pvalue > 1e-3


def test_every_bit_of_a_uniform_is_fair():
    bits = (uniforms(seed=3, epoch=0, ids=torch.arange(4096), draws=8) * 2**24).long()
    ones = torch.stack([(bits >> i & 1).sum() for i in range(24)])
    z = (ones - bits.numel() / 2) / (bits.numel() / 4) ** 0.5
    assert z.abs().max() < 4.5


def test_normals_pass_kolmogorov_smirnov_and_share_nothing_with_uniforms():
    ids = torch.arange(5000)
    z = normals(seed=0, epoch=0, ids=ids, draws=5)
    assert z.shape == (5000, 5) and z.dtype == torch.float32 and z.isfinite().all()
    assert stats.kstest(z.double().ravel().numpy(), "norm").pvalue > 1e-3
    correlation = np.corrcoef(z.T.numpy()) - np.eye(5)
    assert np.abs(correlation).max() < 0.06
    u = uniforms(seed=0, epoch=0, ids=ids, draws=5)
    assert np.abs(np.corrcoef(z.T.numpy(), u.T.numpy())[:5, 5:]).max() < 0.06


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 100, 997, 65_537])
def test_permuted_is_a_permutation(n):
    for epoch in range(3):
        values = permuted(np.arange(n), n=n, seed=4, epoch=epoch)
        assert values.dtype == np.int64
        np.testing.assert_array_equal(np.unique(values), np.arange(n))


def test_permuted_at_some_positions_equals_the_whole_permutation_there():
    whole = permuted(np.arange(1000), n=1000, seed=0, epoch=7)
    positions = torch.tensor([[999, 0], [5, 123]])
    np.testing.assert_array_equal(
        permuted(positions, n=1000, seed=0, epoch=7), whole[positions.numpy()]
    )
    assert len(permuted(np.arange(0), n=1000, seed=0, epoch=7)) == 0


def test_permuted_handles_a_hundred_billion_ids_without_holding_them():
    n = 10**11 + 7
    positions = np.arange(n - 50_000, n)
    values = permuted(positions, n=n, seed=0, epoch=0)
    assert len(np.unique(values)) == 50_000 and 0 <= values.min() and values.max() < n
    assert stats.kstest(values / n, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("n", [2, 3, 4])
def test_all_orders_of_a_few_items_are_equally_likely(n):
    orders = list(itertools.permutations(range(n)))
    counts = dict.fromkeys(orders, 0)
    for seed in range(60):
        for epoch in range(40):
            counts[tuple(permuted(np.arange(n), n=n, seed=seed, epoch=epoch).tolist())] += 1
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


@pytest.mark.parametrize("n", [13, 64])
def test_every_position_is_equally_likely_to_hold_every_id(n):
    counts = np.zeros((n, n))
    for epoch in range(2000):
        counts[np.arange(n), permuted(np.arange(n), n=n, seed=1, epoch=epoch)] += 1
    # Rows and columns sum to the number of epochs, so (n - 1)^2 cells are free.
    statistic = ((counts - 2000 / n) ** 2 / (2000 / n)).sum()
    assert stats.chi2.sf(statistic, (n - 1) ** 2) > 1e-3


def test_neighbouring_positions_and_epochs_are_uncorrelated():
    n = 20_000
    first, second = (permuted(np.arange(n), n=n, seed=0, epoch=e) for e in (0, 1))
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03
    gaps = np.diff(first) % n
    assert stats.kstest(gaps / n, "uniform").pvalue > 1e-3
    assert (first == second).sum() < 10


def test_permuted_refuses_positions_outside_the_range():
    with pytest.raises(AssertionError, match=r"positions must be in \[0, 10\)"):
        permuted(np.array([3, 10]), n=10, seed=0, epoch=0)
