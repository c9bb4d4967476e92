"""cluster.yaml: Ray's launcher accepts it, and every experiment fits on the nodes it may add."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from selfsup_ray.cluster.session import most_added
from selfsup_ray.config import load
from selfsup_ray.experiment import Experiment
from selfsup_ray.pipeline import UP_TO

ROOT = Path(__file__).parent.parent
EXPERIMENTS = sorted([*ROOT.glob("experiments/*.yaml"), *ROOT.glob("experiments/patches/*.yaml")])


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    made: dict[str, Any] = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    return made


def test_rays_launcher_accepts_the_file(cluster: dict[str, Any]):
    validate_config(cluster)


def test_without_work_there_is_the_head_alone_and_it_takes_none(cluster: dict[str, Any]):
    kinds = dict(cluster["available_node_types"])
    head = kinds.pop(cluster["head_node_type"])
    assert head["resources"]["CPU"] == 0
    assert "InstanceMarketOptions" not in head["node_config"], "the head must not be taken away"
    assert {kind["min_workers"] for kind in kinds.values()} == {0}
    markets = [kind["node_config"]["InstanceMarketOptions"] for kind in kinds.values()]
    assert markets == [{"MarketType": "spot"}] * len(kinds)
    assert 0 < cluster["idle_timeout_minutes"] <= 30


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_stage_of_an_experiment_fits_on_what_the_autoscaler_may_add(
    cluster: dict[str, Any], path: Path
):
    experiment = load(Experiment, path)
    for stage in experiment.stages:
        asked = getattr(experiment, stage).resources
        wanted = min(1, asked.workers) if stage in UP_TO else asked.workers
        assert asked.workers == 0 or most_added(cluster, asked) >= wanted, stage


def test_what_is_mounted_and_installed_is_the_checkout(cluster: dict[str, Any]):
    [(there, here)] = cluster["file_mounts"].items()
    assert here == "."
    assert any(f"pip install --quiet -e {there}" in line for line in cluster["setup_commands"])
    assert {"**/.git", "**/.venv", "/runs"} <= set(cluster["rsync_exclude"])
