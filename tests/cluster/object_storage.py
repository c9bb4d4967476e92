"""Runs one experiment on two nodes that share no disk: its driver is killed, and runs elsewhere.

Run by test_object_storage.py in a process of its own, since a session of Ray may exist beside it
only there. argv: a folder, the URL of an empty bucket. Writes found.json.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from ray.cluster_utils import Cluster

from selfsup_ray.data.synthetic import write_shapes
from selfsup_ray.storage import fetched, located

STORE = 150 * 2**20
TWO = {"workers": 2}
KEPT = (".arrow", ".npy", ".safetensors", ".parquet")


def experiment(folder: Path) -> Path:
    """Write an experiment whose stages work on both nodes: Ray Data, Ray Train, tasks."""
    write_shapes(folder / "photos", 120, size=16)
    values = {
        "out": "set by the command",
        "ingest": {
            "source": str(folder / "photos"),
            "image_size": 16,
            "shard_size": 20,
            "resources": TWO,
        },
        "pretext": {
            "epochs": 4,
            "batch_size": 24,
            "checkpoint_every": 2,
            "precision": "float32",
            "backbone": {"name": "resnet18", "stem": "stl", "width": 4},
            "resources": TWO,
        },
        "embed": {"resources": TWO},
        "graph": {
            "k": 5,
            "min_recall": 0,  # too few images to train well
            "method": {"name": "cells", "memory_mb": 1},
            "resources": TWO,
        },
        "export": {},
    }
    path = folder / "photos.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def contents(out: str) -> dict[str, str]:
    """Return the hash of every array, table and weight below a run folder or its URL."""
    if "://" not in out:
        files = {str(p.relative_to(out)): p for p in Path(out).rglob("*")}
    else:
        names = [e.name for e in located(out).entries(recursive=True) if not e.is_folder]  # type: ignore[attr-defined]
        files = {name: fetched(f"{out}/{name}") for name in names if name.endswith(KEPT)}
    kept = {name: path for name, path in files.items() if name.endswith(KEPT)}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in kept.items()}


def driver(
    folder: Path, address: str, out: str, cache: str, *changes: str
) -> subprocess.Popen[bytes]:
    """Start `selfsup-ray run` on the cluster, as on a machine with this cache."""
    words = ["run", str(folder / "photos.yaml"), f"out={out}", *changes, "--address", address]
    environment = {**os.environ, "SELFSUP_RAY_CACHE": str(folder / cache)}
    with open(folder / f"{cache}.log", "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "selfsup_ray", *words],
            env=environment,
            stdout=log,
            stderr=log,
            cwd=folder,
        )


def wait_for(true: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Return whether a condition came true while a process ran."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.2)
    return False


def main(folder: Path, bucket: str) -> None:
    """Run it on a disk that both nodes see, then on the bucket with a kill in between."""
    experiment(folder)
    os.environ["RAY_memory_monitor_refresh_ms"] = "0"  # other work on this machine is not ours
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE},
    )
    for name in ("node1", "node2"):
        own = {"SELFSUP_RAY_CACHE": str(folder / name)}
        cluster.add_node(num_cpus=1, object_store_memory=STORE, env_vars=own)
    found: dict[str, Any] = {}
    local, out = str(folder / "runs" / "local"), f"{bucket}/runs/x"
    began = time.monotonic()
    here = [f"{stage}.resources.workers=0" for stage in ("ingest", "embed", "graph")]
    found["local"] = driver(folder, cluster.address, local, "on-disk", *here).wait()
    found["local_s"] = round(time.monotonic() - began, 1)

    killed = driver(folder, cluster.address, out, "first")
    checkpoint = located(f"{out}/pretext/checkpoint.pt")
    found["was_training"] = wait_for(checkpoint.is_file, killed, 400)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    for cache in ("first", "node1", "node2"):
        shutil.rmtree(folder / cache, ignore_errors=True)
    began = time.monotonic()
    found["again"] = driver(folder, cluster.address, out, "second").wait()
    found["again_s"] = round(time.monotonic() - began, 1)

    expected, got = contents(local), contents(out)
    found["files"] = len(expected)
    found["different"] = sorted(
        n for n in expected.keys() | got.keys() if expected.get(n) != got.get(n)
    )
    found["report"] = located(f"{out}/report.html").is_file()
    found["caches"] = {c: len(list((folder / c).rglob("*.arrow"))) for c in ("node1", "node2")}
    found["beside"] = sorted(p.name for p in folder.iterdir())
    found["log"] = (folder / "second.log").read_text()[-2000:]
    (folder / "found.json").write_text(json.dumps(found, indent=1))
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
