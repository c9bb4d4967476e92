"""The stream feed: each image once an epoch, in an order that only seed and epoch decide."""

import itertools
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from selfsup_ray.batches import Batches
from selfsup_ray.cluster.stream import BUFFER_BYTES, held_bytes
from selfsup_ray.config import build
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.shard_files import Rows, shard_path, write_shard
from selfsup_ray.data.shard_ranges import StoredImages, parsed
from selfsup_ray.data.stream import MappedFeed, Stream, StreamFeed, read_here
from selfsup_ray.data.stream_order import BLOCK_ROWS, Piece, StreamOrder
from selfsup_ray.data.synthetic import corpus_of_arrays, shape_images
from selfsup_ray.errors import ArtifactError, ConfigError
from selfsup_ray.experiment import Experiment
from selfsup_ray.ops.rng import permuted
from selfsup_ray.stages.pretext import PretextConfig
from selfsup_ray.training import TrainConfig

FEED = StreamFeed(lanes=4, buffer=128)
CONFIG = TrainConfig(epochs=3, batch_size=32, accumulate=2)
N, STEPS = 700, 21  # 700 // 32


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    images, labels = shape_images(N, size=8)
    out = tmp_path_factory.mktemp("stream") / "corpus"
    return corpus_of_arrays(out, images, labels, shard_size=300, encoding="png")


def batches(corpus: Corpus, feed: StreamFeed = FEED, seed: int = 0) -> Batches:
    return Batches(Stream(corpus, feed, batch_size=32, seed=seed), CONFIG, pin=False)


def ids_of(feed: Batches, start: int = 0) -> list[list[int]]:
    return [ids.tolist() for _, ids in feed.read(start)]


@pytest.mark.parametrize(
    ("shard_rows", "batch_size", "lanes", "buffer"),
    [((300, 0, 511, 7), 32, 4, 64), ((97,), 16, 8, 16), ((5,) * 40, 8, 2, 1000), ((9,), 9, 1, 9)],
)
def test_an_epoch_shows_every_image_once_but_the_rest_of_the_last_batch(
    shard_rows, batch_size, lanes, buffer
):
    order = StreamOrder(shard_rows, batch_size=batch_size, lanes=lanes, buffer=buffer, seed=3)
    n = sum(shard_rows)
    used = n // batch_size * batch_size
    epochs = [order.ids(np.arange(used), epoch=epoch) for epoch in range(4)]
    for ids in epochs:
        assert len(set(ids.tolist())) == used and ids.min() >= 0 and ids.max() < n
    assert all((a != b).any() for a, b in itertools.pairwise(epochs)) or used < 10


def test_images_are_those_of_their_ids_and_the_epochs_differ(corpus):
    read = list(batches(corpus).read_ahead(0))
    assert len(read) == 3 * STEPS * 2
    for [images], ids in read:
        assert torch.equal(images, corpus.images(ids))
    epochs = [torch.cat([ids for _, ids in read[e * 42 : (e + 1) * 42]]) for e in range(3)]
    assert all(len(ids.unique()) == STEPS * 32 for ids in epochs)
    assert not torch.equal(epochs[0], epochs[1])


def test_the_order_is_a_function_of_the_seed(corpus):
    assert ids_of(batches(corpus)) == ids_of(batches(corpus))
    assert ids_of(batches(corpus)) != ids_of(batches(corpus, seed=1))


@pytest.mark.parametrize("start", [1, 4, 20, 21, 50])
def test_a_resumed_stream_gives_the_batches_of_an_undisturbed_one(corpus, start):
    assert ids_of(batches(corpus), start) == ids_of(batches(corpus))[2 * start :]


