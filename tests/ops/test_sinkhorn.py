"""Sinkhorn-Knopp against the published loop in float64, POT, and itself on several workers."""

import threading

import numpy as np
import ot
import pytest
import torch

from selfsup_ray.ops.sinkhorn import Balanced, balanced_labels, sinkhorn_knopp

PRECISIONS = ("bfloat16", "float32", "float64")


def published(logits, lam, tolerance):
    """Return iterations and labels of the loop as the paper's code has it, in float64."""
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    a = np.exp(lam * log_p).T
    k, n = a.shape
    c, t = np.full(n, 1 / n), 0
    while True:
        r = (1 / k) / (a @ c)
        after = (1 / n) / (a.T @ r)
        if t % 10 == 0 and np.abs(c / after - 1).sum() <= tolerance:
            return t + 1, (a * r[:, None]).argmax(axis=0)
        c, t = after, t + 1


def waves(scale):
    i, j = np.arange(1, 1001)[:, None], np.arange(1, 11)[None]
    return scale * np.sin(0.37 * i * j)


def labels_of(blocks, result, lam):
    return np.concatenate([balanced_labels(b, result.log_r, lam=lam)[0] for b in blocks])


def random_logits(n, k, scale=1.0, seed=0):
    return (scale * np.random.default_rng(seed).normal(size=(n, k))).astype(np.float32)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize(
    ("scale", "lam", "tolerance", "iterations", "counts", "checksum"),
    [
        (1, 25, 0.1, 31, [98, 104, 99, 99, 101, 97, 107, 105, 87, 103], 2207376),
        (1, 10, 0.01, 21, [101, 102, 102, 104, 100, 92, 101, 109, 91, 98], 2185977),
        (3, 25, 0.1, 71, [98, 102, 99, 99, 99, 100, 103, 103, 94, 103], 2217013),
    ],
)
def test_the_reference_case_comes_out_to_the_count(
    precision, blocks, scale, lam, tolerance, iterations, counts, checksum
):
    logits = waves(scale)
    pieces = np.array_split(logits.astype(np.float32), blocks)
    result = sinkhorn_knopp(pieces, lam=lam, tolerance=tolerance / 1000, precision=precision)
    labels = labels_of(pieces, result, lam)
    assert (result.iterations, result.converged) == (iterations, True)
    assert np.bincount(labels, minlength=10).tolist() == counts
    assert int((np.arange(1000) * labels).sum()) == checksum
    steps, expected = published(logits, lam, tolerance)
    assert steps == iterations
    assert (labels == expected).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_labels_agree_with_pot_on_random_problems(precision):
    lam = 5.0
    logits = random_logits(600, 12)
    log_p = logits - torch.from_numpy(logits).logsumexp(dim=1, keepdim=True).numpy()
    plan = ot.sinkhorn(
        np.full(600, 1 / 600), np.full(12, 1 / 12), -log_p.astype(np.float64), 1 / lam,
        method="sinkhorn_log", stopThr=1e-12,
    )  # fmt: skip
    result = sinkhorn_knopp([logits], lam=lam, precision=precision, tolerance=1e-6)
    labels = labels_of([logits], result, lam)
    assert (labels == plan.argmax(axis=1)).mean() >= 0.998
    assert np.abs(np.bincount(labels, minlength=12) - 50).max() <= 12


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_near_uniform_scores_of_3000_clusters_do_not_underflow(precision):
    logits = random_logits(9000, 3000, scale=0.01)
    result = sinkhorn_knopp([logits], lam=25, precision=precision)
    labels = labels_of([logits], result, 25)
    counts = np.bincount(labels, minlength=3000)
    assert result.converged and np.isfinite(result.log_r).all()
    assert counts.max() <= 4 * counts.mean()
    assert (labels == published(logits.astype(np.float64), 25, 0.1)[1]).mean() >= 0.999


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_confident_scores_that_underflow_64_bits_are_balanced(precision):
    """A cluster that is e^-2000 away from every image still gets its share."""
    logits = random_logits(3000, 20, scale=3.0)
    logits[:, 7] -= 80
    result = sinkhorn_knopp([logits], lam=25, precision=precision, max_iterations=3000)
    counts = np.bincount(labels_of([logits], result, 25), minlength=20)
    assert result.converged
    assert counts.min() >= 130 and counts.max() <= 170


