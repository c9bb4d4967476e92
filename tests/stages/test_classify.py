"""classify: networks trained end to end, the same however they are run, stopped or cached."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from selfsup_ray.artifacts import read_json
from selfsup_ray.config import Resources, build
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.shifted import normalized
from selfsup_ray.data.synthetic import corpus_of_arrays, shape_images
from selfsup_ray.errors import ArtifactError, ConfigError
from selfsup_ray.models.encoder import Encoder
from selfsup_ray.models.weights import read_weights
from selfsup_ray.stages.classify import Classified, _build, classify
from selfsup_ray.stages.classify_config import ClassifyConfig
from selfsup_ray.stages.classify_data import split_images
from selfsup_ray.stages.classify_network import NetworkPlan
from selfsup_ray.stages.patch_dictionary import PatchDictionary
from selfsup_ray.stages.patch_pictures import patch_tiles
from selfsup_ray.stages.patches import PatchesConfig, fit_patches
from selfsup_ray.stages.whiten import WhitenConfig, whiten
from selfsup_ray.tracking import read_records
from selfsup_ray.training import TrainJob, fit

N, SIDE = 160, 12
HERE = Resources(workers=0)
FULL = {"name": "phi_full", "k": 8, "bottleneck": 6}
BASE: dict[str, Any] = {
    "model": FULL,
    "epochs": 2,
    "batch_size": 16,
    "log_every": 3,
    "checkpoint_every": 5,
    "precision": "float32",
    "optim": {"name": "sgd", "lr": 0.01, "weight_decay": 0},
    "schedule": {"name": "step", "milestones": [1]},
    "resources": {"workers": 0},
}
DEEPER = {"name": "code", "size": 8, "patch_size": 2, "k": 2, "patches_per_entry": 8}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of four classes, and a dictionary of 16 patches of 3 x 3 pixels."""
    folder = tmp_path_factory.mktemp("classify")
    images, labels = shape_images(N, size=SIDE)
    corpus = corpus_of_arrays(folder / "ingest", images, labels, shard_size=60)
    drawn = WhitenConfig(patches=512, patch_size=3, resources=HERE)
    sample = whiten(corpus, drawn, out=folder / "whiten")
    entries = PatchesConfig(size=16, patches_per_entry=32, resources=HERE)
    fit_patches(corpus, sample, entries, out=folder / "patches")
    return folder


def run(made: Path, out: Path, **changes: Any) -> Classified:
    config = build(ClassifyConfig, {**BASE, **changes})
    encoder = Encoder.open(made / "patches")
    return classify(Corpus.open(made / "ingest"), config, encoder=encoder, out=out)


def weights(done: Classified, layer: int = 1) -> dict[str, torch.Tensor]:
    return read_weights(done.path / f"layer{layer}" / "network.safetensors")


def assert_same(one: Classified, other: Classified, **tolerance: float) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **(tolerance or {"rtol": 0, "atol": 0}))
    assert one.metrics == other.metrics


@pytest.mark.parametrize(
    "model",
    [
        FULL,
        {"name": "phi_hard", "k": 0.25, "bottleneck": 6, "also_k": [1]},
        {"name": "phi_hard", "code": "triangle", "embedding": "learnable", "bottleneck": 6},
        {"name": "phi_simple", "k": 4},
        {"name": "vanilla", "size": 16, "patch_size": 3, "bottleneck": 6},
        {"name": "cnn", "architecture": "VGGc16d2A", "hidden": [8]},
    ],
    ids=lambda model: "-".join(str(model.get(key, "")) for key in ("name", "code")),
)
def test_every_network_learns_the_shapes(made: Path, tmp_path: Path, model: dict[str, Any]):
    lr = 1e-4 if model["name"] == "phi_simple" else 0.01
    optim = {"name": "sgd", "lr": lr, "weight_decay": 0}
    done = run(made, tmp_path / "c", model=model, epochs=5, optim=optim)
    assert done.max_accuracy > 0.6 and done.last_accuracy <= done.max_accuracy
    curve = done.metrics["layers"][0]["curve"]
    assert [point["epoch"] for point in curve] == [1, 2, 3, 4, 5]
    assert done.max_accuracy == max(point["test_accuracy"] for point in curve)
    if model.get("also_k"):
        assert set(done.metrics["layers"][0]["outputs"]) == {"4", "1"}
        assert done.metrics["k1"]["last_accuracy"] == curve[-1]["test_accuracy_k1"]


