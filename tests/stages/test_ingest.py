"""The stage ingest: every file is kept or accounted for, with the same ids however it is run."""

import csv
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from selfsup_ray.artifacts import read_done, write_text
from selfsup_ray.config import Resources, override, to_dict
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.decode import decode_square
from selfsup_ray.data.duplicates import duplicate_groups
from selfsup_ray.data.synthetic import (
    BAD_KINDS,
    SHAPES,
    corpus_of_arrays,
    write_bad_corpus,
    write_shapes,
)
from selfsup_ray.errors import ArtifactError, ConfigError
from selfsup_ray.stages.ingest import IngestConfig, ingest

HERE = Resources(workers=0)


def config(**changes: object) -> IngestConfig:
    values = {"image_size": 16, "shard_size": 32, "resources": HERE} | changes
    return IngestConfig(**values)  # type: ignore[arg-type]


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def shard_bytes(corpus: Corpus) -> list[bytes]:
    return [path.read_bytes() for path in sorted((corpus.path / "shards").iterdir())]


def test_of_2000_files_with_5_percent_bad_none_is_lost(tmp_path):
    planted = write_bad_corpus(tmp_path / "images", n=2000, share=0.05)
    bad = {one.path: one.reason for one in planted if one.reason}
    assert len(bad) == 100 and len(set(one.kind for one in planted if one.reason)) >= 12
    corpus = ingest(tmp_path / "images", config(shard_size=256), out=tmp_path / "corpus")
    quarantine = table(tmp_path / "corpus" / "quarantine.csv")
    below = f"{tmp_path}/images/"
    assert {r["source"].removeprefix(below): r["reason"] for r in quarantine} == bad
    assert all(row["detail"] for row in quarantine)
    sizes = {row["source"]: int(row["size_bytes"]) for row in quarantine}
    assert sizes == {name: Path(name).stat().st_size for name in sizes}
    every = sorted(str(path) for path in (tmp_path / "images").rglob("*") if path.is_file())
    assert corpus.sources(np.arange(len(corpus))) == [name for name in every if name not in sizes]
    facts = read_done(tmp_path / "corpus").facts
    assert (facts["listed"], facts["kept"], facts["quarantined"]) == (2000, 1900, 100)
    assert sum(facts["reasons"].values()) == 100


def test_every_kept_file_is_stored_as_decoding_it_alone_gives(tmp_path):
    write_bad_corpus(tmp_path / "images", n=150, share=0.2)
    corpus = ingest(tmp_path / "images", config(max_bad_share=0.2), out=tmp_path / "corpus")
    images = corpus.images(np.arange(len(corpus))).permute(0, 2, 3, 1).numpy()
    for source, image in zip(corpus.sources(np.arange(len(corpus))), images, strict=True):
        alone = decode_square(Path(source).read_bytes(), size=16, fit="crop").pixels
        np.testing.assert_array_equal(image, alone, err_msg=source)
    noted = {row["source"]: row["note"] for row in table(corpus.path / "notes.csv")}
    assert "mislabelled" in noted.values() and "animated" in noted.values()


def test_ids_and_bytes_are_the_same_on_ray_and_here(tmp_path, ray_session):
    write_bad_corpus(tmp_path / "images", n=300, share=0.05)
    here = ingest(tmp_path / "images", config(), out=tmp_path / "here")
    on_ray = config(resources=Resources(workers=3))
    there = ingest(tmp_path / "images", on_ray, out=tmp_path / "there")
    assert there.fingerprint == here.fingerprint
    assert shard_bytes(there) == shard_bytes(here)
    assert table(there.path / "quarantine.csv") == table(here.path / "quarantine.csv")


def test_killed_at_any_moment_it_continues_to_the_same_corpus(tmp_path):
    write_bad_corpus(tmp_path / "images", n=1500, share=0.04)
    changes = config(shard_size=20, encoding="png")
    whole = ingest(tmp_path / "images", changes, out=tmp_path / "whole")
    out = tmp_path / "killed"
    call = "from selfsup_ray.stages.ingest import *; import sys; "
    call += "ingest(sys.argv[1], load(IngestConfig, Path(sys.argv[2])), out=sys.argv[3])"
    call = "from selfsup_ray.config import load; from pathlib import Path; " + call
    write_text(tmp_path / "config.yaml", yaml.safe_dump(to_dict(changes)))
    arguments = [tmp_path / "images", tmp_path / "config.yaml", out]
    process = subprocess.Popen([sys.executable, "-c", call, *arguments])
    while len(list((out / "shards").glob("*.arrow"))) < 8:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not (out / "done.json").exists()
    before = {p.name: p.stat().st_mtime_ns for p in (out / "shards").glob("*.arrow")}
    write_shapes(tmp_path / "images" / "a" / "later", 4)  # ids are those of the first listing
    again = ingest(tmp_path / "images", changes, out=out)
    assert 8 <= len(before) < again.num_shards
    assert {n: (out / "shards" / n).stat().st_mtime_ns for n in before} == before
    assert again.fingerprint == whole.fingerprint and shard_bytes(again) == shard_bytes(whole)
    assert table(out / "quarantine.csv") == table(whole.path / "quarantine.csv")
    files = [sorted(str(p.relative_to(c.path)) for p in c.path.rglob("*")) for c in (again, whole)]
    assert files[0] == files[1]  # no half-written file is left


