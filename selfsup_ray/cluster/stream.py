"""The stream feed on a cluster: Ray Data tasks read the blocks that a training worker asks for."""

from __future__ import annotations

import itertools
import json
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from selfsup_ray.cluster.data import described, error_of, numbered, settings
from selfsup_ray.cluster.session import (
    alive,
    connect,
    launch_config,
    require_resources,
    workers_that_fit,
)
from selfsup_ray.config import Resources
from selfsup_ray.data.shard_ranges import StoredImages
from selfsup_ray.errors import ResourceError, UserError

if TYPE_CHECKING:
    from selfsup_ray.data.datasets import Dataset
    from selfsup_ray.data.stream import Arrival, Feed
    from selfsup_ray.data.stream_order import Piece

TASKS = 4
"""Tasks that read for one worker at a time, each with one CPU; fewer where there are fewer."""
PIECES_A_TASK = 8
"""Pieces of one task: some MB, which take about as long as a task should."""
TASKS_AT_ONCE = 500
"""Tasks of one execution: enough to hide its start, few enough for Ray Data to plan at once."""
FAILED = -1
"""In place of a piece's number: the row holds what went wrong."""
BUFFER_BYTES = 512 * 2**20
"""Bytes of the object store that blocks may take which one worker has not asked for yet."""


def read_on_ray(images: StoredImages, pieces: Iterator[Piece]) -> Generator[Arrival, None, None]:
    """Read pieces by Ray Data, in their order; a `Reader` for the workers of a training.

    Each worker runs a pipeline of its own over what it alone needs, so that no barrier between the
    workers and no timing decides who gets what, and a restarted worker begins where it stopped.
    """
    while ahead := list(itertools.islice(pieces, TASKS_AT_ONCE * PIECES_A_TASK)):
        tasks = [ahead[i : i + PIECES_A_TASK] for i in range(0, len(ahead), PIECES_A_TASK)]
        yield from _execution(images, tasks)


def on_ray(dataset: Dataset) -> Dataset:
    """Return a training worker's dataset; a stream is read by Ray Data from now on."""
    from selfsup_ray.data.stream import Stream  # late: it imports torch, which tasks do without

    if isinstance(dataset, Stream):
        dataset.reader = read_on_ray
    return dataset


def require_reader(resources: Resources, *, stage: str) -> None:
    """Raise ResourceError at once unless the workers of a streamed training leave a CPU free.

    The tasks that read run beside the workers; without one, everything would wait forever.
    """
    import ray

    connect(None)
    require_resources(resources, stage=stage)
    nodes = alive()
    workers = min(resources.workers, sum(workers_that_fit(node, resources) for node in nodes))
    total = sum(node.get("CPU", 0) for node in nodes)
    if total - workers * resources.cpus >= 1:
        return
    if launch_config(ray.get_runtime_context().gcs_address) is not None:
        return  # the autoscaler adds a node for the tasks
    raise ResourceError(
        f"{stage} with feed.name=stream asks for {workers} workers with {resources.cpus:g} CPUs "
        f"each and a CPU more, for the tasks that read for them, but Ray has {total:g}. Lower "
        f"{stage}.resources, or join a larger cluster with --address."
    )


def held_bytes(feed: Feed, image_bytes: float, *, workers: int) -> float:
    """Return the memory for stored images of a worker which streams them; 0 for a mapped feed.

    image_bytes: of an image in its shard. What Ray has read ahead for the worker counts in.
    """
    from selfsup_ray.data.stream import READS_AT_A_TIME, StreamFeed
    from selfsup_ray.data.stream_order import BLOCK_ROWS

    if not isinstance(feed, StreamFeed):
        return 0.0
    images = (feed.buffer + feed.lanes * BLOCK_ROWS) / max(workers, 1)
    ahead = BUFFER_BYTES if workers else READS_AT_A_TIME * BLOCK_ROWS * image_bytes
    return images * image_bytes + ahead


def _execution(images: StoredImages, tasks: list[list[Piece]]) -> Generator[Arrival, None, None]:
    from ray.data import ExecutionResources, TaskPoolStrategy

    pieces, at_a_time = list(itertools.chain.from_iterable(tasks)), min(TASKS, len(tasks))
    with settings():
        blocks = numbered(len(tasks), concurrency=at_a_time).map_batches(
            _Read(images, [[(piece.first, piece.rows) for piece in task] for task in tasks]),
            batch_size=None,
            batch_format="pyarrow",
            compute=TaskPoolStrategy(size=at_a_time),
            num_cpus=1,
        )
        options = blocks.context.execution_options
        options.preserve_order = True
        options.resource_limits = ExecutionResources(object_store_memory=BUFFER_BYTES)
        for block in blocks.iter_batches(batch_size=None, batch_format="pyarrow"):
            for number, column in _columns(block):
                if number == FAILED:
                    raise error_of(json.loads(column[0].as_py()))
                yield pieces[number], column


def _columns(block: pa.Table) -> Iterator[tuple[int, pa.LargeBinaryArray]]:
    """Yield (number of the piece, images) for every run of images of one piece."""
    for part in block.to_batches():
        numbers = part.column("piece").to_numpy()
        cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
        for start, stop in itertools.pairwise(cuts):
            yield int(numbers[start]), part.column("image").slice(start, stop - start)


class _Read:
    """Body of a task: the pieces of a row's number, as a table of images for each.

    tasks: (first id, images) of each piece; plain numbers, since importing `Piece` imports torch.
    """

    def __init__(self, images: StoredImages, tasks: list[list[tuple[int, int]]]) -> None:
        self.images, self.tasks = images, tasks
        self.firsts = np.concatenate([[0], np.cumsum([len(task) for task in tasks])])

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        [task] = block.column("id").to_pylist()
        pieces = self.tasks[task]
        with ThreadPoolExecutor(len(pieces)) as pool:  # each mostly waits for the store
            reads = [pool.submit(self.images.read, *piece) for piece in pieces]
            try:
                for number, read in enumerate(reads, start=int(self.firsts[task])):
                    yield _table(number, read.result())
            except UserError as error:
                words = json.dumps(described(error)).encode()
                yield _table(FAILED, pa.array([words], pa.large_binary()))


def _table(number: int, images: pa.LargeBinaryArray) -> pa.Table:
    numbers = pa.array(np.full(len(images), number, np.int32))
    return pa.table({"piece": numbers, "image": images})
