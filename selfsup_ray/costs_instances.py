"""Machines that can be rented by the hour: memory, and what they cost on demand."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Instance:
    """One type of machine: two vCPUs a core, memory in GiB, GPUs, dollars an hour."""

    vcpus: int
    memory_gib: int
    gpus: int
    dollars: float

    @property
    def memory_bytes(self) -> int:
        """Memory of the machine."""
        return self.memory_gib * 2**30


INSTANCES = {
    "m7i.2xlarge": Instance(8, 32, 0, 0.40),
    "m7i.4xlarge": Instance(16, 64, 0, 0.81),
    "m7i.8xlarge": Instance(32, 128, 0, 1.61),
    "m7i.16xlarge": Instance(64, 256, 0, 3.23),
    "r7i.8xlarge": Instance(32, 256, 0, 2.12),
    "g5.xlarge": Instance(4, 16, 1, 1.01),
    "g5.12xlarge": Instance(48, 192, 4, 5.67),
    "g6.xlarge": Instance(4, 16, 1, 0.80),
    "g6.12xlarge": Instance(48, 192, 4, 4.60),
}
"""On-demand list prices in us-west-2 at the end of 2025, Linux; spot machines cost a third to a
half. Others, or your own, come with `plan --price TYPE=DOLLARS`."""
