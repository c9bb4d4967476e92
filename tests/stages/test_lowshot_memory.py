"""The low-shot stage in little memory: classes in ranges, mapped lists, searches from files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selfsup_ray.artifacts import Array, ShardedArray
from selfsup_ray.config import Resources, build, override
from selfsup_ray.costs_lowshot import lowshot_cost
from selfsup_ray.costs_training import Cost
from selfsup_ray.errors import ResourceError
from selfsup_ray.experiment import Experiment
from selfsup_ray.ops.completion import own_lists
from selfsup_ray.ops.diffusion import diffuse_scores
from selfsup_ray.ops.neighbors import exact_topk
from selfsup_ray.ops.spreading import class_ranges, spread_bytes
from selfsup_ray.stages import lowshot_pool
from selfsup_ray.stages.embed import Embeddings
from selfsup_ray.stages.lowshot import LowShot, low_shot
from selfsup_ray.stages.lowshot_config import LowShotConfig
from selfsup_ray.stages.lowshot_pool import write_block
from selfsup_ray.stages.lowshot_search import Nearest
from selfsup_ray.stages.lowshot_units import Run, Unit
from tests.stages.test_lowshot import deterministic_files, write_embeddings

C, PER_CLASS, DIM, STEPS = 80, 9, 12, 3
"""40 classes in each set-up: ranges of 16 or 32."""
SETTINGS: dict[str, Any] = {
    "classes": {"num_base": 40, "val_base": 20, "val_novel": 20},
    "shots": [2],
    "seeds": [1],
    "methods": ["diffusion", "diffusion_background"],
    "k": 6,
    "niter": STEPS,
}
LITTLE = {"memory_gb": 500 * (2 * 16 * 4 + 2) / 1e9}
"""Labels of 16 classes on at most 500 nodes: fewer than all on either pool."""


def mixture() -> tuple[Array, Array]:
    rng = np.random.default_rng(1)
    labels = rng.permutation(np.repeat(np.arange(C), PER_CLASS))
    rows = rng.normal(size=(C, DIM))[labels] + 0.7 * rng.normal(size=(len(labels), DIM))
    rows[-4:] = rows[:4]  # exact duplicates
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), labels


def settings(**changes: Any) -> LowShotConfig:
    return override(build(LowShotConfig, SETTINGS), changes)


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Embeddings:
    return write_embeddings(tmp_path_factory.mktemp("features") / "embed", mixture()[0])


@pytest.fixture(scope="module")
def at_once(features: Embeddings) -> LowShot:
    return low_shot(features, mixture()[1], settings(), out=features.path.parent / "at_once")


def run_of(made: LowShot, features: Embeddings, **changes: Any) -> Run:
    path = features.array.path
    return Run(made.path, path, path, settings(**changes), Unit("test", 2, 1))


@pytest.mark.parametrize("method", SETTINGS["methods"])
@pytest.mark.parametrize("options", [{}, {"min_similarity": 0.5, "reciprocal": True}])
def test_classes_in_ranges_on_mapped_lists_give_the_bits_of_all_at_once_in_memory(
    at_once: LowShot, features: Embeddings, method: str, options: dict[str, Any]
):
    changes = {f"diffusion.{key}": value for key, value in options.items()}
    run = run_of(at_once, features, **changes)
    pool = run.pool("base" if method == "diffusion" else "background")
    assert not np.isin(run.novel_ids, pool.images).any()
    nodes = np.concatenate([pool.images, run.novel_ids])
    seeds = np.concatenate([pool.classes, run.novel_classes])
    rows = mixture()[0]
    lists = own_lists(rows[nodes], k=5)
    wanted = diffuse_scores(
        lists.ids.astype(np.int32),
        seeds,
        exact_topk(run.test_rows, rows[nodes], k=6).ids,
        num_classes=40,
        niter=STEPS,
        similarity=lists.similarity,
        options=run.config.diffusion.options,
    )
    little = run_of(at_once, features, **changes, **LITTLE)
    steps = zip(wanted, run.diffused(method, STEPS), little.diffused(method, STEPS), strict=True)
    for scores, whole, in_ranges in steps:
        np.testing.assert_array_equal(whole, scores)
        np.testing.assert_array_equal(in_ranges, scores)
    assert not list((at_once.path / "scratch").glob("*"))


def test_the_table_does_not_depend_on_memory_and_nothing_is_left_behind(
    tmp_path: Path, at_once: LowShot, features: Embeddings
):
    made = low_shot(features, mixture()[1], settings(**LITTLE), out=tmp_path / "lowshot")
    assert deterministic_files(made.path) == deterministic_files(at_once.path)
    assert not (made.path / "scratch").exists()


def test_an_order_found_once_for_all_runs_changes_no_more_than_rounding(
    tmp_path: Path, at_once: LowShot, features: Embeddings, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(lowshot_pool, "ORDERED_ROWS", 50)
    made = low_shot(features, mixture()[1], settings(), out=tmp_path / "lowshot")
    run = run_of(made, features)
    pool = run.pool("background")
    assert pool.order is not None and run_of(at_once, features).pool("background").order is None
    np.testing.assert_array_equal(np.sort(pool.order), np.arange(len(pool)))
    method = "diffusion_background"
    pairs = zip(run.diffused(method, 3), run_of(at_once, features).diffused(method, 3), strict=True)
    for scores, wanted in pairs:
        np.testing.assert_allclose(scores, wanted, rtol=1e-5, atol=1e-9)


def test_shared_images_searched_by_cells_that_look_everywhere_give_the_same_table(
    tmp_path: Path, at_once: LowShot, features: Embeddings
):
    cells = {"name": "cells", "cell_size": 32, "probes": 1000}
    made = low_shot(features, mixture()[1], settings(search=cells), out=tmp_path / "lowshot")
    assert (made.path / "test" / "background_block" / "cells").exists()
    assert made.table == at_once.table
    assert made.curves == at_once.curves


def test_the_nearest_rows_of_a_block_are_those_of_a_search_of_all(tmp_path: Path):
    rows = mixture()[0]
    array = ShardedArray.create(
        tmp_path / "rows", shard_rows=[300, 0, 420], row_shape=(DIM,), dtype="float32"
    )
    for i, (a, b) in enumerate(((0, 300), (300, 300), (300, 720))):
        array.write_shard(i, rows[a:b])
    images = np.arange(700)
    block = write_block(tmp_path / "block", array, images, np.full(700, -1), width=5)
    queries = rows[650:]
    found = Nearest(tmp_path / "search", block, 7).run(queries, Resources(workers=0))
    wanted = exact_topk(queries, rows[:700], k=7)
    np.testing.assert_array_equal(found.ids, wanted.ids)
    np.testing.assert_array_equal(found.similarity, wanted.similarity)
    assert not (tmp_path / "search").exists()


def test_ranges_of_classes_fit_the_memory_and_hold_every_class_once():
    for memory in (16, 40, 100, 128, 480):
        budget = spread_bytes(1000, memory, dtype="float32")
        how = {"dtype": "float32", "memory_bytes": budget, "widest": 507}
        ranges = class_ranges(507, 1000, **how)
        covered = [c for first, stop in ranges for c in range(first, stop)]
        assert covered == list(range(507))
        widest = max(stop - first for first, stop in ranges)
        assert spread_bytes(1000, widest, dtype="float32") <= budget
        assert class_ranges(507, 1000, **how, together=True) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory_gb": 1e-5}, r"16 classes on [\d,]+ images take 0\.\d GB"),
        ({**LITTLE, "diffusion.sinkhorn": 1}, r"40 classes, which lowshot\.diffusion\.sinkhorn"),
        ({"memory_gb": 6e-6, "methods": ["knn"]}, r"Set lowshot\.search\.name=cells"),
    ],
)
def test_too_little_memory_is_an_error_before_anything_is_written(
    tmp_path: Path, features: Embeddings, changes: dict[str, Any], message: str
):
    with pytest.raises(ResourceError, match=message):
        low_shot(features, mixture()[1], settings(**changes), out=tmp_path / "lowshot")
    assert not (tmp_path / "lowshot").exists()


def test_the_planned_cost_counts_images_classes_and_background_folders(
    tmp_path: Path, features: Embeddings
):
    def planned(n: int, **changes: Any) -> Cost:
        lowshot = {**SETTINGS, "classes": {"num_base": 600}, "niter": 10, **changes}
        embed = {"imported": {"files": ["x.hdf5"]}}
        values = {"out": str(tmp_path), "embed": embed, "lowshot": lowshot}
        return lowshot_cost(build(Experiment, values), n, dim=64)

    small, large = planned(1_000_000), planned(10_000_000)
    assert large.seconds is not None and small.seconds is not None
    assert large.seconds > 50 * small.seconds  # all pairs
    assert large.memory_bytes is not None and small.memory_bytes is not None
    assert 4e9 < small.memory_bytes < 6e9  # the labels' 4 GB, and the graph
    more = planned(1_000_000, classes={"num_base": 600, "val_base": 300, "val_novel": 1500})
    assert more.seconds is not None and more.seconds > small.seconds
    assert "600 classes" in small.assumes and "1,800 classes" in more.assumes
    folders = {"folders": [{"path": str(features.path)}]}
    assert "1,000,720 nodes (720 of background folders)" in (
        planned(1_000_000, background=folders).assumes
    )
