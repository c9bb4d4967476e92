"""A small pipeline on eight nodes, one worker killed on the way: do the plan's counts come true?

    python experiments/benchmarks/eight_nodes.py --nodes 8 --images 8192

Ray's test cluster: a head and `--nodes` raylets of one CPU, each with an object store of its own,
on a loopback of their own (`--tasks-only` leaves that out, and the bytes). Every stage runs on it;
in the middle of k-means the process of one actor is killed. Prints one JSON line: per stage the
tasks, actors and bytes between workers that `plan` announced and that Ray's own records and the
loopback's counter show, and the restarts. Expected: tasks, actors and restarts equal; bytes of
the stages whose actors talk within 1.2 of the plan plus what Ray itself says in the meantime
(`ray_bytes`: that many a second when nothing is done). About 250 CPU-seconds for eight nodes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from loopback import own_loopback, sent_bytes

STORE = 100 * 2**20
STAGES = ("ingest", "whiten", "patches", "embed", "graph", "diffuse")
WORK = {
    "ingest": r".*MapBatches\(_Work\)$",
    "whiten": "whiten",
    "patches": r"PointShard\.(largest|totals|sums)",
    "embed": r"MapWorker\(.*MapBatches\(_ActorWork\)\)\.submit",
    "graph": r"IndexShard\.(search_stored|__ray_call__)|merge_block|write_shard",
    "diffuse": "diffuse",
}
"""Names of the tasks and calls of a stage; all others are Ray's own."""
ACTORS = {"patches": "PointShard", "embed": r"MapWorker\(.*", "graph": "IndexShard"}


