"""Ray Data pipelines over shards: a stream of shard numbers through tasks, or an actor pool."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from selfsup_ray import errors
from selfsup_ray.cluster.session import connect, require_resources
from selfsup_ray.config import Resources
from selfsup_ray.errors import UserError

if TYPE_CHECKING:
    from ray.data import Dataset

Batch = Any  # dict of numpy arrays; Ray's own type is wider than any function accepts
Facts = dict[str, Any]
Work = Callable[[int], Facts]
_ERROR = "error of the user"


def stream_tasks(
    work: Work, shards: Sequence[int], resources: Resources, *, stage: str
) -> Iterator[tuple[int, Facts]]:
    """Yield (shard, work(shard)) as Ray Data's tasks finish; in this process when workers is 0.

    work: picklable; reads and writes files, may run twice, and returns a few plain values that
    JSON can hold. At most `resources.workers` tasks run at a time, fewer where there are fewer
    CPUs. A task whose worker or node dies is run again.
    """
    if resources.workers == 0:
        yield from ((shard, work(shard)) for shard in shards)
        return
    if not shards:
        return
    from ray.data import TaskPoolStrategy

    connect(None)
    require_resources(Resources(workers=1, cpus=resources.cpus, gpus=resources.gpus), stage=stage)
    at_a_time = min(resources.workers, len(shards))
    with settings():
        rows = numbered(len(shards), concurrency=at_a_time).map_batches(
            _Work(work, shards),
            batch_size=None,
            compute=TaskPoolStrategy(size=at_a_time),
            **_each(resources),
        )
        yield from _results(rows)


def stream_actors(
    make: Callable[[], Work], shards: Sequence[int], resources: Resources, *, stage: str
) -> Iterator[tuple[int, Facts]]:
    """Yield (shard, work(shard)), with one `work = make()` in each actor of a Ray Data pool.

    For work that loads something first, such as an encoder. Otherwise as `stream_tasks`; an actor
    that dies is made anew and its shard done again. Raises ResourceError when `resources.fewest`
    actors do not fit; with more room there are more.
    """
    if resources.workers == 0:
        work = make()
        yield from ((shard, work(shard)) for shard in shards)
        return
    if not shards:
        return
    from ray.data import ActorPoolStrategy

    connect(None)
    require_resources(resources, stage=stage)
    fewest, most = (min(n, len(shards)) for n in (resources.fewest, resources.workers))
    with settings():
        rows = numbered(len(shards)).map_batches(
            _ActorWork,
            fn_constructor_args=(make, shards),
            batch_size=None,
            compute=ActorPoolStrategy(min_size=fewest, max_size=most),
            **_each(resources),
        )
        yield from _results(rows)


class _Work:
    """A function of one shard number as a function of a batch of one row."""

    def __init__(self, work: Work, shards: Sequence[int]) -> None:
        self.work = work
        self.shards = np.asarray(shards, dtype=np.int64)

    def __call__(self, batch: Batch) -> Batch:
        [shard] = self.shards[batch["id"]].tolist()
        try:
            facts = self.work(shard)
        except UserError as error:  # said to the user as it is, without Ray's pages around it
            facts = {_ERROR: described(error)}
        return {"shard": np.array([shard]), "facts": np.array([json.dumps(facts)])}


class _ActorWork(_Work):
    """The same, made inside an actor."""

    def __init__(self, make: Callable[[], Work], shards: Sequence[int]) -> None:
        super().__init__(make(), shards)


def numbered(n: int, *, concurrency: int | None = None) -> Dataset:
    """Return a dataset of n rows 0..n-1, `id`, in n blocks.

    Ray fuses it with a map of the same concurrency, one CPU, and batches of whole blocks.
    """
    import ray

    return ray.data.range(n, override_num_blocks=n, concurrency=concurrency)


def _each(resources: Resources) -> dict[str, Any]:
    return {"num_cpus": resources.cpus} | ({"num_gpus": resources.gpus} if resources.gpus else {})


def _results(rows: Dataset) -> Iterator[tuple[int, Facts]]:
    for batch in rows.iter_batches(batch_size=None, batch_format="numpy"):
        for shard, text in zip(batch["shard"].tolist(), batch["facts"], strict=True):
            facts = json.loads(str(text))
            if _ERROR in facts:
                raise error_of(facts[_ERROR])
            yield shard, facts


def described(error: UserError) -> list[str]:
    """Return kind and message of an error, as data that goes through Ray unchanged."""
    kind = next(c.__name__ for c in type(error).__mro__ if c.__module__ == errors.__name__)
    return [kind, str(error)]


def error_of(description: list[str]) -> UserError:
    """Return the error that `described` put into words."""
    kind, message = description
    made: UserError = getattr(errors, kind)(message)
    return made


@contextmanager
def settings() -> Iterator[None]:
    """Run quietly, and without readers that start anew for each execution."""
    from ray.data import DataContext

    wanted = {
        "enable_progress_bars": False,  # the caller has its own
        "print_on_execution_start": False,
        "use_datasource_v2": False,
        "retried_map_errors": ["Errno"],  # an OSError of a file system that hiccups
        "max_map_retries": 3,
    }
    context, ray_log = DataContext.get_current(), logging.getLogger("ray.data")
    before, level = {name: getattr(context, name) for name in wanted}, ray_log.level
    ray_log.setLevel(logging.ERROR)
    for name, value in wanted.items():
        setattr(context, name, value)
    try:
        yield
    finally:
        ray_log.setLevel(level)
        for name, value in before.items():
            setattr(context, name, value)