def test_two_and_three_ranks_share_the_batches_of_one(corpus, on_ranks):
    def mine() -> list[torch.Tensor]:
        read = list(batches(corpus).read_ahead(5))
        assert all(torch.equal(images, corpus.images(ids)) for [images], ids in read)
        return [ids for _, ids in read]

    alone = mine()
    for size in (2, 3):
        ranks = on_ranks(mine, size=size)
        shared = [torch.cat(parts) for parts in zip(*ranks, strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(shared, alone, strict=True))


def test_a_batch_is_drawn_from_every_lane_and_shuffled_within_the_buffer():
    order = StreamOrder((4096,) * 4, batch_size=64, lanes=8, buffer=1024, seed=0)
    line = order.line(0)
    block_of = np.empty(4096 * 4, np.int64)
    for i, first in enumerate(line.first_ids):
        block_of[first : first + BLOCK_ROWS] = i
    first = block_of[order.ids(np.arange(64), epoch=0)]
    assert Counter((first // 8).tolist()) == dict.fromkeys(range(8), 8), "8 images of each lane"
    window = order.ids(np.arange(1024), epoch=0)
    assert (np.diff(window.reshape(16, 8, 8)[:, 0].ravel()) < 0).any(), "not as they are stored"
    assert len(set(block_of[window].tolist())) == 8, "a window of 128 rows lies in one block here"


def test_workers_whose_number_divides_the_lanes_read_no_image_twice():
    order = StreamOrder((2048, 1000, 3000), batch_size=64, lanes=8, buffer=640, seed=0)
    steps = 6048 // 64
    for workers in (1, 2, 4, 8):
        share, read = 64 // workers, Counter[int]()
        for rank in range(workers):
            starts = (step * 64 + rank * share for step in range(steps))
            for piece in order.plan((0, np.arange(at, at + share)) for at in starts):
                read.update(range(piece.first, piece.first + piece.rows))
        assert set(read.values()) == {1} and len(read) == steps * 64


def test_a_stream_holds_no_more_than_its_buffer_and_a_block_for_each_lane(corpus):
    asked, given = [], []

    def counting(images: StoredImages, pieces: Iterator[Piece]) -> Iterator:
        for piece in pieces:
            asked.append(piece.rows)
            yield piece, images.read(piece.first, piece.rows)

    stream = Stream(corpus, FEED, batch_size=32, seed=0, reader=counting)  # type: ignore[arg-type]
    most = 0
    for images, _ in stream.batches((0, np.arange(32 * s, 32 * s + 32)) for s in range(STEPS)):
        given.append(len(images))
        most = max(most, sum(asked) - sum(given))
    assert 0 < most <= FEED.buffer + FEED.lanes * BLOCK_ROWS


def test_pieces_come_in_their_order_from_threads(corpus):
    order = StreamOrder(corpus.shard_rows, batch_size=32, lanes=4, buffer=128, seed=0)
    pieces = list(order.plan((0, np.arange(32 * s, 32 * s + 32)) for s in range(STEPS)))
    stored = StoredImages(corpus.path, corpus.offsets, corpus.fingerprint)
    read = list(read_here(stored, iter(pieces)))
    assert [piece for piece, _ in read] == pieces
    for piece, column in read:
        wanted = [corpus.encoded(i) for i in range(piece.first, piece.first + piece.rows)]
        assert column.to_pylist() == wanted


def test_permutations_of_two_streams_differ_and_stream_0_is_the_plain_one():
    at = np.arange(1000)
    plain = permuted(at, n=1000, seed=1, epoch=2)
    assert np.array_equal(plain, permuted(at, n=1000, seed=1, epoch=2, stream=0))
    other = permuted(at, n=1000, seed=1, epoch=2, stream=7)
    assert sorted(other) == list(at) and (other == plain).sum() < 10


@pytest.mark.parametrize("n", [1, 2, 300, 9000])
def test_the_layout_of_a_shard_is_found_in_its_first_bytes(tmp_path: Path, n: int):
    images = [bytes([i % 251]) * (1 + i % 5) for i in range(n)]
    rows = Rows(images, np.zeros(n), ["x"] * n, np.zeros((n, 16), np.uint8))
    write_shard(tmp_path, 0, rows, {"facts": "{}"})
    data = shard_path(tmp_path, 0).read_bytes()
    layout = parsed(data[: 64 * 1024])
    offsets = np.frombuffer(data, "<i8", n + 1, layout.offsets_at)
    found = [
        data[layout.values_at + a : layout.values_at + b] for a, b in itertools.pairwise(offsets)
    ]
    assert layout.rows == n and found == images


def test_a_damaged_header_is_an_error_and_never_a_wrong_image(tmp_path: Path):
    rows = Rows([b"abc"] * 20, np.zeros(20), ["x"] * 20, np.zeros((20, 16), np.uint8))
    write_shard(tmp_path, 0, rows, {})
    whole = shard_path(tmp_path, 0).read_bytes()
    good = parsed(whole)
    with pytest.raises(struct.error):
        parsed(whole[:100])
    with pytest.raises(pa.ArrowInvalid, match="no Arrow file"):
        parsed(b"\x89PNG" + whole)
    generator = np.random.default_rng(0)
    for _ in range(500):
        bad = bytearray(whole)
        bad[int(generator.integers(8, good.offsets_at))] = int(generator.integers(256))
        try:
            parsed(bytes(bad))
        except (pa.ArrowInvalid, struct.error, IndexError):
            continue


def test_a_damaged_shard_ends_the_stream_with_the_sentence_of_the_corpus(tmp_path: Path):
    images, labels = shape_images(64, size=8)
    corpus = corpus_of_arrays(tmp_path / "corpus", images, labels, shard_size=32)
    shard_path(corpus.path, 1).write_bytes(b"ARROW1")
    with pytest.raises(ArtifactError, match=r"00001\.arrow cannot be read .* run ingest again"):
        list(batches(corpus).read_ahead(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 100}, r"batch_size=100 cannot .* feed\.lanes=8"),
        ({"feed": {"name": "stream", "buffer": 256}}, r"feed\.buffer=256 does not hold one batch"),
    ],
)
def test_a_feed_that_cannot_serve_the_batches_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        PretextConfig(**({"feed": {"name": "stream"}} | changes))


@pytest.mark.parametrize("stage", ["selflabel", "sela", "classify"])
def test_a_stage_that_looks_images_up_by_their_ids_says_why_it_cannot_stream(stage):
    with pytest.raises(ConfigError, match=rf"`{stage}\.feed` cannot be set: .* by their ids"):
        build(Experiment, {"out": "x", "ingest": {}, stage: {"feed": {"name": "stream"}}})


def test_a_method_that_keeps_images_by_their_ids_is_refused():
    with pytest.raises(ConfigError, match=r"method\.name=insdis looks them up by their ids"):
        build(PretextConfig, {"method": {"name": "insdis"}, "feed": {"name": "stream"}})


@pytest.mark.parametrize("method", ["simclr", "moco", "byol"])
def test_other_methods_stream(method):
    made = build(PretextConfig, {"method": {"name": method}, "feed": {"name": "stream"}})
    assert made.feed == StreamFeed()


def test_the_plan_counts_the_buffer_of_a_stream():
    image = 64 * 64 * 3
    feed = StreamFeed(lanes=8, buffer=10_000)
    assert held_bytes(MappedFeed(), image, workers=4) == 0
    held = held_bytes(feed, image, workers=4) - BUFFER_BYTES
    assert held == (10_000 + 8 * BLOCK_ROWS) * image / 4
    alone = held_bytes(feed, image, workers=0)
    assert alone == (10_000 + (8 + 4) * BLOCK_ROWS) * image
