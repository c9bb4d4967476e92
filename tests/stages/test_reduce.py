"""The reduce stage: scikit-learn's components, the same bytes however it is run."""

import multiprocessing
import os
import signal
from pathlib import Path

import faiss
import numpy as np
import pytest
from sklearn.decomposition import PCA

from selfsup_ray.artifacts import ShardedArray, begin, finish
from selfsup_ray.config import Resources
from selfsup_ray.errors import ArtifactError, ConfigError
from selfsup_ray.ops.pca import unit_rows
from selfsup_ray.stages import reduce as stage
from selfsup_ray.stages.embed import Embeddings
from selfsup_ray.stages.graph import GraphConfig, build_graph
from selfsup_ray.stages.reduce import ReduceConfig, Reduced, reduce, sampled_ids

HERE = Resources(workers=0)


def embeddings(folder: Path, rows: np.ndarray, shard_rows: list[int]) -> Embeddings:
    """A finished embed stage that holds these rows."""
    inputs = {"corpus": str(rows.tobytes())}
    begin(folder, stage="embed", config={}, inputs=inputs)
    array = ShardedArray.create(
        folder / "rows", shard_rows=shard_rows, row_shape=rows.shape[1:], dtype="float32"
    )
    for i in range(array.num_shards):
        array.write_shard(i, rows[array.offsets[i] : array.offsets[i + 1]])
    finish(folder, stage="embed", config={}, inputs=inputs, seconds=0, facts={"corpus": "../c"})
    return Embeddings.open(folder)


def made_rows(n: int = 300, d: int = 16) -> np.ndarray:
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(n, d)) * np.linspace(3, 0.1, d) + 1
    return unit_rows(rows.astype(np.float32))


@pytest.fixture
def features(tmp_path: Path) -> Embeddings:
    return embeddings(tmp_path / "embed", made_rows(), [120, 0, 130, 50])


def made_bytes(reduced: Reduced) -> bytes:
    transform = (reduced.path / "transform.safetensors").read_bytes()
    return transform + np.asarray(reduced.array).tobytes()


def test_rows_are_scikit_learns_components_made_unit_rows(tmp_path: Path, features: Embeddings):
    reduced = reduce(features, ReduceConfig(dim=5, resources=HERE), out=tmp_path / "reduce")
    rows = np.asarray(features.array).astype(np.float64)
    pca = PCA(n_components=5, svd_solver="full").fit(rows)
    wanted, got = pca.transform(rows), np.asarray(reduced.array)
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(got, wanted * np.sign((got * wanted).sum(axis=0)), atol=1e-5)
    share = pca.explained_variance_ratio_.sum()
    assert reduced.facts["explained_variance"] == pytest.approx(share, abs=1e-6)
    assert reduced.array.shard_rows == features.array.shard_rows
    assert reduced.facts["corpus"] == "../c"


def test_faiss_applies_the_transform_that_is_written_for_it(tmp_path: Path, features: Embeddings):
    config = ReduceConfig(dim=5, rotate=True, resources=HERE)
    reduced = reduce(features, config, out=tmp_path / "reduce")
    theirs = faiss.read_VectorTransform(str(reduced.path / "transform.vt"))
    applied = theirs.apply(np.asarray(features.array))
    np.testing.assert_allclose(unit_rows(applied), np.asarray(reduced.array), atol=1e-5)


def test_workers_and_threads_change_no_byte(
    tmp_path: Path, features: Embeddings, ray_session: None, monkeypatch: pytest.MonkeyPatch
):
    asked = [HERE, Resources(workers=0, cpus=3), Resources(workers=1), Resources(workers=2)]
    made = [
        reduce(features, ReduceConfig(dim=4, resources=r), out=tmp_path / f"{i}")
        for i, r in enumerate(asked)
    ]
    assert len({made_bytes(m) for m in made}) == 1
    assert len({m.fingerprint for m in made}) == 1


