"""Running and planning an experiment: what is run, skipped, refused, and what it would cost."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient

from selfsup_ray import cli
from selfsup_ray.artifacts import read_claim, read_done
from selfsup_ray.config import Resources, build, override
from selfsup_ray.costs_network import network
from selfsup_ray.costs_training import Cost
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.synthetic import write_shapes
from selfsup_ray.errors import ArtifactError, ConfigError
from selfsup_ray.experiment import Experiment, seeded
from selfsup_ray.models.backbones import ResNetConfig
from selfsup_ray.models.clusterer import Clusterer
from selfsup_ray.models.encoder import Encoder
from selfsup_ray.pipeline import Result, run, run_experiment
from selfsup_ray.planning import Plan, Step, plan, plan_experiment, require_room
from selfsup_ray.planning_text import size
from selfsup_ray.stages.diffuse import Diffusion
from selfsup_ray.stages.embed import Embeddings
from selfsup_ray.stages.evaluate import Evaluation
from selfsup_ray.stages.export import Exported
from selfsup_ray.stages.graph import Graph
from selfsup_ray.stages.probe import Probe
from selfsup_ray.stages.reduce import Reduced
from selfsup_ray.steps import open_artifact
from selfsup_ray.tracking import Status, Tracker

HERE = {"workers": 0}
SMALL = {"epochs": 1, "batch_size": 16, "precision": "float32", "resources": HERE}
STAGES = ["ingest", "pretext", "embed", "reduce", "graph", "scan", "selflabel"]
STAGES += ["diffuse", "probe", "evaluate", "export"]


def tiny(folder: Path) -> dict[str, Any]:
    """Return an experiment on folder/photos that takes seconds, all in this process."""
    return {
        "out": str(folder / "runs" / "tiny"),
        "ingest": {"source": str(folder / "photos"), "image_size": 16, "resources": HERE},
        "pretext": {**SMALL, "backbone": {"name": "resnet18", "stem": "stl", "width": 4}},
        "embed": {"resources": HERE},
        "reduce": {"dim": 8, "resources": HERE},
        "graph": {"k": 5, "resources": HERE},
        "scan": {**SMALL, "num_clusters": 4, "num_neighbors": 5},
        "selflabel": {**SMALL, "threshold": 0.3},
        "diffuse": {"labels_per_class": 2},
        "probe": {},
        "evaluate": {},
        "export": {},
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """One finished run of the tiny experiment; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("finished")
    write_shapes(folder / "photos", 40, size=16)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny(folder)))
    return folder, run(folder / "tiny.yaml")


def copied(finished: tuple[Path, Result], to: Path) -> Experiment:
    """Return the experiment of a copy of the finished run."""
    folder, _ = finished
    shutil.copytree(folder / "runs", to / "runs")
    made = build(Experiment, tiny(folder))
    return override(made, {"out": str(to / "runs" / "tiny")})


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_run_leaves_every_stage_finished_and_names_what_to_open(
    finished: tuple[Path, Result],
):
    folder, result = finished
    assert [read_done(result.out / stage).stage for stage in STAGES] == STAGES
    assert result.report == folder / "runs" / "tiny" / "report.html"
    assert "<html" in result.report.read_text()
    assert result.store == f"sqlite:///{folder / 'runs' / 'mlflow.db'}"
    metrics = json.loads((result.out / "evaluate" / "metrics.json").read_text())
    text = result.text()
    assert f"ACC {metrics['accuracy']:.3f}, NMI" in text and "over 40 labelled images" in text
    for part in (result.report, "mlflow ui --backend-store-uri", result.pseudo_labels):
        assert str(part) in text


def test_running_again_changes_nothing_but_the_report(finished: tuple[Path, Result]):
    folder, result = finished
    before = times(folder / "runs")
    assert run(folder / "tiny.yaml") == result
    after = times(folder / "runs")
    assert {path for path in after if after[path] != before.get(path)} == {result.report}


