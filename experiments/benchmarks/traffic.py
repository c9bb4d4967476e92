"""Bytes that the workers of a training send each other, per step and image, against the theory.

    python experiments/benchmarks/traffic.py --workers 2 --steps 6

Every pretext method, with batch normalisation that crosses workers and that does not, on a small
ResNet-18, by `training.fit` in gloo processes that share a loopback of their own. A training of
`--steps` steps more than another sends the bytes of these steps, start-up left out. One JSON line:
bytes of a step as `plan` has them (`costs_traffic.pretext_size`), bytes as the loopback counted
them, and their ratio. Expected: 1.00 to 1.03, the rest being headers, the ring's small messages,
and the loss that is averaged for a record. Linux, as root or where user namespaces are allowed.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopback import own_loopback, sent_bytes

if TYPE_CHECKING:
    from selfsup_ray.stages.pretext import PretextConfig

SIDE, IMAGES = 16, 512


def configs(batch: int) -> dict[str, PretextConfig]:
    """Return the trainings, by name; small networks, since only sizes matter."""
    from selfsup_ray.models.backbones import ResNetConfig
    from selfsup_ray.models.norm import LocalNorm, ShuffleNorm, SyncNorm
    from selfsup_ray.models.pretext import BYOLConfig, InsDisConfig, MoCoConfig, SimCLRConfig
    from selfsup_ray.stages.pretext import PretextConfig

    methods: dict[str, Any] = {
        "simclr, sync": SimCLRConfig(batch_norm=SyncNorm()),
        "simclr, local": SimCLRConfig(batch_norm=LocalNorm()),
        "moco, shuffle": MoCoConfig(queue_size=256, batch_norm=ShuffleNorm(group_size=8)),
        "moco, sync": MoCoConfig(queue_size=256, batch_norm=SyncNorm()),
        "byol, sync": BYOLConfig(batch_norm=SyncNorm()),
        "insdis, local": InsDisConfig(batch_norm=LocalNorm()),
    }
    backbone = ResNetConfig(stem="cifar", width=16)
    return {
        name: PretextConfig(
            method=method, backbone=backbone, batch_size=batch, epochs=1, log_every=1000
        )
        for name, method in methods.items()
    }


def on_rank(rank: int, size: int, name: str, steps: int, batch: int, meeting: Path) -> None:
    """Train `steps` steps as one of `size` processes."""
    import numpy as np
    import torch
    import torch.distributed as dist

    from selfsup_ray.config import override
    from selfsup_ray.data.views import Views
    from selfsup_ray.models.backbones import build_backbone
    from selfsup_ray.models.pretext import build_pretext
    from selfsup_ray.training import fit

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    config = override(configs(batch)[name], {"checkpoint_every": 10**6})
    images = np.zeros((steps * batch, 3, SIDE, SIDE), np.uint8)

    class Same:
        """Black images: what is sent does not depend on what they show."""

        def __len__(self) -> int:
            return len(images)

        def batch(self, ids: Any, *, epoch: int) -> list[Any]:
            return [torch.from_numpy(images[ids])]

    views = Views(config.views, image_size=SIDE, seed=0, num_views=2)
    backbone = build_backbone(config.backbone)
    objective = build_pretext(config.method, backbone, num_images=len(images))
    fit(objective, Same(), views, config, device="cpu")  # type: ignore[arg-type]
    dist.barrier()
    dist.destroy_process_group()


def bytes_of(name: str, *, size: int, steps: int, batch: int) -> int:
    """Return what a training of some steps sends in all."""
    import torch.multiprocessing as processes

    before = sent_bytes()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (size, name, steps, batch, Path(folder, "meeting"))
        processes.start_processes(on_rank, args=arguments, nprocs=size, start_method="fork")
    return sent_bytes() - before


def main() -> None:
    """Print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=64)
    given = parser.parse_args()
    own_loopback()
    from selfsup_ray.costs_traffic import pretext_size

    found: dict[str, Any] = {}
    for name, config in configs(given.batch).items():
        size = pretext_size(config, workers=given.workers, side=config.views.size or SIDE, n=IMAGES)
        few, many = (
            bytes_of(name, size=given.workers, steps=steps, batch=given.batch)
            for steps in (2, 2 + given.steps)
        )
        measured, planned = (many - few) / given.steps, size.step.total
        found[name] = {
            **{key: value for key, value in vars(size.step).items() if value},
            "planned_step": planned,
            "measured_step": round(measured),
            "per_image": round(measured / given.batch),
            "ratio": round(measured / planned, 4),
        }
    asked = {"workers": given.workers, "steps": given.steps, "batch": given.batch}
    print(json.dumps({"benchmark": "traffic", **asked, "methods": found}))


if __name__ == "__main__":
    main()