def test_too_many_bad_files_stop_the_run_and_a_higher_limit_continues_it(tmp_path):
    planted = write_bad_corpus(tmp_path / "images", n=200, share=0.2)
    out = tmp_path / "corpus"
    with pytest.raises(ArtifactError, match=r"max_bad_share=0\.1.*quarantine\.csv lists them"):
        ingest(tmp_path / "images", config(max_bad_share=0.1), out=out)
    listed = table(out / "quarantine.csv")
    bad = {f"{tmp_path}/images/{one.path}": one.reason for one in planted if one.reason}
    assert 20 < len(listed) <= 40 and not (out / "done.json").exists()
    assert {row["source"]: row["reason"] for row in listed}.items() <= bad.items()
    before = {p.name: p.stat().st_mtime_ns for p in (out / "shards").iterdir()}
    corpus = ingest(tmp_path / "images", config(max_bad_share=0.2), out=out)
    assert len(corpus) == 160 and len(table(out / "quarantine.csv")) == 40
    assert {n: (out / "shards" / n).stat().st_mtime_ns for n in before} == before


def test_a_share_of_bad_files_equal_to_the_limit_is_allowed(tmp_path):
    write_bad_corpus(tmp_path / "images", n=100, share=0.1)
    assert len(ingest(tmp_path / "images", config(max_bad_share=0.1), out=tmp_path / "c")) == 90


def test_exact_duplicates_are_found_over_shards_and_reported(tmp_path):
    write_shapes(tmp_path / "images", 70)
    files = sorted((tmp_path / "images").rglob("*.png"))
    shutil.copy(files[0], tmp_path / "images" / "square" / "again.png")
    shutil.copy(files[0], tmp_path / "images" / "circle" / "zz.png")
    shutil.copy(files[60], tmp_path / "images" / "cross" / "copy.png")
    corpus = ingest(tmp_path / "images", config(), out=tmp_path / "corpus")
    groups: dict[str, set[str]] = {}
    for row in table(corpus.path / "duplicates.csv"):
        groups.setdefault(row["digest"], set()).add(row["source"].rpartition("/")[2])
        assert corpus.sources(np.array([int(row["id"])])) == [row["source"]]
    assert sorted(map(sorted, groups.values())) == [
        sorted([files[0].name, "again.png", "zz.png"]),
        sorted([files[60].name, "copy.png"]),
    ]
    facts = read_done(corpus.path).facts
    assert (facts["duplicate_groups"], facts["duplicates"]) == (2, 3)


@pytest.mark.parametrize("bucket_rows", [1, 7, 1000])
def test_duplicates_do_not_depend_on_the_size_of_the_buckets(tmp_path, bucket_rows):
    images = np.random.default_rng(0).integers(0, 40, (90, 1, 1, 1), np.uint8)
    corpus = corpus_of_arrays(tmp_path, np.broadcast_to(images, (90, 4, 4, 3)), shard_size=11)
    found = [tuple(ids.tolist()) for ids in duplicate_groups(corpus, bucket_rows=bucket_rows)]
    same: dict[int, list[int]] = {}
    for i, value in enumerate(images.ravel().tolist()):
        same.setdefault(value, []).append(i)
    assert sorted(found) == sorted(tuple(ids) for ids in same.values() if len(ids) > 1)


def test_classes_of_folders_become_labels(tmp_path):
    write_shapes(tmp_path / "images", 10)
    corpus = ingest(tmp_path / "images", config(), out=tmp_path / "corpus")
    assert corpus.class_names == list(SHAPES) and corpus.num_labelled == 10
    expected = [SHAPES.index(Path(source).parent.name) for source in corpus.sources(np.arange(10))]
    assert corpus.labels().tolist() == expected
    flat = ingest(tmp_path / "images", config(labels="none"), out=tmp_path / "flat")
    assert not flat.has_labels and flat.class_names is None


def test_labels_may_cover_a_few_images_only(tmp_path):
    write_shapes(tmp_path / "screens", 8)
    (tmp_path / "topics.csv").write_text("screen_id,topic\n00003,login\n00005,maps\n00008,gone\n")
    changes = config(
        labels_csv=tmp_path / "topics.csv", path_column="screen_id", label_column="topic"
    )
    corpus = ingest(tmp_path / "screens", changes, out=tmp_path / "corpus")
    named = {
        Path(source).stem: label
        for source, label in zip(
            corpus.sources(np.arange(8)), corpus.labels().tolist(), strict=True
        )
        if label >= 0
    }
    assert named == {"00003": 0, "00005": 1} and corpus.class_names == ["login", "maps"]
    assert corpus.num_labelled == 2
    (tmp_path / "topics.csv").write_text("screen_id,topic\n00003,news\n")
    with pytest.raises(ArtifactError, match="built from another labels_csv"):
        ingest(tmp_path / "screens", changes, out=tmp_path / "corpus")
    with pytest.raises(ArtifactError, match=r"none\.csv cannot be read"):
        ingest(tmp_path / "screens", config(labels_csv=tmp_path / "none.csv"), out=tmp_path / "x")


