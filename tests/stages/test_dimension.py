"""The stage dimension: every number is that of plain loops, however and how often it is started."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selfsup_ray.artifacts import read_done
from selfsup_ray.config import build, override, to_dict
from selfsup_ray.costs import cost
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.synthetic import corpus_of_arrays, write_shapes
from selfsup_ray.errors import ConfigError
from selfsup_ray.experiment import Experiment
from selfsup_ray.ops.intrinsic_dimension import SETS, centroid_distance, point_set, unit_points
from selfsup_ray.report import write_report
from selfsup_ray.stages.dimension import PatchDimension, patch_dimension
from selfsup_ray.stages.dimension_config import DimensionConfig
from selfsup_ray.stages.dimension_tasks import Work
from selfsup_ray.steps import open_artifact, run_stage

CONFIG = DimensionConfig(
    patch_size=3,
    points=600,
    ks=(8, 2),
    iterations=5,
    points_per_centroid=30,
    seed=4,
    levina_bickel={"first": 3, "last": 6, "queries": 50},
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """30 smooth color images of 9 pixels in shards of 8, with noise."""
    rng = np.random.default_rng(0)
    coarse = rng.random((30, 3, 3, 3)).repeat(3, axis=1).repeat(3, axis=2)
    images = np.clip(coarse + 0.1 * rng.standard_normal((30, 9, 9, 3)), 0, 1)
    labels = np.full(30, -1)
    folder = tmp_path_factory.mktemp("corpus")
    return corpus_of_arrays(folder / "c", (255 * images).astype(np.uint8), labels, shard_size=8)


@pytest.fixture(scope="module")
def made(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> PatchDimension:
    return patch_dimension(corpus, CONFIG, out=tmp_path_factory.mktemp("made"))


def results(made: PatchDimension) -> bytes:
    return (made.path / "distances.csv").read_bytes() + (made.path / "dimension.json").read_bytes()


def all_patches(corpus: Corpus, size: int) -> np.ndarray:
    """(n P, 3 s s) in [0, 1], image by image, row by row, channel first."""
    images = corpus.images(np.arange(len(corpus))).numpy() / 255
    n, _, side, _ = images.shape
    steps = range(side - size + 1)
    return np.array(
        [
            images[i, :, y : y + size, x : x + size].ravel()
            for i in range(n)
            for y in steps
            for x in steps
        ]
    )


def places(work: Work) -> np.ndarray:
    """Row of each drawn patch in `all_patches`."""
    found = [np.array([at.image, at.row, at.column]) for _, at in work.draws()]
    return np.ravel_multi_index(tuple(np.concatenate(found, axis=1)), (30, 7, 7))


def test_the_points_are_distinct_patches_of_the_images(corpus: Corpus):
    work = Work(corpus, CONFIG, Path("nowhere"))
    assert (work.dim, work.per_image, work.num_points) == (27, 49, 600)
    assert len(np.unique(places(work))) == 600
    every = override(CONFIG, {"points": 10_000})
    assert Work(corpus, every, Path("nowhere")).num_points == 30 * 49


def test_numbers_are_those_of_the_definition(corpus: Corpus, made: PatchDimension):
    patches = all_patches(corpus, 3)
    values, vectors = np.linalg.eigh(np.cov(patches.T, bias=True))
    root = np.sqrt(np.maximum(values, 0)) + 1e-3
    work = Work(corpus, CONFIG, Path("nowhere"))
    chosen = patches[places(work)].astype(np.float32)
    for name in ("original", "whitened", "gaussian"):
        # Turned or not, distances in whitened space are the same.
        points = unit_points(point_set(name, chosen, (vectors / root).astype(np.float32), seed=4))
        for k in (2, 8):
            want = centroid_distance(points, k, points_per_centroid=30, iterations=5, seed=4)
            found = made.table["distances"][name][str(k)]
            assert found["mean_squared"] == pytest.approx(want.mean_squared, rel=0.03), (name, k)


def test_the_handle_the_table_and_the_stamp_say_the_same(made: PatchDimension):
    ks, values = made.distances("whitened")
    assert ks == [2, 8] and values[0] > values[1]
    rows = list(csv.DictReader((made.path / "distances.csv").read_text().splitlines()))
    assert [(row["set"], int(row["k"])) for row in rows] == [(s, k) for s in SETS for k in (2, 8)]
    whitened = [float(row["mean_squared"]) for row in rows if row["set"] == "whitened"]
    assert whitened == values
    facts = read_done(made.path).facts
    assert facts["mean_squared"]["whitened"] == values[1] and facts["largest_k"] == 8
    assert facts["levina_bickel"]["gaussian"] == made.dimension("gaussian")
    assert made.dimension("original") < made.dimension("gaussian")
    left = {path.name for path in made.path.iterdir()}
    assert not left & {"drawn", "sums", "points"}, "what was only needed on the way is gone"
    assert PatchDimension.open(made.path).fingerprint == made.fingerprint


def test_two_ray_workers_write_the_same_bytes(
    corpus: Corpus, made: PatchDimension, tmp_path: Path, ray_session: None
):
    config = override(CONFIG, {"resources.workers": 2})
    assert results(patch_dimension(corpus, config, out=tmp_path)) == results(made)


def test_the_cut_into_shards_changes_nothing(corpus: Corpus, made: PatchDimension, tmp_path: Path):
    images = corpus.images(np.arange(30)).permute(0, 2, 3, 1).numpy()
    other = corpus_of_arrays(tmp_path / "c", images, np.full(30, -1), shard_size=30)
    assert results(patch_dimension(other, CONFIG, out=tmp_path / "out")) == results(made)


KILLED = """
import json, os, signal, sys
from pathlib import Path
from selfsup_ray.config import build
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.stages import dimension_tasks
from selfsup_ray.report import write_report
from selfsup_ray.stages.dimension import patch_dimension
from selfsup_ray.stages.dimension_config import DimensionConfig
corpus, out, config, after = sys.argv[1:]
written, left = dimension_tasks.write_json, [int(after)]
def write_json(path, value):
    written(path, value)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
