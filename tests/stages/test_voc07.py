"""VOC 2007 by linear SVMs: the lists, the protocol, and average precision by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.svm import LinearSVC

from selfsup_ray.artifacts import ShardedArray, begin, finish
from selfsup_ray.data.voc import read_lists
from selfsup_ray.errors import ArtifactError, ConfigError
from selfsup_ray.stages.embed import EmbedConfig, Embeddings
from selfsup_ray.stages.voc07 import Voc07Config, area, eleven_point, voc07

CLASSES = ("bird", "boat", "bus")
COSTS = (0.01, 1.0, 100.0)


def write_lists(folder, part, names, marks):
    lists = folder / "ImageSets" / "Main"
    lists.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(CLASSES):
        lines = [f"{image} {mark:2d}" for image, mark in zip(names, marks[:, i], strict=True)]
        (lists / f"{name}_{part}.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture
def voc(tmp_path):
    """A folder of lists, and a corpus and embeddings of their images, several classes an image."""
    rng = np.random.default_rng(0)
    names = [f"{i:06d}" for i in range(1, 241)]
    shows = rng.random((240, 3)) < 0.35
    marks = np.where(shows, 1, -1)
    marks[5, 0] = marks[200, 1] = 0
    folder = tmp_path / "VOC2007"
    write_lists(folder, "trainval", names[:140], marks[:140])
    write_lists(folder, "test", names[140:], marks[140:])
    rows = shows @ rng.normal(size=(3, 16)) + 0.8 * rng.normal(size=(240, 16))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    order = rng.permutation(240)
    return SimpleNamespace(
        folder=folder,
        corpus=Images([f"JPEGImages/{names[i]}.jpg" for i in order]),
        features=embeddings(tmp_path / "embed", rows[order]),
        rows=rows,
        marks=marks,
    )


class Images:
    """The one thing that the stage asks a corpus for: where its images came from."""

    def __init__(self, sources):
        self._sources = sources

    def __len__(self):
        return len(self._sources)

    def sources(self, ids):
        return [self._sources[i] for i in ids]


def embeddings(out, rows):
    begin(out, stage="embed", config=EmbedConfig(), inputs={})
    array = ShardedArray.create(
        out / "rows", shard_rows=[100, 140], row_shape=(16,), dtype="float32"
    )
    array.write_shard(0, rows[:100])
    array.write_shard(1, rows[100:])
    finish(out, stage="embed", config=EmbedConfig(), inputs={}, seconds=0, facts={"corpus": "x"})
    return Embeddings.open(out)


def test_every_class_is_scored_as_the_protocol_has_it(voc, tmp_path):
    config = Voc07Config(folder=voc.folder, costs=COSTS)
    made = voc07(voc.corpus, voc.features, config, out=tmp_path / "voc07")
    assert list(made.metrics["classes"]) == list(CLASSES)
    for i, name in enumerate(CLASSES):
        scores = made.metrics["classes"][name]
        train = np.flatnonzero(voc.marks[:140, i])
        test = 140 + np.flatnonzero(voc.marks[140:, i])
        svm = LinearSVC(C=scores["cost"], class_weight={1: 2, -1: 1}, random_state=0)
        svm.fit(voc.rows[train], voc.marks[train, i])
        decided = svm.decision_function(voc.rows[test])
        expected = eleven_point(voc.marks[test, i] == 1, decided)
        assert scores["average_precision"] == pytest.approx(expected, abs=1e-3)
        assert scores["num_positive"] == (voc.marks[test, i] == 1).sum()
        assert scores["cost"] in COSTS
    assert made.mean_average_precision > 0.6  # a third of the images show a class
    again = voc07(voc.corpus, voc.features, config, out=tmp_path / "voc07")
    assert again.metrics == made.metrics


def test_objects_marked_difficult_count_neither_way(voc, tmp_path):
    config = Voc07Config(folder=voc.folder, costs=(1.0,))
    first = voc07(voc.corpus, voc.features, config, out=tmp_path / "a")
    rows = np.array(voc.features.array)
    id = voc.corpus._sources.index("JPEGImages/000201.jpg")
    rows[id] = -rows[id]
    moved = embeddings(tmp_path / "moved", rows)
    second = voc07(voc.corpus, moved, config, out=tmp_path / "b")
    assert first.metrics["classes"]["boat"] == second.metrics["classes"]["boat"]
    assert first.metrics["classes"]["bus"] != second.metrics["classes"]["bus"]


def test_average_precision_by_hand():
    shows = np.array([True, False, True, False, False])
    scores = np.array([5.0, 4.0, 3.0, 2.0, 1.0])
    # Precision 1 up to recall 1/2 (levels 0 to 0.5), then 2/3 (0.6 to 1).
    assert eleven_point(shows, scores) == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert area(shows, scores) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_an_image_that_was_not_ingested_is_named(voc, tmp_path):
    fewer = Images([s for s in voc.corpus._sources if "000007" not in s])
    with pytest.raises(ArtifactError, match=r"1 of the 140 images .* e\.g\. 000007\."):
        voc07(fewer, voc.features, Voc07Config(folder=voc.folder), out=tmp_path / "voc07")


def test_two_images_of_one_name_are_refused(voc, tmp_path):
    twice = Images([*voc.corpus._sources, "more/000007.jpg"])
    with pytest.raises(ArtifactError, match="Two images of the corpus are called 000007"):
        voc07(twice, voc.features, Voc07Config(folder=voc.folder), out=tmp_path / "voc07")


def test_a_folder_without_lists_and_a_damaged_list_are_told(voc):
    with pytest.raises(ArtifactError, match=r"has no lists such as aeroplane_val\.txt"):
        read_lists(voc.folder, "val")
    file = voc.folder / "ImageSets" / "Main" / "boat_test.txt"
    file.write_text(file.read_text().replace("-1", "-7", 1))
    with pytest.raises(ArtifactError, match=r"boat_test\.txt, line \d+: expected .* got '\d+ -7'"):
        read_lists(voc.folder, "test")
    file.write_text("000001 1\n")
    with pytest.raises(ArtifactError, match=r"lists other images than bird_test\.txt"):
        read_lists(voc.folder, "test")


def test_settings_that_cannot_work_are_refused(voc):
    with pytest.raises(ConfigError, match="at least"):
        Voc07Config(folder=voc.folder, folds=1)
