"""Stored codes: any view's code is a window of them, bit by bit; written shard by shard."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from selfsup_ray.config import Resources
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.synthetic import corpus_of_arrays, shape_images
from selfsup_ray.ops.crop_flip import center_windows, cut, draw_windows
from selfsup_ray.ops.patch_codes import unpack_bits
from selfsup_ray.stages.code_cache import CodeCache, Coding, write_codes

HERE = Resources(workers=0)
PIXELS, _ = shape_images(17, size=12)


def made_corpus(path: Path) -> Corpus:
    return corpus_of_arrays(path, PIXELS, shard_size=7)


def made_coding(precision="bfloat16", kind="up_to") -> Coding:
    rng = np.random.default_rng(0)
    return Coding(
        kernel=rng.normal(size=(70, 27)).astype(np.float32),
        bias=rng.normal(size=70).astype(np.float32),
        patch_size=3,
        k=18,
        mean=(0.5, 0.4, 0.3),
        std=(0.5, 0.6, 0.7),
        kind=kind,
        precision=precision,
    )


def content(cache: CodeCache) -> bytes:
    return np.asarray(cache.array).tobytes()


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["up_to", "kth"])
def test_the_code_of_an_augmented_view_is_a_window_of_the_stored_codes(
    tmp_path: Path, precision, kind
):
    corpus, coding = made_corpus(tmp_path / "corpus"), made_coding(precision, kind)
    cache = write_codes(corpus, coding, padding=2, out=tmp_path / "codes", resources=HERE)
    assert cache.array.shape == (17, 2, 14, 14, 9) and cache.side == 10
    ids = np.array([16, 0, 3, 3, 8, 7, 11])
    for epoch in range(4):
        windows = draw_windows(torch.from_numpy(ids), seed=1, epoch=epoch, padding=2)
        view = cut(corpus.images(ids), windows, padding=2)
        assert torch.equal(cache.windows(ids, windows), coding(view))


def test_the_central_window_is_the_code_of_the_image(tmp_path: Path):
    corpus, coding = made_corpus(tmp_path / "corpus"), made_coding()
    cache = write_codes(corpus, coding, padding=2, out=tmp_path / "codes", resources=HERE)
    ids = np.arange(17)
    found = cache.windows(ids, center_windows(17, padding=2))
    assert torch.equal(found, coding(corpus.images(ids)))
    assert (unpack_bits(found, 70).sum(dim=-1) == 18).all()


def test_without_padding_there_are_the_image_and_its_mirror_image(tmp_path: Path):
    corpus, coding = made_corpus(tmp_path / "corpus"), made_coding()
    cache = write_codes(corpus, coding, padding=0, out=tmp_path / "codes", resources=HERE)
    stored = torch.from_numpy(np.asarray(cache.array))
    images = corpus.images(np.arange(17))
    assert torch.equal(stored[:, 0], coding(images))
    assert torch.equal(stored[:, 1], coding(images.flip(3)))


def test_workers_and_interruptions_change_no_byte(tmp_path: Path, ray_session: None):
    corpus, coding = made_corpus(tmp_path / "corpus"), made_coding()
    here = write_codes(corpus, coding, padding=2, out=tmp_path / "here", resources=HERE)
    two = Resources(workers=2, cpus=1)
    there = write_codes(corpus, coding, padding=2, out=tmp_path / "there", resources=two)
    assert content(there) == content(here)
    kept = there.array.shard_path(0).stat().st_mtime_ns
    there.array.shard_path(1).unlink()
    again = write_codes(corpus, coding, padding=2, out=tmp_path / "there", resources=HERE)
    assert content(again) == content(here)
    assert again.array.shard_path(0).stat().st_mtime_ns == kept
    assert not list((tmp_path / "there").glob("*.tmp"))


def test_a_cache_pickles_as_its_path(tmp_path: Path):
    corpus, coding = made_corpus(tmp_path / "corpus"), made_coding()
    cache = write_codes(corpus, coding, padding=2, out=tmp_path / "codes", resources=HERE)
    windows = center_windows(1, padding=2)
    before = cache.windows(np.array([9]), windows)
    data = pickle.dumps(cache)
    assert len(data) < 1000
    assert torch.equal(pickle.loads(data).windows(np.array([9]), windows), before)