def test_a_sample_in_several_blocks_is_its_rows_together(
    tmp_path: Path, features: Embeddings, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stage, "SAMPLE_BLOCK", 40)
    config = ReduceConfig(dim=3, sample=170, seed=5, resources=HERE)
    reduced = reduce(features, config, out=tmp_path / "reduce")
    ids = sampled_ids(300, config)
    assert len(set(ids.tolist())) == 170 and (np.diff(ids) > 0).all()
    assert sampled_ids(300, ReduceConfig(sample=170, sample_from="first")).tolist() == [*range(170)]
    pca = PCA(n_components=3, svd_solver="full").fit(np.asarray(features.array)[ids])
    same = np.abs((reduced.transform.matrix * pca.components_).sum(axis=1))
    np.testing.assert_allclose(same, 1, atol=1e-6)
    assert not (reduced.path / "moments").exists()


def test_an_interrupted_run_continues_to_the_same_bytes(
    tmp_path: Path, features: Embeddings, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stage, "SAMPLE_BLOCK", 100)
    config, out = ReduceConfig(dim=4, rotate=True, resources=HERE), tmp_path / "part"
    whole = reduce(features, config, out=tmp_path / "whole")
    write = stage._write_moments

    def dies(source: Path, stored: Path, config: ReduceConfig, block: int) -> None:
        if block == 2:
            raise KeyboardInterrupt
        write(source, stored, config, block)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stage, "_write_moments", dies)
        reduce(features, config, out=out)
    assert len(list((out / "moments").glob("*.npy"))) == 2
    reduced = reduce(features, config, out=out)
    assert made_bytes(reduced) == made_bytes(whole)
    (out / "done.json").unlink()
    reduced.array.shard_path(2).unlink()
    before = reduced.array.shard_path(0).stat().st_mtime_ns
    assert made_bytes(reduce(features, config, out=out)) == made_bytes(whole)
    assert reduced.array.shard_path(0).stat().st_mtime_ns == before


def test_a_run_killed_between_shards_continues_to_the_same_bytes(
    tmp_path: Path, features: Embeddings
):
    config, out = ReduceConfig(dim=4, resources=HERE), tmp_path / "part"
    whole = reduce(features, config, out=tmp_path / "whole")

    def killed() -> None:
        write = stage._reduce_shard

        def dies(source: Path, folder: Path, threads: int, shard: int) -> None:
            if shard == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            write(source, folder, threads, shard)

        stage._reduce_shard = dies
        reduce(features, config, out=out)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(list((out / "rows").glob("*.npy"))) == 2
    assert made_bytes(reduce(features, config, out=out)) == made_bytes(whole)


