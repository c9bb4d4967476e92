"""A pretraining that streams its images; run by test_stream.py in a process that may be killed.

    python streaming.py alone OUT CORPUS          in this process
    python streaming.py ray OUT CORPUS PHOTOS     by two Ray Train workers, one of which is killed

`ray` ingests PHOTOS by Ray's tasks first, beside OUT.
"""

import dataclasses
import os
import signal
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

from selfsup_ray.config import Resources
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.stream import StreamFeed
from selfsup_ray.models.backbones import ResNetConfig
from selfsup_ray.models.encoder import Encoder
from selfsup_ray.optim import SGDConfig
from selfsup_ray.resources import TrainResources
from selfsup_ray.stages.ingest import IngestConfig, ingest
from selfsup_ray.stages.pretext import PretextConfig, pretrain

INGEST = IngestConfig(image_size=32, shard_size=64, encoding="jpeg", resources=Resources(workers=0))
CONFIG = PretextConfig(
    epochs=3,
    batch_size=16,
    feed=StreamFeed(lanes=4, buffer=64),
    backbone=ResNetConfig(stem="cifar", width=8),
    optim=SGDConfig(lr=0.003),
    precision="float32",
    log_every=2,
    checkpoint_every=3,
    resources=TrainResources(workers=0),
)
STEPS = 3 * (200 // 16)


def alone(out: Path, corpus: Path | str) -> Encoder:
    """Train in this process."""
    return pretrain(Corpus.open(corpus), CONFIG, out=out)


def by_ray(out: Path, corpus: str, photos: str) -> None:
    """Train by two workers of a Ray of its own, and kill one of them after the first checkpoint."""
    import ray

    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=200 * 2**20,
            _temp_dir=folder,
        )
        on_ray = dataclasses.replace(INGEST, resources=Resources(workers=2))
        ingest(photos, on_ray, out=out.with_name("ingested"))
        threading.Thread(target=kill_a_worker, args=(out,), daemon=True).start()
        two = dataclasses.replace(CONFIG, resources=TrainResources(workers=2))
        pretrain(Corpus.open(corpus), two, out=out)
        ray.shutdown()


def kill_a_worker(out: Path) -> None:
    """Kill a training worker among this process's children, once there is a checkpoint."""
    import psutil

    while not (out / "checkpoint.pt").exists():
        time.sleep(0.02)
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.cmdline()[0].startswith("ray::RayTrainWorker"):
                os.kill(process.pid, signal.SIGKILL)
                (out.parent / "killed").touch()
                return


if __name__ == "__main__":
    mode, folder, *rest = sys.argv[1:]
    {"alone": alone, "ray": by_ray}[mode](Path(folder), *rest)
