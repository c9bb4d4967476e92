"""What the low-shot protocol costs: by images, classes, background folders and runs."""

from __future__ import annotations

from dataclasses import dataclass

from selfsup_ray.config import read_yaml
from selfsup_ray.costs_graph import SEARCH_FLOPS
from selfsup_ray.costs_training import WORKER_BYTES, Cost
from selfsup_ray.errors import ArtifactError
from selfsup_ray.experiment import Experiment
from selfsup_ray.ops.spreading import spread_bytes
from selfsup_ray.stages.embed import Embeddings
from selfsup_ray.stages.lowshot_config import ClassesConfig, LowShotConfig

LINKS_PER_NEIGHBOR = 1.45
"""Links of an image for each neighbor it lists, once every link goes both ways."""
LINK_CLASSES_PER_S = 5e9
"""Links times classes of diffusion that one CPU core does in a second, in any order of images."""
TEST_SHARE = 0.05
"""Of the images, assumed to be for testing."""
PASSES = 3
"""Of every n and seed: validation explored, then the chosen on validation and on test classes."""


@dataclass(frozen=True)
class _Sizes:
    """nodes: of the largest graph; others: background rows of folders, those without a graph
    apart too; classes, novel: of one set-up.
    """

    nodes: int
    others: int
    without_graph: tuple[int, ...]
    classes: int
    novel: int


def lowshot_cost(e: Experiment, n: int, *, dim: int) -> Cost:
    """Return the cost of the protocol on n images with rows of `dim` numbers."""
    assert e.lowshot is not None
    made = e.lowshot
    sizes, ask = _sizes(made, n), made.resources
    links = LINKS_PER_NEIGHBOR * made.k * sizes.nodes
    labels = spread_bytes(sizes.nodes, sizes.classes, dtype="float32")
    budget = made.memory_gb * 1e9
    exact = max(n, *sizes.without_graph, 0) if made.search.name == "exact" else 0
    runs = PASSES * len(made.shots) * len(made.seeds)
    search, run = _search_flops(made, sizes, n, dim), _run_s(made, sizes, dim, links)
    cores = ask.cpus * max(ask.workers, 1)
    seconds = search / (SEARCH_FLOPS * cores) + runs * run / cores
    scores = (made.niter + 1) * TEST_SHARE * n * sizes.classes * 4 if labels > budget else 0
    shared = 2 * n * dim * 4 + 2 * (n + 2 * sizes.others) * made.k * 8
    return Cost(
        memory_bytes=int(
            WORKER_BYTES
            + max(min(labels, budget), exact * dim * 4 / max(ask.workers, 1))
            + links * 4
        ),
        disk_bytes=int(shared + max(ask.workers, 1) * (links * 4 + scores)),
        seconds=seconds if seconds > 600 else None,
        assumes=f"{len(made.shots) * len(made.seeds)} runs of each set-up, {sizes.nodes:,} nodes "
        f"({sizes.others:,} of background folders), {sizes.classes:,} classes, d={dim} at most; "
        f"{search / (SEARCH_FLOPS * cores):,.0f} s of search and {run / cores:,.0f} s a run; the "
        f"grid of the linear classifier adds to it",
    )


def _sizes(made: LowShotConfig, n: int) -> _Sizes:
    folders = made.background.folders if "diffusion_background" in made.methods else ()
    rows = []
    for folder in folders:
        try:
            rows.append(len(Embeddings.open(folder.path)))
        except ArtifactError:  # not made yet: nothing is known of it, and the run itself says so
            rows.append(0)
    others = sum(rows)
    without = tuple(r for r, f in zip(rows, folders, strict=True) if f.graph is None)
    base, novel = _classes(made.classes)
    return _Sizes(n + others, others, without, base + novel, novel)


def _classes(config: ClassesConfig) -> tuple[int, int]:
    """Return base and novel classes of a set-up, at most; without a file as many novel as base."""
    if config.file is None:
        assert config.num_base is not None
        half = -(-config.num_base // 2)
        return config.val_base or half, config.val_novel or half
    lists = read_yaml(config.file) if config.file.is_file() else {}
    sizes = {
        kind: [len(values) for key, values in lists.items() if key.startswith(kind)]
        for kind in ("base", "novel")
    }
    return max(sizes["base"], default=0), max(sizes["novel"], default=0)


def _search_flops(made: LowShotConfig, sizes: _Sizes, n: int, dim: int) -> float:
    """Return the work of the lists that all runs share."""
    own = [n, *sizes.without_graph]
    # Cells look into about a thousandth of the pairs, at a million images.
    pairs = sum(float(m) * m for m in own)
    if made.search.name != "exact":
        pairs = sum(float(m) * min(m, 4000) for m in own)
    return 2.0 * dim * (pairs + float(n) * sizes.others)


def _run_s(made: LowShotConfig, sizes: _Sizes, dim: int, links: float) -> float:
    """Return the seconds of one run's diffusions on one core."""
    novel = sizes.novel * sum(made.shots) / len(made.shots)
    methods = sum(name in made.methods for name in ("diffusion", "diffusion_background"))
    completion = 2.0 * sizes.nodes * novel * dim / SEARCH_FLOPS
    return methods * (completion + made.niter * links * sizes.classes / LINK_CLASSES_PER_S)
