"""Which images the low-shot protocol takes: those kept for testing, published ones, refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selfsup_ray.artifacts import Array, ShardedArray, begin, finish
from selfsup_ray.config import Resources, build, override
from selfsup_ray.data.published import write_feature_block
from selfsup_ray.errors import ConfigError
from selfsup_ray.stages.embed import EmbedConfig, Embeddings
from selfsup_ray.stages.graph import GraphConfig, build_graph
from selfsup_ray.stages.imported import ImportFeaturesConfig, import_features
from selfsup_ray.stages.lowshot import LowShot, low_shot
from selfsup_ray.stages.lowshot_config import LowShotConfig
from selfsup_ray.stages.lowshot_data import SetupImages, held_out, images_of_setups
from selfsup_ray.stages.reduce import ReduceConfig, reduce

HERE = Resources(workers=0)
C, PER_CLASS, DIM = 12, 30, 8
BOTH = ["diffusion", "diffusion_background"]
SETTINGS: dict[str, Any] = {
    "classes": {"num_base": 6, "val_base": 3, "val_novel": 3},
    "shots": [1, 3],
    "seeds": [1, 2],
    "methods": [*BOTH, "logistic", "knn", "fused", "fused_background"],
    "k": 6,
    "niter": 4,
    "logistic": {
        "lr": [0.1, 0.01],
        "weight_decay": [0.0, 0.01],
        "batch_size": [8, 16],
        "iterations": 60,
        "eval_every": 25,
    },
    "knn": {"k": [1, 6]},
    "fusion": {"weights": [0.0, 0.5, 1.0]},
}


def mixture() -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(C), PER_CLASS))
    rows = rng.normal(size=(C, DIM))[labels] + 0.9 * rng.normal(size=(len(labels), DIM))
    rows[-4:] = rows[:4]  # exact duplicates
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return rows, labels


def write_embeddings(folder: Path, rows: Array, *, encoder: str = "one") -> Embeddings:
    inputs = {"encoder": encoder}
    begin(folder, stage="embed", config=EmbedConfig(), inputs=inputs)
    cut = len(rows) // 3
    array = ShardedArray.create(
        folder / "rows",
        shard_rows=[cut, len(rows) - cut],
        row_shape=rows.shape[1:],
        dtype="float32",
    )
    array.write_shard(0, rows[:cut])
    array.write_shard(1, rows[cut:])
    facts = {"corpus": "../corpus"}
    finish(folder, stage="embed", config=EmbedConfig(), inputs=inputs, seconds=0, facts=facts)
    return Embeddings.open(folder)


def settings(**changes: Any) -> LowShotConfig:
    return override(build(LowShotConfig, SETTINGS), changes)


@pytest.fixture
def features(tmp_path: Path) -> Embeddings:
    return write_embeddings(tmp_path / "embed", mixture()[0])


def _all_test_ids(made: LowShot) -> Array:
    return np.concatenate([np.load(made.path / s / "test_ids.npy") for s in ("val", "test")])


def test_published_features_need_no_corpus(tmp_path: Path):
    rows, labels = mixture()
    raw = rows * np.linspace(20, 40, len(rows), dtype=np.float32)[:, None]
    blocks = [tmp_path / "train.h5", tmp_path / "val.h5"]
    for path, part in zip(blocks, (slice(0, 240), slice(240, None)), strict=True):
        write_feature_block(path, raw[part], labels[part])
    unit = import_features(blocks, out=tmp_path / "unit")
    as_published = import_features(
        blocks, ImportFeaturesConfig(normalize=False), out=tmp_path / "raw"
    )
    config = settings(
        methods=["diffusion", "logistic"],
        **{"test": {"name": "rows", "first": 240}, "logistic.scale": "none"},
    )
    made = low_shot(
        unit,
        np.asarray(ShardedArray.open(unit.path / "labels")),
        config,
        out=tmp_path / "lowshot",
        linear_features=as_published,
    )
    np.testing.assert_array_equal(np.sort(_all_test_ids(made)), np.arange(240, 360))
    assert made.mean("logistic", n=3, number="top1_all") > 0.4
    assert made.mean("diffusion", n=3, number="top1_all") > 0.4


def test_images_are_kept_for_testing_by_share_by_source_or_by_place(
    tmp_path: Path, features: Embeddings
):
    labels = mixture()[1]
    place = np.arange(len(labels))
    small = {"methods": ["knn"], "seeds": [1], "shots": [1]}
    made = low_shot(features, labels, settings(**small), out=tmp_path / "share")
    tested = np.bincount(labels[_all_test_ids(made)], minlength=C)
    np.testing.assert_array_equal(tested, PER_CLASS // 5)

    def sources(ids: Array) -> list[str]:
        return [f"{'val' if i % 4 == 3 else 'train'}/{i}.png" for i in ids]

    by_source = settings(**small, **{"test": {"name": "source", "pattern": "val/*"}})
    made = low_shot(features, labels, by_source, out=tmp_path / "source", sources=sources)
    np.testing.assert_array_equal(np.sort(_all_test_ids(made)), place[place % 4 == 3])
    by_rows = settings(**small, **{"test": {"name": "rows", "first": 200}})
    made = low_shot(features, labels, by_rows, out=tmp_path / "rows")
    np.testing.assert_array_equal(np.sort(_all_test_ids(made)), place[200:])
    none = settings(**small, **{"test": {"name": "source", "pattern": "test/*"}})
    with pytest.raises(ConfigError, match=r"'test/\*' matches no image's source.*'train/0.png'"):
        low_shot(features, labels, none, out=tmp_path / "none", sources=sources)
    with pytest.raises(ConfigError, match="needs the sources"):
        low_shot(features, labels, none, out=tmp_path / "none")
    late = settings(**small, **{"test": {"name": "rows", "first": 9999}})
    with pytest.raises(ConfigError, match="first=9999 leaves no test image"):
        low_shot(features, labels, late, out=tmp_path / "none")
    by_class = settings(**small, **{"test": {"name": "source", "pattern": "[1-9]*/7.png"}})

    def by_label(ids: Array) -> list[str]:
        return [f"{labels[i]}/{7 if i % 2 else 8}.png" for i in ids]

    with pytest.raises(ConfigError, match=r"no test image of class 0 \(cat\)"):
        names = ["cat"]
        low_shot(
            features, labels, by_class, out=tmp_path / "n", sources=by_label, class_names=names
        )
    assert not (tmp_path / "none").exists()


def test_what_does_not_fit_is_refused_before_any_work(tmp_path: Path, features: Embeddings):
    labels, out = mixture()[1], tmp_path / "lowshot"
    with pytest.raises(ConfigError, match=r"Novel class 6 has 24 training images.*asks for 25"):
        low_shot(features, labels, settings(shots=[1, 25]), out=out)
    with pytest.raises(ConfigError, match="72 base images, fewer than the 80 neighbors"):
        low_shot(features, labels, settings(k=80), out=out)
    with pytest.raises(ConfigError, match="7 labels, 360 embeddings"):
        low_shot(features, labels[:7], settings(), out=out)
    alone = {"background.other_classes": False}
    with pytest.raises(ConfigError, match="set-up `val` has no background image"):
        low_shot(features, labels, settings(**alone), out=out)
    narrow = write_embeddings(tmp_path / "narrow", mixture()[0][:, :4].copy())
    folders = {"background.folders": [{"path": str(narrow.path)}]}
    with pytest.raises(ConfigError, match="rows of 4 numbers, but this run's embeddings have 8"):
        low_shot(features, labels, settings(**folders), out=out)
    other = write_embeddings(tmp_path / "other", mixture()[0], encoder="two")
    folders = {"background.folders": [{"path": str(other.path)}]}
    with pytest.raises(ConfigError, match="made by another encoder"):
        low_shot(features, labels, settings(**folders), out=out)
    assert not out.exists()


def test_config_values_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="give either `num_base` or `file`"):
        settings(classes={})
    with pytest.raises(ConfigError, match="`methods` has fused, which needs logistic too"):
        settings(methods=["diffusion", "fused"])
    with pytest.raises(ConfigError, match=r"`seeds` needs at least one value and each once"):
        settings(seeds=[1, 1])
    with pytest.raises(ConfigError, match="`lr` needs at least one value"):
        settings(**{"logistic.lr": []})


def test_a_split_from_a_file_is_the_same_as_by_counts(tmp_path: Path):
    labels = mixture()[1]
    lists = {
        "base_val": [0, 1, 2],
        "novel_val": [6, 7, 8],
        "base_test": [3, 4, 5],
        "novel_test": [9, 10, 11],
    }
    own, published = tmp_path / "split.yaml", tmp_path / "label_idx.json"
    own.write_text("\n".join(f"{name}: {numbers}" for name, numbers in lists.items()))
    numbered = {
        f"{kind}_classes_{number}": [c + 1 for c in lists[f"{kind}_{name}"]]
        for kind in ("base", "novel")
        for name, number in (("val", 1), ("test", 2))
    }
    names = {"label_names": [f"n{c}" for c in range(C)]}
    published.write_text(json.dumps(names | numbered))
    counted = images(labels, settings())
    for path in (own, published):
        found = images(labels, settings(classes={"file": str(path)}))
        for setup in ("val", "test"):
            np.testing.assert_array_equal(found[setup].train_ids, counted[setup].train_ids)
            np.testing.assert_array_equal(found[setup].setup.is_novel, [False] * 3 + [True] * 3)


def images(labels: Array, config: LowShotConfig) -> dict[str, SetupImages]:
    return images_of_setups(labels, held_out(labels, config, None), config, class_names=None)


def test_a_graph_that_does_not_fit_its_background_is_refused(tmp_path: Path, features: Embeddings):
    rows, labels = mixture()
    other = write_embeddings(tmp_path / "other", rows[:300].copy())
    for k, source, message in (
        (9, features, "has 360 images, but .* has 300 rows"),
        (4, other, r"keeps 4 neighbors, fewer than the 5 that lowshot.k=6 needs"),
    ):
        config = GraphConfig(k=k, resources=HERE)
        graph = build_graph(source, config, out=tmp_path / f"graph{k}")
        folders = {"background.folders": [{"path": str(other.path), "graph": str(graph.path)}]}
        with pytest.raises(ConfigError, match=message):
            low_shot(features, labels, settings(**folders), out=tmp_path / "lowshot")


def test_a_background_must_have_gone_through_the_same_reduction(
    tmp_path: Path, features: Embeddings
):
    rows, labels = mixture()
    own = reduce(features, ReduceConfig(dim=4, resources=HERE), out=tmp_path / "own")
    other = write_embeddings(tmp_path / "other", rows[100:].copy())
    apart = reduce(other, ReduceConfig(dim=4, resources=HERE), out=tmp_path / "apart")
    same = ReduceConfig(dim=4, transform=own.path, resources=HERE)
    together = reduce(other, same, out=tmp_path / "together")
    small = {"methods": ["diffusion_background"], "shots": [1], "seeds": [1]}
    for background in (apart, other):
        changes = {**small, "background.folders": [{"path": str(background.path)}]}
        with pytest.raises(ConfigError, match=r"made by another reduction"):
            low_shot(own, labels, settings(**changes), out=tmp_path / "lowshot")
    changes = {**small, "background.folders": [{"path": str(together.path)}]}
    made = low_shot(own, labels, settings(**changes), out=tmp_path / "lowshot")
    assert len(np.load(made.path / "test" / "background" / "images.npy")) > len(together)
