"""Four shapes in four colors, through all stages on Ray, into the right four clusters."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from selfsup_ray.config import build, override
from selfsup_ray.data.synthetic import SHAPES, write_shapes
from selfsup_ray.errors import ArtifactError, ResourceError
from selfsup_ray.experiment import Experiment
from selfsup_ray.pipeline import Result, run_experiment
from selfsup_ray.stages.evaluate import Evaluation
from selfsup_ray.steps import open_artifact

HERE = {"workers": 0}
# Mild color changes: color is part of what tells the shapes apart.
VIEWS = {
    "name": "scan_simclr",
    "scale": [0.3, 1.0],
    "jitter": [0.4, 0.4, 0.4, 0.02],
    "jitter_p": 1.0,
    "gray_p": 0.0,
}
TRAINED = {"precision": "float32", "views": VIEWS, "resources": HERE}


def shapes(folder: Path) -> dict[str, Any]:
    return {
        "out": str(folder / "runs" / "shapes"),
        "ingest": {
            "source": str(folder / "photos"),
            "image_size": 32,
            "shard_size": 128,
            "resources": {"workers": 2},
        },
        "pretext": {
            **TRAINED,
            "backbone": {"name": "resnet18", "stem": "stl", "width": 8},
            "epochs": 12,
            "batch_size": 64,
            "optim": {"name": "sgd", "lr": 0.1},
        },
        "embed": {"resources": {"workers": 1}},
        "graph": {"k": 5, "resources": {"workers": 2}},
        "scan": {
            **TRAINED,
            "num_clusters": 4,
            "num_neighbors": 5,
            "epochs": 12,
            "batch_size": 100,
            "optim": {"name": "adam", "lr": 1e-3},
        },
        "selflabel": {**TRAINED, "epochs": 2, "batch_size": 100, "threshold": 0.8},
        "probe": {},
        "evaluate": {"baselines": ["pixels"]},
        "export": {},
    }


@pytest.fixture(scope="module")
def finished(
    ray_session: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Experiment, Result]:
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder / "photos", 420, size=32)
    made = build(Experiment, shapes(folder))
    return made, run_experiment(made)


@pytest.mark.slow
def test_the_four_shapes_are_found_without_labels(finished: tuple[Experiment, Result]):
    made, _ = finished
    evaluation = open_artifact(made.folder("evaluate"))
    assert isinstance(evaluation, Evaluation)
    assert evaluation.metrics["scan"]["accuracy"] > 0.9
    assert evaluation.metrics["accuracy"] > 0.9
    assert evaluation.metrics["embeddings"]["knn_accuracy"] > 0.9


@pytest.mark.slow
def test_the_pseudo_labels_agree_with_the_folders_the_images_came_from(
    finished: tuple[Experiment, Result],
):
    _, result = finished
    assert result.pseudo_labels is not None
    table = pq.read_table(result.pseudo_labels).to_pydict()
    names = np.array([Path(source).parent.name for source in table["source"]])
    clusters = np.array(table["cluster"])
    assert table["id"] == list(range(420))
    majority = [np.unique(names[clusters == c], return_counts=True)[1].max() for c in range(4)]
    assert sum(majority) / len(names) > 0.9
    assert set(names) == set(SHAPES)


@pytest.mark.slow
def test_mlflow_has_one_parent_and_a_finished_child_per_stage(
    finished: tuple[Experiment, Result],
):
    made, result = finished
    client = MlflowClient(tracking_uri=result.store)
    [experiment] = [e for e in client.search_experiments() if e.name == "selfsup_ray"]
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs.pop("shapes")
    assert set(runs) == {f"shapes/{stage}" for stage in made.stages}
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    assert {run.info.status for run in (parent, *runs.values())} == {"FINISHED"}
    steps = client.get_metric_history(runs["shapes/pretext"].info.run_id, "loss")
    assert steps[-1].value < steps[0].value
    assert runs["shapes/graph"].data.params["k"] == "5"
    artifacts = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert {"report.html", "experiment.yaml"} <= artifacts


@pytest.mark.slow
def test_running_again_skips_every_stage_and_a_changed_value_is_refused(
    finished: tuple[Experiment, Result],
):
    made, result = finished
    stamps = {path: path.stat().st_mtime_ns for path in result.out.glob("*/done.json")}
    assert len(stamps) == len(made.stages)
    assert run_experiment(made) == result
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    with pytest.raises(ArtifactError) as caught:
        run_experiment(override(made, {"pretext.optim.lr": 0.3}))
    assert "pretext.optim.lr=0.1" in str(caught.value)
    assert "asks for 0.3" in str(caught.value)
    more = {f"{stage}.resources.cpus": 2 for stage in ("pretext", "scan")}
    assert run_experiment(override(made, more)) == result


@pytest.mark.parametrize("stage", ["pretext", "embed", "graph", "scan"])
def test_workers_that_the_cluster_has_no_room_for_are_refused_before_the_first_stage(
    ray_session: None, tmp_path: Path, stage: str
):
    write_shapes(tmp_path / "photos", 120, size=16)
    made = build(Experiment, shapes(tmp_path))
    with pytest.raises(ResourceError, match=f"{stage} asks for 64 workers"):
        run_experiment(override(made, {f"{stage}.resources.workers": 64}))
    assert not made.folder("ingest").exists()


@pytest.mark.slow
def test_the_report_shows_the_run(finished: tuple[Experiment, Result]):
    made, result = finished
    page = result.report.read_text()
    metrics = json.loads((made.folder("evaluate") / "metrics.json").read_text())
    assert all(name in page for name in SHAPES)
    assert f"{metrics['accuracy']:.3f}" in page or f"{100 * metrics['accuracy']:.1f}" in page
