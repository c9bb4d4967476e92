"""map_shards: shard numbers in, results out, a bounded number of Ray tasks in flight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

from selfsup_ray.cluster.failures import answers_still
from selfsup_ray.cluster.session import connect, require_resources
from selfsup_ray.config import Resources
from selfsup_ray.progress import track

T = TypeVar("T")

RETRIES = 3
"""Times a task is run again after its worker or node died, or a file could not be read."""


def map_shards(
    fn: Callable[[int], T],
    shards: Sequence[int],
    resources: Resources,
    *,
    label: str = "shards",
    address: str | None = None,
) -> Iterator[tuple[int, T]]:
    """Yield (shard number, fn(shard number)) as they finish; in this process when workers is 0.

    fn: picklable, reads its shard and writes its shard whole, may run twice. At most
    `resources.workers` run at a time, each with `resources.cpus` and `.gpus`. Results should be
    small: large ones belong into files. Raises ResourceError at once when there are too few CPUs
    or GPUs, and what fn raises.
    """
    results = _results(fn, shards, resources, label=label, address=address)
    if len(shards) < 2:
        yield from results
        return
    with track(label, len(shards), "shards") as progress:
        for result in results:
            progress.advance()
            yield result


def _results(
    fn: Callable[[int], T],
    shards: Sequence[int],
    resources: Resources,
    *,
    label: str,
    address: str | None,
) -> Iterator[tuple[int, T]]:
    if resources.workers == 0:
        yield from ((shard, fn(shard)) for shard in shards)
        return
    if not shards:
        return
    import ray
    from ray.exceptions import RayTaskError

    connect(address)
    require_resources(resources, stage=label)
    run: Any = ray.remote(_run).options(
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
        max_retries=RETRIES,
        retry_exceptions=[OSError],
        name=label,
    )
    shared, waiting = ray.put(fn), iter(shards)
    running = {run.remote(shared, shard): shard for shard in islice(waiting, resources.workers)}
    try:
        while running:
            [done], _ = ray.wait(list(running), num_returns=1)
            shard = running.pop(done)
            running |= {run.remote(shared, later): later for later in islice(waiting, 1)}
            yield shard, ray.get(done)
    except RayTaskError as error:
        raise error.cause from error
    finally:
        if running and answers_still():  # the caller stopped early, or a task failed
            for task in running:
                ray.cancel(task)


def _run(fn: Callable[[int], T], shard: int) -> T:
    return fn(shard)