def experiment(folder: Path, nodes: int, images: int) -> Any:
    """Return a pipeline that keeps every node busy in most of its stages."""
    from selfsup_ray.config import build
    from selfsup_ray.experiment import Experiment, seeded

    every = {"resources": {"workers": nodes}}
    few = {"resources": {"workers": max(1, nodes // 2)}}
    values = {
        "out": str(folder / "run"),
        "ingest": {
            **{"source": str(folder / "photos"), "image_size": 16, "encoding": "raw"},
            **{"shard_size": -(-images // nodes), **every},
        },
        "whiten": {"patches": 16_384 * nodes, "patch_size": 5, **every},
        "patches": {
            **{"size": 512, "patches_per_entry": 32 * nodes, "iterations": 10, "k": 128},
            **{"code": "hard", "grid": 1, **every},
        },
        "embed": few,
        "graph": {"k": 10, "recall_sample": 100, **few},
        "diffuse": {"labels_per_class": 5, **few},
    }
    return seeded(build(Experiment, values))


class Records:
    """What Ray knows of tasks and actors, by its State API: that of this cluster and no other."""

    def __init__(self, address: str) -> None:
        self.address, self.seen = address, set[str]()

    def new_tasks(self) -> list[Any]:
        """Return the tasks that were not there at the last call, once they have all ended."""
        from ray.util.state import list_tasks

        before, deadline = -1, time.monotonic() + 60
        while True:
            time.sleep(2)  # records travel once a second
            known = list_tasks(self.address, limit=10_000)
            every = [t for t in known if t.task_id not in self.seen]
            running = [t for t in every if t.state not in ("FINISHED", "FAILED")]
            settled = len(every) == before and not [t for t in running if t.type == "NORMAL_TASK"]
            if settled or time.monotonic() > deadline:
                break
            before = len(every)
        self.seen |= {t.task_id for t in every}
        return every

    def actors(self, pattern: str) -> list[Any]:
        """Return all actors of a class, the ended ones too."""
        from ray.util.state import list_actors

        known = list_actors(self.address, limit=10_000, detail=True)
        return [actor for actor in known if re.fullmatch(pattern, actor.class_name)]


def kill_one(records: Records, state: Path, killed: list[int]) -> None:
    """Kill one actor of k-means once its first rounds are written."""
    while not state.exists():  # on a busy machine the actors take minutes to start
        time.sleep(0.01)
    alive = [actor for actor in records.actors("PointShard") if actor.state == "ALIVE"]
    with suppress(ProcessLookupError):
        os.kill(alive[0].pid, signal.SIGKILL)
        killed.append(alive[0].pid)


def run_stage_on(made: Any, stage: str, records: Records, *, count_bytes: bool) -> dict[str, Any]:
    """Run one stage and return what was done for it."""
    from selfsup_ray.steps import run_stage

    killed, thread = list[int](), None
    if stage == "patches":
        state = made.folder("patches") / "kmeans" / "kmeans.safetensors"
        thread = threading.Thread(target=kill_one, args=(records, state, killed), daemon=True)
        thread.start()
    before, began = sent_bytes() if count_bytes else 0, time.monotonic()
    run_stage(stage, made, made.folder, None)
    seconds = time.monotonic() - began
    sent = sent_bytes() - before if count_bytes else None
    if thread is not None:
        thread.join(10)
    tasks = records.new_tasks()
    work = {t.task_id for t in tasks if re.fullmatch(WORK[stage], t.name)}
    actors = records.actors(ACTORS[stage]) if stage in ACTORS else []
    return {
        "tasks": len(work),
        "actors": len(actors),
        "restarts": sum(int(actor.num_restarts or 0) for actor in actors),
        "kills": len(killed),
        "rays_own": dict(Counter(t.name for t in tasks if t.task_id not in work)),
        "seconds": round(seconds, 1),
        "sent_bytes": sent,
    }


def start(nodes: int, *, alone: bool) -> Any:
    """Start the cluster and join it. alone: on a network that has a loopback only."""
    import ray
    from ray.cluster_utils import Cluster

    # Elsewhere Ray takes the machine's own address for the loopback's, and they must agree.
    here = {"node_ip_address": "127.0.0.1"} if alone else {}
    node = {"object_store_memory": STORE, **here}
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": 0, **node}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(nodes):
        cluster.add_node(num_cpus=1, **node)
    joined = {"_node_ip_address": "127.0.0.1"} if alone else {}
    ray.init(address=cluster.address, log_to_driver=False, **joined)
    return cluster


def main() -> None:
    """Run the pipeline and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--images", type=int, default=8192)
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1])
    parser.add_argument("--tasks-only", action="store_true", help="count no bytes")
    given = parser.parse_args()
    if not given.tasks_only:
        own_loopback()
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    os.environ |= {"RAY_DATA_USE_DATASOURCE_V2": "0", "OMP_NUM_THREADS": "1"}
    # Every node here sees the memory of the whole machine, and would kill workers for the others'.
    os.environ |= {"RAY_memory_monitor_refresh_ms": "0"}
    from selfsup_ray.cluster.placement import live_cluster
    from selfsup_ray.data.synthetic import write_shapes
    from selfsup_ray.planning import plan_experiment

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_shapes(folder / "photos", given.images, size=16)
        made = experiment(folder, given.nodes, given.images)
        cluster = start(given.nodes, alone=not given.tasks_only)
        stages = STAGES[: STAGES.index(given.until) + 1]
        planned = plan_experiment(made, only=stages, cluster=live_cluster(None))
        records, found = Records(cluster.address), dict[str, Any]()
        records.new_tasks()
        idle = _idle_rate() if not given.tasks_only else 0.0
        for step in planned.steps:
            if step.counts is None:
                continue
            here = run_stage_on(made, step.stage, records, count_bytes=not given.tasks_only)
            sent = {"sent_bytes": step.counts.sent_bytes} if not given.tasks_only else {}
            here["ray_bytes"] = round(idle * here["seconds"])
            plan = {"tasks": step.counts.tasks, "actors": step.counts.actors, **sent}
            found[step.stage] = {"planned": plan, "measured": here}
            print(f"{step.stage}: {found[step.stage]}", file=sys.stderr, flush=True)
        _end(cluster)
    facts = {"nodes": given.nodes, "images": given.images, "idle_bytes_per_s": round(idle)}
    print(json.dumps({"benchmark": "eight_nodes", **facts, "stages": found}))


def _idle_rate(seconds: float = 10.0) -> float:
    """Return bytes a second that the cluster sends while nothing is done."""
    before = sent_bytes()
    time.sleep(seconds)
    return (sent_bytes() - before) / seconds


def _end(cluster: Any) -> None:
    import ray

    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
