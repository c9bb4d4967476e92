"""What a kNN graph and a diffusion on it cost, as plain numbers; `costs` asks for an experiment."""

from __future__ import annotations

import math
from dataclasses import dataclass

from selfsup_ray.cluster.methods import ExactConfig, HNSWConfig, IVFConfig
from selfsup_ray.config import Resources
from selfsup_ray.stages.cell_graph import CellsConfig

SEARCH_FLOPS = 60e9
"""Multiplications and additions a second of exact search on one CPU core (faiss, float32)."""
GPU_SEARCH_FLOPS = 5e12
JOIN_FLOPS = 250e9
"""The same of bfloat16 products in the cell join, on a core with AVX512-BF16 or AMX."""
JOIN_ROW_S = 14e-6
"""Seconds of one core for a row in the cell join besides products, and again as much for every 256
numbers of it: selection, gathers, sorting (38.2 s in all for 1 M x 256 on one core measured)."""
JOIN_LIST_S = 75e-6
"""Seconds of one core to take a cell's rows for one range of rows that looks there: 60 to 77e-6 in
a profile of two ranges of 10 M x 64, on a busy machine, the product included."""
GROUPS = 13
"""Groups of about sqrt(cells) centers that a row is compared with to find its cell."""
GROWTH = 1.35
"""Members of a looked-into cell over the average: full cells are looked into more often."""


@dataclass(frozen=True)
class GraphCost:
    """memory_bytes: of one worker, without the process itself; disk_bytes: at the peak; seconds."""

    memory_bytes: int
    disk_bytes: int
    seconds: float
    assumes: str


def graph_cost(
    method: ExactConfig | CellsConfig | IVFConfig | HNSWConfig,
    *,
    n: int,
    dim: int,
    k: int,
    resources: Resources,
) -> GraphCost:
    """Return what the lists of n rows (n, dim) cost by a method of the stage `graph`."""
    workers, lists = max(resources.workers, 1), n * k * 8
    cores = workers * resources.cpus
    match method:
        case CellsConfig():
            return _cells(method, n=n, dim=dim, k=k, cores=cores)
        case IVFConfig():
            scanned = n * method.probes(n) / method.lists(n) * GROWTH
            seconds = 2.0 * n * scanned * dim / (SEARCH_FLOPS / 8 * cores)
            note = f"{scanned:,.0f} rows compared with each, at the speed of single queries"
        case HNSWConfig():
            seconds = n * (method.ef_construction + method.ef_search) * dim * 6e-9 / cores
            note = "graphs built row by row"
        case ExactConfig():
            gpus = GPU_SEARCH_FLOPS * resources.gpus * workers
            seconds = n * float(n) * dim / (gpus or SEARCH_FLOPS * cores)
            note = "every pair compared once"
    return GraphCost(n * dim * 4 // workers, lists, seconds, f"d={dim} at most, {note}")


def _cells(method: CellsConfig, *, n: int, dim: int, k: int, cores: float) -> GraphCost:
    size, ranges = n / method.cells(n), math.ceil(n / method.range_rows(n, dim=dim, k=k))
    compared = method.probes * size * GROWTH + GROUPS * method.cells(n) ** 0.5
    flops = 2.0 * n * compared * dim
    # Small classes scatter near cells over the whole order, so a range looks into most of them.
    taken = ranges * method.cells(n) * JOIN_LIST_S if ranges > 1 else 0.0
    seconds = (flops / JOIN_FLOPS + n * JOIN_ROW_S * (1 + dim / 256) + taken) / cores
    note = f"{method.probes} cells of {size:.0f} rows compared with each, {JOIN_FLOPS / 1e9:.0f} "
    return GraphCost(
        method.memory_mb * 1_000_000,
        # The rows twice in files on the way: in parts, then in the order of the cells.
        n * (dim * 8 + k * 16 + 24),
        seconds,
        f"d={dim} at most, {note}GFLOP/s a core",
    )
