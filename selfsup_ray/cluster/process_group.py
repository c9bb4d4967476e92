"""The process group of a training's workers, set up by a controller that does not import torch.

Ray Train's own TorchConfig does the same for CPU and CUDA, and torch comes with it: 2 CPU seconds
of every training, in a process that has no other use for it. Here only functions import torch.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import ray
from ray.train.backend import Backend, BackendConfig

log = logging.getLogger(__name__)

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Ray notices a worker that died long before."""

LEAVE_S = 30.0
"""Longest wait for the workers to leave the group."""


@dataclass
class ProcessGroup(BackendConfig):
    """How the workers reach each other: in place of TorchConfig, as TorchTrainer's torch_config."""

    backend: Literal["nccl", "gloo"]

    @property
    def backend_cls(self) -> type[Backend]:
        """Return what the controller calls when the workers have started and before they end."""
        return _Connection


class _Connection(Backend):
    share_cuda_visible_devices = True  # NCCL copies between GPUs of a node where each sees all

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, ProcessGroup)
        address, port = worker_group.execute_single(0, open_store)
        facts = {"address": address, "port": port, "backend": backend_config.backend}
        size = len(worker_group)
        start = worker_group.execute_single_async
        ray.get([start(k, join, world_rank=k, world_size=size, **facts) for k in range(size)])

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        try:
            ray.get(worker_group.execute_async(leave), timeout=LEAVE_S)
        except ray.exceptions.GetTimeoutError:  # the processes end now in any case
            log.warning("the process group did not end within %.0f s", LEAVE_S)


_store: Any = None
"""Of rank 0's process: torch's key-value store, by which the ranks find each other."""


def open_store() -> tuple[str, int]:
    """Open the store in rank 0's process; return the address and port where it listens."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    global _store
    address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    _store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
    return address, _store.port


def join(*, address: str, port: int, backend: str, world_rank: int, world_size: int) -> None:
    """Make this process one rank of the group."""
    from torch.distributed import TCPStore, init_process_group  # type: ignore[attr-defined]

    store = _store if world_rank == 0 else TCPStore(address, port)
    init_process_group(
        backend,
        store=store,
        rank=world_rank,
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )


def leave() -> None:
    """End this process's part of the group."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