def test_a_subset_of_classes_is_all_that_is_kept(tmp_path):
    write_shapes(tmp_path / "images", 12)
    (tmp_path / "subset.txt").write_text("triangle three sides\ncross plus\n")
    changes = config(classes=tmp_path / "subset.txt")
    corpus = ingest(tmp_path / "images", changes, out=tmp_path / "corpus")
    assert len(corpus) == 6 and corpus.class_names == ["plus", "three sides"]
    assert corpus.labels().tolist() == [0] * 3 + [1] * 3
    assert corpus.counts["skipped"] == {"other classes": 6}


@pytest.mark.parametrize(("encoding", "most"), [("raw", 0), ("png", 0), ("jpeg", 6)])
def test_an_encoding_loses_no_more_than_it_says(tmp_path, encoding, most):
    write_shapes(tmp_path / "images", 9, size=16)
    corpus = ingest(tmp_path / "images", config(encoding=encoding), out=tmp_path / "corpus")
    got = corpus.images(np.arange(9)).permute(0, 2, 3, 1).numpy()
    expected = [np.asarray(Image.open(source)) for source in corpus.sources(np.arange(9))]
    assert np.abs(got.astype(int) - np.stack(expected)).mean() <= most


def test_one_image_is_a_corpus_and_a_unit_may_be_all_bad(tmp_path):
    write_shapes(tmp_path / "one", 1)
    assert len(ingest(tmp_path / "one", config(), out=tmp_path / "c1")) == 1
    for i in range(4):
        (tmp_path / "one" / f"{i}.jpg").write_bytes(b"")
    changes = config(shard_size=2, max_bad_share=1.0)
    corpus = ingest(tmp_path / "one", changes, out=tmp_path / "c5")
    assert corpus.shard_rows == (0, 0, 1) and len(corpus.images(np.array([0]))) == 1
    assert corpus.labels().tolist() == [-1]


def test_a_source_without_one_right_image_is_an_error_whatever_the_limit(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"x")
    with pytest.raises(ArtifactError, match=r"None of the 1 files.*quarantine\.csv"):
        ingest(tmp_path / "images", config(max_bad_share=1.0), out=tmp_path / "corpus")
    assert table(tmp_path / "corpus" / "quarantine.csv")[0]["reason"] == "not_an_image"


def test_a_stop_just_before_the_stamp_loses_nothing(tmp_path, monkeypatch):
    planted = write_bad_corpus(tmp_path / "images", n=60, share=0.1)
    changes, out = config(max_bad_share=0.1), tmp_path / "corpus"

    def stopped(*_args: object, **_values: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("selfsup_ray.stages.ingest.finish", stopped)
        ingest(tmp_path / "images", changes, out=out)
    ingest(tmp_path / "images", changes, out=out)
    assert len(table(out / "quarantine.csv")) == sum(bool(one.reason) for one in planted) == 6


def test_several_sources_follow_each_other(tmp_path):
    write_shapes(tmp_path / "a", 4)
    write_shapes(tmp_path / "b", 4, seed=1)
    corpus = ingest([tmp_path / "b", tmp_path / "a"], config(), out=tmp_path / "corpus")
    sources = corpus.sources(np.arange(8))
    assert all("/b/" in s for s in sources[:4]) and all("/a/" in s for s in sources[4:])


def test_a_finished_corpus_is_opened_and_another_config_is_an_error(tmp_path):
    write_shapes(tmp_path / "images", 5)
    out = tmp_path / "corpus"
    first = ingest(tmp_path / "images", config(), out=out)
    stamp = (out / "done.json").stat().st_mtime_ns
    more = override(config(), {"resources.workers": 7})  # decides nothing
    assert ingest(tmp_path / "images", more, out=out).fingerprint == first.fingerprint
    assert (out / "done.json").stat().st_mtime_ns == stamp
    with pytest.raises(ArtifactError, match=r"ingest\.image_size=16, but this run asks for 20"):
        ingest(tmp_path / "images", config(image_size=20), out=out)


def test_mistakes_of_the_config_name_the_key(tmp_path):
    with pytest.raises(ConfigError, match=r"`ingest\.source` is required"):
        ingest(config=config(), out=tmp_path)
    with pytest.raises(ConfigError, match=r"labels_csv.*labels: none.*exclude each other"):
        IngestConfig(labels="none", labels_csv=Path("l.csv"))
    with pytest.raises(ConfigError, match="encoding"):
        IngestConfig(encoding="webp")  # type: ignore[arg-type]


def test_there_are_enough_kinds_of_bad_files():
    assert len(BAD_KINDS) >= 12 and {kind.reason for kind in BAD_KINDS} >= {
        "empty",
        "truncated",
        "corrupt",
        "not_an_image",
        "unsupported",
        "too_large",
    }