def test_the_network_in_the_folder_has_the_accuracy_that_was_measured(made: Path, tmp_path: Path):
    done = run(made, tmp_path / "c")
    corpus, ids = Corpus.open(made / "ingest"), done.split.test
    images = normalized(corpus.images(ids), done.config.views)
    with torch.no_grad():
        predicted = done.network()(images)[0].argmax(dim=1).numpy()
    assert (predicted == corpus.labels(ids)).mean() == pytest.approx(done.last_accuracy)
    assert not set(ids) & set(done.split.train)
    assert len(ids) + len(done.split.train) == N


def test_the_patches_that_weigh_most_and_least_are_drawn(made: Path, tmp_path: Path):
    done = run(made, tmp_path / "c")
    for name in ("best", "worst", "best_whitened", "worst_whitened"):
        with Image.open(done.path / f"{name}.png") as picture:
            assert picture.size == (8 * 20, 2 * 20)  # 16 entries of 3 x 3, six times as large
    norms = weights(done)["layers.0.bottleneck.weight"].flatten(1).norm(dim=0)
    raw = PatchDictionary.open(made / "patches").raw[int(norms.argmax())]
    want = patch_tiles(raw[None])[0]
    with Image.open(done.path / "best.png") as picture:
        got = np.asarray(picture)[1:19:6, 1:19:6]
    np.testing.assert_array_equal(got, want)


def test_cached_codes_change_nothing(made: Path, tmp_path: Path):
    plain = run(made, tmp_path / "plain")
    cached = run(made, tmp_path / "cached", cache_codes=True)
    assert_same(plain, cached)
    assert not (cached.path / "codes").exists()


class _StoppedError(Exception):
    pass


def stop_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the training fail when it reads so many batches."""
    read, count = Corpus.images, [0]

    def images(self: Corpus, ids: Any) -> torch.Tensor:
        count[0] += len(ids) == 16
        if count[0] > batches:
            raise _StoppedError
        return read(self, ids)

    monkeypatch.setattr(Corpus, "images", images)


@pytest.mark.parametrize("deeper", [(), (DEEPER, DEEPER)], ids=["one layer", "three layers"])
def test_a_training_that_was_stopped_goes_on_to_the_same_weights(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deeper: Any
):
    model = {**FULL, "pool": 2}
    whole = run(made, tmp_path / "whole", model=model, deeper=deeper)
    for batches in (13, 7 if deeper else 4):
        with monkeypatch.context() as patched, pytest.raises(_StoppedError):
            stop_after(batches, patched)
            run(made, tmp_path / "stopped", model=model, deeper=deeper)
    resumed = run(made, tmp_path / "stopped", model=model, deeper=deeper)
    assert_same(whole, resumed)
    for layer in range(1, len(deeper) + 2):
        a, b = weights(whole, layer), weights(resumed, layer)
        assert all(torch.equal(a[name], b[name]) for name in a)


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
import time
torch.set_num_threads(1)
from selfsup_ray.data.corpus import Corpus
from stages.test_classify import run
read = Corpus.images
Corpus.images = lambda self, ids: (time.sleep(0.1), read(self, ids))[1]
run(Path({made!r}), Path({out!r}), epochs=6, checkpoint_every=3)
"""


def test_a_killed_training_goes_on_to_the_same_weights(made: Path, tmp_path: Path):
    out, tests = tmp_path / "killed", Path(__file__).parent.parent
    code = KILLED.format(tests=str(tests), made=str(made), out=str(out))
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ})
    checkpoint = out / "layer1" / "checkpoint.pt"
    deadline = time.monotonic() + 60
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "done.json").exists(), "killed too late to show anything"
    resumed = run(made, out, epochs=6, checkpoint_every=3)
    records = read_records(out / "layer1" / "metrics.jsonl")
    steps = [record["step"] for record in records]
    assert steps == sorted(set(steps))
    assert_same(run(made, tmp_path / "whole", epochs=6, checkpoint_every=3), resumed)


