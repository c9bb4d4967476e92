"""Runs from published feature files, by the command line: import, reduce, graph, labels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from selfsup_ray import cli
from selfsup_ray.artifacts import Array, read_done
from selfsup_ray.config import build
from selfsup_ray.data.published import write_feature_block
from selfsup_ray.errors import ConfigError
from selfsup_ray.experiment import Experiment
from selfsup_ray.planning import plan_experiment
from selfsup_ray.stages.diffuse import Diffusion
from selfsup_ray.stages.embed import Embeddings
from selfsup_ray.stages.lowshot import LowShot

ROOT = Path(__file__).parents[2]
C, DIM = 16, 24


def features(classes: Array, seed: int) -> Array:
    """Raw features, positive and not of unit length, close to their class's center."""
    centers = np.random.default_rng(0).gamma(2, size=(C, DIM))
    noise = np.random.default_rng(seed).normal(size=(len(classes), DIM))
    return np.maximum(centers[classes] + 0.6 * noise, 0).astype(np.float32)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HDF5 blocks as published: labelled images for training and testing, unlabelled background."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(1)
    train, val = np.repeat(np.arange(C), 12), rng.permutation(np.repeat(np.arange(C), 4))
    write_feature_block(folder / "train.hdf5", features(train, 2), train, batch=64)
    write_feature_block(folder / "val.hdf5", features(val, 3), val, batch=64)
    for block in (0, 1, 10):
        hidden = rng.integers(0, C, 150)
        zeros = np.zeros(150, np.int64)
        write_feature_block(
            folder / f"block{block}.hdf5", features(hidden, 4 + block), zeros, batch=64
        )
    split = {"base_classes_1": [1, 2, 3, 4], "novel_classes_1": [9, 10, 11, 12]}
    split |= {"base_classes_2": [5, 6, 7, 8], "novel_classes_2": [13, 14, 15, 16]}
    (folder / "label_idx.json").write_text(json.dumps(split))
    return folder


def command(name: str, folder: Path, **changes: Any) -> list[str]:
    items = [
        f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in changes.items()
    ]
    return ["run", str(ROOT / "experiments" / f"{name}.yaml"), f"out={folder / name}", *items]


def test_published_files_become_the_low_shot_table_by_two_commands(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    here = {"reduce.resources.workers": 0, "reduce.dim": 8, "embed.resources.workers": 0}
    blocks = [str(files / f"block{i}.hdf5") for i in (10, 0, 1)]
    background = {"embed.imported.files": blocks, "graph.k": 6, "graph.method": {"name": "exact"}}
    background |= here | {"reduce.sample": 200, "graph.resources.workers": 0}
    assert cli.main(command("yfcc-background", tmp_path, **background)) == 0
    assert read_done(tmp_path / "yfcc-background" / "graph").facts["recall"] == 1
    assert not (tmp_path / "yfcc-background" / "embed" / "labels").exists()

    there = tmp_path / "yfcc-background"
    folders = [{"path": str(there / "reduce"), "graph": str(there / "graph")}]
    main = {
        "embed.imported.files": [str(files / "train.hdf5"), str(files / "val.hdf5")],
        "reduce.transform": str(there / "reduce"),
        "lowshot.classes.file": str(files / "label_idx.json"),
        "lowshot.background.folders": folders,
        "lowshot.shots": [1, 5],
        "lowshot.seeds": [1, 2],
        "lowshot.k": 6,
        "lowshot.niter": 4,
        "lowshot.knn.k": [1, 5],
        "lowshot.logistic.iterations": 100,
        "lowshot.logistic.eval_every": 50,
        "lowshot.logistic.batch_size": [16],
        "lowshot.resources.workers": 0,
    }
    arguments = command("lowshot-imagenet-yfcc", tmp_path, **here, **main)
    assert cli.main(arguments) == 0
    out = tmp_path / "lowshot-imagenet-yfcc"
    made = LowShot.open(out / "lowshot")
    test_ids = np.concatenate([np.load(made.path / s / "test_ids.npy") for s in ("val", "test")])
    assert sorted(test_ids) == list(range(C * 12, C * 16))  # the rows of val.hdf5, all classes
    assert made.mean("diffusion_background", n=5, number="top1_all") > 0.7
    assert made.mean("logistic", n=5, number="top1_all") > 0.7
    assert "Low-shot classification" in (out / "report.html").read_text()

    capsys.readouterr()
    assert cli.main(["plan", *arguments[1:]]) == 0
    assert "Nothing to run" in capsys.readouterr().out


def test_labels_of_a_raw_matrix_spread_over_its_graph(files: Path, tmp_path: Path):
    truth = np.repeat(np.arange(C), 12)
    features(truth, 2).tofile(tmp_path / "rows.float32")
    known = np.where(np.arange(len(truth)) % 12 < 2, truth, -1)
    np.save(tmp_path / "labels.npy", known)
    (tmp_path / "names.txt").write_text("\n".join(f"class {c}" for c in range(C)))
    here = {"workers": 0}
    source = {"files": [str(tmp_path / "rows.float32")], "dim": DIM}
    source |= {"labels": str(tmp_path / "labels.npy"), "class_names": str(tmp_path / "names.txt")}
    values = {
        "out": str(tmp_path / "run"),
        "embed": {"imported": source, "dtype": "float16", "resources": here},
        "graph": {"k": 6, "resources": here},
        "diffuse": {"niter": 3, "resources": here},
    }
    path = tmp_path / "raw.yaml"
    path.write_text(yaml.safe_dump(values))
    assert [s.state for s in plan_experiment(build(Experiment, values)).steps] == ["run"] * 3
    assert cli.main(["run", str(path)]) == 0
    assert Embeddings.open(tmp_path / "run" / "embed").array.dtype == np.float16
    found = np.asarray(Diffusion.open(tmp_path / "run" / "diffuse").predictions)
    assert (found == truth).mean() > 0.8
    assert (tmp_path / "run" / "report.html").exists()
    np.save(tmp_path / "labels.npy", known[:-1])
    values["out"] = str(tmp_path / "other")
    path.write_text(yaml.safe_dump(values))
    assert cli.main(["run", str(path)]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ingest": {"source": "photos"}}, r"rows without images, on which ingest cannot run"),
        ({"scan": {"num_clusters": 2}}, r"on which scan cannot run; leave out scan"),
        ({"lowshot": {"classes": {"num_base": 2}}}, r"normalize is False.*add `reduce: \{\}`"),
        ({"diffuse": {}}, r"diffuse needs graph"),
        ({"embed": {"layer": "head"}}, r"`layer` is for an encoder, but `imported` takes"),
    ],
)
def test_what_cannot_start_from_rows_is_an_error(
    tmp_path: Path, changes: dict[str, Any], message: str
):
    embed = {"imported": {"files": ["x.hdf5"], "normalize": False}, **changes.get("embed", {})}
    with pytest.raises(ConfigError, match=message):
        build(Experiment, {"out": str(tmp_path), **changes, "embed": embed})
