"""The exact graph of all pairs on the actors of a search: steps handed out, files between."""

from __future__ import annotations

import importlib.util
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from selfsup_ray.artifacts import ShardedArray
from selfsup_ray.errors import UserError
from selfsup_ray.ops.all_pairs import AllPairs, run_joins, run_settles

log = logging.getLogger(__name__)

FROM_ROWS = 32768
"""Rows from which all pairs are formed at once; fewer are not worth compiling the kernels."""


def pays(missing: Sequence[int], ids: ShardedArray) -> bool:
    """Return whether the missing shards of exact lists come from all pairs at once.

    The same lists as a search by every row, 2 to 4 times faster; but not for a few rows, or for
    the small rest that an interrupted search left.
    """
    rest = sum(ids.shard_rows[i] for i in missing)
    if not rest or len(ids) < FROM_ROWS:
        return False
    if importlib.util.find_spec("numba") is None:
        log.warning("numba is not installed: every row is searched, same lists, slower")
        return False
    return 2 * rest >= len(ids) or (_between(ids) / "plan.json").exists()


def write_all_pairs(
    array: ShardedArray,
    ids: ShardedArray,
    similarity: ShardedArray,
    missing: Sequence[int],
    *,
    actors: Sequence[Any],
    threads: int,
) -> Iterator[int]:
    """Write the missing shards of every row's k nearest others; yield each number.

    actors: run the steps, `threads` at a time each; without any they run in this process. What an
    interrupted run has joined is kept.
    """
    parts = threads * max(1, len(actors))
    pairs = AllPairs.begin(array, _between(ids), k=ids.shape[1], parts=parts)
    how: dict[str, Any] = {"actors": actors, "threads": threads}
    joins = _batches(pairs.missing_joins, threads)
    log.info("graph: %d groups of rows, joined in %d steps", pairs.num_groups, len(joins))
    deque(_share(run_joins, pairs, joins, **how), maxlen=0)
    deque(_share(run_settles, pairs, _batches(pairs.missing_lists, threads), **how), maxlen=0)
    out = (ids.path.resolve(), similarity.path.resolve())
    shards = [(i, *out) for i in missing]
    for i, *_ in _share(_write, pairs, shards, **how):
        yield i
    pairs.remove()


def _batches(parts: list[Any], size: int) -> list[list[Any]]:
    """Return the parts, as many in a batch as one worker has threads."""
    return [parts[i : i + size] for i in range(0, len(parts), size)]


def _share(
    step: Callable[[AllPairs, Any, int], None],
    pairs: AllPairs,
    parts: Sequence[Any],
    *,
    actors: Sequence[Any],
    threads: int,
) -> Iterator[Any]:
    """Run step(pairs, part, threads) for every part, on whichever actor is free; yield the part."""
    if not actors:
        for part in parts:
            step(pairs, part, threads)
            yield part
        return
    import ray

    idle, waiting = list(actors), list(parts)[::-1]
    running: dict[Any, tuple[Any, Any]] = {}
    while waiting or running:
        while waiting and idle:
            actor, part = idle.pop(), waiting.pop()
            call = actor.__ray_call__.remote(_in_actor, step, pairs, part, threads)
            running[call] = (actor, part)
        (done,), _ = ray.wait(list(running), num_returns=1)
        answers([done])
        actor, part = running.pop(done)
        idle.append(actor)
        yield part


def _in_actor(_actor: Any, step: Callable[..., None], *args: Any) -> None:
    step(*args)


def _write(pairs: AllPairs, part: tuple[int, Path, Path], threads: int) -> None:
    i, ids, similarity = part
    pairs.write(i, ShardedArray.open(ids), ShardedArray.open(similarity))


def _between(ids: ShardedArray) -> Path:
    """Return the folder of the files between, next to the lists."""
    return ids.path.parent / "pairs"


def answers(refs: list[Any]) -> list[Any]:
    """Return ray.get's values; an error the user can mend comes without Ray's traceback."""
    import ray

    try:
        values: list[Any] = ray.get(refs)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    return values