def trained_on(made: Path, out: Path, config: ClassifyConfig) -> dict[str, Any]:
    """Return weights and history of one of the ranks that train together."""
    corpus, encoder = Corpus.open(made / "ingest"), Encoder.open(made / "patches")
    plan = NetworkPlan(config, out, SIDE, 4, encoder)
    job = TrainJob(partial(_build, corpus, plan, 1), config)
    objective, dataset, views = job.built()
    state = fit(objective, dataset, views, config, device="cpu")
    return {"weights": state["objective"], "history": state["history"]}


def assert_alike(one: dict[str, Any], two: dict[str, Any]) -> None:
    for name, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, rtol=1e-3, atol=1e-4)
    for mine, theirs in zip(one["history"], two["history"], strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine.keys() - {"images_per_s", "data_wait_share"}:
            assert mine[key] == pytest.approx(theirs[key], abs=2e-3), key


def test_two_ranks_train_the_network_of_one(
    made: Path, tmp_path: Path, on_ranks: Callable[..., list[Any]]
):
    values = {**BASE, "validation_share": 0.2, "model": {**FULL, "also_k": [2]}}
    config = build(ClassifyConfig, values)
    split_images(Corpus.open(made / "ingest"), config).write(tmp_path)
    alone = trained_on(made, tmp_path, config)
    for rank in on_ranks(trained_on, made, tmp_path, config, size=2):
        assert_alike(alone, rank)
    last = alone["history"][-1]
    assert {"test_accuracy", "test_accuracy_k2", "validation_accuracy_k2"} <= last.keys()


@pytest.mark.usefixtures("ray_session")
def test_two_workers_train_the_network_of_one_process(made: Path, tmp_path: Path):
    one = run(made, tmp_path / "one")
    two = run(made, tmp_path / "two", resources={"workers": 2})
    a, b = weights(one), weights(two)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)
    assert two.last_accuracy == pytest.approx(one.last_accuracy, abs=2e-3)


def test_deeper_layers_have_folders_and_numbers_of_their_own(made: Path, tmp_path: Path):
    done = run(made, tmp_path / "c", model={**FULL, "pool": 2}, deeper=(DEEPER,), sum_logits=True)
    assert [one["layer"] for one in done.metrics["layers"]] == [1, 2]
    assert done.metrics["layer1"]["max_accuracy"] <= 1
    assert done.max_accuracy == done.metrics["layer2"]["max_accuracy"]
    first = run(made, tmp_path / "first", model={**FULL, "pool": 2})
    a, b = weights(first), weights(done)
    assert all(torch.equal(a[name], b[name]) for name in a), "a layer below was changed"
    assert done.network()(torch.zeros(2, 3, SIDE, SIDE))[0].shape == (2, 4)


def test_patches_of_the_map_below_make_the_dictionary_of_a_layer(made: Path, tmp_path: Path):
    done = run(made, tmp_path / "c", model={**FULL, "pool": 2}, deeper=(DEEPER,))
    corpus = Corpus.open(made / "ingest")
    images = normalized(corpus.images(done.split.train), done.config.views)
    below: Any = done.network().blocks[0]  # type: ignore[union-attr, index]
    with torch.no_grad():
        maps = below.maps(images)[0]
    patches = torch.nn.functional.unfold(maps, 2).transpose(1, 2).flatten(0, 1).double()
    stored = np.load(done.path / "layer2" / "whiten" / "patches" / "00000.npy")
    assert len(stored) == 64
    distance = torch.cdist(torch.from_numpy(stored).double(), patches).min(dim=1).values
    assert distance.max() < 1e-4
    tensors = read_weights(done.path / "layer2" / "whiten" / "whitening.safetensors")
    covariance = np.cov(patches.numpy().T, bias=True)
    np.testing.assert_allclose(tensors["covariance"], covariance, rtol=1e-4, atol=1e-6)


def test_a_layer_says_how_its_dictionary_is_made(made: Path, tmp_path: Path):
    layer = {**DEEPER, "source": "gaussian", "select": "farthest", "unit_norm": True}
    done = run(made, tmp_path / "c", model={**FULL, "pool": 2}, deeper=(layer,), epochs=1)
    folder = done.path / "layer2"
    noise = np.load(folder / "whiten" / "patches" / "00000.npy")
    assert noise.shape == (64, 6 * 4)
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    matrix = read_weights(folder / "whiten" / "whitening.safetensors")["matrix"].numpy()
    rows, chosen = noise @ matrix, [0]
    while len(chosen) < 8:
        apart = ((rows[:, None] - rows[chosen]) ** 2).sum(axis=2).min(axis=1)
        chosen.append(int(apart.argmax()))
    unit = rows[chosen] / np.linalg.norm(rows[chosen], axis=1, keepdims=True)
    stored = read_weights(folder / "dictionary.safetensors")
    np.testing.assert_allclose(stored["kernel"], -unit @ matrix.T, atol=1e-4)
    np.testing.assert_allclose(stored["bias"], 0.5, atol=1e-4)


