"""The trainer against bare loops on the same cores: through Ray Train, and against lightly.

    python experiments/benchmarks/train.py ray --rounds 3       # bar: ratio >= 0.95
    python experiments/benchmarks/train.py lightly --rounds 3   # bar: ratio >= 2.0

Both train SimCLR on a ResNet-18 with CIFAR stem, 32 px, batch 64, in processes of their own that
take turns, so that a busy machine slows both; each prints one JSON line.

`ray`: images/s of `train` (one Ray Train worker with `--threads` CPUs; corpus on disk,
augmentation, records, checkpoints) and of a bare loop that calls the same objective with the same
precision on views that lie in memory, with as many threads. Medians over steps and rounds.

`lightly`: CPU seconds per step of lightly's float32 loop (its NTXentLoss and projection head) and
of `fit` with our defaults (bfloat16 autocast, channels_last), from the same weights on the same
views; the largest difference of the two loss curves, smoothed over ten steps, is reported with it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from selfsup_ray.config import Resources
from selfsup_ray.models.backbones import ResNetConfig, build_backbone
from selfsup_ray.models.heads import MLPHead
from selfsup_ray.models.pretext import SimCLR, SimCLRConfig
from selfsup_ray.optim import ConstantSchedule, SGDConfig
from selfsup_ray.training import TrainConfig, TrainJob, fit, has_bfloat16

BATCH, SIDE, NUM_IMAGES = 64, 32, 512
OPTIM = SGDConfig(lr=0.06, weight_decay=5e-4)
METHOD = SimCLRConfig(temperature=0.5, head=MLPHead(batch_norm="all"))
WARM = 3  # steps left out: oneDNN makes its kernels in the first


def pixels() -> np.ndarray:
    """Return images with something to learn, coloured shapes: (NUM_IMAGES, SIDE, SIDE, 3) uint8."""
    from selfsup_ray.data.synthetic import shape_images

    return shape_images(NUM_IMAGES, size=SIDE, seed=0)[0]


def two_views() -> Tensor:
    """Return two augmented views of every image, normalised: (2, NUM_IMAGES, 3, SIDE, SIDE)."""
    from selfsup_ray.data.views import SimCLRViews, Views

    images = torch.from_numpy(pixels()).permute(0, 3, 1, 2).contiguous()
    views = Views(SimCLRViews(strength=0.5, blur_p=0), image_size=SIDE, seed=0)
    return torch.stack(views([images], torch.arange(NUM_IMAGES), 0))


def batches_of(steps: int) -> list[np.ndarray]:
    """Return the image ids of every step, as `fit` draws them with seed 0."""
    from selfsup_ray.ops.rng import permuted

    per_epoch = NUM_IMAGES // BATCH
    positions = [
        np.arange(s % per_epoch * BATCH, (s % per_epoch + 1) * BATCH) for s in range(steps)
    ]
    return [
        permuted(p, n=NUM_IMAGES, seed=0, epoch=s // per_epoch) for s, p in enumerate(positions)
    ]


def train_config(steps: int, resources: Resources) -> TrainConfig:
    """Return a training with the project's defaults; only what must be set is set."""
    return TrainConfig(
        epochs=-(-steps * BATCH // NUM_IMAGES),
        batch_size=BATCH,
        optim=OPTIM,
        schedule=ConstantSchedule(),
        log_every=1,
        checkpoint_every=10**6,
        resources=resources,
    )


def timed_steps(step: Callable[[int], float], steps: int) -> dict[str, Any]:
    """Return wall and CPU seconds of every step after the warm ones, and all losses."""
    wall, cpu, losses = [], [], []
    for i in range(steps):
        began, began_cpu = time.perf_counter(), time.process_time()
        losses.append(step(i))
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - began_cpu)
    return {"wall": wall[WARM:], "cpu": cpu[WARM:], "losses": losses}