@pytest.mark.parametrize("left", [".", "export"], ids=["run", "stage"])
def test_a_run_cut_off_after_its_work_is_closed_in_mlflow_by_the_next_command(
    finished: tuple[Path, Result], tmp_path: Path, left: str, monkeypatch: pytest.MonkeyPatch
):
    made = copied(finished, tmp_path)
    shutil.rmtree(made.out / "export")
    finish = Tracker.finish

    def cut_off(tracker: Tracker, status: Status = "FINISHED") -> None:
        if tracker.folder == made.out / left:
            raise KeyboardInterrupt  # as a kill would: MLflow is told nothing
        finish(tracker, status)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Tracker, "finish", cut_off)
        run_experiment(made)
    before = mlflow_states(made)
    assert before[made.out / left] == "RUNNING"
    assert plan_experiment(made).to_run == ()
    run_experiment(made)
    assert mlflow_states(made) == dict.fromkeys(before, "FINISHED")


def mlflow_states(made: Experiment) -> dict[Path, str]:
    """Return the state of the MLflow run of the experiment and of each of its stages."""
    client = MlflowClient(f"sqlite:///{made.out.parent / 'mlflow.db'}")
    ids = {file.parent: json.loads(file.read_text()) for file in made.out.rglob("mlflow.json")}
    return {folder: client.get_run(i["run_id"]).info.status for folder, i in ids.items()}


def test_a_finished_run_is_planned_as_current(finished: tuple[Path, Result]):
    folder, _ = finished
    made = plan(folder / "tiny.yaml")
    assert [step.state for step in made.steps] == ["current"] * len(STAGES)
    assert made.to_run == ()
    assert "Nothing to run." in made.text()
    assert [step["stage"] for step in json.loads(made.json())["steps"]] == STAGES


def test_every_folder_opens_as_the_handle_of_its_stage(finished: tuple[Path, Result]):
    _, result = finished
    types = [Corpus, Encoder, Embeddings, Reduced, Graph, Clusterer, Clusterer]
    types += [Diffusion, Probe, Evaluation, Exported]
    assert [type(open_artifact(result.out / stage)) for stage in STAGES] == types
    with pytest.raises(ArtifactError, match="holds no finished stage"):
        open_artifact(result.out / "absent")


def test_a_changed_value_is_refused_before_any_earlier_stage_is_run(
    finished: tuple[Path, Result], tmp_path: Path
):
    made = copied(finished, tmp_path)
    shutil.rmtree(made.folder("graph"))
    with pytest.raises(ArtifactError, match=r"scan\.entropy_weight=5\.0, but this run asks for 2"):
        run_experiment(override(made, {"scan.entropy_weight": 2.0}))
    assert not made.folder("graph").exists()


def test_a_stage_built_from_other_images_is_refused(finished: tuple[Path, Result], tmp_path: Path):
    made = copied(finished, tmp_path)
    shutil.rmtree(made.folder("ingest"))
    write_shapes(tmp_path / "others", 40, size=16, seed=1)
    others = override(made, {"ingest.source": str(tmp_path / "others")})
    run_experiment(others, only=["ingest"])
    with pytest.raises(ArtifactError, match="pretext was built from another corpus"):
        run_experiment(others)


def test_a_deleted_stage_is_made_again_and_later_ones_stay(
    finished: tuple[Path, Result], tmp_path: Path
):
    made = copied(finished, tmp_path)
    shutil.rmtree(made.folder("embed"))
    planned = {step.stage: step.state for step in plan_experiment(made).steps}
    assert [stage for stage, state in planned.items() if state == "run"] == ["embed"]
    scan = times(made.folder("scan"))
    run_experiment(made)
    assert read_done(made.folder("embed")).stage == "embed"
    assert times(made.folder("scan")) == scan


def test_until_and_only_choose_the_stages(tmp_path: Path):
    write_shapes(tmp_path / "photos", 40, size=16)
    made = build(Experiment, tiny(tmp_path))
    with pytest.raises(ArtifactError, match=r"embed reads .*ingest, which has not finished"):
        run_experiment(made, only=["embed"])
    run_experiment(made, until="pretext")
    assert sorted(p.parent.name for p in made.out.glob("*/done.json")) == ["ingest", "pretext"]
    run_experiment(made, only=["embed", "reduce"])
    assert (made.folder("reduce") / "done.json").exists()
    states = {step.stage: step.state for step in plan_experiment(made, only=["graph"]).steps}
    assert states["graph"] == "run"
    assert {states[s] for s in STAGES if s != "graph"} == {"left out"}
    with pytest.raises(ConfigError, match=r"has no stage `scan`\. It has: ingest, pretext"):
        run_experiment(override(made, dict.fromkeys(STAGES[2:])), until="scan")


