"""The stage patches: dictionaries of each kind, the encoder on them, and its place in a run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selfsup_ray.cluster import kmeans as sharded
from selfsup_ray.config import Resources, build, override
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.synthetic import corpus_of_arrays, shape_images, write_shapes
from selfsup_ray.errors import ArtifactError, ConfigError
from selfsup_ray.experiment import Experiment
from selfsup_ray.models.encoder import Encoder
from selfsup_ray.models.patch_backbone import PatchBackbone
from selfsup_ray.ops.whitening import code_kernel
from selfsup_ray.planning import plan_experiment
from selfsup_ray.stages.patch_dictionary import PatchDictionary
from selfsup_ray.stages.patch_pictures import by_size, patch_tiles, write_pictures
from selfsup_ray.stages.patches import PatchesConfig, fit_patches
from selfsup_ray.stages.whiten import PatchSample, WhitenConfig, whiten
from selfsup_ray.steps import run_stage
from selfsup_ray.sweep_trial import _inputs_of_rankme, addresses, rankme
from selfsup_ray.tracking import open_run

HERE = Resources(workers=0)
SMALL = {"size": 8, "patches_per_entry": 40, "resources": HERE}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, PatchSample]:
    folder = tmp_path_factory.mktemp("patches")
    pixels, labels = shape_images(30, size=12)
    corpus = corpus_of_arrays(folder / "corpus", pixels, labels, shard_size=8)
    config = WhitenConfig(patches=400, patch_size=3, resources=HERE)
    return corpus, whiten(corpus, config, out=folder / "whiten")


def fitted(made: tuple[Corpus, PatchSample], out: Path, **values) -> PatchDictionary:
    fit_patches(*made, PatchesConfig(**(SMALL | values)), out=out)
    return PatchDictionary.open(out)


def whitened_rows(sample: PatchSample, count: int) -> np.ndarray:
    return np.asarray(sample.array)[:count] @ sample.matrix


def test_centroids_are_the_means_of_the_patches_nearest_to_them(made, tmp_path):
    dictionary = fitted(made, tmp_path / "p", iterations=60, precision="float32")
    rows = whitened_rows(made[1], 320)
    apart = ((rows[:, None] - dictionary.centroids[None]) ** 2).sum(axis=2)
    nearest = apart.argmin(axis=1)
    np.testing.assert_array_equal(np.bincount(nearest, minlength=8), dictionary.counts)
    means = np.array([rows[nearest == i].mean(axis=0) for i in range(8)])
    np.testing.assert_allclose(dictionary.centroids, means, atol=1e-4)
    facts = json.loads((tmp_path / "p" / "done.json").read_text())["facts"]
    assert facts["objective"] == pytest.approx(apart.min(axis=1).mean(), rel=1e-4)


def test_faiss_finds_a_dictionary_as_good(made, tmp_path):
    rows, objectives = whitened_rows(made[1], 320), []
    for backend in ("own", "faiss"):
        found = fitted(made, tmp_path / backend, backend=backend).centroids
        objectives.append(((rows[:, None] - found) ** 2).sum(axis=2).min(axis=1).mean())
    assert objectives[0] == pytest.approx(objectives[1], rel=0.05)


def test_faiss_finds_the_same_in_a_worker_as_here(made, tmp_path, ray_session):
    here = fitted(made, tmp_path / "here", backend="faiss")
    there = fitted(made, tmp_path / "there", backend="faiss", resources=Resources(workers=1))
    np.testing.assert_allclose(there.centroids, here.centroids, atol=1e-5)
    np.testing.assert_array_equal(there.counts, here.counts)


def test_faiss_in_several_workers_is_refused():
    with pytest.raises(ConfigError, match=r"one worker, but resources.workers is 2; set it to 1"):
        PatchesConfig(backend="faiss", resources=Resources(workers=2))


def test_a_sampled_dictionary_is_the_start_of_the_sample(made, tmp_path):
    dictionary = fitted(made, tmp_path / "p", select="sample", size=300)
    raw = np.asarray(made[1].array)[:300].reshape(300, 3, 3, 3)
    np.testing.assert_allclose(dictionary.raw, raw, atol=1e-4)
    np.testing.assert_allclose(dictionary.centroids, whitened_rows(made[1], 300), atol=1e-5)
    assert not dictionary.counts.any()


def test_farthest_patches_are_chosen_one_after_the_other(made, tmp_path):
    dictionary = fitted(made, tmp_path / "p", select="farthest")
    rows = whitened_rows(made[1], 320)
    chosen = [0]
    while len(chosen) < 8:
        apart = ((rows[:, None] - rows[chosen]) ** 2).sum(axis=2).min(axis=1)
        chosen.append(int(apart.argmax()))
    np.testing.assert_allclose(dictionary.centroids, rows[chosen], atol=1e-5)


def test_copies_are_mirror_images_then_negatives_of_unit_length(made, tmp_path):
    plain = fitted(made, tmp_path / "plain")
    more = fitted(made, tmp_path / "more", flips=True, negatives=True, unit_norm=True)
    assert len(more) == 32
    np.testing.assert_allclose(np.linalg.norm(more.centroids[:8], axis=1), 1, rtol=1e-5)
    length = np.linalg.norm(plain.centroids, axis=1, keepdims=True)
    np.testing.assert_allclose(more.centroids[:8], plain.centroids / length, atol=1e-5)
    np.testing.assert_allclose(more.raw[8:16], more.raw[:8, ..., ::-1], atol=1e-4)
    np.testing.assert_array_equal(more.centroids[16:], -more.centroids[:16])
    np.testing.assert_array_equal(more.counts, np.tile(plain.counts, 4))


def test_the_encoder_has_the_kernel_of_the_dictionary(made, tmp_path):
    encoder = fit_patches(*made, PatchesConfig(**SMALL, k=3, grid=1), out=tmp_path / "p")
    dictionary = PatchDictionary.open(tmp_path / "p")
    backbone = encoder.backbone()
    assert isinstance(backbone, PatchBackbone)
    kernel, bias = code_kernel(dictionary.centroids, dictionary.matrix)
    np.testing.assert_array_equal(backbone.kernel.numpy(), kernel)
    np.testing.assert_array_equal(backbone.bias.numpy(), bias)
    assert (backbone.code.k, backbone.code.patch_size, encoder.dim) == (3, 3, 8)
    rows = encoder.embed(made[0].images(np.arange(5)))
    assert rows.shape == (5, 8)


@pytest.mark.parametrize(("k", "entries"), [(0.25, 2), (0.01, 1), (5, 5)])
def test_k_is_a_number_or_a_share_of_all_entries(k, entries):
    assert PatchesConfig(size=8, k=k).backbone_k == entries
    assert PatchesConfig(size=8, k=k, negatives=True).backbone_k in (entries, 2 * entries)


def files(folder: Path) -> dict[str, bytes]:
    names = ("dictionary.safetensors", "encoder.safetensors", "encoder.json", "raw.png")
    return {name: (folder / name).read_bytes() for name in names}


def test_workers_change_nothing(made, tmp_path, ray_session):
    for workers in (0, 2):
        fitted(made, tmp_path / f"{workers}", resources=Resources(workers=workers))
    assert files(tmp_path / "0") == files(tmp_path / "2")
    alone, pool = (Encoder.open(tmp_path / name) for name in ("0", "2"))
    assert alone.fingerprint == pool.fingerprint


def test_k_means_continues_where_it_was_interrupted(made, tmp_path, monkeypatch):
    fitted(made, tmp_path / "whole")
    real, calls = sharded._write, []

    def dies(*args):
        calls.append(1)
        real(*args)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(sharded, "_write", dies)
    with pytest.raises(KeyboardInterrupt):
        fitted(made, tmp_path / "cut")
    fitted(made, tmp_path / "cut")
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert not (tmp_path / "cut" / "kmeans").exists()


def test_more_patches_than_were_drawn_are_refused(made, tmp_path):
    message = r"8 entries of 51 patches each want 408 patches, but .* holds 400"
    with pytest.raises(ConfigError, match=message):
        fitted(made, tmp_path / "p", patches_per_entry=51)
    with pytest.raises(ConfigError, match="401 entries want 401 patches"):
        fitted(made, tmp_path / "p", select="sample", size=401)
    with pytest.raises(ConfigError, match="k=9 is more than the 8 entries"):
        PatchesConfig(size=8, k=9)


def test_a_folder_without_a_dictionary_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"dictionary\.safetensors cannot be read"):
        PatchDictionary.open(tmp_path)


def test_pictures_and_the_curve_of_k_means_are_tracked(made, tmp_path):
    tracker = open_run(tmp_path / "p", None, name="patches")
    config = PatchesConfig(**SMALL)
    fit_patches(*made, config, out=tmp_path / "p", tracker=tracker)
    for name in ("raw.png", "whitened.png"):
        with Image.open(tmp_path / "p" / name) as picture:
            assert picture.size == (8 * 20, 20)
    text = (tmp_path / "p" / "metrics.jsonl").read_text().splitlines()
    curve = [r["objective"] for r in map(json.loads, text) if "objective" in r]
    assert len(curve) == 25
    assert curve == sorted(curve, reverse=True)


def test_tiles_have_full_contrast_and_channels_last():
    patches = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)).numpy()
    patches[4] = 0.3
    tiles = patch_tiles(patches)
    assert tiles.shape == (5, 4, 4, 3)
    assert [(tile.min(), tile.max()) for tile in tiles] == [(0, 255)] * 4 + [(128, 128)]
    at = np.unravel_index(patches[1].argmax(), patches[1].shape)
    assert tiles[1, at[1], at[2], at[0]] == 255
    assert patch_tiles(patches[:, :1]).shape == (5, 4, 4, 3)
    assert by_size(np.array([2, 5, 5, 9])).tolist() == [3, 1, 2, 0]


def test_maps_of_many_channels_are_drawn_channel_by_channel(tmp_path):
    maps = torch.rand(3, 6, 2, 2, generator=torch.Generator().manual_seed(0)).numpy()
    empty = np.zeros((3, 0), np.float32)
    entries = PatchDictionary(empty, empty, maps, maps, np.array([1, 3, 2]))
    raw, _ = write_pictures(entries, tmp_path, prefix="layer2_")
    assert raw == tmp_path / "layer2_raw.png"
    with Image.open(raw) as picture:
        first = np.asarray(picture)[1:25:6, 1:37:6]
    want = np.block([[maps[1, 3 * i + j] for j in range(3)] for i in range(2)])
    want = 255 * (want - want.min()) / np.ptp(want)
    np.testing.assert_allclose(first, np.repeat(want[..., None], 3, axis=2), atol=0.51)


WHOLE = {
    "out": "runs/x",
    "ingest": {"source": "photos", "image_size": 32},
    "whiten": {"patches": 1000},
    "patches": {"size": 10, "patches_per_entry": 100},
    "embed": {},
    "graph": {},
}
HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


def test_an_experiment_embeds_with_patches_in_place_of_pretext():
    experiment = build(Experiment, WHOLE)
    assert experiment.encoder == "patches"
    assert experiment.inputs("embed") == ("ingest", "patches")
    assert experiment.inputs("patches") == ("ingest", "whiten")
    views = {"views": {"name": "scan_simclr", **HALF}}
    clustered = WHOLE | {"scan": {"num_clusters": 4, **views}, "selflabel": views}
    assert build(Experiment, clustered).inputs("scan") == ("ingest", "patches", "graph")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretext": {}}, "pretext and patches each make the encoder"),
        ({"patches": None}, "embed needs pretext: add the key `pretext: {}`, or `whiten: {}` and"),
        ({"whiten": None}, "patches needs whiten: add the key `whiten: {}`"),
        ({"patches.size": 11}, r"patches.size=11 looks at 1100 patches, but whiten.patches=1000"),
        ({"whiten.patch_size": 33}, "whiten.patch_size=33 does not fit into images of"),
        ({"scan": {"num_clusters": 4}}, r"scan.views.mean and scan.views.std must be \[0.5"),
        ({"whiten.resources.gpus": 1}, "whiten works on CPUs"),
    ],
)
def test_an_experiment_says_what_does_not_go_together(changes, message):
    with pytest.raises(ConfigError, match=message):
        override(build(Experiment, WHOLE), changes)


def test_a_plan_refuses_more_patches_than_the_images_have(tmp_path):
    write_shapes(tmp_path / "photos", 4, size=8)
    changes = {"ingest.source": str(tmp_path / "photos"), "out": str(tmp_path / "run")}
    experiment = override(build(Experiment, WHOLE), changes | {"graph": None})
    small = {"ingest.image_size": 8, "whiten.patches": 64, "patches.patches_per_entry": 1}
    plan_experiment(override(experiment, small))
    small["whiten.patches"] = 65
    with pytest.raises(ConfigError, match=r"whiten.patches=65, but 4 images of 8 x 8 pixels"):
        plan_experiment(override(experiment, small))


def test_a_trial_ranks_codes_without_labels(tmp_path, made):
    experiment = build(
        Experiment,
        {
            **{"out": str(tmp_path / "run"), "ingest": {"source": "photos", "image_size": 12}},
            "whiten": {"patches": 400, "patch_size": 3, "resources": {"workers": 0}},
            "patches": {"size": 8, "patches_per_entry": 40, "resources": {"workers": 0}},
        },
    )
    at = addresses(experiment, tmp_path)["ingest"]
    at.parent.mkdir(parents=True)
    at.symlink_to(made[0].path.absolute())
    for name in ("whiten", "patches"):
        run_stage(name, experiment, lambda stage: addresses(experiment, tmp_path)[stage], None)
    inputs = _inputs_of_rankme(experiment, addresses(experiment, tmp_path))
    assert 1 <= rankme(*inputs) <= inputs[1].dim
    with pytest.raises(ConfigError, match="metric=rankme is of an encoder"):
        _inputs_of_rankme(override(experiment, {"patches": None}), {})
