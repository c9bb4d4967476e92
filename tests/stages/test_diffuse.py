"""The diffuse stage: scores of the formula, however the work is cut and whenever it is stopped."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selfsup_ray.artifacts import ShardedArray, begin, finish
from selfsup_ray.cluster.shards import map_shards
from selfsup_ray.config import Resources, build, override, to_dict
from selfsup_ray.errors import ConfigError, ResourceError
from selfsup_ray.ops.diffusion import knn_to_adjacency
from selfsup_ray.stages.diffuse import DiffuseConfig, Diffusion, _job, choose_seeds, diffuse
from selfsup_ray.stages.diffuse_blocks import _Block, class_blocks
from selfsup_ray.stages.diffuse_rows import row_ranges
from selfsup_ray.stages.graph import Graph, GraphConfig

HERE = Resources(workers=0)
N, K, C = 500, 8, 37


def made_lists(n: int = N, k: int = K, seed: int = 0) -> np.ndarray:
    """Neighbors close on a circle, but for a hub that most list, and some missing."""
    rng = np.random.default_rng(seed)
    ids = (np.arange(n)[:, None] + rng.permuted(np.tile(np.r_[1:k, -3], (n, 1)), axis=1)) % n
    ids[1 : n - n // 4, -1] = 0
    ids[rng.random((n, k)) < 0.05] = -1
    return ids.astype(np.int32)


def made_graph(folder: Path, ids: np.ndarray, *, order: np.ndarray | None = None) -> Graph:
    """A finished graph stage that holds these lists, in three shards."""
    config, inputs = GraphConfig(k=ids.shape[1]), {"features": str(ids.tobytes())}
    begin(folder, stage="graph", config=config, inputs=inputs)
    cuts = [0, len(ids) // 3, len(ids) // 2, len(ids)]
    rows = np.diff(cuts).tolist()
    similarity = np.linspace(1, 0, ids.size, dtype=np.float32).reshape(ids.shape)
    arrays: dict[str, np.ndarray] = {"ids": ids, "similarity": similarity}
    if order is not None:
        arrays["order"] = order.astype(np.int64)
    for name, values in arrays.items():
        array = ShardedArray.create(
            folder / name, shard_rows=rows, row_shape=values.shape[1:], dtype=values.dtype.name
        )
        for i, part in enumerate(np.split(values, cuts[1:-1])):
            array.write_shard(i, part)
    finish(folder, stage="graph", config=config, inputs=inputs, seconds=0, facts={"recall": 1.0})
    return Graph.open(folder)


def made_labels(n: int = N, seed: int = 0) -> np.ndarray:
    """A class for every node; class 5 is empty, and one node in ten is unknown."""
    labels = np.arange(n) * C // n
    labels[labels == 5] = 4
    labels[np.random.default_rng(seed).random(n) < 0.1] = -1
    return labels


def reference(ids: np.ndarray, seeds: np.ndarray, niter: int) -> list[np.ndarray]:
    """L_0 … L_niter in float64, by scipy."""
    b = knn_to_adjacency(ids).astype(np.float64)
    w = b / np.asarray(b.sum(axis=1))[:, None]
    label = np.zeros((len(ids), C))
    label[seeds >= 0, seeds[seeds >= 0]] = 1
    steps = []
    for t in range(niter + 1):
        label = w @ label if t else label
        sums = label.sum(axis=0)
        label = label / np.where(sums > 0, sums, 1)
        steps.append(label)
    return steps


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return made_graph(tmp_path_factory.mktemp("graph"), made_lists())


CONFIG = DiffuseConfig(
    niter=4, labels_per_class=3, top=4, full_scores=True, sample=200, resources=HERE
)
CHANGES: dict[str, dict[str, Any]] = {
    "three blocks": {"memory_gb": N * (2 * 16 * 4 + 2) * 1.01 / 1e9},
    "two threads": {"resources.cpus": 2},
    "rows": {"mode": "rows", "memory_gb": 200 * 6 * 48 * 4 / 1e9},
}


def outputs(made: Diffusion) -> dict[str, np.ndarray]:
    arrays = {name: getattr(made, name) for name in ("predictions", "classes", "scores")}
    return {name: np.asarray(array) for name, array in (arrays | {"all": made.all_scores}).items()}


@pytest.fixture(scope="module")
def plain(graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> Diffusion:
    return diffuse(graph, made_labels(), CONFIG, out=tmp_path_factory.mktemp("plain"))


def test_scores_and_accuracies_are_those_of_the_formula(graph: Graph, plain: Diffusion):
    labels = made_labels()
    seeds = choose_seeds(labels, 3, seed=0)
    steps = reference(made_lists(), seeds, 4)
    found = outputs(plain)
    top = steps[4].max(axis=0)
    assert (np.abs(found["all"] - steps[4]) / np.where(top > 0, top, 1)).max() < 1e-6
    watched = (labels >= 0) & (seeds < 0)
    for t, step in enumerate(plain.facts["steps"]):
        best = np.where(steps[t].max(axis=1) > 0, steps[t].argmax(axis=1), -1)
        assert step["accuracy"] == pytest.approx((best == labels)[watched].mean(), abs=0.005)
    np.testing.assert_array_equal(found["predictions"][seeds >= 0], seeds[seeds >= 0])
    order = np.argsort(-found["all"], axis=1, kind="stable")[:, :4]
    np.testing.assert_array_equal(found["classes"], order)
    np.testing.assert_array_equal(found["scores"], np.take_along_axis(found["all"], order, 1))


def test_entropy_coverage_and_mass_are_those_of_the_rows(graph: Graph, plain: Diffusion):
    config = override(CONFIG, {"sample": N})
    made = diffuse(graph, made_labels(), config, out=plain.path.parent / "whole")
    rows = reference(made_lists(), choose_seeds(made_labels(), 3, seed=0), 4)
    for step, label in zip(made.facts["steps"], rows, strict=True):
        total = label.sum(axis=1)
        shares = label[total > 0] / total[total > 0, None]
        entropy = -(shares * np.log(np.where(shares > 0, shares, 1))).sum(axis=1).mean()
        assert step["coverage"] == pytest.approx((total > 0).mean())
        assert step["entropy"] == pytest.approx(entropy, abs=1e-5)
    assert made.facts["steps"][0]["mass"] == pytest.approx(3, abs=0.2)


@pytest.mark.parametrize("name", CHANGES)
def test_however_the_work_is_cut_the_bits_are_the_same(
    graph: Graph, plain: Diffusion, tmp_path: Path, name: str
):
    made = diffuse(graph, made_labels(), override(CONFIG, CHANGES[name]), out=tmp_path / "out")
    for key, values in outputs(plain).items():
        np.testing.assert_array_equal(outputs(made)[key], values)
    assert made.facts["steps"] == plain.facts["steps"]


def test_rows_are_cut_into_several_ranges(graph: Graph, tmp_path: Path):
    job = _job(graph, made_labels(), override(CONFIG, CHANGES["rows"]), tmp_path)
    ranges = row_ranges(job.adjacency(), job)
    assert len(ranges) > 2
    assert [a for a, _ in ranges] == [0, *(b for _, b in ranges[:-1])] and ranges[-1][1] == N


@pytest.mark.parametrize("name", ["three blocks", "rows"])
def test_two_ray_workers_write_the_same_bytes(
    graph: Graph, plain: Diffusion, tmp_path: Path, name: str, ray_session: None
):
    config = override(CONFIG, {**CHANGES[name], "resources.workers": 2})
    made = diffuse(graph, made_labels(), config, out=tmp_path / "out")
    for key, values in outputs(plain).items():
        np.testing.assert_array_equal(outputs(made)[key], values)


@pytest.mark.parametrize("mode", ["classes", "rows"])
def test_the_order_of_places_changes_nothing_but_rounding(
    plain: Diffusion, tmp_path: Path, mode: str
):
    order = np.random.default_rng(1).permutation(N)
    ordered = made_graph(tmp_path / "graph", made_lists(), order=order)
    config = override(CONFIG, CHANGES["rows"] if mode == "rows" else {})
    made = diffuse(ordered, made_labels(), config, out=tmp_path / "out")
    whole = outputs(plain)["all"]
    assert np.abs(outputs(made)["all"] - whole).max() < 1e-6 * whole.max()
    assert (outputs(made)["predictions"] == outputs(plain)["predictions"]).mean() > 0.99


@dataclass(frozen=True)
class DyingBlock:
    """A block of classes whose worker is killed in the first try of block 1."""

    block: _Block
    mark: Path

    def __call__(self, i: int) -> None:
        if i == 1 and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        self.block(i)


def test_a_killed_ray_worker_changes_nothing(
    graph: Graph, plain: Diffusion, tmp_path: Path, ray_session: None
):
    import ray

    config = override(CONFIG, {**CHANGES["three blocks"], "resources.workers": 2})
    out, labels = tmp_path / "out", made_labels()
    digest = hashlib.sha256(labels.tobytes()).hexdigest()
    begin(
        out, stage="diffuse", config=config, inputs={"graph": graph.fingerprint, "labels": digest}
    )
    job = _job(graph, labels, config, out)
    blocks = class_blocks(job, len(job.adjacency()))
    assert len(blocks) == 3
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        dying = DyingBlock(_Block(job, blocks), tmp_path / "mark")
        done = [i for i, _ in map_shards(dying, range(3), config.resources)]
    finally:
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert sorted(done) == [0, 1, 2] and (tmp_path / "mark").exists()
    made = diffuse(graph, labels, config, out=out)
    for key, values in outputs(plain).items():
        np.testing.assert_array_equal(outputs(made)[key], values)


KILLED = """
import sys
from pathlib import Path
import numpy as np
from selfsup_ray.config import build
from selfsup_ray.stages import diffuse_blocks, diffuse_rows
from selfsup_ray.stages.diffuse import DiffuseConfig, diffuse
from selfsup_ray.stages.graph import Graph
import json, os, signal
folder, graph, mode, config = sys.argv[1:]
labels = np.load(folder + "/labels.npy")
saved, left = diffuse_rows.save if mode == "rows" else diffuse_blocks.save, [int(5)]
def save(path, values):
    saved(path, values)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