def test_dictionaries_of_all_layers_are_drawn(made: Path, tmp_path: Path):
    done = run(made, tmp_path / "c", model={**FULL, "pool": 2}, deeper=(DEEPER,), epochs=1)
    for name in ("raw", "whitened", "covariance"):
        with Image.open(done.path / f"layer2_{name}.png") as picture:
            # Eight entries of 6 channels, 2 x 3 tiles of 2 x 2 numbers, six times as large.
            wanted = (2 * 24 * 12 + 20, 24 * 12) if name == "covariance" else (8 * 38, 26)
            assert picture.size == wanted


def test_a_sampled_dictionary_of_a_layer_draws_one_patch_for_each_entry(made: Path, tmp_path: Path):
    layer = {**DEEPER, "select": "sample", "patches_per_entry": 10_000}
    done = run(made, tmp_path / "c", model={**FULL, "pool": 2}, deeper=(layer,), epochs=1)
    assert len(np.load(done.path / "layer2" / "whiten" / "patches" / "00000.npy")) == 8


@pytest.mark.parametrize("code", ["kth", "triangle"])
def test_all_layers_of_a_trained_network_have_one_code(made: Path, tmp_path: Path, code: str):
    model = {**FULL, "pool": 2, "code": code}
    done = run(made, tmp_path / "c", model=model, deeper=(DEEPER,), epochs=1)
    corpus, ids = Corpus.open(made / "ingest"), done.split.test
    images = normalized(corpus.images(ids), done.config.views)
    network: Any = done.network()
    with torch.no_grad():
        [second] = network.blocks[1].code(network.blocks[0].maps(images)[0])
        predicted = network(images)[0].argmax(dim=1).numpy()
    if code == "kth":  # one bit of the eight entries at every position
        assert set(np.bitwise_count(second.numpy()).ravel()) == {1}
    else:
        assert second.dtype == torch.float32 and second.min() == 0
    assert (predicted == corpus.labels(ids)).mean() == pytest.approx(done.last_accuracy)


def test_a_budget_is_drawn_from_the_training_images_whatever_their_class(made: Path):
    corpus = Corpus.open(made / "ingest")
    whole = split_images(corpus, build(ClassifyConfig, BASE))
    small = split_images(corpus, build(ClassifyConfig, {**BASE, "label_budget": 40}))
    again = split_images(corpus, build(ClassifyConfig, {**BASE, "label_budget": 40, "seed": 1}))
    assert len(small.train) == 40 and set(small.train) <= set(whole.train)
    assert set(small.train) != set(again.train)
    np.testing.assert_array_equal(small.test, whole.test)


def test_validation_images_choose_an_epoch_and_are_not_trained_on(made: Path, tmp_path: Path):
    done = run(made, tmp_path / "c", validation_share=0.3, epochs=3)
    parts = done.split
    assert not set(parts.train) & set(parts.validation)
    curve = done.metrics["layers"][0]["curve"]
    best = max(curve, key=lambda point: point["validation_accuracy"])
    assert done.metrics["chosen_accuracy"] == best["test_accuracy"]


def test_the_accuracy_is_measured_as_often_as_asked_and_at_the_end(made: Path, tmp_path: Path):
    done = run(made, tmp_path / "c", epochs=5, test_every=2)
    assert [point["epoch"] for point in done.metrics["layers"][0]["curve"]] == [2, 4, 5]


def test_curves_are_recorded_under_the_name_of_the_layer(made: Path, tmp_path: Path):
    from selfsup_ray.tracking import open_run

    config = build(ClassifyConfig, {**BASE, "model": {**FULL, "pool": 2}, "deeper": [DEEPER]})
    out = tmp_path / "c"
    tracker = open_run(out, None, name="classify")
    corpus, encoder = Corpus.open(made / "ingest"), Encoder.open(made / "patches")
    classify(corpus, config, encoder=encoder, out=out, tracker=tracker)
    names = {name for record in read_records(out / "metrics.jsonl") for name in record}
    assert {"layer1.loss", "layer2.loss", "layer1.test_accuracy", "layer2.test_accuracy"} <= names


