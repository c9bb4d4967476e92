"""What a trained stage asks of the cluster, beside the `Resources` of every stage."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from selfsup_ray.config import Positive, Resources, config, to_dict


@config
class TrainResources(Resources):
    """What a trained stage asks of the cluster."""

    min_workers: Positive | None = None
    """Train with as many workers as there is room for, from this number up to `workers`: go on with
    fewer when a node is lost, and with more when one comes. None: with `workers`, always."""
    placement: Literal["pack", "spread"] = "pack"
    """pack: workers near each other, on few nodes; spread: on as many nodes as there are."""
    backend: Literal["by_device", "nccl", "gloo"] = "by_device"
    """What carries gradients from worker to worker. by_device: nccl where each worker has GPUs of
    its own, gloo elsewhere. gloo serves GPUs too, where NCCL finds no way between the nodes."""

    def __post_init__(self) -> None:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(
                f"min_workers={self.min_workers} is more than workers={self.workers}; workers is "
                f"the largest number, min_workers the smallest"
            )
        if self.backend == "nccl" and self.gpus < 1:
            raise ValueError(
                f"backend=nccl needs a GPU for each worker, but gpus={self.gpus:g}; "
                f"leave backend out, or set gpus=1"
            )

    @property
    def fewest(self) -> int:
        """Workers that there must be room for."""
        return self.workers if self.min_workers is None else self.min_workers

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change on the way."""
        return self.fewest != self.workers

    @property
    def transport(self) -> Literal["nccl", "gloo"]:
        """The backend, after it was chosen by device."""
        if self.backend != "by_device":
            return self.backend
        return "nccl" if self.gpus >= 1 else "gloo"


def _with_defaults(value: Any) -> Any:
    return to_dict(value) if type(value) is Resources else value


AnyResources = Annotated[TrainResources, BeforeValidator(_with_defaults)]
"""What a trained stage asks; plain Resources are taken with the defaults of the others."""
