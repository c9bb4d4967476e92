"""A cluster that starts empty: nodes come for the stage that needs them, and go again.

Ray's fake provider starts a raylet where a cloud would start a machine; all else is as it is there.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from selfsup_ray.data.synthetic import write_shapes

HEAD_ID = "f" * 51 + "00000"
HEAD = "ray.head.default"  # the fake provider's own name for it
KINDS = {
    HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
    "data": {"resources": {"CPU": 1, "data": 1}, "node_config": {}, "max_workers": 2},
    "large": {"resources": {"CPU": 3, "large": 1}, "node_config": {}, "max_workers": 1},
}


def launch_file(folder: Path, port: int) -> Path:
    """Write what `ray up` leaves on a head; this provider needs every key that others default."""
    path = folder / "launch.yaml"
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "gcs_address": f"127.0.0.1:{port}",
        "head_node_id": HEAD_ID,
        "launch_multiple": True,
        "disable_node_updaters": True,
    }
    commands = ["head_setup", "worker_setup", "head_start_ray", "worker_start_ray"]
    empty = [f"{name}_commands" for name in ("initialization", "setup", *commands)]
    made = {
        **{"cluster_name": "empty", "max_workers": 3, "idle_timeout_minutes": 0.1},
        **{"provider": provider, "head_node_type": HEAD, "available_node_types": KINDS},
        **{"auth": {}, "docker": {}, "file_mounts": {}, "upscaling_speed": 10.0},
        **{name: [] for name in (*empty, "cluster_synced_files", "rsync_exclude", "rsync_filter")},
        "file_mounts_sync_continuously": False,
    }
    path.write_text(yaml.safe_dump(made))
    return path


def nodes(head: Any) -> Counter[str]:
    """Return how many nodes of each kind are alive, by the GCS's own list."""
    from ray._raylet import GcsClient

    found = GcsClient(head.address).get_all_node_info(timeout=30)
    alive = [node for node in found.values() if node.state == 0]
    kinds = [next((kind for kind in KINDS if kind in n.resources_total), "head") for n in alive]
    return Counter(kinds)


def command(head: Any, *arguments: str, name: str = "run") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "selfsup_ray", name, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=head.environment,
    )


@pytest.fixture(scope="module")
def head(start_head: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("launch")
    environment = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "RAY_NODE_TYPE_NAME": HEAD,
    }
    return start_head(
        "--num-cpus=0", launch_file=partial(launch_file, folder), environment=environment
    )


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """Return an experiment whose first stage fits on small nodes and whose second does not."""
    write_shapes(tmp_path / "photos", 64, size=16)
    path = tmp_path / "exp.yaml"
    small, large = {"workers": 2, "cpus": 1}, {"workers": 1, "cpus": 3}
    made = {
        "out": str(tmp_path / "run"),
        "ingest": {
            **{"source": str(tmp_path / "photos"), "image_size": 16, "shard_size": 32},
            "resources": small,
        },
        "whiten": {"patches": 500, "patch_size": 5, "resources": large},
    }
    path.write_text(yaml.safe_dump(made))
    return path


@pytest.mark.timeout(300)
def test_what_no_node_type_can_hold_fails_at_once_and_no_node_comes(head: Any, experiment: Path):
    run = command(head, str(experiment), "whiten.resources.cpus=4")
    output = run.communicate(timeout=240)[0]
    assert run.returncode == 2, output
    assert "whiten asks for 1 workers with 4 CPUs and 0 GPUs each" in output
    assert "can only grow to room for 0: at most 3 nodes, of 2 data (1 CPUs, 0 GPUs), 1 large" in (
        output
    )
    assert nodes(head) == {"head": 1}
    assert not (experiment.parent / "run/ingest").exists()


@pytest.mark.timeout(300)
def test_a_plan_for_an_empty_cluster_names_the_nodes_to_come_and_starts_none(
    head: Any, experiment: Path
):
    plan = command(head, str(experiment), "--address", head.address, name="plan")
    output = plan.communicate(timeout=240)[0]
    assert plan.returncode == 0, output
    assert "may add 3, of 2 data (1 CPUs), 1 large (3 CPUs)" in output
    assert "2 on 2 x data" in output and "1 on 1 x large" in output
    assert nodes(head) == {"head": 1}


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_a_run_on_an_empty_cluster_gets_the_nodes_it_needs_and_they_go_again(
    head: Any, experiment: Path
):
    assert nodes(head) == {"head": 1}
    run = command(head, str(experiment))
    most, deadline = Counter[str](), time.monotonic() + 280
    while run.poll() is None and time.monotonic() < deadline:
        most |= nodes(head)
        time.sleep(0.2)
    if run.poll() is None:
        run.kill()
    output = run.communicate()[0]
    assert run.returncode == 0, output
    assert "whiten: room for 0 of 1 workers now; the cluster adds nodes" in output
    assert most["data"] >= 1 and most["large"] == 1, most
    assert (experiment.parent / "run/whiten/done.json").exists()

    deadline = time.monotonic() + 120
    while nodes(head) != {"head": 1}:
        assert time.monotonic() < deadline, f"still there: {nodes(head)}"
        time.sleep(0.5)