def test_a_finished_folder_is_opened_and_another_config_is_refused(made: Path, tmp_path: Path):
    done = run(made, tmp_path / "c")
    before = (done.path / "done.json").stat().st_mtime_ns
    run(made, tmp_path / "c", resources={"workers": 0, "cpus": 1})
    assert (done.path / "done.json").stat().st_mtime_ns == before
    assert read_json(done.path / "metrics.json") == done.metrics
    with pytest.raises(ArtifactError, match=r"classify.model.k=8, but this run asks for 4"):
        run(made, tmp_path / "c", model={**FULL, "k": 4})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {**FULL, "k": 17}}, "k=17 is more than the 16 entries"),
        ({"batch_size": 512}, "batch_size=512, but only"),
        ({"label_budget": 1000}, "label_budget=1,000, but only"),
        ({"test": {"name": "source", "pattern": "no/*"}}, "classify.test.pattern='no/\\*'"),
        ({"model": {**FULL, "residual": "add"}}, "set bottleneck=3, or residual=cat"),
        ({"deeper": ({**DEEPER, "size": 64, "patches_per_entry": 512},)}, "lower either"),
        ({"deeper": ({**DEEPER, "patch_size": 9},)}, "layer 2: .* leaves nothing of a map"),
    ],
)
def test_what_does_not_go_together_is_said_before_any_work(
    made: Path, tmp_path: Path, changes: dict[str, Any], message: str
):
    with pytest.raises(ConfigError, match=message):
        run(made, tmp_path / "c", **changes)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sum_logits": True}, "needs `deeper` layers"),
        ({"deeper": [{"name": "conv"}]}, "phi_full needs code"),
        ({"model": {"name": "cnn"}, "deeper": [{"name": "conv"}]}, "no layers to put others on"),
        ({"model": {"name": "vanilla"}, "cache_codes": True}, "has no code"),
        ({"model": {**FULL, "also_k": [1]}, "deeper": [DEEPER]}, "leave model.also_k out"),
        ({"model": {**FULL, "also_k": [1]}, "cache_codes": True}, "one k"),
        ({"model": {"name": "cnn", "architecture": "VGG7"}}, "architecture='VGG7' is none of"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        build(ClassifyConfig, values)


def test_a_dictionary_is_asked_for_where_one_is_needed(made: Path, tmp_path: Path):
    config = build(ClassifyConfig, BASE)
    with pytest.raises(ConfigError, match="no encoder was given"):
        classify(Corpus.open(made / "ingest"), config, out=tmp_path / "c")


def test_ranks_count_every_test_image_once(on_ranks: Callable[..., list[Any]]):
    from selfsup_ray.models.classifier import Classifier

    class Images:
        labels = np.arange(11) % 3

        def __len__(self) -> int:
            return 11

        def batch(self, positions: np.ndarray[Any, Any]) -> list[torch.Tensor]:
            return [torch.from_numpy(positions).float()[:, None]]

    class Echo(torch.nn.Module):
        head_names = output_names = ("",)

        def forward(self, images: torch.Tensor, codes: Any) -> list[torch.Tensor]:
            return [torch.nn.functional.one_hot((images[:, 0] % 4 % 3).long(), 3).float()]

    def count() -> int:
        labels = np.zeros(4, np.int64)
        return Classifier(Echo(), labels, measured={}, epochs=1).correct(Images())[0]

    want = sum(i % 4 % 3 == i % 3 for i in range(11))
    assert on_ranks(count, size=2) == [want, want] and count() == want


def test_shuffled_views_are_made_anew_but_alike(made: Path, tmp_path: Path):
    small, views = {"name": "cnn", "architecture": "VGGc16d1"}, {"padding": 0, "shuffle": "pixels"}
    once, again = (run(made, tmp_path / x, model=small, views=views, epochs=1) for x in "cd")
    assert_same(once, again)
    with pytest.raises(ConfigError, match=r"views\.shuffle=pixels makes every view anew"):
        run(made, tmp_path / "e", views=views, cache_codes=True)
