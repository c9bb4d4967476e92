"""The stage whiten: the same patches and the same matrix, whatever draws them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selfsup_ray.config import Resources
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.synthetic import corpus_of_arrays, shape_images
from selfsup_ray.errors import ArtifactError, ConfigError
from selfsup_ray.ops.patch_sampling import drawn_positions
from selfsup_ray.ops.pixel_shuffle import shuffled_pixels
from selfsup_ray.ops.whitening import whitening_matrix
from selfsup_ray.stages import patch_rows
from selfsup_ray.stages import whiten as whiten_stage
from selfsup_ray.stages.whiten import PatchSample, WhitenConfig, whiten, whiten_maps
from selfsup_ray.tracking import Tracker

HERE = Resources(workers=0)
PIXELS, LABELS = shape_images(25, size=12)


def made_corpus(path: Path, *, pixels: np.ndarray = PIXELS, shard_size: int = 7) -> Corpus:
    return corpus_of_arrays(path, pixels, shard_size=shard_size)


def whitened(corpus: Corpus, out: Path, **values) -> PatchSample:
    values = {"patches": 300, "patch_size": 3, "resources": HERE} | values
    return whiten(corpus, WhitenConfig(**values), out=out)


def contents(sample: PatchSample) -> list[bytes]:
    arrays = (np.asarray(sample.array), sample.mean, sample.covariance, sample.matrix)
    return [values.tobytes() for values in arrays]


def every_patch(pixels: np.ndarray, s: int) -> np.ndarray:
    """Return all patches (m, 3 s s) in [0, 1], channel first, by loops."""
    levels = pixels.transpose(0, 3, 1, 2) / 255
    side = pixels.shape[1] - s + 1
    rows = [
        image[:, y : y + s, x : x + s].ravel()
        for image in levels
        for y in range(side)
        for x in range(side)
    ]
    return np.array(rows)


def test_patches_are_the_first_draws_and_the_covariance_is_that_of_every_patch(tmp_path):
    sample = whitened(made_corpus(tmp_path / "corpus"), tmp_path / "whiten")
    at = drawn_positions(0, 300, num_images=25, height=12, width=12, patch_size=3, seed=0)
    levels = PIXELS.transpose(0, 3, 1, 2) / np.float32(255)
    rows = [
        levels[i, :, y : y + 3, x : x + 3].ravel()
        for i, y, x in zip(at.image, at.row, at.column, strict=True)
    ]
    np.testing.assert_allclose(np.asarray(sample.array), np.array(rows), atol=1e-7)
    everything = every_patch(PIXELS, 3)
    np.testing.assert_allclose(sample.mean, everything.mean(axis=0), rtol=1e-10)
    np.testing.assert_allclose(sample.covariance, np.cov(everything.T, bias=True), rtol=1e-8)
    np.testing.assert_array_equal(sample.matrix, whitening_matrix(sample.covariance))
    assert sample.facts["covariance_patches"] == len(everything) == 25 * 100
    assert sample.facts["off_diagonal_after"] < 1e-5 < sample.facts["off_diagonal_before"]
    assert (sample.channels, sample.patch_size, len(sample)) == (3, 3, 300)


def test_shards_change_nothing(tmp_path):
    one = whitened(made_corpus(tmp_path / "a", shard_size=100), tmp_path / "one")
    many = whitened(made_corpus(tmp_path / "b", shard_size=2), tmp_path / "many")
    assert contents(one) == contents(many)


def test_workers_change_nothing(tmp_path, ray_session):
    corpus = made_corpus(tmp_path / "corpus")
    alone = whitened(corpus, tmp_path / "alone")
    pool = whitened(corpus, tmp_path / "pool", resources=Resources(workers=2))
    assert contents(alone) == contents(pool)
    assert alone.fingerprint == pool.fingerprint


@pytest.mark.parametrize("step", ["_cut_shard", "_assemble", "remove_rounds"])
def test_an_interrupted_run_continues_to_the_same_bytes(tmp_path, monkeypatch, step):
    corpus = made_corpus(tmp_path / "corpus")
    whole = whitened(corpus, tmp_path / "whole")
    place = whiten_stage if step == "remove_rounds" else patch_rows
    real, calls = getattr(place, step), []

    def dies(*args):
        calls.append(1)
        if place is patch_rows:
            real(*args)
        if len(calls) == (2 if step == "_cut_shard" else 1):
            raise KeyboardInterrupt

    monkeypatch.setattr(place, step, dies)
    with pytest.raises(KeyboardInterrupt):
        whitened(corpus, tmp_path / "cut")
    monkeypatch.setattr(place, step, real)
    if place is patch_rows:
        with pytest.raises(ArtifactError, match="no finished stage"):
            PatchSample.open(tmp_path / "cut")
    assert contents(whitened(corpus, tmp_path / "cut")) == contents(whole)
    assert not list((tmp_path / "cut").glob("round*"))


def test_covariances_are_drawn_beside_each_other_and_tracked(tmp_path):
    class Sent(Tracker):
        def artifact(self, path: Path) -> None:
            sent.append(path)

    sent, out = list[Path](), tmp_path / "w"
    out.mkdir()
    config = WhitenConfig(patches=300, patch_size=3, resources=HERE)
    sample = whiten(made_corpus(tmp_path / "c"), config, out=out, tracker=Sent(out, None))
    assert sent == [out / "covariance.png"]
    with Image.open(sent[0]) as picture:
        levels = np.asarray(picture).astype(float) / 255
    d, times = 27, 300 // 27
    assert levels.shape == (d * times, 2 * d * times + 20, 3)
    after = sample.matrix.T.astype(float) @ sample.covariance @ sample.matrix
    for first, covariance in ((0, sample.covariance), (d * times + 20, after)):
        white = levels[times // 2 :: times, first + times // 2 :: times].min(axis=2)[:, :d]
        sizes = np.sqrt(np.abs(covariance) / np.abs(covariance).max())
        assert (white[sizes < 0.05] > 0.9).all() and (white[sizes > 0.95] < 0.35).all()
    assert (white[~np.eye(d, dtype=bool)] > 0.8).all()


def test_a_smaller_sample_is_the_start_of_a_larger_one(tmp_path):
    corpus = made_corpus(tmp_path / "corpus")
    small = np.asarray(whitened(corpus, tmp_path / "small", patches=100).array)
    large = np.asarray(whitened(corpus, tmp_path / "large", patches=2000).array)
    np.testing.assert_array_equal(large[:100], small)
    other = np.asarray(whitened(corpus, tmp_path / "other", patches=100, seed=1).array)
    assert not np.array_equal(other, small)


def test_faint_patches_are_passed_over_and_others_drawn_for_them(tmp_path):
    pixels = PIXELS.copy()
    pixels[:, :, 4:] = 0  # most patches are black
    corpus = made_corpus(tmp_path / "corpus", pixels=pixels)
    sample = whitened(corpus, tmp_path / "whiten", patches=900)
    rows = np.asarray(sample.array)
    assert np.linalg.norm(rows, axis=1).min() >= 0.01
    bright = (np.linalg.norm(every_patch(pixels, 3), axis=1) >= 0.01).sum()
    assert sample.facts["drawn"] - sample.facts["faint"] >= 900
    assert sample.facts["covariance_patches"] == 2500  # the covariance is of all patches
    with pytest.raises(ConfigError, match=f"only {bright:,} of the 2,500 patches have a norm"):
        whitened(corpus, tmp_path / "more", patches=int(bright) + 1)


def test_levels_in_plus_minus_one_are_twice_as_wide(tmp_path):
    corpus = made_corpus(tmp_path / "corpus")
    small = whitened(corpus, tmp_path / "zero", min_norm=0)
    wide = whitened(corpus, tmp_path / "plus", min_norm=0, pixel_scale="plus_minus_one")
    expected = 2 * np.asarray(small.array) - 1
    np.testing.assert_allclose(np.asarray(wide.array), expected, atol=1e-6)
    np.testing.assert_allclose(wide.covariance, 4 * small.covariance, rtol=1e-12)


def test_the_covariance_of_the_sample_is_numpys(tmp_path):
    sample = whitened(made_corpus(tmp_path / "c"), tmp_path / "w", covariance_from="sample")
    rows = np.asarray(sample.array, np.float64)
    np.testing.assert_allclose(sample.covariance, np.cov(rows.T, bias=True), rtol=1e-9, atol=1e-12)
    assert sample.facts["covariance_patches"] == 300


@pytest.mark.parametrize(("source", "variance"), [("gaussian", 1.0), ("uniform", 1 / 3)])
def test_noise_stands_in_place_of_patches(tmp_path, source, variance):
    sample = whitened(made_corpus(tmp_path / "c"), tmp_path / "w", source=source, patches=20_000)
    rows = np.asarray(sample.array, np.float64)
    assert rows.shape == (20_000, 27)
    np.testing.assert_allclose(np.diag(sample.covariance), variance, rtol=0.06)
    np.testing.assert_allclose(sample.covariance, np.cov(rows.T, bias=True), atol=1e-10)


def test_images_are_chosen_by_their_source(tmp_path):
    corpus = made_corpus(tmp_path / "corpus")  # sources array#0, array#1, …
    sample = whitened(corpus, tmp_path / "w", only="array#*", without="array#[1-6]")
    keep = [0, *range(7, 25)]
    np.testing.assert_allclose(sample.mean, every_patch(PIXELS[keep], 3).mean(axis=0), rtol=1e-10)
    with pytest.raises(ConfigError, match=r"whiten.only='test/\*'.*leave none of the 25 images"):
        whitened(corpus, tmp_path / "none", only="test/*")


class FloatMaps:
    """Feature maps (n, 2, 5, 6) in three shards, read in batches of 2."""

    shape, shard_rows, is_bytes = (2, 5, 6), (3, 0, 4), False

    def __init__(self) -> None:
        self.maps = torch.randn(7, 2, 5, 6, generator=torch.Generator().manual_seed(0))

    def batches(self, shard: int) -> Iterator[torch.Tensor]:
        first = sum(self.shard_rows[:shard])
        yield from torch.split(self.maps[first : first + self.shard_rows[shard]], 2)


def test_feature_maps_are_sampled_like_images_without_scaling(tmp_path):
    maps = FloatMaps()
    config = WhitenConfig(patches=60, patch_size=3, min_norm=0, resources=HERE)
    sample = whiten_maps(maps, config, inputs={"layer": "1"}, out=tmp_path / "w")
    everything = np.array(
        [
            image[:, y : y + 3, x : x + 3].numpy().ravel()
            for image in maps.maps
            for y in range(3)
            for x in range(4)
        ]
    )
    rows = np.asarray(sample.array)
    assert {row.tobytes() for row in rows} <= {row.tobytes() for row in everything}
    assert len(np.unique(rows, axis=0)) == 60
    expected = np.cov(everything.astype(np.float64).T, bias=True)
    np.testing.assert_allclose(sample.covariance, expected, atol=1e-10)
    maps.maps[5, 1, 2, 2] = float("nan")
    with pytest.raises(ArtifactError, match="Shard 2 of the maps holds a number that is not finit"):
        whiten_maps(maps, config, inputs={"layer": "1"}, out=tmp_path / "nan")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patch_size": 13}, r"whiten.patch_size=13, but the images are 12 x 12 pixels"),
        ({"patches": 2501}, r"whiten.patches=2,501, but 25 images .* only 2,500 patches"),
    ],
)
def test_more_than_there_is_cannot_be_drawn(tmp_path, values, message):
    with pytest.raises(ConfigError, match=message):
        whitened(made_corpus(tmp_path / "corpus"), tmp_path / "w", **values)
    assert not (tmp_path / "w").exists()


def test_directions_without_variance_want_a_regularization(tmp_path):
    gray = np.repeat(PIXELS[..., :1], 3, axis=3)
    corpus = made_corpus(tmp_path / "corpus", pixels=gray)
    with pytest.raises(ConfigError, match="only 9 of the 27 directions"):
        whitened(corpus, tmp_path / "zero", regularization=0)
    sample = whitened(corpus, tmp_path / "some")
    assert np.isfinite(sample.matrix).all()


def test_images_with_shuffled_pixels_are_drawn_from_as_if_they_were_the_corpus(tmp_path):
    corpus = made_corpus(tmp_path / "corpus")
    sample = whitened(corpus, tmp_path / "whiten", shuffle="pixels", seed=4)
    levels, ids = torch.from_numpy(PIXELS.transpose(0, 3, 1, 2).copy()), torch.arange(25)
    mixed = shuffled_pixels(levels, ids, seed=4, epoch=0, shuffle="pixels")
    pixels = mixed.numpy().transpose(0, 2, 3, 1)
    plain = whitened(made_corpus(tmp_path / "mixed", pixels=pixels), tmp_path / "plain", seed=4)
    assert contents(sample) == contents(plain)