def test_the_graph_takes_what_reduce_makes(tmp_path: Path, features: Embeddings):
    reduced = reduce(features, ReduceConfig(dim=16, resources=HERE), out=tmp_path / "reduce")
    graph = build_graph(reduced, GraphConfig(k=5, resources=HERE), out=tmp_path / "graph")
    rows = np.asarray(features.array).astype(np.float64)
    rows = rows - rows.mean(axis=0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    similarity = rows @ rows.T
    np.fill_diagonal(similarity, -2)
    np.testing.assert_array_equal(np.asarray(graph.ids), np.argsort(-similarity, axis=1)[:, :5])


def test_rows_on_a_plane_are_reduced_but_not_whitened_beyond_it(tmp_path: Path):
    plane = unit_rows(np.random.default_rng(0).normal(size=(60, 2)) @ np.eye(2, 8))
    features = embeddings(tmp_path / "embed", plane, [60])
    reduced = reduce(features, ReduceConfig(dim=4, resources=HERE), out=tmp_path / "reduce")
    assert np.abs(np.asarray(reduced.array)[:, 2:]).max() < 1e-5
    config = ReduceConfig(dim=4, whiten_power=0.5, resources=HERE)
    with pytest.raises(ConfigError, match=r"only 2 of the 4 components.*reduce.dim to 2"):
        reduce(features, config, out=tmp_path / "whitened")


def test_more_dimensions_than_there_are_is_an_error(tmp_path: Path, features: Embeddings):
    with pytest.raises(ConfigError, match=r"reduce.dim=256, but the rows .* have 16 dimensions"):
        reduce(features, ReduceConfig(resources=HERE), out=tmp_path / "reduce")
    assert not (tmp_path / "reduce").exists()


def test_one_row_has_no_direction_of_variance(tmp_path: Path):
    features = embeddings(tmp_path / "embed", made_rows(1), [1])
    with pytest.raises(ConfigError, match="at least 2 rows"):
        reduce(features, ReduceConfig(dim=2, resources=HERE), out=tmp_path / "reduce")


def test_a_number_that_is_not_finite_is_an_error(tmp_path: Path):
    rows = made_rows()
    rows[290, 3] = np.nan
    features = embeddings(tmp_path / "embed", rows, [150, 150])
    with pytest.raises(ArtifactError, match="not finite"):
        reduce(features, ReduceConfig(dim=2, resources=HERE), out=tmp_path / "all")
    config = ReduceConfig(dim=2, sample=200, sample_from="first", resources=HERE)
    with pytest.raises(ArtifactError, match="row 290 holds a number that is not finite"):
        reduce(features, config, out=tmp_path / "first")


def test_a_current_folder_is_kept_and_another_config_is_an_error(
    tmp_path: Path, features: Embeddings
):
    out = tmp_path / "reduce"
    reduce(features, ReduceConfig(dim=4, resources=HERE), out=out)
    stamp = (out / "done.json").stat().st_mtime_ns
    reduce(features, ReduceConfig(dim=4, resources=Resources(workers=0, cpus=2)), out=out)
    assert (out / "done.json").stat().st_mtime_ns == stamp
    with pytest.raises(ArtifactError, match=r"reduce.dim=4, but this run asks for 5"):
        reduce(features, ReduceConfig(dim=5, resources=HERE), out=out)


def test_new_rows_take_the_map_of_others(tmp_path: Path, features: Embeddings):
    config = ReduceConfig(dim=5, rotate=True, resources=HERE)
    fitted = reduce(features, config, out=tmp_path / "fitted")
    others = embeddings(tmp_path / "others", np.asarray(features.array)[60:20:-1].copy(), [25, 15])
    wanted = np.asarray(fitted.array)[60:20:-1]
    for given in (fitted.path, fitted.path / "transform.vt"):
        config = ReduceConfig(dim=5, transform=given, resources=HERE)
        found = reduce(others, config, out=tmp_path / f"by-{given.name}")
        np.testing.assert_allclose(np.asarray(found.array), wanted, atol=1e-5)
        assert "explained_variance" not in found.facts


def test_a_map_that_does_not_fit_or_has_changed_is_an_error(tmp_path: Path, features: Embeddings):
    given = reduce(features, ReduceConfig(dim=5, resources=HERE), out=tmp_path / "fitted").path
    with pytest.raises(ConfigError, match=r"maps 16 dimensions to 5, .* set reduce.dim to 5"):
        reduce(features, ReduceConfig(transform=given, dim=4), out=tmp_path / "other")
    with pytest.raises(ConfigError, match="`transform` is applied as it is, but rotate=True"):
        ReduceConfig(transform=given, rotate=True)
    config, out = ReduceConfig(transform=given, dim=5, resources=HERE), tmp_path / "out"
    reduce(features, config, out=out)
    rows = embeddings(tmp_path / "changed", made_rows()[:, ::-1].copy(), [300])
    for path in (given / "transform.safetensors", given / "config.yaml"):
        path.unlink()
    for path in [*given.rglob("*.npy"), given / "done.json"]:
        path.unlink()
    reduce(rows, ReduceConfig(dim=5, resources=HERE), out=given)
    with pytest.raises(ArtifactError, match="was built with another map than"):
        reduce(features, config, out=out)