def test_a_constant_of_the_image_changes_nothing():
    logits = random_logits(500, 8)
    moved = logits + np.random.default_rng(1).normal(size=(500, 1)).astype(np.float32)
    first, second = (sinkhorn_knopp([x], lam=10) for x in (logits, moved))
    assert first.iterations == second.iterations
    assert (labels_of([logits], first, 10) == labels_of([moved], second, 10)).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_marginals_give_the_clusters_their_shares(precision):
    logits, shares = random_logits(20_000, 5), np.array([0.5, 0.2, 0.15, 0.1, 0.05])
    result = sinkhorn_knopp([logits], lam=20, marginals=shares, precision=precision)
    counts = np.bincount(labels_of([logits], result, 20), minlength=5)
    assert np.abs(counts / 20_000 - shares).max() <= 0.01


def test_a_warm_start_reaches_the_same_labels_sooner():
    logits = random_logits(5000, 30, scale=2.0)
    cold = sinkhorn_knopp([logits], lam=20, tolerance=1e-6)
    near = (logits + 0.01 * random_logits(5000, 30, seed=1)).astype(np.float32)
    again = sinkhorn_knopp([near], lam=20, tolerance=1e-6)
    warm = sinkhorn_knopp([near], lam=20, tolerance=1e-6, start=cold.log_r)
    assert warm.iterations < again.iterations
    assert (labels_of([near], warm, 20) == labels_of([near], again, 20)).mean() >= 0.999


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_a_matrix_in_files_gives_the_same_bits(tmp_path, precision):
    blocks = np.array_split(random_logits(7001, 40), 3)
    inside = sinkhorn_knopp(blocks, lam=15, precision=precision)
    outside = sinkhorn_knopp(blocks, lam=15, precision=precision, folder=tmp_path, threads=2)
    # Pieces of a file flush their sums at other rows, so float32 sums may round differently.
    assert inside.iterations == outside.iterations
    np.testing.assert_allclose(inside.log_r, outside.log_r, atol=1e-5)
    again = sinkhorn_knopp(blocks, lam=15, precision=precision, folder=tmp_path)
    assert (again.log_r == outside.log_r).all()


def on_workers(count, blocks, **how) -> list[Balanced]:
    """Run as many workers, each with its share of the blocks, in threads that add up together."""
    barrier, parts, results = threading.Barrier(count), [None] * count, [None] * count

    def work(rank):
        def all_sum(x):
            parts[rank] = x
            barrier.wait()
            total = torch.stack(parts).sum(dim=0)
            barrier.wait()
            return total

        own = np.array_split(np.arange(len(blocks)), count)[rank]
        results[rank] = sinkhorn_knopp([blocks[i] for i in own], all_sum=all_sum, **how)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_two_and_four_workers_find_the_same_scaling(precision):
    blocks = np.array_split(random_logits(4000, 25, scale=2.0), 8)
    [alone] = on_workers(1, blocks, lam=20, precision=precision)
    for count in (2, 4):
        for result in on_workers(count, blocks, lam=20, precision=precision):
            assert result.iterations == alone.iterations
            assert (result.log_r == alone.log_r).all()


def test_an_iteration_bound_is_kept_and_said():
    result = sinkhorn_knopp([waves(3).astype(np.float32)], lam=25, tolerance=0, max_iterations=7)
    assert (result.iterations, result.converged) == (7, False)


def test_equal_scores_go_to_the_lower_label_and_the_cost_is_minus_log_p():
    logits = np.array([[0, 1, 1], [2, 0, 0]], np.float32)
    labels, cost = balanced_labels(logits, np.zeros(3), lam=25)
    assert labels.tolist() == [1, 0]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert cost == pytest.approx(-np.log(p[0, 1]) - np.log(p[1, 0]), rel=1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_named(precision, bad):
    blocks = np.array_split(random_logits(100, 6), 2)
    blocks[1][3, 2] = bad
    with pytest.raises(ValueError, match="row 3 of block 1 of the scores is not finite"):
        sinkhorn_knopp(blocks, lam=10, precision=precision)


@pytest.mark.parametrize("marginals", [[1, 0, 1], [1, np.nan, 1], [1, 1]])
def test_marginals_must_be_positive_and_as_many_as_clusters(marginals):
    with pytest.raises(ValueError, match="marginals must be 3 positive numbers"):
        sinkhorn_knopp([random_logits(10, 3)], lam=10, marginals=np.array(marginals))
