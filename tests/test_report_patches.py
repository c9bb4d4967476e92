"""A run of patches from images to neighbors, clusters and the report, and the report's section."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selfsup_ray.artifacts import read_done
from selfsup_ray.config import Resources, build
from selfsup_ray.data.synthetic import corpus_of_arrays, shape_images, write_shapes
from selfsup_ray.experiment import Experiment
from selfsup_ray.models.clusterer import Clusterer
from selfsup_ray.pipeline import Result, run_experiment
from selfsup_ray.planning import plan_experiment
from selfsup_ray.report_html import Section
from selfsup_ray.report_patches import patches_section
from selfsup_ray.report_run import Run
from selfsup_ray.stages.patch_dictionary import PatchDictionary
from selfsup_ray.stages.patches import PatchesConfig, fit_patches
from selfsup_ray.stages.probe import Probe
from selfsup_ray.stages.whiten import WhitenConfig, whiten

HERE = {"workers": 0}
HALF = [0.5, 0.5, 0.5]


def experiment(folder: Path) -> dict[str, Any]:
    views = {"name": "scan_simclr", "mean": HALF, "std": HALF, "gray_p": 0, "jitter_p": 0}
    strong = {"name": "ours", "mean": HALF, "std": HALF, "cutout": 4}
    trained = {"epochs": 1, "batch_size": 50, "precision": "float32", "resources": HERE}
    return {
        "out": str(folder / "run"),
        "ingest": {"source": str(folder / "photos"), "image_size": 16, "resources": HERE},
        "whiten": {"patches": 2048, "pixel_scale": "plus_minus_one", "resources": HERE},
        "patches": {"size": 32, "patches_per_entry": 64, "resources": HERE},
        "embed": {"resources": HERE},
        "reduce": {"dim": 32, "resources": HERE},
        "graph": {"k": 5, "resources": HERE},
        "scan": {**trained, "num_clusters": 4, "num_neighbors": 5, "views": views},
        "selflabel": {**trained, "threshold": 0.3, "views": strong},
        "diffuse": {"labels_per_class": 10, "niter": 5, "resources": HERE},
        "probe": {},
        "evaluate": {},
        "export": {},
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, Result]:
    folder = tmp_path_factory.mktemp("patches")
    write_shapes(folder / "photos", 200, size=16)
    made = build(Experiment, experiment(folder))
    planned = plan_experiment(made)
    assert all(step.cost.disk_bytes for step in planned.steps)
    return made, run_experiment(made)


def test_codes_tell_shapes_apart_without_training(finished: tuple[Experiment, Result]):
    made, _ = finished
    probe = Probe.open(made.folder("probe"))
    assert probe.linear > 0.85
    assert probe.knn > 0.4  # chance: 0.25


def test_clusters_stand_on_codes_like_on_any_encoder(finished: tuple[Experiment, Result]):
    made, result = finished
    for stage in ("scan", "selflabel"):
        clusterer = Clusterer.open(made.folder(stage))
        backbone = clusterer.backbone().state_dict()
        dictionary = PatchDictionary.open(made.folder("patches")).kernel
        np.testing.assert_array_equal(backbone["kernel"].numpy(), dictionary[0])
        assert clusterer.assignments.shape == (200,)
    assert result.pseudo_labels is not None


def test_labels_spread_over_the_neighbors_that_codes_find(finished: tuple[Experiment, Result]):
    made, _ = finished
    facts = read_done(made.folder("diffuse")).facts
    assert facts["accuracy"] > 0.4  # chance: 0.25


def test_the_dictionary_is_exported_with_the_encoder(finished: tuple[Experiment, Result]):
    made, _ = finished
    exported = PatchDictionary.open(made.folder("export"))
    assert exported.raw.shape == exported.zca.shape == (32, 3, 5, 5)
    assert exported.counts.sum() == 2048


def test_running_again_finds_every_stage_current(finished: tuple[Experiment, Result]):
    made, _ = finished
    assert plan_experiment(made).to_run == ()


def test_the_report_shows_dictionary_and_covariances(finished: tuple[Experiment, Result]):
    _, result = finished
    page = result.report.read_text()
    [body] = re.findall(r'<section id="patches">.*?</section>', page, flags=re.DOTALL)
    assert "2,048 patches of 5 x 5 pixels, levels in [-1, 1]" in body
    assert "32 entries by k-means among 2,048 patches" in body
    assert "the 8 nearest are 1, averaged over 2 x 2 parts" in body
    assert body.count('class="thumb"') == 2 * 32
    assert body.count("<svg") == 3
    share = float(re.findall(r"whitened \(pca\): ([\d.]+) % off diagonal", body)[0])
    assert share < 1


def section_of(folder: Path) -> Section | str:
    return patches_section(Run.open(folder))


def test_without_patches_the_report_says_so(tmp_path):
    corpus_of_arrays(tmp_path / "ingest", shape_images(4, size=8)[0])
    assert "whiten has not finished" in str(section_of(tmp_path))


@pytest.mark.parametrize("select", ["sample", None])
def test_noise_and_samples_are_named_as_what_they_are(tmp_path, select):
    corpus = corpus_of_arrays(tmp_path / "ingest", shape_images(4, size=8)[0])
    config = WhitenConfig(
        patches=50, patch_size=3, source="gaussian", whitening="zca", resources=Resources(workers=0)
    )
    sample = whiten(corpus, config, out=tmp_path / "whiten")
    if select:
        chosen = PatchesConfig(size=20, select=select, code="triangle", negatives=True)
        fit_patches(corpus, sample, chosen, out=tmp_path / "patches")
    made = section_of(tmp_path)
    assert isinstance(made, Section)
    assert "50 patches of gaussian noise in place of 3 x 3 pixels" in made.body
    shown = 2 * 40 if select else 50
    assert made.body.count('class="thumb"') == shown
    if select:
        assert "40 entries by chance among 20 patches, negatives added" in made.body
        assert "nearer than the average" in made.body