def test_without_labels_everything_runs_and_the_probe_is_left_out(tmp_path: Path):
    write_shapes(tmp_path / "photos", 40, size=16)
    made = override(build(Experiment, tiny(tmp_path)), {"ingest.labels": "none", "selflabel": None})
    result = run_experiment(made)
    assert not (made.folder("probe") / "done.json").exists()
    metrics = json.loads((made.folder("evaluate") / "metrics.json").read_text())
    assert "accuracy" not in metrics
    assert metrics["num_labelled"] == 0
    assert result.pseudo_labels is not None
    assert result.scores is not None and "4 clusters, SCAN score" in result.scores


def test_the_seed_of_an_experiment_is_added_to_every_stages_own():
    values = tiny(Path("x")) | {"seed": 3}
    values["scan"] = {**values["scan"], "seed": 10}
    made = seeded(build(Experiment, values))
    assert made.pretext and made.scan and made.graph
    assert (made.pretext.seed, made.scan.seed, made.graph.seed) == (3, 13, 3)
    assert seeded(made) == made


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"graph": None}, "scan needs graph: add the key `graph: {}`"),
        ({"scan.num_neighbors": 6}, "scan.num_neighbors=6 is more than the graph.k=5"),
        (
            {"probe.knn_index": "graph", "graph": None, "scan": None, "selflabel": None}
            | {"diffuse": None},
            "probe.knn_index=graph needs graph",
        ),
        ({"ingest.source": None}, "ingest.source is required"),
        (dict.fromkeys(STAGES), "give at least one stage"),
        ({"pretext.method": {"name": "moco", "queue_size": 100}}, "queue_size=100 must be"),
        ({"embed.batch": 3}, "Unknown key `embed.batch`: did you mean `batch_size`?"),
    ],
)
def test_a_mistake_between_stages_is_found_when_the_config_is_made(
    changes: dict[str, Any], says: str
):
    made = build(Experiment, tiny(Path("x")))
    with pytest.raises(ConfigError) as caught:
        override(made, changes)
    assert says in str(caught.value)


def test_new_images_find_their_neighbors_in_a_finished_run(
    finished: tuple[Path, Result], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder, _ = finished
    run_folder = folder / "runs" / "tiny"
    corpus = Corpus.open(run_folder / "ingest")
    own = corpus.sources(np.array([3, 17]))
    new = [str(next((folder / "photos").rglob(Path(name).name))) for name in own]
    out = tmp_path / "found.csv"
    arguments = [str(run_folder), *new, "--k", "4"]
    assert cli.main(["neighbors", *arguments, "--out", str(out)]) == 0
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4"] * 2
    graph = Graph.open(run_folder / "graph")
    for i, image in enumerate((3, 17)):
        listed = rows[4 * i : 4 * i + 4]
        assert listed[0]["image"] == new[i] and listed[0]["source"] == own[i]
        wanted = [image, *np.asarray(graph.ids)[image, :3].tolist()]
        assert [int(row["id"]) for row in listed] == wanted
        assert float(listed[0]["similarity"]) == pytest.approx(1, abs=1e-5)
    capsys.readouterr()
    assert cli.main(["neighbors", *arguments]) == 0
    assert capsys.readouterr().out == out.read_text()


def test_the_probe_takes_neighbors_from_the_runs_graph_when_told_to(
    finished: tuple[Path, Result], tmp_path: Path
):
    made = copied(finished, tmp_path)
    shutil.rmtree(made.folder("probe"))
    asked = override(made, {"probe.knn_index": "graph"})
    assert asked.inputs("probe") == ("ingest", "embed", "graph")
    assert made.inputs("probe") == ("ingest", "embed")
    run_experiment(asked, only=["probe"])
    claim = read_claim(made.folder("probe") / "config.yaml")
    assert claim["inputs"]["graph"] == Graph.open(made.folder("graph")).fingerprint
    assert 0 <= Probe.open(made.folder("probe")).knn <= 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pretext.batch_size": 41}, r"pretext.batch_size=41, but there are only 40 images"),
        (
            {"graph.k": 40, "scan.num_neighbors": 40},
            r"scan.num_neighbors=40, but there are only 40 images, each with 39 others",
        ),
        ({"ingest.source": "nowhere"}, "There is no source nowhere"),
    ],
)
def test_what_the_images_do_not_allow_is_refused_before_a_folder_is_made(
    tmp_path: Path, changes: dict[str, Any], says: str
):
    write_shapes(tmp_path / "photos", 40, size=16)
    made = override(build(Experiment, tiny(tmp_path)), changes)
    with pytest.raises((ConfigError, ArtifactError), match=says):
        run_experiment(made)
    assert not made.out.exists()