diffuse_rows.save = diffuse_blocks.save = save
diffuse(Graph.open(graph), labels, build(DiffuseConfig, json.loads(config)), out=folder + "/out")
"""


@pytest.mark.parametrize("name", ["three blocks", "rows"])
def test_a_killed_diffusion_continues_to_the_same_bytes(
    graph: Graph, plain: Diffusion, tmp_path: Path, name: str
):
    config = override(CONFIG, CHANGES[name])
    np.save(tmp_path / "labels.npy", made_labels())
    mode, text = config.mode, json.dumps(to_dict(config))
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(graph.path), mode, text]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    parts = list((tmp_path / "out" / "parts").rglob("*.np[yz]"))
    assert parts and not (tmp_path / "out" / "done.json").exists()
    stamps = {path: path.stat().st_mtime_ns for path in parts if path.name == "facts.npz"}
    made = diffuse(graph, made_labels(), config, out=tmp_path / "out")
    assert all(not path.exists() or path.stat().st_mtime_ns == s for path, s in stamps.items())
    for key, values in outputs(plain).items():
        np.testing.assert_array_equal(outputs(made)[key], values)
    assert made.facts["steps"] == plain.facts["steps"]


def test_bfloat16_labels_keep_the_predictions(graph: Graph, plain: Diffusion, tmp_path: Path):
    config = override(CONFIG, {"dtype": "bfloat16"})
    made = diffuse(graph, made_labels(), config, out=tmp_path / "blocks")
    rows = diffuse(
        graph,
        made_labels(),
        override(config, CHANGES["rows"]),
        out=tmp_path / "rows",
    )
    whole = outputs(plain)["all"]
    top = np.where(whole.max(axis=0) > 0, whole.max(axis=0), 1)
    assert (np.abs(outputs(made)["all"] - whole) / top).max() < 0.01
    np.testing.assert_array_equal(outputs(rows)["all"], outputs(made)["all"])
    assert (outputs(made)["predictions"] == outputs(plain)["predictions"]).mean() > 0.97


def test_seeds_are_so_many_of_each_class_by_seed_alone():
    labels = made_labels()
    seeds = choose_seeds(labels, 3, seed=0)
    counts = np.bincount(seeds[seeds >= 0], minlength=C)
    np.testing.assert_array_equal(counts, np.minimum(3, np.bincount(labels[labels >= 0])))
    assert ((seeds == labels) | (seeds == -1)).all()
    np.testing.assert_array_equal(choose_seeds(labels, 3, seed=0), seeds)
    assert (choose_seeds(labels, 3, seed=1) != seeds).any()
    np.testing.assert_array_equal(choose_seeds(labels, None, seed=0), labels)


def test_all_known_labels_are_seeds_and_then_there_is_no_accuracy(graph: Graph, tmp_path: Path):
    made = diffuse(graph, made_labels(), DiffuseConfig(resources=HERE), out=tmp_path / "out")
    assert made.accuracy is None
    assert made.facts["seeds"] == (made_labels() >= 0).sum()
    assert made.all_scores is None
    assert not (made.path / "parts").exists()


def test_one_image_keeps_its_label(tmp_path: Path):
    alone = made_graph(tmp_path / "graph", np.full((1, 2), -1, np.int32))
    made = diffuse(alone, [3], DiffuseConfig(resources=HERE), out=tmp_path / "out")
    assert np.asarray(made.predictions).tolist() == [3]


def test_no_label_at_all_is_an_error(graph: Graph, tmp_path: Path):
    with pytest.raises(ConfigError, match="no image has a label"):
        diffuse(graph, np.full(N, -1), out=tmp_path / "out")


def test_too_little_memory_names_the_other_mode(graph: Graph, tmp_path: Path):
    config = override(CONFIG, {"memory_gb": 1e-6})
    with pytest.raises(ResourceError, match=r"memory_gb is 1e-06. Raise it, or set .*mode=rows"):
        diffuse(graph, made_labels(), config, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "rows", "operator": {"reset_seeds": True}}, "`mode` is rows"),
        ({"dtype": "bfloat16", "operator": {"tau": 2.0}}, "`dtype` is bfloat16"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        build(DiffuseConfig, changes)
