"""The low-shot stage on a mixture of Gaussians, against the whole protocol in plain numpy."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selfsup_ray.artifacts import Array, ShardedArray, begin, finish, read_done
from selfsup_ray.config import Resources, build, override
from selfsup_ray.errors import ArtifactError, ConfigError
from selfsup_ray.stages import lowshot_pool
from selfsup_ray.stages.embed import EmbedConfig, Embeddings
from selfsup_ray.stages.graph import GraphConfig, build_graph
from selfsup_ray.stages.lowshot import LowShot, low_shot
from selfsup_ray.stages.lowshot_config import LowShotConfig
from selfsup_ray.tracking import open_run

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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[LowShotConfig, LowShot]:
    folder = tmp_path_factory.mktemp("whole")
    made = write_embeddings(folder / "embed", mixture()[0])
    config = settings()
    return config, low_shot(made, mixture()[1], config, out=folder / "lowshot")


def slow_scores(nodes: Array, seeds: Array, test: Array, *, k: int, steps: int, c: int) -> Array:
    """Return scores after some steps by whole matrices (spec 2.5, 2.6), background nodes first."""
    similarity = (nodes.astype(float) @ nodes.T.astype(float)).astype(np.float32)
    a = np.zeros((len(nodes), len(nodes)))
    for i in range(len(nodes)):
        others = [j for j in np.lexsort((np.arange(len(nodes)), -similarity[i])) if j != i]
        a[i, [i, *others[: k - 1]]] = 1
    b = a + a.T
    w = b / b.sum(axis=1, keepdims=True)
    labels = np.zeros((len(nodes), c))
    labels[np.flatnonzero(seeds >= 0), seeds[seeds >= 0]] = 1
    labels /= np.maximum(labels.sum(axis=0), 1)
    for _ in range(steps):
        labels = w @ labels
        labels /= labels.sum(axis=0)
    similarity = (test.astype(float) @ nodes.T.astype(float)).astype(np.float32)
    near = np.array([np.lexsort((np.arange(len(nodes)), -s))[:k] for s in similarity])
    return labels[near].sum(axis=1)


@pytest.mark.parametrize("in_domain", [False, True])
def test_diffusion_is_the_protocol_in_whole_matrices(
    tmp_path: Path, features: Embeddings, in_domain: bool
):
    rows, labels = mixture()
    config = settings(methods=BOTH, shots=[3], seeds=[2], **{"background.in_domain": in_domain})
    made = low_shot(features, labels, config, out=tmp_path / "lowshot")
    for setup, classes in (("val", [0, 1, 2, 6, 7, 8]), ("test", [3, 4, 5, 9, 10, 11])):
        test_ids = np.load(made.path / setup / "test_ids.npy")
        is_train = ~np.isin(np.arange(len(labels)), _all_test_ids(made))
        assert set(labels[test_ids]) == set(classes)
        base = [i for c in classes[:3] for i in np.flatnonzero((labels == c) & is_train)]
        random_state, novel = np.random.RandomState(2), []
        for c in classes[3:]:
            images = np.flatnonzero((labels == c) & is_train)
            random_state.shuffle(images)
            novel += list(images[:3])
        others = list(np.flatnonzero(~np.isin(labels, classes) & is_train))
        if in_domain:
            unlabelled = np.isin(labels, classes[3:]) & is_train
            others = list(np.flatnonzero((~np.isin(labels, classes) & is_train) | unlabelled))
        own = {c: i for i, c in enumerate(classes)}
        for method, background in (("diffusion", []), ("diffusion_background", others)):
            inside = set(background)
            nodes = [*background, *base, *(i for i in novel if i not in inside)]
            seeds = np.array([own[labels[i]] if i in {*base, *novel} else -1 for i in nodes])
            truth = np.array([own[label] for label in labels[test_ids]])
            for t in range(config.niter + 1):
                scores = slow_scores(rows[nodes], seeds, rows[test_ids], k=6, steps=t, c=6)
                scores = scores.round(9)  # equal scores in exact arithmetic are ties
                order = np.argsort(-scores, axis=1, kind="stable")
                hits = (order[:, :1] == truth[:, None]).any(axis=1)
                curve = made.curves[setup][method]["3"]["top1_all"]["mean"]
                assert curve[t] == pytest.approx(hits.mean(), abs=1.01 / len(hits))


def results(made: LowShot) -> list[dict[str, str]]:
    with (made.path / "results.csv").open() as file:
        return list(csv.DictReader(file))


def _all_test_ids(made: LowShot) -> Array:
    return np.concatenate([np.load(made.path / s / "test_ids.npy") for s in ("val", "test")])


def test_hyper_parameters_are_the_best_of_validation_and_what_the_test_was_run_with(
    whole: tuple[LowShotConfig, LowShot],
):
    _, made = whole
    chosen = json.loads((made.path / "hyperparameters.json").read_text())
    assert chosen == made.table["chosen"]
    for n in ("1", "3"):
        for method in BOTH:
            curve = made.curves["val"][method][n]["top5_all"]["mean"]
            t = chosen[n]["niter"][method]
            assert curve[t] == max(curve) and max(curve[:t], default=-1) < curve[t]
            assert made.table["val"][n][method]["top5_all"]["mean"] == pytest.approx(curve[t])
            tested = made.curves["test"][method][n]["top5_novel"]["mean"][t]
            assert made.mean(method, n=int(n), number="top5_novel") == pytest.approx(tested)
        for method in ("logistic", "knn", "fused", "fused_background"):
            on_val = made.table["val"][n][method]["top5_all"]["mean"]
            assert chosen[n]["validation"][method] == pytest.approx(on_val)
        better = chosen[n]["validation"]
        assert better["fused"] >= max(better["logistic"], better["diffusion"]) - 1e-12


def test_the_table_is_mean_and_deviation_of_the_rows_by_seed(
    whole: tuple[LowShotConfig, LowShot],
):
    config, made = whole
    rows = results(made)
    assert len(rows) == 2 * 2 * 2 * len(config.methods)
    for n in config.shots:
        for method in config.methods:
            mine = [
                r for r in rows if (r["setup"], r["n"], r["method"]) == ("test", str(n), method)
            ]
            assert [r["seed"] for r in mine] == ["1", "2"]
            values = [float(r["top5_novel"]) for r in mine]
            cell = made.table["test"][str(n)][method]["top5_novel"]
            assert cell["mean"] == pytest.approx(np.mean(values))
            assert cell["std"] == pytest.approx(np.std(values))
    facts = read_done(made.path).facts
    means = [made.mean("diffusion_background", n=n, setup="val") for n in config.shots]
    assert facts["validation_top5"] == pytest.approx(np.mean(means))
    assert facts["method"] == "diffusion_background"


def test_log_probabilities_of_the_linear_classifier_are_stored_for_both_set_ups(
    whole: tuple[LowShotConfig, LowShot],
):
    _, made = whole
    files = sorted((made.path / "log_probabilities").glob("*.npy"))
    assert len(files) == 8
    labels = mixture()[1]
    for path in files:
        setup = path.name.split("-")[0]
        log_p = np.load(path)
        test_ids = np.load(made.path / setup / "test_ids.npy")
        assert log_p.shape == (len(test_ids), 6)
        np.testing.assert_allclose(np.exp(log_p).sum(axis=1), 1, rtol=1e-5)
    classes = np.load(made.path / "test" / "test_classes.npy")
    hits = np.argmax(np.load(files[3]), axis=1) == classes  # test-n003-seed002
    wanted = ("test", "3", "2", "logistic")
    row = next(r for r in results(made) if (r["setup"], r["n"], r["seed"], r["method"]) == wanted)
    assert float(row["top1_all"]) == pytest.approx(hits.mean())
    assert len(labels) == C * PER_CLASS


def deterministic_files(folder: Path) -> dict[str, bytes]:
    """Return the content of every result; times and resources are apart."""
    skipped = ("done.json", "seconds.csv", "config.yaml", "versions.json", "metrics.jsonl")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in skipped and path.parent.name != "seconds"
    }


KILLED = """
import os, signal, sys
from pathlib import Path
from selfsup_ray.stages import lowshot_units
from tests.stages.test_lowshot import mixture, settings
from selfsup_ray.stages.embed import Embeddings
from selfsup_ray.stages.imported import ImportFeaturesConfig, import_features
from selfsup_ray.stages.lowshot import low_shot