def test_planning_writes_nothing_and_costs_every_stage(tmp_path: Path):
    write_shapes(tmp_path / "photos", 40, size=16)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny(tmp_path)))
    before = times(tmp_path)
    made = plan(tmp_path / "tiny.yaml", {"scan.epochs": 2}, until="scan")
    assert times(tmp_path) == before
    assert made.num_images == 40
    assert made.to_run == tuple(STAGES[:6])
    costs = {step.stage: step.cost for step in made.steps}
    assert all(costs[stage].memory_bytes and costs[stage].disk_bytes for stage in made.to_run)
    once, twice = costs["pretext"].seconds, costs["scan"].seconds
    assert once and twice and 1.2 < twice / once < 5, "two epochs cost more than one"
    assert "2 epochs" in made.text()


def test_the_disk_estimates_are_near_what_the_stages_leave(
    finished: tuple[Path, Result], tmp_path: Path
):
    folder, result = finished
    made = plan(folder / "tiny.yaml", {"out": str(tmp_path / "new")})
    found = {step.stage: step.cost.disk_bytes or 0 for step in made.steps}
    patterns = {"ingest": "shards/*", "graph": "*/*.npy"}
    for stage, pattern in (patterns | dict.fromkeys(("embed", "reduce"), "rows/*.npy")).items():
        left = sum(path.stat().st_size for path in (result.out / stage).glob(pattern))
        assert found[stage] == pytest.approx(left, rel=0.35), stage


def test_an_interrupted_stage_is_planned_with_the_rate_it_had(
    finished: tuple[Path, Result], tmp_path: Path
):
    made = copied(finished, tmp_path)
    (made.folder("pretext") / "done.json").unlink()
    lines = [{"step": step, "images_per_s": 8.0} for step in (1, 2, 3)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (made.folder("pretext") / "metrics.jsonl").write_text(text)
    step = {step.stage: step for step in plan_experiment(made).steps}["pretext"]
    assert (step.state, step.cost.seconds) == ("continue", 32 / 8.0)  # 2 batches of 16


@pytest.mark.parametrize(
    ("name", "parameters", "multiply_adds"),
    # torchvision's documentation: parameters less the classifier's, GFLOPS counted as
    # multiply-adds of one 224-pixel image, classifier included (below 0.1 % of it).
    [("resnet18", 11_176_512, 1.814e9), ("resnet50", 23_508_032, 4.089e9)],
)
def test_the_size_of_a_network_is_what_torchvision_documents(
    name: Any, parameters: int, multiply_adds: float
):
    found = network(ResNetConfig(name=name, stem="imagenet"), 224)
    assert found.parameters == parameters
    assert found.flops == pytest.approx(2 * multiply_adds, rel=0.005)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (None, ""),
        (0, "0 B"),
        (999, "999 B"),
        (1500, "1.5 kB"),
        (12_345_678, "12 MB"),
        (3e12, "3.0 TB"),
    ],
)
def test_bytes_are_written_as_people_do(num_bytes: Any, text: str):
    assert size(num_bytes) == text


def test_room_is_asked_only_for_what_an_interrupted_stage_has_not_written(tmp_path: Path):
    too_much = shutil.disk_usage(tmp_path).free + 10**12
    step = Step("graph", "continue", "", Resources(workers=0), Cost(disk_bytes=too_much))
    made = Plan(tmp_path, 10, (step,))
    with pytest.raises(ArtifactError, match="the disk has"):
        require_room(made)
    (tmp_path / "graph").mkdir()
    with open(tmp_path / "graph" / "rows.npy", "wb") as file:
        file.truncate(too_much)  # a hole: no block of the disk
    require_room(made)
