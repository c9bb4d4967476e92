"""Diffusion by torch alone: the same as the kernels, on a graph made with and without numba."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from selfsup_ray.artifacts import ShardedArray
from selfsup_ray.ops import adjacency
from selfsup_ray.ops.adjacency import (
    Adjacency,
    Links,
    build_adjacency,
    traversal_order,
    write_adjacency,
)
from selfsup_ray.ops.cpu_spreading import CpuSpread
from selfsup_ray.ops.spreading import Variant
from selfsup_ray.ops.torch_spreading import TorchSpread

N, C = 900, 37
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]


def lists(n: int = N, k: int = 7, seed: int = 0) -> np.ndarray:
    """Random lists that nearly all hold node 3, with repeated, own and missing ids."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, n, (n, k)).astype(np.int32)
    ids[:-9, 2] = 3
    ids[::7, 1] = ids[::7, 4]
    ids[::5, 3] = np.arange(n)[::5]
    ids[rng.random((n, k)) < 0.1] = -1
    return ids


def seeds() -> np.ndarray:
    made = np.full(N, -1)
    made[np.random.default_rng(1).permutation(N)[:80]] = np.arange(80) % (C - 1)
    return made


def rows_of(graph: Adjacency) -> list[tuple[list[int], list[int]]]:
    """Neighbors of each place that weigh 2, and those that weigh 1."""
    out = []
    for p in range(len(graph)):
        row = graph.ids[graph.indptr[p] : graph.indptr[p + 1]].tolist()
        out.append((row[: graph.twice[p]], row[graph.twice[p] :]))
    return out