folder, last = Path(sys.argv[1]), int(sys.argv[2])
written = []
write = lowshot_units.write_json

def counted(path, value):
    write(path, value)
    if path.parent.name in ("explore", "final"):
        written.append(path)
        if len(written) == last:
            os.kill(os.getpid(), signal.SIGKILL)

lowshot_units.write_json = counted
low_shot(Embeddings.open(folder / "embed"), mixture()[1], settings(), out=folder / "lowshot")
"""


def test_a_run_killed_twice_continues_to_the_same_bytes(
    tmp_path: Path, features: Embeddings, whole: tuple[LowShotConfig, LowShot]
):
    root = Path(__file__).parents[2]
    for last in (2, 5):
        command = [sys.executable, "-c", KILLED, str(tmp_path), str(last)]
        environment = os.environ | {"PYTHONPATH": str(root)}
        ended = subprocess.run(command, cwd=root, env=environment, capture_output=True)
        assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    units = list((tmp_path / "lowshot" / "units").rglob("*-seed*.json"))
    assert len([u for u in units if u.parent.name in ("explore", "final")]) == 7
    kept = {path: path.stat().st_mtime_ns for path in units}
    config, made = whole
    low_shot(features, mixture()[1], config, out=tmp_path / "lowshot")
    assert {path: path.stat().st_mtime_ns for path in units} == kept
    assert deterministic_files(tmp_path / "lowshot") == deterministic_files(made.path)


def test_the_cut_into_shards_and_groups_changes_nothing(
    tmp_path: Path,
    features: Embeddings,
    whole: tuple[LowShotConfig, LowShot],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(lowshot_pool, "SHARD_ROWS", 20)
    monkeypatch.setattr(lowshot_pool, "GROUP_ROWS", 50)
    config, once = whole
    made = low_shot(features, mixture()[1], config, out=tmp_path / "lowshot")
    join = made.path / "test" / "background" / "join1"
    assert len(list((join / "ids").glob("*.npy"))) > 8
    assert not (join / "partial").exists()
    for name in ("results.csv", "curves.json", "table.json"):
        assert (made.path / name).read_bytes() == (once.path / name).read_bytes()


def test_two_workers_give_the_same_bytes(tmp_path: Path, features: Embeddings, ray_session: None):
    small = {"methods": ["diffusion", "logistic"], "shots": [1], "logistic.batch_size": [8]}
    for name, workers in (("here", 0), ("there", 2)):
        config = settings(**small, **{"resources.workers": workers})
        low_shot(features, mixture()[1], config, out=tmp_path / name)
    assert deterministic_files(tmp_path / "there") == deterministic_files(tmp_path / "here")


def test_background_of_another_run_with_its_graph_is_the_same_as_searched(
    tmp_path: Path, features: Embeddings
):
    rows, labels = mixture()
    other = write_embeddings(tmp_path / "other", rows[::-1].copy())
    graph = build_graph(other, GraphConfig(k=9, resources=Resources(workers=0)), out=tmp_path / "g")
    found = {}
    for name, path in (("searched", None), ("graph", str(graph.path))):
        folders = [{"path": str(other.path), "graph": path}]
        config = settings(
            methods=["diffusion_background"], seeds=[1], **{"background.folders": folders}
        )
        made = low_shot(features, labels, config, out=tmp_path / name)
        found[name] = made.table | {"curves": made.curves}
        sizes = len(np.load(made.path / "val" / "background" / "images.npy"))
        assert sizes == len(rows) + sum(labels >= 0) - _tested_and_novel(made, labels)
    assert found["searched"] == found["graph"]
    shutil.rmtree(graph.path)
    build_graph(other, GraphConfig(k=10, resources=Resources(workers=0)), out=graph.path)
    with pytest.raises(ArtifactError, match="was built from another background"):
        low_shot(features, labels, config, out=tmp_path / "graph")


def test_the_graph_of_other_rows_than_the_background_has_is_an_error(
    tmp_path: Path, features: Embeddings
):
    rows, labels = mixture()
    other = write_embeddings(tmp_path / "other", rows[::-1].copy())
    third = write_embeddings(tmp_path / "third", rows, encoder="two")
    config = GraphConfig(k=9, resources=Resources(workers=0))
    graph = build_graph(third, config, out=tmp_path / "g")
    folders = [{"path": str(other.path), "graph": str(graph.path)}]
    asked = settings(methods=["diffusion_background"], **{"background.folders": folders})
    with pytest.raises(ConfigError, match="was made from other rows"):
        low_shot(features, labels, asked, out=tmp_path / "lowshot")


def _tested_and_novel(made: LowShot, labels: Array) -> int:
    """Images that are no shared node of the validation set-up: all tests, and its novel classes."""
    novel = np.isin(labels, [6, 7, 8])
    novel[_all_test_ids(made)] = True
    return int(novel.sum())


def test_very_wide_gaussian_weights_are_constant_ones(tmp_path: Path, features: Embeddings):
    curves = {}
    for name, options in (
        ("constant", {}),
        ("wide", {"weights": "gaussian", "sigma": 1e4}),
        ("narrow", {"weights": "gaussian", "sigma": 0.1}),
        ("floor", {"min_similarity": 0.9}),
    ):
        changes = {f"diffusion.{key}": value for key, value in options.items()}
        config = settings(methods=["diffusion_background"], seeds=[1], shots=[3], **changes)
        made = low_shot(features, mixture()[1], config, out=tmp_path / name)
        curves[name] = made.curves["test"]["diffusion_background"]["3"]["top1_all"]["mean"]
    np.testing.assert_allclose(curves["wide"], curves["constant"], atol=1e-9)
    assert curves["narrow"] != curves["constant"] != curves["floor"]


def test_a_finished_folder_is_current_and_other_settings_are_an_error(
    whole: tuple[LowShotConfig, LowShot], tmp_path: Path
):
    config, made = whole
    features = Embeddings.open(made.path.parent / "embed")
    stamp = (made.path / "done.json").read_bytes()
    with open_run(tmp_path / "tracked", name="lowshot") as tracker:
        again = low_shot(features, mixture()[1], config, out=made.path, tracker=tracker)
    assert again.fingerprint == made.fingerprint
    assert (made.path / "done.json").read_bytes() == stamp
    with pytest.raises(ArtifactError, match=r"lowshot\.k=6, but this run asks for 7"):
        low_shot(features, mixture()[1], override(config, {"k": 7}), out=made.path)
