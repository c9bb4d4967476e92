"""Trains on two nodes, of which the one with rank 0 is killed; a third comes, and is given back.

Run by test_elastic.py in a process of its own, since a session of Ray may exist beside it only
there. Writes `result.json`: who trained which step where, and how far the weights are from those
of a training in one process.
"""

import json
import os
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from nodes import added, started
from torch import Tensor

from selfsup_ray import collectives
from selfsup_ray.cluster import notice
from selfsup_ray.cluster import train as trainer
from selfsup_ray.models.backbones import ResNetConfig, build_backbone
from selfsup_ray.models.pretext import SimCLR, SimCLRConfig
from selfsup_ray.ops.rng import uniforms
from selfsup_ray.optim import SGDConfig
from selfsup_ray.resources import TrainResources
from selfsup_ray.tracking import Tracker
from selfsup_ray.training import State, TrainConfig, TrainJob

N, BATCH, EPOCHS = 75, 15, 4  # batches of 15: 8 images on one worker and 7 on the other
STEPS = EPOCHS * N // BATCH
LOST_AT, GROWN_AT, DRAINED_AT = 7, 13, 15  # in epochs; checkpoints every 3 steps, records every 2


class Noise:
    """Random images."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.images = torch.randint(0, 256, (N, 3, 8, 8), generator=generator, dtype=torch.uint8)

    def __len__(self) -> int:
        return N

    def batch(self, ids: np.ndarray, *, epoch: int) -> list[Tensor]:
        return [self.images[torch.from_numpy(ids)]]


class Watched(SimCLR):
    """SimCLR that counts how often each image was trained on, and stops for the cluster to change.

    The counts and the number of workers at each step are part of the state: what was trained after
    the last checkpoint before a loss does not count.
    """

    seen: Tensor
    workers: Tensor

    def __init__(self, folder: Path, *, alone: bool) -> None:
        super().__init__(
            SimCLRConfig(temperature=0.5), build_backbone(ResNetConfig(stem="cifar", width=4))
        )
        self.folder, self.alone = folder, alone
        self.register_buffer("seen", torch.zeros(EPOCHS, N))
        self.register_buffer("workers", torch.zeros(STEPS))

    def forward(self, views: list[Tensor], ids: Tensor) -> Any:
        step = int((self.workers > 0).sum())
        now = torch.zeros(N).index_fill(0, ids, 1.0)
        self.seen[step * BATCH // N] += collectives.all_sum(now)
        self.workers[step] = collectives.world_size()
        if not self.alone:
            self._note(step)
        return super().forward(views, ids)

    def _note(self, step: int) -> None:
        rank, size = collectives.rank(), collectives.world_size()
        node = ray.get_runtime_context().get_node_id()
        note = {"step": step, "rank": rank, "workers": size, "node": node, "time": time.time()}
        with open(self.folder / "notes.jsonl", "a") as file:
            file.write(json.dumps(note) + "\n")
        if rank == 0 and (step, size) in ((GROWN_AT, 1), (DRAINED_AT, 2)):
            notice.within(600, notice.is_told)
        taken = self.folder / "taken"
        is_taken = step > DRAINED_AT and taken.exists() and taken.read_text() == node
        if (step == LOST_AT and size == 2 and rank == 0) or is_taken:
            time.sleep(600)  # ended by the loss of the node


def two_views(images: list[Tensor], ids: Tensor, epoch: int) -> list[Tensor]:
    noise = [uniforms(seed=3, epoch=epoch, ids=ids, draws=192, stream=view) for view in range(2)]
    return [images[0] / 255 - 0.5 + 0.2 * one.view_as(images[0]) for one in noise]


def build(folder: Path, alone: bool) -> tuple[Watched, Noise, Any]:
    return Watched(folder, alone=alone), Noise(), two_views


def trained(folder: Path, resources: TrainResources) -> State:
    config = TrainConfig(
        epochs=EPOCHS,
        batch_size=BATCH,
        optim=SGDConfig(lr=0.003),
        precision="float32",
        log_every=2,
        checkpoint_every=3,
        resources=resources,
    )
    job = TrainJob(partial(build, folder, resources.workers == 0), config)
    out = folder / ("alone" if resources.workers == 0 else "elastic")
    out.mkdir(exist_ok=True)
    return trainer.train(job, out=out, tracker=Tracker(out, None))


def notes(folder: Path) -> list[dict[str, Any]]:
    path = folder / "notes.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(folder: Path, step: int, workers: int) -> dict[str, Any]:
    """Return rank 0's note of a step on so many workers, once there is one."""
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline:
        for note in notes(folder):
            if (note["step"], note["workers"], note["rank"]) == (step, workers, 0):
                return note
        time.sleep(0.05)
    raise TimeoutError(f"no step {step} on {workers} workers; {notes(folder)[-3:]}")


def change(cluster: Any, folder: Path, nodes: list[Any], times: dict[str, float]) -> None:
    """Kill the node of rank 0 in the middle of an epoch; add one, and take it back with notice."""
    doomed = wait_for(folder, LOST_AT, 2)["node"]
    [lost] = [node for node in nodes if node.node_id == doomed]
    cluster.remove_node(lost, allow_graceful=False)
    times["killed"] = time.time()
    times["on_one"] = wait_for(folder, GROWN_AT, 1)["time"]
    times["added"] = time.time()
    borrowed = added(cluster, cpus=1)
    times["on_two"] = wait_for(folder, DRAINED_AT, 2)["time"]
    (folder / "taken").write_text(borrowed.node_id)
    drain(cluster, borrowed)
    times["drained"] = wait_for(folder, DRAINED_AT + 1, 2)["time"]
    cluster.remove_node(borrowed, allow_graceful=False)
    times["on_one_again"] = wait_for(folder, DRAINED_AT + 1, 1)["time"]


def drain(cluster: Any, node: Any) -> None:
    """Say that a node will be taken away in a minute, as a cloud does with a spot machine."""
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int((time.time() + 60) * 1000)
    head = ray._raylet.GcsClient(address=cluster.address)
    is_accepted, why_not = head.drain_node(node.node_id, reason, "taken back", deadline_ms)
    assert is_accepted, why_not


def main(folder: Path) -> None:
    """Train on a cluster that changes, then in this process, and write `result.json`."""
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "5"
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "1"  # the tests have it off
    os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "1"
    trainer.RESIZE_CHECK_S = 1.0
    cluster, nodes = started([2, 1])  # packed, both workers would be on the first
    ray.init(address=cluster.address, log_to_driver=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    times, states = {"started": time.time()}, list[State]()
    ask = TrainResources(workers=2, min_workers=1, placement="spread")
    thread = threading.Thread(target=lambda: states.append(trained(folder, ask)))
    thread.start()
    change(cluster, folder, nodes, times)
    thread.join(900)
    times["ended"] = time.time()
    [elastic] = states
    alone = trained(folder, TrainResources(workers=0))
    weights = [
        torch.cat([x.flatten() for name, x in sorted(state["objective"].items()) if "." in name])
        for state in (elastic, alone)
    ]
    result = {
        "steps": elastic["step"],
        "notes": notes(folder),
        "times": times,
        "seen": elastic["objective"]["seen"].tolist(),
        "workers": elastic["objective"]["workers"].int().tolist(),
        "difference": float((weights[0] - weights[1]).norm() / weights[1].norm()),
        "losses": [[r["loss"] for r in state["history"]] for state in (elastic, alone)],
    }
    (folder / "result.json").write_text(json.dumps(result))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