def lightly_loop(steps: int) -> dict[str, Any]:
    """lightly's SimCLR example in float32, one forward for each view."""
    import torchvision
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    resnet = torchvision.models.resnet18(weights=None)
    resnet.conv1, resnet.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    resnet.fc = nn.Identity()
    head = SimCLRProjectionHead(512, 512, 128)
    start = first_weights()
    resnet.load_state_dict(weights_of(start, "backbone."))
    for layer, source in zip(learned_layers(head), learned_layers(start.head), strict=True):
        layer.weight.data.copy_(source.weight)
    model, criterion = nn.Sequential(resnet, head), NTXentLoss(temperature=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-4)
    views, ids = two_views(), batches_of(steps)

    def step(i: int) -> float:
        loss = criterion(model(views[0, ids[i]]), model(views[1, ids[i]]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return timed_steps(step, steps)


def first_weights() -> SimCLR:
    """Return the objective that every loop starts from."""
    return SimCLR(METHOD, build_backbone(ResNetConfig(stem="cifar"), seed=0), seed=0)


def weights_of(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Return the entries of a state dict below a prefix."""
    state = module.state_dict()
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def learned_layers(head: nn.Module) -> list[Any]:
    """Return the layers of a head that have weights, in order."""
    return [layer for layer in head.modules() if getattr(layer, "weight", None) is not None]


class InMemory:
    """Images by id; only the ids matter, since the views are made beforehand."""

    def __len__(self) -> int:
        return NUM_IMAGES

    def batch(self, ids: np.ndarray, *, epoch: int) -> list[Tensor]:
        return [torch.empty(len(ids), 3, 1, 1, dtype=torch.uint8)]


def our_loop(steps: int) -> dict[str, Any]:
    """`fit` with the defaults of TrainConfig, on the views that lightly gets."""
    views, made = two_views(), train_config(steps, Resources(workers=0))
    wall, cpu, losses = [time.perf_counter()], [time.process_time()], list[float]()

    def note(record: dict[str, float]) -> None:
        wall.append(time.perf_counter())
        cpu.append(time.process_time())
        losses.append(record["loss"])

    def make_views(_: list[Tensor], ids: Tensor, epoch: int) -> list[Tensor]:
        return [view[ids] for view in views]

    fit(first_weights(), InMemory(), make_views, made, device="cpu", on_log=note)
    walls, cpus = np.diff(wall).tolist(), np.diff(cpu).tolist()
    return {"wall": walls[WARM:steps], "cpu": cpus[WARM:steps], "losses": losses[:steps]}


def bare_loop(steps: int) -> dict[str, Any]:
    """The objective called on tensors in memory: our precision and memory order, no trainer."""
    objective = first_weights().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-4)
    views, all_ids = two_views(), [torch.from_numpy(ids) for ids in batches_of(steps)]
    batches = [
        [view[ids].contiguous(memory_format=torch.channels_last) for view in views]
        for ids in all_ids
    ]

    def step(i: int) -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = objective(batches[i], all_ids[i])
        loss.backward()
        optimizer.step()
        return loss.item()

    return timed_steps(step, steps)


def build(corpus: Path) -> tuple[SimCLR, Any, Any]:
    """Return what a worker of `ray_loop` trains: the objective, the corpus's images, the views."""
    from selfsup_ray.data.corpus import Corpus
    from selfsup_ray.data.datasets import Images
    from selfsup_ray.data.views import SimCLRViews, Views

    views = Views(SimCLRViews(strength=0.5, blur_p=0), image_size=SIDE, seed=0)
    return first_weights(), Images(Corpus.open(corpus)), views


def ray_loop(steps: int) -> dict[str, Any]:
    """`train` with a Ray Train worker and a corpus on disk; seconds per step from its records."""
    from selfsup_ray.cluster.session import session
    from selfsup_ray.cluster.train import train
    from selfsup_ray.data.synthetic import corpus_of_arrays
    from selfsup_ray.tracking import open_run

    threads = torch.get_num_threads()
    made = train_config(steps, Resources(workers=1, cpus=threads))
    with tempfile.TemporaryDirectory() as folder, session(num_cpus=threads):
        corpus_of_arrays(Path(folder, "corpus"), pixels())
        out = Path(folder, "train")
        job = TrainJob(partial(build, Path(folder, "corpus")), made)
        state = train(job, out=out, tracker=open_run(out, name="benchmark"))
    records = state["history"][:steps]
    seconds = [BATCH / record["images_per_s"] for record in records]
    waits = [record["data_wait_share"] for record in records]
    return {"wall": seconds[WARM:], "losses": [r["loss"] for r in records], "wait": waits[WARM:]}


LOOPS = {"lightly": lightly_loop, "ours": our_loop, "bare": bare_loop, "ray": ray_loop}


def in_turn(names: list[str], *, rounds: int, steps: int, threads: int) -> dict[str, list[Any]]:
    """Return each loop's results by round; every run is a process of its own."""
    results: dict[str, list[Any]] = {name: [] for name in names}
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    for _ in range(rounds):
        for name in names:
            command = [sys.executable, __file__, "one", name, "--steps", str(steps)]
            done = subprocess.run(
                [*command, "--threads", str(threads)],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
    return results


def middle(rounds: list[Any], key: str) -> float:
    """Return the median over rounds of the median over steps."""
    return median(median(result[key]) for result in rounds)


def report_ray(results: dict[str, list[Any]], threads: int) -> dict[str, Any]:
    """Return the line of `ray`."""
    bare, ray = middle(results["bare"], "wall"), middle(results["ray"], "wall")
    return {
        "benchmark": "train_through_ray",
        "threads": threads,
        "bare_images_per_s": round(BATCH / bare, 2),
        "ray_images_per_s": round(BATCH / ray, 2),
        "data_wait_share": round(middle(results["ray"], "wait"), 4),
        "ratio": round(bare / ray, 3),
        "bar": 0.95,
    }


def report_lightly(results: dict[str, list[Any]], threads: int) -> dict[str, Any]:
    """Return the line of `lightly`."""
    kernel = np.ones(10) / 10
    curves = [
        np.convolve(np.mean([r["losses"] for r in results[name]], axis=0), kernel, mode="valid")
        for name in ("lightly", "ours")
    ]
    pairs = zip(results["lightly"], results["ours"], strict=True)
    ratios = [median(theirs["cpu"]) / median(ours["cpu"]) for theirs, ours in pairs]
    return {
        "benchmark": "step_against_lightly",
        "threads": threads,
        "bfloat16_in_hardware": has_bfloat16(),
        "lightly_cpu_s_per_step": round(middle(results["lightly"], "cpu"), 3),
        "ours_cpu_s_per_step": round(middle(results["ours"], "cpu"), 3),
        "ratio": round(median(ratios), 3),
        "wall_ratio": round(
            middle(results["lightly"], "wall") / middle(results["ours"], "wall"), 3
        ),
        "first_loss": [round(float(curve[0]), 3) for curve in curves],
        "last_loss": [round(float(curve[-1]), 3) for curve in curves],
        "largest_curve_difference": round(float(np.abs(curves[0] - curves[1]).max()), 3),
        "bar": 2.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["ray", "lightly", "one"])
    parser.add_argument("loop", nargs="?", choices=LOOPS)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None, help="2 for ray, 1 for lightly")
    asked = parser.parse_args()
    threads = asked.threads or {"ray": 2, "lightly": 1, "one": 1}[asked.what]
    if asked.what == "one":
        torch.set_num_threads(threads)
        print(json.dumps(LOOPS[asked.loop](asked.steps)))
        return
    names = ["bare", "ray"] if asked.what == "ray" else ["lightly", "ours"]
    results = in_turn(names, rounds=asked.rounds, steps=asked.steps, threads=threads)
    line = report_ray if asked.what == "ray" else report_lightly
    print(json.dumps(line(results, threads)))


if __name__ == "__main__":
    main()
