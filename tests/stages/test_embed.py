"""The stage embed: one unit row per image, whatever runs it, however often it is interrupted."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from selfsup_ray.artifacts import ShardedArray
from selfsup_ray.cluster.data import stream_actors
from selfsup_ray.config import Resources
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.synthetic import corpus_of_arrays, shape_images
from selfsup_ray.errors import ArtifactError
from selfsup_ray.models.backbones import ResNetConfig, build_backbone
from selfsup_ray.models.encoder import Encoder, save_encoder
from selfsup_ray.models.inputs import ImageInput
from selfsup_ray.stages.embed import EmbedConfig, Embeddings, ShardEmbedder, embed

HERE = Resources(workers=0)


def made_corpus(path: Path, n: int = 26) -> Corpus:
    images, labels = shape_images(n, size=16)
    return corpus_of_arrays(path / "corpus", images, labels, shard_size=8)


def made_encoder(path: Path) -> Encoder:
    torch.manual_seed(0)
    backbone = build_backbone(ResNetConfig(name="resnet18", stem="cifar", width=4))
    return save_encoder(path / "encoder", backbone=backbone, images=ImageInput(image_size=16))


def test_rows_are_what_the_encoder_gives_for_each_image_alone(tmp_path):
    corpus, encoder = made_corpus(tmp_path), made_encoder(tmp_path)
    features = embed(corpus, encoder, EmbedConfig(resources=HERE), out=tmp_path / "embeddings")
    network = encoder.module("cpu")
    alone = torch.cat([network(corpus.images(np.array([i]))) for i in range(26)])
    np.testing.assert_allclose(np.asarray(features.array), alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(np.asarray(features.array), axis=1), 1, atol=1e-6)
    assert features.shape == (26, encoder.dim) == alone.shape
    assert features.array.shard_rows == corpus.shard_rows
    assert features.corpus.fingerprint == corpus.fingerprint


def test_rows_do_not_depend_on_the_batch_size(tmp_path):
    corpus, encoder = made_corpus(tmp_path), made_encoder(tmp_path)
    one, other = (
        embed(corpus, encoder, EmbedConfig(batch_size=b, resources=HERE), out=tmp_path / f"b{b}")
        for b in (3, 256)
    )
    np.testing.assert_allclose(np.asarray(one.array), np.asarray(other.array), atol=1e-6)


def test_bfloat16_rows_are_unit_float32_near_the_exact_ones(tmp_path):
    corpus, encoder = made_corpus(tmp_path), made_encoder(tmp_path)
    exact = embed(corpus, encoder, EmbedConfig(resources=HERE), out=tmp_path / "exact")
    config = EmbedConfig(precision="bfloat16", resources=HERE)
    short = np.asarray(embed(corpus, encoder, config, out=tmp_path / "short").array)
    assert short.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(short, axis=1), 1, atol=1e-5)
    cosine = (short * np.asarray(exact.array)).sum(axis=1)
    assert 0.99 < cosine.min() < 0.9999999


def test_rows_are_stored_as_float16_when_asked(tmp_path):
    corpus, encoder = made_corpus(tmp_path), made_encoder(tmp_path)
    exact = embed(corpus, encoder, EmbedConfig(resources=HERE), out=tmp_path / "exact")
    config = EmbedConfig(dtype="float16", resources=HERE)
    half = embed(corpus, encoder, config, out=tmp_path / "half").array
    assert half.shard(0).dtype == np.float16
    np.testing.assert_array_equal(np.asarray(half), np.asarray(exact.array).astype(np.float16))


def test_actors_give_the_same_bits_as_this_process(tmp_path, ray_session):
    corpus, encoder = made_corpus(tmp_path), made_encoder(tmp_path)
    alone = embed(corpus, encoder, EmbedConfig(resources=HERE), out=tmp_path / "alone")
    config = EmbedConfig(resources=Resources(workers=1))
    pool = embed(corpus, encoder, config, out=tmp_path / "pool")
    assert np.asarray(pool.array).tobytes() == np.asarray(alone.array).tobytes()
    assert pool.fingerprint == alone.fingerprint


def test_a_killed_actor_changes_nothing(tmp_path, ray_session):
    corpus, encoder = made_corpus(tmp_path), made_encoder(tmp_path)
    alone = embed(corpus, encoder, EmbedConfig(resources=HERE), out=tmp_path / "alone")
    rows = ShardedArray.create(
        tmp_path / "rows", shard_rows=corpus.shard_rows, row_shape=(encoder.dim,), dtype="float32"
    )
    killed = tmp_path / "killed"

    def make():
        work = ShardEmbedder(
            corpus.path, encoder.path, rows.path, config=EmbedConfig(), device="cpu"
        )

        def dies_once(shard):
            if shard == 2 and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return work(shard)

        return dies_once

    done = [shard for shard, _ in stream_actors(make, range(4), Resources(), stage="embed")]
    assert killed.exists() and sorted(done) == [0, 1, 2, 3]
    assert np.asarray(rows).tobytes() == np.asarray(alone.array).tobytes()


def test_an_interrupted_run_keeps_its_shards_and_writes_the_rest(tmp_path):
    corpus, encoder = made_corpus(tmp_path), made_encoder(tmp_path)
    whole = embed(corpus, encoder, EmbedConfig(resources=HERE), out=tmp_path / "whole")
    out = tmp_path / "part"
    part = embed(corpus, encoder, EmbedConfig(resources=HERE), out=out)
    (out / "done.json").unlink()
    part.array.shard_path(2).unlink()
    before = [part.array.shard_path(i).stat().st_mtime_ns for i in (0, 1, 3)]
    again = embed(corpus, encoder, EmbedConfig(batch_size=256, resources=HERE), out=out)
    assert [again.array.shard_path(i).stat().st_mtime_ns for i in (0, 1, 3)] == before
    assert np.asarray(again.array).tobytes() == np.asarray(whole.array).tobytes()


def test_a_finished_stage_is_skipped_and_another_encoder_is_an_error(tmp_path):
    corpus, encoder = made_corpus(tmp_path), made_encoder(tmp_path)
    config, out = EmbedConfig(resources=HERE), tmp_path / "embeddings"
    first = embed(corpus, encoder, config, out=out)
    stamp = (out / "done.json").stat().st_mtime_ns
    assert embed(corpus, encoder, config, out=out).fingerprint == first.fingerprint
    assert (out / "done.json").stat().st_mtime_ns == stamp
    backbone = encoder.backbone()
    with torch.no_grad():
        next(backbone.parameters()).mul_(2)
    other = save_encoder(tmp_path / "other", backbone=backbone, images=ImageInput(image_size=16))
    with pytest.raises(ArtifactError, match="built from another encoder"):
        embed(corpus, other, config, out=out)


def test_an_encoder_with_broken_weights_is_a_clear_error(tmp_path):
    corpus = made_corpus(tmp_path)
    backbone = build_backbone(ResNetConfig(name="resnet18", stem="cifar", width=4))
    with torch.no_grad():
        next(backbone.parameters()).fill_(float("nan"))
    encoder = save_encoder(tmp_path / "nan", backbone=backbone, images=ImageInput(image_size=16))
    with pytest.raises(ArtifactError, match=r"no finite embedding of image 0 \(array#0\)"):
        embed(corpus, encoder, EmbedConfig(resources=HERE), out=tmp_path / "embeddings")


def test_embeddings_that_are_not_finished_cannot_be_opened(tmp_path):
    with pytest.raises(ArtifactError, match="no finished stage"):
        Embeddings.open(tmp_path)
