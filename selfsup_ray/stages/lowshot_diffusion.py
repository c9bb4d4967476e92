"""One diffusion of the low-shot protocol: shared lists stay mapped, classes go through in ranges.

A run changes the lists of the rows near its few novel images alone. These changes, the adjacency
of the whole, and with several ranges of classes the scores, are what a run holds of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from selfsup_ray.artifacts import Array, create_mapped, require_disk
from selfsup_ray.errors import ResourceError
from selfsup_ray.ops.adjacency import Adjacency, Links, write_adjacency
from selfsup_ray.ops.completion import Patched, completed
from selfsup_ray.ops.diffusion import DiffusionOptions, spread_scores, weighted_adjacency
from selfsup_ray.ops.spreading import class_ranges, spread_bytes
from selfsup_ray.stages.lowshot_pool import Pool


def ranges_that_fit(
    num_classes: int, nodes: int, options: DiffusionOptions, *, memory_bytes: int
) -> list[tuple[int, int]]:
    """Return the ranges of classes that a worker spreads one after the other; one, if all fit.

    Raises ResourceError when not even 16 classes fit, or, with sinkhorn, not all.
    """
    together = options.sinkhorn > 0
    found = class_ranges(
        num_classes,
        nodes,
        dtype="float32",
        memory_bytes=memory_bytes,
        widest=num_classes,
        together=together,
    )
    if found:
        return found
    least = num_classes if together else 16
    needed = spread_bytes(nodes, least, dtype="float32") / 1e9
    why = ", which lowshot.diffusion.sinkhorn normalises together," if together else ""
    instead = ", or set lowshot.diffusion.sinkhorn=0" if together else ", or give fewer images"
    raise ResourceError(
        f"lowshot: {least} classes{why} on {nodes:,} images take {needed:.1f} GB, but "
        f"lowshot.memory_gb is {memory_bytes / 1e9:g}. Raise it{instead}."
    )


def completed_lists(pool: Pool, new: Array) -> tuple[Patched, Patched]:
    """Return ids and similarity of the pool's lists after rows `new` (m, d) were added.

    In memory: the lists that changed, and those of the new rows.
    """
    rows: list[Array] = []
    changed: list[tuple[Array, Array]] = []
    first, added = 0, None
    parts = completed(pool.shards(), new, k=pool.width, num_old=len(pool))
    for i, part in enumerate(parts):
        if i == pool.ids.num_shards:
            added = part
            break
        before = pool.ids.shard(i)[:, : pool.width]
        here = np.flatnonzero((part.ids != before).any(axis=1))
        rows.append(here + first)
        changed.append((part.ids[here].astype(np.int32), part.similarity[here]))
        first += len(before)
    assert added is not None, "the last lists are those of the new rows"
    ids, similarity = (np.concatenate(values) for values in zip(*changed, strict=True))
    replaced = np.concatenate(rows)
    return (
        Patched(pool.ids, replaced, ids, added.ids.astype(np.int32)),
        Patched(pool.similarity, replaced, similarity, added.similarity),
    )


@dataclass(frozen=True)
class Diffusing:
    """How a run diffuses: see `lowshot.diffusion`, `lowshot.memory_gb` and `lowshot.resources`.

    folder: local, for the adjacency and scores of this run alone; the caller removes it.
    """

    folder: Path
    options: DiffusionOptions
    memory_bytes: int
    threads: int
    device: str

    def adjacency(self, pool: Pool, new: Array) -> Adjacency:
        """Return the rows of B over the pool and rows `new`, mapped from the folder."""
        ids, similarity = completed_lists(pool, new)
        order = pool.order
        if order is not None:
            order = np.append(order, np.arange(len(pool), len(ids)))
        options = self.options
        if not options.is_constant:
            lists = (ids.whole(), similarity.whole())
            return weighted_adjacency(*lists, order=order, options=options)
        least = options.min_similarity
        return write_adjacency(
            self.folder / "adjacency",
            Links(ids, None if least is None else similarity, least),
            order=order,
            reciprocal=options.reciprocal,
            threads=self.threads,
            memory_bytes=self.memory_bytes,
        )

    def scores(
        self, graph: Adjacency, seeds: Array, near: Array, *, num_classes: int, niter: int
    ) -> Iterator[Array]:
        """Yield the (n_t, C) scores of the test images after 0..niter steps.

        With several ranges of classes the scores of all steps wait in a mapped file.
        """
        ranges = ranges_that_fit(
            num_classes, len(graph), self.options, memory_bytes=self.memory_bytes
        )

        def spread(first: int, stop: int) -> Iterator[Array]:
            return spread_scores(
                graph,
                seeds,
                near,
                first=first,
                stop=stop,
                niter=niter,
                threads=self.threads,
                device=self.device,
                variant=self.options.variant,
            )

        if len(ranges) == 1:
            yield from spread(0, num_classes)
            return
        shape = (niter + 1, len(near), num_classes)
        require_disk(self.folder, size_bytes=int(np.prod(shape)) * 4)
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = create_mapped(self.folder / "scores.npy", shape, np.float32)
        for first, stop in ranges:
            for t, part in enumerate(spread(first, stop)):
                kept[t, :, first:stop] = part
        yield from kept
