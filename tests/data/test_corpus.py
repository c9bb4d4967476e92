"""The corpus: what was put in comes out by id, in any order, from any encoding."""

import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.shard_files import digest
from selfsup_ray.data.synthetic import corpus_of_arrays, shape_images
from selfsup_ray.errors import ArtifactError


def made(path: Path, n: int = 23, **options: object) -> tuple[Corpus, np.ndarray, np.ndarray]:
    images, labels = shape_images(n, size=16, seed=3)
    corpus = corpus_of_arrays(path, images, labels, shard_size=5, **options)  # type: ignore[arg-type]
    return corpus, images, labels


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_images_come_back_by_id_in_any_order_and_with_repeats(tmp_path, encoding):
    corpus, images, labels = made(tmp_path, encoding=encoding)
    ids = np.array([22, 0, 7, 7, 4, 5, 21, 0])
    got = corpus.images(ids)
    assert got.dtype == torch.uint8 and got.shape == (8, 3, 16, 16)
    np.testing.assert_array_equal(got.permute(0, 2, 3, 1).numpy(), images[ids])
    np.testing.assert_array_equal(corpus.images(torch.from_numpy(ids)).numpy(), got.numpy())
    np.testing.assert_array_equal(corpus.labels(ids), labels[ids])
    assert corpus.sources(ids) == [f"array#{i}" for i in ids]


@pytest.mark.parametrize("num_threads", [1, 3])
def test_jpeg_images_are_decoded_as_pillow_does(tmp_path, monkeypatch, num_threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    corpus, images, _ = made(tmp_path, encoding="jpeg")
    got = corpus.images(np.arange(23)).permute(0, 2, 3, 1).numpy()
    pillow = [np.asarray(Image.open(BytesIO(corpus.encoded(i)))) for i in range(23)]
    np.testing.assert_array_equal(got, pillow)
    assert np.abs(got.astype(int) - images).mean() < 5


def test_shards_are_cut_where_the_manifest_says(tmp_path):
    corpus, images, labels = made(tmp_path)
    assert corpus.shard_rows == (5, 5, 5, 5, 3) and len(corpus) == 23 and corpus.num_shards == 5
    got = corpus.shard_images(4, 1, 99).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(got, images[21:])
    np.testing.assert_array_equal(corpus.labels(), labels)
    expected = b"".join(digest(image.tobytes()) for image in images[5:10])
    assert corpus.digests(1).tobytes() == expected


def test_raw_images_are_stored_as_rows_of_rgb(tmp_path):
    corpus, images, _ = made(tmp_path)
    assert corpus.encoded(11) == images[11].tobytes()


def test_a_corpus_pickles_as_its_path(tmp_path):
    corpus, images, _ = made(tmp_path)
    corpus.images(np.array([3]))
    data = pickle.dumps(corpus)
    assert len(data) < 500
    again = pickle.loads(data)
    assert again.fingerprint == corpus.fingerprint
    np.testing.assert_array_equal(again.images(np.array([9]))[0].permute(1, 2, 0), images[9])


def test_many_threads_read_the_same_images(tmp_path):
    corpus, images, _ = made(tmp_path, n=200)
    order = random.Random(0).sample(range(200), 200)
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda i: corpus.images(np.array([i]))[0], order))
    np.testing.assert_array_equal(torch.stack(got).permute(0, 2, 3, 1), images[order])


def test_fingerprint_follows_pixels_and_labels(tmp_path):
    images, labels = shape_images(8, size=16)
    first = corpus_of_arrays(tmp_path / "a", images, labels)
    same = corpus_of_arrays(tmp_path / "b", images, labels)
    other = corpus_of_arrays(tmp_path / "c", images, labels[::-1])
    assert first.fingerprint == same.fingerprint != other.fingerprint


def test_no_images_and_no_labels_are_no_special_case(tmp_path):
    corpus = corpus_of_arrays(tmp_path / "none", np.empty((0, 8, 8, 3), np.uint8))
    assert len(corpus) == 0 and corpus.images(np.array([], np.int64)).shape == (0, 3, 8, 8)
    unlabelled = corpus_of_arrays(tmp_path / "one", np.zeros((1, 8, 8, 3), np.uint8))
    assert not unlabelled.has_labels and unlabelled.labels().tolist() == [-1]
    assert unlabelled.class_names is None


def test_an_id_outside_the_corpus_is_an_error(tmp_path):
    corpus, _, _ = made(tmp_path)
    with pytest.raises(IndexError, match=r"\[0, 23\)"):
        corpus.images(np.array([23]))
    with pytest.raises(IndexError):
        corpus.labels(np.array([-1]))


def test_missing_or_damaged_files_say_what_to_do(tmp_path):
    with pytest.raises(ArtifactError, match="no finished stage"):
        Corpus.open(tmp_path / "nowhere")
    corpus, _, _ = made(tmp_path / "damaged")
    (corpus.path / "shards" / "00001.arrow").write_bytes(b"not arrow")
    with pytest.raises(ArtifactError, match=r"00001\.arrow cannot be read.*run ingest again"):
        corpus.images(np.array([6]))
