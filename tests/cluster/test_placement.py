"""plan on a cluster: what runs where, what must come, memory and money, and what never fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from selfsup_ray.cli import main
from selfsup_ray.cluster.placement import Cluster, cluster_file, live_cluster, place
from selfsup_ray.config import Resources
from selfsup_ray.data.synthetic import write_shapes
from selfsup_ray.errors import ConfigError, ResourceError
from selfsup_ray.planning import plan

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    write_shapes(folder / "photos", 96, size=16)
    made = {
        "out": str(folder / "run"),
        "ingest": {"source": str(folder / "photos"), "image_size": 16, "shard_size": 16},
        "whiten": {"patches": 500, "patch_size": 5, "resources": {"workers": 3, "cpus": 2}},
        "patches": {"size": 16, "patches_per_entry": 16, "iterations": 4},
        "embed": {"resources": {"workers": 2, "cpus": 1, "gpus": 1}},
    }
    path = folder / "exp.yaml"
    path.write_text(yaml.safe_dump(made))
    return path


def of_types(max_workers: int, **kinds: dict[str, Any]) -> dict[str, Any]:
    head = {"head": {"resources": {"CPU": 0}, "node_config": {"InstanceType": "m7i.2xlarge"}}}
    return {
        "cluster_name": "made",
        "max_workers": max_workers,
        "head_node_type": "head",
        "available_node_types": {**head, **kinds},
    }


def written(folder: Path, launched: dict[str, Any]) -> Cluster:
    (folder / "made.yaml").write_text(yaml.safe_dump(launched))
    return cluster_file(folder / "made.yaml")


def test_work_without_gpus_goes_to_nodes_without_gpus_and_to_no_more_than_hold_it(tmp_path: Path):
    cpu = {"resources": {"CPU": 8}, "max_workers": 2}
    gpu = {"resources": {"CPU": 48, "GPU": 4}, "max_workers": 2}
    cluster = written(tmp_path, of_types(3, gpu=gpu, cpu=cpu))

    def shares(**asked: float) -> list[tuple[str, int, int, int]]:
        found = place(cluster, Resources(**asked), stage="graph", at_most=False)
        return [(s.type, s.workers, s.nodes, s.added) for s in found]

    assert shares(workers=3, cpus=4) == [("cpu", 3, 2, 2)]
    assert shares(workers=5, cpus=8) == [("cpu", 2, 2, 2), ("gpu", 3, 1, 1)]
    assert shares(workers=6, cpus=1, gpus=1) == [("gpu", 6, 2, 2)]
    assert shares(workers=0, cpus=99) == []


def test_a_stage_that_can_never_be_placed_is_refused_as_a_run_would_be(tmp_path: Path):
    cluster = written(tmp_path, of_types(3, cpu={"resources": {"CPU": 8}, "max_workers": 2}))
    with pytest.raises(ResourceError, match=r"can only grow to room for 2: at most 3 nodes, of 2"):
        place(cluster, Resources(workers=3, cpus=8), stage="graph", at_most=False)
    # An upper bound is not a demand: as many as there is room for.
    assert place(cluster, Resources(workers=9, cpus=8), stage="ingest", at_most=True)[0].nodes == 2


def test_an_elastic_stage_is_planned_with_the_workers_that_fit(tmp_path: Path):
    made = {
        "out": str(tmp_path / "run"),
        "ingest": {"source": str(tmp_path / "photos"), "image_size": 16},
        "pretext": {"batch_size": 64, "resources": {"workers": 6, "min_workers": 2, "cpus": 4}},
    }
    write_shapes(tmp_path / "photos", 96, size=16)
    (tmp_path / "exp.yaml").write_text(yaml.safe_dump(made))
    cpu = {"resources": {"CPU": 8}, "max_workers": 2}
    cluster = written(tmp_path, of_types(2, cpu=cpu))
    found = plan(tmp_path / "exp.yaml", cluster=cluster)
    [pretext] = [step for step in found.steps if step.stage == "pretext"]
    assert pretext.placed is not None and pretext.placed.workers == 4
    assert "2 to 6 x 4 CPU" in found.text()
    with pytest.raises(ResourceError, match=r"pretext asks for at least 5 workers.* for 4"):
        plan(tmp_path / "exp.yaml", {"pretext.resources.min_workers": 5}, cluster=cluster)


def test_the_plan_for_cluster_yaml_names_nodes_to_come_money_and_counts(experiment: Path):
    made = plan(experiment, cluster=cluster_file(ROOT / "cluster.yaml"))
    steps = {step.stage: step for step in made.steps}
    whiten, embed = steps["whiten"].placed, steps["embed"].placed
    assert whiten is not None and embed is not None
    assert [(s.type, s.nodes, s.added, s.on_one) for s in whiten.shares] == [("cpu", 1, 1, 3)]
    assert [(s.type, s.nodes, s.added, s.on_one) for s in embed.shares] == [("gpu", 1, 1, 2)]
    each, seconds = steps["whiten"].cost.memory_bytes, whiten.seconds
    assert each is not None and whiten.node_memory_bytes == 3 * each
    assert seconds is not None and whiten.dollars == pytest.approx(1.61 * seconds / 3600)
    counts = {name: step.counts for name, step in steps.items() if step.counts}
    assert (counts["ingest"].tasks, counts["whiten"].tasks) == (6, 6)
    assert (counts["embed"].tasks, counts["embed"].actors) == (6, 2)
    text = made.text()
    assert "may add 12, of 8 cpu (m7i.8xlarge: 32 CPUs), 8 gpu" in text
    assert "3 on 1 x cpu" in text and "2 on 1 x gpu" in text and "of it for the head" in text


def test_a_stage_with_fewer_pieces_than_workers_takes_as_long_as_its_pieces(experiment: Path):
    cluster = cluster_file(ROOT / "cluster.yaml")

    def seconds(workers: int) -> float:
        made = plan(experiment, {"whiten.resources.workers": workers}, cluster=cluster)
        found = next(step.placed for step in made.steps if step.stage == "whiten")
        assert found is not None and found.seconds is not None
        return found.seconds

    assert seconds(24) >= seconds(6) > seconds(3) / 2.01  # six shards


def test_workers_that_want_more_memory_than_their_node_has_are_pointed_out(
    experiment: Path, tmp_path: Path
):
    small = {"resources": {"CPU": 8, "memory": 10**9}, "max_workers": 1}
    cluster = written(tmp_path, of_types(1, cpu=small))
    made = plan(experiment, only=["ingest", "whiten"], cluster=cluster)
    assert "whiten: 3 workers of 1.1 GB on one cpu want 3.3 GB, but it has 1.0 GB." in made.text()
    assert "no price is known for ingest, whiten: give --price TYPE=DOLLARS" in made.text()


def test_the_command_prints_json_with_given_prices_and_refuses_unknown_names(
    experiment: Path, capsys: pytest.CaptureFixture[str]
):
    base = ["plan", str(experiment), "--cluster", str(ROOT / "cluster.yaml"), "--json"]
    assert main([*base, "--price", "cpu=100", "--price", "m7i.2xlarge=0"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["cluster"]["max_added"] == 12 and "launched" not in made["cluster"]
    assert made["prices"] == {"head": 0.0, "cpu": 100.0, "gpu": 4.6}
    whiten = next(step for step in made["steps"] if step["stage"] == "whiten")
    assert whiten["placed"]["dollars"] == pytest.approx(whiten["placed"]["seconds"] / 36)
    assert main([*base, "--price", "p9.huge=3"]) == 2
    assert "--price names `p9.huge`, but" in capsys.readouterr().err
    assert main([*base, "--price", "cpu=much"]) == 2
    assert "a price is dollars an hour" in capsys.readouterr().err


def test_a_file_that_is_no_cluster_or_hides_what_a_node_holds_is_an_error(tmp_path: Path):
    path = tmp_path / "made.yaml"
    path.write_text("cluster_name: made\n")
    with pytest.raises(ConfigError, match="no key `available_node_types`"):
        cluster_file(path)
    with pytest.raises(ConfigError, match=r"available_node_types.cpu has no `resources`"):
        written(tmp_path, of_types(1, cpu={"max_workers": 1}))


def test_a_cluster_that_nothing_scales_is_planned_with_the_nodes_it_has(
    ray_session: None, experiment: Path
):
    cluster = live_cluster(None)
    assert [(kind.cpus, kind.now, kind.most) for kind in cluster.types] == [(4.0, 1, 1)]
    made = plan(experiment, {"whiten.resources.workers": 2}, until="whiten", cluster=cluster)
    found = made.steps[1].placed
    assert found is not None and [(s.workers, s.added) for s in found.shares] == [(2, 0)]
    assert "nothing adds nodes" in made.text()
    with pytest.raises(ResourceError, match=r"whiten asks for 3 workers .* room for 2"):
        plan(experiment, until="whiten", cluster=cluster)
