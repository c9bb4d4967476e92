"""Files in and out from the command line, as a user types it."""

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse

from selfsup_ray import cli
from selfsup_ray.artifacts import ShardedArray
from selfsup_ray.data import published
from selfsup_ray.data.published import write_feature_block
from selfsup_ray.stages.embed import Embeddings
from selfsup_ray.stages.graph import Graph
from selfsup_ray.stages.imported import ImportFeaturesConfig, import_features


def test_published_files_go_in_and_come_out_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(60, 5)).astype("<f4")
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    rows.tofile(tmp_path / "features.float32")
    ids = np.argsort(-(unit @ unit.T), axis=1)[:, :8].astype("<i4")
    ids.tofile(tmp_path / "ndis60_k8_I_11.int8")
    values = np.take_along_axis(unit @ unit.T, ids, axis=1).astype("<f4")
    values.tofile(tmp_path / "ndis60_k8_D_11.float8")

    embed, graph = str(tmp_path / "run" / "embed"), str(tmp_path / "run" / "graph")
    source = [str(tmp_path / "features.float32"), "--dim", "5"]
    assert cli.main(["import-features", *source, "--out", embed]) == 0
    np.testing.assert_allclose(np.asarray(Embeddings.open(embed).array), unit, atol=1e-6)
    source = [str(tmp_path / "ndis60_k8_I_11.int8"), "--features", embed, "--min-recall", "0.99"]
    assert cli.main(["import-graph", *source, "--out", graph]) == 0
    assert (Graph.open(graph).k, Graph.open(graph).recall) == (7, 1.0)

    out = tmp_path / "out"
    run = str(tmp_path / "run")
    assert cli.main(["export-graph", run, "--format", "int32", "--out", str(out)]) == 0
    assert (out / "ndis60_k8_I_11.int32").read_bytes() == ids.tobytes()
    assert (out / "ndis60_k8_D_11.float32").read_bytes() == values.tobytes()
    assert cli.main(["export-graph", graph, "--out", str(out / "graph.npz")]) == 0
    assert scipy.sparse.load_npz(out / "graph.npz").nnz == 60 * 7
    printed = capsys.readouterr().out.split()
    assert printed[-1] == str(out / "graph.npz") and len(printed) == 5


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("float32", ["features.float32"]),
        ("hdf5", ["block0.hdf5", "block1.hdf5"]),
        ("index", ["features.index"]),
    ],
)
def test_features_go_out_in_the_published_forms_and_come_back_the_same(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    names: list[str],
):
    rows = np.random.default_rng(0).normal(size=(50, 6)).astype("f4")
    write_feature_block(tmp_path / "rows.hdf5", rows, np.arange(50) % 7 - 1)
    config = ImportFeaturesConfig(shard_rows=20, normalize=False)
    import_features(tmp_path / "rows.hdf5", config, out=tmp_path / "embed")
    defaults = (*published.write_feature_blocks.__kwdefaults__.items(),)
    assert defaults == (("block_rows", 1_000_000),)
    monkeypatch.setitem(published.write_feature_blocks.__kwdefaults__, "block_rows", 30)
    out = tmp_path / "out"
    arguments = [str(tmp_path / "embed"), "--format", kind, "--out", str(out)]
    assert cli.main(["export-features", *arguments]) == 0
    assert capsys.readouterr().out.split() == [str(out / name) for name in names]
    assert sorted(path.name for path in out.iterdir()) == names
    again = ImportFeaturesConfig(dim=6 if kind == "float32" else None, normalize=False)
    found = import_features([out / name for name in names], again, out=tmp_path / "again")
    np.testing.assert_array_equal(np.asarray(found.array), rows)
    if kind == "hdf5":
        labels = np.asarray(ShardedArray.open(tmp_path / "again" / "labels"))
        np.testing.assert_array_equal(labels, np.arange(50) % 7 - 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import-features", "absent.float32", "--dim", "4", "--out", "x"], "is not there"),
        (["import-graph", "absent_k4_I_11.int32", "--out", "x"], "does not say how many"),
        (["export-graph", "absent", "--out", "x"], "holds no finished stage"),
        (["export-features", "absent", "--out", "x"], "holds no finished stage"),
        (["neighbors", "absent", "photo.jpg"], "holds no finished stage"),
        (["neighbors", "absent", "photo.jpg", "--k", "0"], "k=0, but every image"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_two(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
