"""Freed memory stays in the process inside a `kept` block, and only there."""

import platform
import resource
from pathlib import Path

import pytest
import torch

from selfsup_ray.memory import kept

PAGES = 64 * 2**20 // 4096


def faults_of_a_block(rounds: int) -> float:
    """Return the page faults of allocating, filling and freeing 64 MB, after some rounds."""
    for _ in range(rounds):
        torch.ones(64 * 2**18)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(64 * 2**18)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 4


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it sets glibc's malloc")


@on_glibc
def test_memory_that_is_used_again_costs_no_page_faults_inside_the_block():
    outside = faults_of_a_block(rounds=1)
    with kept(torch.device("cpu")):
        inside = faults_of_a_block(rounds=20)  # the first rounds leave holes of unfit sizes
    assert outside > PAGES // 2
    assert inside < PAGES // 10


@on_glibc
def test_the_end_of_the_block_gives_the_memory_back():
    with kept(torch.device("cpu")):
        torch.ones(512 * 2**18)
        inside = resident_bytes()
    assert inside - resident_bytes() > 400 * 2**20
