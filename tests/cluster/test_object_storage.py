"""A run folder on object storage, and two nodes of Ray that share no disk."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from selfsup_ray.cluster import turns
from selfsup_ray.cluster.records import RecordsActor, channel_for
from selfsup_ray.errors import ResourceError
from selfsup_ray.storage import located


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_nodes_without_a_shared_disk_end_with_the_bytes_of_a_local_run_after_a_killed_driver(
    bucket: str, tmp_path: Path
):
    script = Path(__file__).with_name("object_storage.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), bucket],
        capture_output=True,
        text=True,
        timeout=1180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["local"], found["again"]) == (0, 0), found["log"]
    assert found["was_training"], "the driver had ended, or not begun to train, when it was killed"
    assert found["files"] > 20 and found["different"] == []
    assert found["report"]
    assert all(found["caches"].values()), f"a node read no shard: {found['caches']}"
    assert not [name for name in found["beside"] if name.startswith("s3")]


def test_a_turn_is_one_trial_s_until_it_ends_or_is_not_heard_of(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(turns.time, "monotonic", lambda: now[0])
    held = turns._Turns()
    assert held.take("a", "one") and not held.take("a", "two") and held.take("b", "two")
    now[0] = turns.LEASE_S - 1
    assert held.take("a", "one")  # renewed
    now[0] += turns.LEASE_S - 1
    assert not held.take("a", "two")
    held.give("a", "two")  # of one that has no turn: nothing happens
    assert not held.take("a", "two")
    held.give("a", "one")
    assert held.take("a", "two")
    now[0] += turns.LEASE_S
    assert held.take("a", "three")


@pytest.mark.usefixtures("ray_session")
def test_records_and_turns_go_through_actors_where_no_disk_is_shared(bucket: str):
    records = channel_for(located(f"{bucket}/x/pretext"))
    assert isinstance(records, RecordsActor)
    records.write({"step": 1, "loss": 2.0})
    records.write({"step": 2, "loss": 1.0})
    new, place = records.read_new(0)
    assert [record["step"] for record in new] == [1, 2] and records.read_new(place) == ([], 2)
    folder = located(f"{bucket}/sweep/stages/embed-1")
    with pytest.raises(ResourceError, match="no sweep is open"), turns.in_turn(folder):
        pass
    held = turns.open_turns(folder)
    with turns.in_turn(folder):
        import ray

        assert not ray.get(held.take.remote(folder.url, "another"))
    assert ray.get(held.take.remote(folder.url, "another"))


def in_process(folder: Path, out: str, cache: str) -> subprocess.Popen[bytes]:
    """Start a run whose stages all work in its own process, on a machine with this cache."""
    stages = ("ingest", "pretext", "embed", "graph")
    changes = [f"{stage}.resources.workers=0" for stage in stages]
    words = ["run", str(folder / "photos.yaml"), f"out={out}", *changes]
    with open(folder / f"{cache}.log", "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "selfsup_ray", *words],
            env={**os.environ, "SELFSUP_RAY_CACHE": str(folder / cache)},
            stdout=log,
            stderr=log,
        )


@pytest.mark.slow
def test_a_run_killed_while_it_trains_goes_on_from_another_machine_to_the_same_bytes(
    bucket: str, tmp_path: Path
):
    path = Path(__file__).with_name("object_storage.py")
    script = ModuleType("object_storage")
    exec(compile(path.read_text(), path, "exec"), script.__dict__)
    script.experiment(tmp_path)
    local, out = str(tmp_path / "runs" / "local"), f"{bucket}/runs/x"
    undisturbed = in_process(tmp_path, local, "unused")
    killed = in_process(tmp_path, out, "first")
    checkpoint = located(f"{out}/pretext/checkpoint.pt")
    assert script.wait_for(checkpoint.is_file, killed, 200), (tmp_path / "first.log").read_text()
    killed.kill()
    killed.wait()
    assert undisturbed.wait() == 0, (tmp_path / "unused.log").read_text()
    again = in_process(tmp_path, out, "second")
    assert again.wait() == 0, (tmp_path / "second.log").read_text()
    assert script.contents(out) == script.contents(local)
    assert located(f"{out}/report.html").is_file()
