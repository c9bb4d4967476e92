"""Bringing stored images to the training loop: mapped, streamed, and plain Ray Data.

    python experiments/benchmarks/stream.py --images 16384 --side 128

One epoch of uint8 batches of JPEG images, without views, as one training worker gets them: from
memory-mapped shards by id (`mapped`); by the stream's blocks in this process (`stream_here`, what
`workers: 0` does); by the same blocks through Ray Data tasks (`stream`); and by Ray Data alone,
Parquet -> map_batches(decode) -> iter_torch_batches with a local shuffle buffer of the same size
(`ray_data`), whose order cannot be continued. They take turns; figures are medians of the rounds,
after a first round that starts Ray's processes. Prints one JSON line with images per CPU second,
over all processes, and per second of wall time. Bar: stream_per_core / ray_data_per_core >= 1.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from selfsup_ray.batches import Batches
from selfsup_ray.cluster.session import connect
from selfsup_ray.cluster.stream import read_on_ray
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.datasets import Images
from selfsup_ray.data.stream import Reader, Stream, StreamFeed, read_here
from selfsup_ray.data.synthetic import corpus_of_arrays
from selfsup_ray.training import TrainConfig


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and all that it started and that still run."""
    from ray._private.services import psutil  # Ray's own copy

    me = psutil.Process()
    total = 0.0
    for process in [me, *me.children(recursive=True)]:
        try:
            spent = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += spent.user + spent.system
    return total


def write_corpus(folder: Path, count: int, side: int) -> Corpus:
    """Write smooth random pictures, whose JPEG files have the size of photos."""
    generator = np.random.default_rng(0)
    small = generator.integers(0, 256, (64, side // 8, side // 8, 3), dtype=np.uint8)
    large = [np.asarray(Image.fromarray(one).resize((side, side))) for one in small]
    noise = generator.normal(0, 6, (side, side, 3))
    images = np.stack([(one + noise).clip(0, 255).astype(np.uint8) for one in large])
    every = images[np.arange(count) % len(images)]
    return corpus_of_arrays(folder / "corpus", every, encoding="jpeg", shard_size=2048)


def write_parquet(corpus: Corpus, folder: Path) -> Path:
    """Write the same files as Parquet, one file for each shard."""
    (folder / "parquet").mkdir()
    for i in range(corpus.num_shards):
        ids = range(int(corpus.offsets[i]), int(corpus.offsets[i + 1]))
        table = pa.table({"image": [corpus.encoded(id) for id in ids], "id": list(ids)})
        pq.write_table(table, folder / "parquet" / f"{i:05d}.parquet", compression="none")
    return folder / "parquet"


def decode(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch of Ray Data with its images decoded."""
    import simplejpeg

    batch["image"] = np.stack([simplejpeg.decode_jpeg(data) for data in batch["image"]])
    return batch


def by_ray_data(folder: Path, *, batch: int, buffer: int, seed: int) -> int:
    """Read an epoch as Ray Data's own pages show it; return the images that came."""
    import ray

    rows = ray.data.read_parquet(str(folder), shuffle="files").map_batches(decode, batch_size=256)
    seen = 0
    for part in rows.iter_torch_batches(
        batch_size=batch, local_shuffle_buffer_size=buffer, local_shuffle_seed=seed
    ):
        seen += len(part["id"])
    return seen


def by_us(corpus: Corpus, reader: Reader | None, *, batch: int, buffer: int, seed: int) -> int:
    """Read an epoch through one of our feeds; return the images that came."""
    config = TrainConfig(epochs=1, batch_size=batch, seed=seed)
    feed = StreamFeed(lanes=8, buffer=buffer)
    stream = Stream(corpus, feed, batch_size=batch, seed=seed, reader=reader or read_here)
    dataset = Images(corpus) if reader is None else stream
    seen = 0
    for [images], ids in Batches(dataset, config, pin=False).read_ahead(0):
        assert images.dtype == torch.uint8
        seen += len(ids)
    return seen


def timed(read: Callable[[], int]) -> tuple[float, float]:
    """Return images per CPU second and per second."""
    cpu, began = cpu_seconds(), time.perf_counter()
    seen = read()
    return seen / (cpu_seconds() - cpu), seen / (time.perf_counter() - began)


def main() -> None:
    """Print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=16384)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--buffer", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        corpus = write_corpus(Path(temporary), given.images, given.side)
        parquet = write_parquet(corpus, Path(temporary))
        connect("local", num_cpus=3)
        import ray

        ray.data.DataContext.get_current().enable_progress_bars = False
        how = {"batch": given.batch, "buffer": given.buffer}
        paths: dict[str, Callable[[int], int]] = {
            "mapped": lambda seed: by_us(corpus, None, seed=seed, **how),
            "stream_here": lambda seed: by_us(corpus, read_here, seed=seed, **how),
            "stream": lambda seed: by_us(corpus, read_on_ray, seed=seed, **how),
            "ray_data": lambda seed: by_ray_data(parquet, seed=seed, **how),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in paths}
        for seed in range(given.rounds + 1):
            for name, read in paths.items():
                found[name].append(timed(lambda read=read, seed=seed: read(seed)))
        size = sum(path.stat().st_size for path in (corpus.path / "shards").iterdir())
        ray.shutdown()
    medians = {name: np.median(np.array(rates[1:]), axis=0) for name, rates in found.items()}
    core = {name: float(rates[0]) for name, rates in medians.items()}
    result = {
        "benchmark": "stream",
        "images": given.images,
        "side": given.side,
        "kilobytes_per_image": round(size / given.images / 1e3, 1),
        **how,
        "load": round(os.getloadavg()[0], 1),
        **{f"{name}_per_core": round(rates[0]) for name, rates in medians.items()},
        **{f"{name}_per_s": round(rates[1]) for name, rates in medians.items()},
        "stream_of_mapped": round(core["stream"] / core["mapped"], 2),
        "stream_of_ray_data": round(core["stream"] / core["ray_data"], 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
