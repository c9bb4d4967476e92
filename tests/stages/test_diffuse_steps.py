"""The diffuse stage with more than its last step: kept steps, and stopping at the best one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selfsup_ray.config import build, override
from selfsup_ray.errors import ArtifactError, ConfigError
from selfsup_ray.stages.diffuse import DiffuseConfig, choose_seeds, diffuse
from selfsup_ray.stages.diffuse_results import Stop
from selfsup_ray.stages.graph import Graph
from tests.stages.test_diffuse import (
    CHANGES,
    CONFIG,
    made_graph,
    made_labels,
    made_lists,
    outputs,
    reference,
)

WAYS = {"one block": {}, **{name: CHANGES[name] for name in ("three blocks", "rows")}}


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return made_graph(tmp_path_factory.mktemp("graph"), made_lists())


@pytest.mark.parametrize("name", WAYS)
def test_kept_steps_are_the_results_of_runs_that_end_there(graph: Graph, tmp_path: Path, name: str):
    config = override(CONFIG, {**WAYS[name], "keep_steps": "all"})
    made = diffuse(graph, made_labels(), config, out=tmp_path / "all")
    rows = reference(made_lists(), choose_seeds(made_labels(), 3, seed=0), 4)
    for t in range(5):
        kept = outputs(made.step(t))
        top = rows[t].max(axis=0)
        assert (np.abs(kept["all"] - rows[t]) / np.where(top > 0, top, 1)).max() < 1e-6
    shorter = diffuse(
        graph, made_labels(), override(CONFIG, {"niter": 2}), out=tmp_path / "shorter"
    )
    for key, values in outputs(shorter).items():
        np.testing.assert_array_equal(outputs(made.step(2))[key], values)
    for key, values in outputs(made).items():
        np.testing.assert_array_equal(outputs(made.step(4))[key], values)


def test_chosen_steps_alone_are_kept(graph: Graph, tmp_path: Path):
    config = override(CONFIG, {"keep_steps": [0, 3]})
    made = diffuse(graph, made_labels(), config, out=tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out" / "steps").iterdir()) == ["000", "003"]
    with pytest.raises(ArtifactError, match=r"has not kept step 2.*keep_steps=\[2\]"):
        made.step(2)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("by", ["certainty", "accuracy"])
def test_stopping_leaves_the_best_step_however_the_work_is_cut(
    graph: Graph, tmp_path: Path, name: str, by: str
):
    labels, many = made_labels(), {"niter": 9, "sample": 500}
    change = {**WAYS[name], **many, "stop": {"by": by, "patience": 2}}
    made = diffuse(graph, labels, override(CONFIG, change), out=tmp_path / "out")
    whole = override(CONFIG, {**many, "keep_steps": "all"})
    plain = diffuse(graph, labels, whole, out=tmp_path / "plain")
    scores = []
    for t in range(10):
        rows = np.asarray(plain.step(t).all_scores).astype(float)
        total = rows.sum(axis=1)
        shares = rows / np.where(total > 0, total, 1)[:, None]
        entropy = -(shares * np.log(np.where(shares > 0, shares, 1))).sum(axis=1)
        sure = np.where(total > 0, 1 - entropy / np.log(rows.shape[1]), 0).mean()
        seeds = choose_seeds(labels, 3, seed=0)
        watched = np.flatnonzero((labels >= 0) & (seeds < 0))[::2]
        best = np.where(rows.max(axis=1) > 0, rows.argmax(axis=1), -1)
        scores.append(sure if by == "certainty" else (best == labels)[watched].mean())
    chosen = made.facts["niter"]
    assert scores[chosen] == max(scores[: chosen + 3])
    assert scores[chosen] > max(scores[:chosen], default=-1)
    kept = by if by == "certainty" else "validation_accuracy"
    for t, step in enumerate(made.facts["steps"]):
        assert step[kept] == pytest.approx(scores[t], abs=1e-5)
    if name != "three blocks":  # several blocks make all steps, then choose
        assert len(made.facts["steps"]) == min(chosen + 3, 10)
    for key, values in outputs(plain.step(chosen)).items():
        np.testing.assert_array_equal(outputs(made)[key], values)
    assert made.accuracy == made.facts["steps"][chosen]["accuracy"]


@pytest.mark.parametrize(
    ("scores", "best", "ended"),
    [
        ([1], 0, False),
        ([1, 2, 3], 2, False),
        ([1, 3, 2], 1, False),
        ([1, 3, 2, 3], 1, True),  # an equal score is no improvement
        ([1, 3, 2, 2, 9], 1, True),  # what comes after the end does not count
        ([3, 2, 1], 0, True),
    ],
)
def test_the_first_best_step_counts_and_patience_ends_it(
    scores: list[float], best: int, ended: bool
):
    stop = Stop("certainty", 2)
    assert (stop.best(scores), stop.has_ended(scores)) == (best, ended)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_steps": [1, 4]}, r"`keep_steps` has 4, beyond the last step, `niter`=3"),
        (
            {"stop": {"patience": 1, "by": "accuracy"}},
            r"needs hidden labels; set `labels_per_class`",
        ),
    ],
)
def test_steps_and_scores_that_do_not_exist_are_errors(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        build(DiffuseConfig, {"niter": 3, **changes})
