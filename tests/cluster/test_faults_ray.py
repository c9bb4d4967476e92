"""Faults of Ray itself: a full object store, a lost GCS or raylet, workers that never come back."""

from __future__ import annotations

import json
import runpy
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray import exceptions

from selfsup_ray.cluster.failures import Watch, explained
from selfsup_ray.errors import ArtifactError, ClusterError
from selfsup_ray.last_word import SENTENCE

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 128 MB, if this machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128m", "tmpfs", str(folder)]
    try:
        made = subprocess.run(mount, capture_output=True, text=True, timeout=30)
    except OSError as error:
        pytest.skip(f"there is no mount: {error}")
    if made.returncode:
        pytest.skip(f"mounting is not allowed here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True, timeout=30)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_full_object_store_spills_and_when_its_disk_is_full_too_one_sentence_says_so(
    tmp_path: Path, small_disk: Path
):
    script = Path(__file__).with_name("store_full.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(small_disk)],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads((tmp_path / "found.json").read_text())
    assert facts.get("same") and facts["spilled"], facts
    assert "object store is full and the disk it spills to has no room" in facts["said"]
    assert "the same command" in facts["said"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_whole_run_that_loses_raylet_and_gcs_ends_with_the_same_files(tmp_path: Path):
    recovery = runpy.run_path(str(ROOT / "experiments/benchmarks/recovery.py"))
    made = recovery["recover"](
        tmp_path,
        kills=2,
        seed=1,
        gap_s=6,
        kinds=("raylet", "gcs"),
        training_workers=0,
        settled=True,
    )
    assert made["kills"] == {"raylet": 1, "gcs": 1}
    assert made["identical"] is True, made
    assert made["untold"] == [], made
    assert made["starts"] > made["runs"], "it stopped and went on"


LOSES_ITS_RAYLET = """
import os, signal
from selfsup_ray.last_word import last_word
with last_word():
    import ray
    from selfsup_ray.cluster.session import connect
    connect("local", num_cpus=1)
    node = ray._private.worker._global_node
    os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
    ray.put(bytes(10**7))
    print("Ray goes on")
"""


def test_a_program_that_ray_ends_in_the_midst_of_a_call_is_spoken_for():
    done = subprocess.run(
        [sys.executable, "-c", LOSES_ITS_RAYLET], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 1 and "Ray goes on" not in done.stdout
    assert done.stderr.count(SENTENCE) == 1 and "Traceback" not in done.stderr


def test_what_ray_gives_up_is_one_sentence_and_a_bug_stays_a_bug():
    lost = exceptions.RayTaskError("work", "a long traceback", exceptions.WorkerCrashedError())
    assert isinstance(explained(lost), ClusterError)
    assert str(explained(lost)).startswith("Ray lost more workers or nodes than it could replace")
    memory = explained(exceptions.OutOfMemoryError("node 1 is short of memory\nand so on"))
    assert "(node 1 is short of memory)" in str(memory) and "batch_size" in str(memory)
    mistake = ArtifactError("rows/00001.npy is missing.")
    assert explained(exceptions.RayTaskError("work", "…", mistake)) is mistake
    away = OSError(5, "Input/output error", "rows/00001.npy")
    assert explained(exceptions.RayTaskError("work", "…", away)) is away
    bug = exceptions.RayTaskError("work", "…", KeyError("k"))
    assert explained(bug) is bug
    ours = ValueError("no Ray in it")
    assert explained(ours) is ours


def test_a_place_where_nobody_listens_is_lost_after_its_patience(free_port: int):
    local = Watch({"GCS": ("127.0.0.1", free_port)}, local=True)
    cluster = Watch({"GCS": ("127.0.0.1", free_port)}, local=False)
    raylet = Watch({"raylet": ("127.0.0.1", free_port)}, local=False)
    for watch in (local, cluster, raylet):
        watch.look(seconds=1)
    assert cluster.sentence is None, "the GCS of a cluster may be restarted"
    assert "its GCS at 127.0.0.1" in str(local.sentence)
    assert "its raylet at 127.0.0.1" in str(raylet.sentence)
    cluster.look(seconds=30)
    assert "its GCS at 127.0.0.1" in str(cluster.sentence)


@pytest.fixture
def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