@pytest.mark.parametrize("reciprocal", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
def test_torch_and_numba_make_the_rows_of_slow_loops(
    monkeypatch: pytest.MonkeyPatch, ordered: bool, reciprocal: bool
):
    ids, order = lists(), np.random.default_rng(2).permutation(N) if ordered else None
    place = np.argsort(order) if ordered else np.arange(N)
    near = [{int(j) for j in row if j >= 0} | {i} for i, row in enumerate(ids)]
    wanted: list[tuple[list[int], list[int]]] = [([], [])] * N
    for i in range(N):
        both = [j for j in range(N) if j in near[i] and i in near[j]]
        one = [j for j in range(N) if (j in near[i]) != (i in near[j])]
        rows = sorted(int(place[j]) for j in both), sorted(int(place[j]) for j in one)
        wanted[int(place[i])] = rows if not reciprocal else (rows[0], [])
    made = build_adjacency(Links(ids), order=order, reciprocal=reciprocal, threads=2)
    assert rows_of(made) == wanted
    monkeypatch.setattr(adjacency, "has_numba", lambda: False)
    monkeypatch.setattr(adjacency, "_SORTED_BYTES", 160 * 7 * 400)  # in three parts
    assert rows_of(build_adjacency(Links(ids), order=order, reciprocal=reciprocal)) == wanted


def test_rows_written_in_parts_from_files_are_those_made_in_memory(tmp_path: Path):
    ids, order = lists(), np.random.default_rng(2).permutation(N)
    similarity = np.random.default_rng(3).random(ids.shape).astype(np.float32)
    stored = []
    for name, values in (("ids", ids), ("similarity", similarity)):
        array = ShardedArray.create(
            tmp_path / name, shard_rows=[500, 0, 400], row_shape=(7,), dtype=values.dtype.name
        )
        for i, part in enumerate(np.split(values, [500, 500])):
            array.write_shard(i, part)
        stored.append(array)
    made = build_adjacency(Links(np.where(similarity < 0.3, -1, ids)), order=order)
    links = Links(*stored, least=0.3)
    how: dict[str, Any] = {"order": order, "threads": 2, "memory_bytes": 200 * (24 * 7 + 32)}
    for _ in range(2):  # the second call finds the files
        found = write_adjacency(tmp_path / "adjacency", links, **how)
        for name in ("indptr", "ids", "twice", "order"):
            np.testing.assert_array_equal(getattr(found, name), getattr(made, name))


@pytest.mark.parametrize("k", [0, 7])
def test_the_order_of_a_traversal_holds_every_image_once_and_neighbors_close(k: int):
    rng = np.random.default_rng(0)
    number = rng.permutation(20_000).astype(np.int32)
    ids = np.empty((20_000, k), np.int32)
    near = (np.arange(20_000)[:, None] + rng.integers(-9, 10, (20_000, k))) % 20_000
    ids[number] = number[near]
    ids[rng.random(ids.shape) < 0.1] = -1
    order = traversal_order(ids, least=1)
    assert order is not None
    np.testing.assert_array_equal(np.sort(order), np.arange(20_000))
    if k:
        place = np.argsort(order)
        gaps = np.abs(place[ids] - place[:, None])[ids >= 0]
        assert np.median(gaps) < 100 < np.median(np.abs(ids - np.arange(20_000)[:, None]))
    assert traversal_order(ids) is None


def test_torch_and_numpy_are_all_that_diffusion_needs():
    code = (
        "import sys\n"
        "absent = ['numba', 'llvmlite', 'scipy', 'sklearn', 'ray', 'faiss', 'yaml', 'pydantic']\n"
        "sys.modules.update(dict.fromkeys(absent))\n"
        "from selfsup_ray.ops import diffusion\n"
        "import numpy as np\n"
        "ids = np.array([[1], [2], [0], [0]], np.int32)\n"
        "seeds, tests = np.array([0, 1, -1, -1]), np.arange(4)[:, None]\n"
        "steps = list(diffusion.diffuse_scores(ids, seeds, tests, num_classes=2, niter=2))\n"
        "print(np.round(steps[2], 6).tolist())\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    rows = [[0.259832, 0.239791], [0.228679, 0.377932], [0.228679, 0.312772], [0.28281, 0.069505]]
    np.testing.assert_allclose(json.loads(found.stdout), rows, atol=2e-6)


@pytest.mark.parametrize(
    "variant",
    [Variant(), Variant(reset_seeds=True), Variant(sinkhorn=2), Variant(normalize_columns=False)],
    ids=str,
)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 0.02)])
@pytest.mark.parametrize("device", DEVICES)
def test_torch_takes_the_same_steps_as_the_kernels(
    variant: Variant, dtype: Any, tolerance: float, device: str
):
    graph, near = build_adjacency(Links(lists())), lists(60, seed=3)
    how: dict[str, Any] = {"dtype": dtype, "variant": variant}
    fast = CpuSpread(graph, seeds(), 2, C, threads=1, **how)
    slow = TorchSpread(graph, seeds(), 2, C, device=device, **how)
    for _ in range(4):
        wanted = fast.sums(near)
        np.testing.assert_allclose(slow.sums(near), wanted, atol=tolerance * wanted.max())
        np.testing.assert_allclose(slow.mass, fast.mass, rtol=tolerance)
        fast.step()
        slow.step()


def test_torch_and_the_kernels_name_the_same_best_classes_with_ties_to_the_lower():
    graph = build_adjacency(Links(lists()))
    fast = CpuSpread(graph, seeds(), 0, C, threads=2, dtype="float32", variant=Variant())
    slow = TorchSpread(graph, seeds(), 0, C, dtype="float32", device="cpu", variant=Variant())
    for state in (fast, slow):
        classes, values = state.top(np.arange(N), 5)
        rows = state.sums(np.arange(N)[:, None])
        order = np.argsort(-rows, axis=1, kind="stable")[:, :5]
        np.testing.assert_array_equal(classes, order)
        np.testing.assert_array_equal(values, np.take_along_axis(rows, order, axis=1))


def test_pieces_of_a_gather_change_rounding_at_most(monkeypatch: pytest.MonkeyPatch):
    from selfsup_ray.ops import torch_spreading

    graph, found = build_adjacency(Links(lists())), []
    for size in (2**28, 2**14):
        monkeypatch.setattr(torch_spreading, "GATHERED_BYTES", size)
        state = TorchSpread(graph, seeds(), 0, C, dtype="float32", device="cpu", variant=Variant())
        state.step()
        found.append(state.sums(lists()))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)