dimension_tasks.write_json = write_json
patch_dimension(Corpus.open(corpus), build(DimensionConfig, json.loads(config)), out=out)
"""


@pytest.mark.parametrize("after", [4, 12])
def test_a_killed_analysis_continues_with_what_is_missing(
    corpus: Corpus, made: PatchDimension, tmp_path: Path, after: int
):
    text, out = json.dumps(to_dict(CONFIG)), tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(corpus.path), str(out), text, str(after)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    there = {
        path: path.stat().st_mtime_ns for path in out.rglob("*.json") if "array" not in str(path)
    }
    assert not (out / "done.json").exists() and len(there) >= after
    again = patch_dimension(corpus, CONFIG, out=out)
    assert results(again) == results(made)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in there.items())


def test_a_finished_analysis_is_kept(corpus: Corpus, made: PatchDimension):
    before = os.stat(made.path / "done.json").st_mtime_ns
    patch_dimension(corpus, CONFIG, out=made.path)
    assert os.stat(made.path / "done.json").st_mtime_ns == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"patch_size": 12}, "patch_size=12, but the images have 9 pixels a side"),
        ({"ks": [594]}, "has 594 points .* but 595 are the least for 594 centroids"),
        ({"points": 5}, "has 4 points"),
    ],
)
def test_too_few_points_are_refused(
    corpus: Corpus, tmp_path: Path, changes: dict[str, Any], says: str
):
    with pytest.raises(ConfigError, match=says):
        patch_dimension(corpus, override(CONFIG, changes), out=tmp_path)


def test_a_set_without_directions_is_refused(tmp_path: Path):
    black = corpus_of_arrays(
        tmp_path / "c", np.zeros((20, 9, 9, 3), np.uint8), np.full(20, -1), shard_size=20
    )
    config = override(CONFIG, {"sets": ["original"]})
    with pytest.raises(ConfigError, match="original has 0 points that are not zero"):
        patch_dimension(black, config, out=tmp_path / "out")


def test_the_numbers_between_can_be_had_and_bad_lists_are_refused():
    assert DimensionConfig(ks=(6, 3)).all_k == (3, 6)
    assert DimensionConfig(ks=(6, 3), between=True).all_k == (3, 4, 5, 6)
    assert len(DimensionConfig(between=True).all_k) == 1023
    with pytest.raises(ConfigError, match="`ks` needs at least one value and each once"):
        build(DimensionConfig, {"ks": [2, 2]})
    with pytest.raises(ConfigError, match="2 <= first <= last, not 1 and 20"):
        build(DimensionConfig, {"levina_bickel": {"first": 1}})


def test_an_experiment_runs_it_reports_it_and_knows_its_cost(tmp_path: Path):
    write_shapes(tmp_path / "photos", 20, size=16)
    here = {"workers": 0}
    values = {
        "out": tmp_path / "run",
        "ingest": {"source": str(tmp_path / "photos"), "image_size": 16, "resources": here},
        "dimension": {**to_dict(CONFIG), "resources": here},
    }
    experiment = build(Experiment, values)
    for stage in experiment.stages:
        run_stage(stage, experiment, experiment.folder, None)
    assert "Dimension of the patches" in write_report(experiment.out).read_text()
    made = open_artifact(tmp_path / "run" / "dimension")
    assert isinstance(made, PatchDimension) and made.distances("original")[0] == [2, 8]
    few = cost(experiment, "dimension", 20, tmp_path)
    every = override(experiment, {"dimension.between": True, "dimension.ks": [2, 200]})
    more = cost(every, "dimension", 20, tmp_path)
    assert few.seconds and more.seconds and more.seconds > 20 * few.seconds
