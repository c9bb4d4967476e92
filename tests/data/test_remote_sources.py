"""Sources on object storage: what a local folder gives, the same from a bucket."""

import csv
import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow import fs

from selfsup_ray import object_store
from selfsup_ray.artifacts import read_json
from selfsup_ray.config import Resources
from selfsup_ray.data import remote
from selfsup_ray.data.images import ImageError
from selfsup_ray.data.remote import RemoteFile
from selfsup_ray.data.sources import Source, read_items
from selfsup_ray.data.synthetic import saved, shape_images
from selfsup_ray.data.tables import Columns
from selfsup_ray.errors import ArtifactError, StorageError
from selfsup_ray.object_store import filesystem, place
from selfsup_ray.stages.ingest import IngestConfig, ingest

FILES = ["cats/1.png", "cats/10.png", "cats.png", "dogs/x/3.png", "dogs/4.jpg", "cats+b/ü 5.png"]


def png(i: int) -> bytes:
    return saved(Image.fromarray(shape_images(i + 1, size=8, seed=i)[0][-1]), "PNG")


CONTENT = {name: png(i) for i, name in enumerate(FILES)}


def put(folder: Path, url: str) -> None:
    """Write a local folder to a bucket."""
    fs.copy_files(
        str(folder),
        place(url),
        source_filesystem=fs.LocalFileSystem(),
        destination_filesystem=filesystem(url),
    )


def write_photos(folder: Path) -> None:
    for name, data in CONTENT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "dogs" / "broken.png").write_bytes(b"not an image")
    (folder / "dogs" / "notes.txt").write_text("side file")
    (folder / ".hidden.png").write_bytes(CONTENT["cats.png"])
    (folder / "unnamed").write_bytes(CONTENT["cats.png"])


def write_tar(path: Path, mode: str) -> None:
    with tarfile.open(path, mode) as tar:
        for i, (name, data) in enumerate(CONTENT.items()):
            for member, content in ((f"{i}.png", data), (f"{i}.cls", name[:3].encode())):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def write_zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / "photos.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in CONTENT.items():
            archive.writestr(name, data)


def write_parquet(folder: Path) -> None:
    table = pa.table(
        {"image": list(CONTENT.values()), "path": FILES, "label": [0, 0, 1, 2, 2, 1], "big": FILES}
    )
    pq.write_table(table, folder / "photos.parquet", row_group_size=4)


def write_manifest(folder: Path) -> None:
    write_photos(folder)
    with open(folder / "list.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label"])
        writer.writerows([*([name, name[:3]] for name in reversed(FILES)), ["gone.png", "cat"]])


KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "folder": (write_photos, ""),
    "glob": (write_photos, "/*s/**/*.png"),
    "tar": (lambda folder: write_tar(folder / "a.tar", "w"), ""),
    "compressed tar": (lambda folder: write_tar(folder / "a.tar.gz", "w:gz"), "/a.tar.gz"),
    "zip": (write_zip, "/photos.zip"),
    "Parquet": (write_parquet, "/photos.parquet"),
    "folder of Parquet": (write_parquet, ""),
    "CSV": (write_manifest, "/list.csv"),
}


def offered(source: str) -> list[tuple[Any, ...]]:
    """Return (name, folder, label, bytes or reason) of every item, its names below the source."""
    items = list(Source(source, Columns()).items())
    read = list(read_items(items, image_column="image", max_bytes=10**6))
    assert [item for item, _ in read] == items
    return [
        (item.source, item.folder, item.label, d.reason if isinstance(d, ImageError) else d)
        for item, d in read
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_offers_the_same_from_a_bucket_as_from_a_folder(kind, tmp_path, bucket):
    write, name = KINDS[kind]
    (tmp_path / "photos").mkdir()
    write(tmp_path / "photos")
    put(tmp_path / "photos", f"{bucket}/deep/photos")
    here = offered(f"{tmp_path}/photos{name}")
    there = offered(f"{bucket}/deep/photos{name}")
    assert len(here) >= 4
    root = (f"{tmp_path}/photos", f"{bucket}/deep/photos")
    assert [(n.replace(*root), *rest) for n, *rest in here] == there


def test_a_corpus_from_a_bucket_has_the_ids_bytes_labels_and_quarantine_of_a_local_one(
    tmp_path, bucket
):
    write_photos(tmp_path / "photos")
    write_tar(tmp_path / "photos" / "dogs" / "more.tar", "w")
    put(tmp_path / "photos", f"{bucket}/photos")
    config = IngestConfig(
        image_size=8, shard_size=5, max_bad_share=0.5, resources=Resources(workers=0)
    )
    here = ingest(tmp_path / "photos", config, out=tmp_path / "here")
    there = ingest(f"{bucket}/photos/", config, out=tmp_path / "there")
    every = np.arange(len(here))
    assert there.counts == here.counts and there.class_names == here.class_names
    assert there.shard_rows == here.shard_rows and (there.labels() == here.labels()).all()
    assert [there.encoded(i) for i in every] == [here.encoded(i) for i in every]
    assert there.sources(every) == [
        name.replace(f"{tmp_path}/", f"{bucket}/") for name in here.sources(every)
    ]
    content = [read_json(corpus.path / "corpus.json")["content"] for corpus in (here, there)]
    assert content[0] == content[1]
    [bad] = csv.DictReader((tmp_path / "there" / "quarantine.csv").read_text().splitlines())
    assert bad["source"] == f"{bucket}/photos/dogs/broken.png"
    assert bad["reason"] == "not_an_image"


class Failing:
    """A file system of pyarrow's whose reads fail now and then, as over a bad network."""

    def __init__(self, inner: Any, every: int) -> None:
        self.inner, self.every, self.calls = inner, every, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def open_input_file(self, path: str) -> Any:
        return Failing(self._now_and_then(self.inner.open_input_file, path), self.every)

    def read_at(self, *args: Any) -> Any:
        return self._now_and_then(self.inner.read_at, *args)

    def __enter__(self) -> "Failing":
        return self

    def __exit__(self, *error: object) -> None:
        self.inner.close()

    def _now_and_then(self, call: Callable[..., Any], *args: Any) -> Any:
        self.calls += 1
        if self.calls % self.every == 0:
            raise OSError("When reading: AWS Error NETWORK_CONNECTION: connection reset")
        return call(*args)


@pytest.fixture
def bad_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Return `fail(every)`: from then on every so many requests fail; waits are short."""

    def fail(every: int) -> None:
        failing: dict[str, Failing] = {}

        def through(url: str) -> Any:
            return failing.setdefault(url, Failing(object_store.filesystem(url), every))

        monkeypatch.setattr(remote, "filesystem", through)
        monkeypatch.setattr(object_store, "FIRST_WAIT_S", 0.001)

    yield fail


@pytest.mark.parametrize("kind", ["folder", "tar", "Parquet"])
def test_requests_that_fail_now_and_then_change_nothing(kind, tmp_path, bucket, bad_network):
    write, name = KINDS[kind]
    (tmp_path / "photos").mkdir()
    write(tmp_path / "photos")
    put(tmp_path / "photos", f"{bucket}/photos")
    undisturbed = offered(f"{bucket}/photos{name}")
    bad_network(2)
    assert offered(f"{bucket}/photos{name}") == undisturbed


def test_a_store_that_stays_away_stops_the_run_and_quarantines_nothing(
    tmp_path, bucket, bad_network
):
    (tmp_path / "photos").mkdir()
    write_photos(tmp_path / "photos")
    put(tmp_path / "photos", f"{bucket}/photos")
    items = list(Source(f"{bucket}/photos", Columns()).items())
    bad_network(1)
    with pytest.raises(StorageError, match=r"cannot be read: \d+ attempts .*AWS_ENDPOINT_URL"):
        list(read_items(items, image_column="image", max_bytes=10**6))


def test_an_object_deleted_after_the_listing_is_quarantined_and_a_large_one_is_not_read(
    tmp_path, bucket
):
    (tmp_path / "photos").mkdir()
    write_photos(tmp_path / "photos")
    put(tmp_path / "photos", f"{bucket}/photos")
    items = list(Source(f"{bucket}/photos", Columns()).items())
    object_store.delete(f"{bucket}/photos/cats.png")
    largest = max(map(len, CONTENT.values()))
    reasons = {
        item.source.removeprefix(f"{bucket}/photos/"): data.reason
        for item, data in read_items(items, image_column="image", max_bytes=largest - 1)
        if isinstance(data, ImageError)
    }
    assert reasons.pop("cats.png") == "missing"
    assert set(reasons.values()) == {"too_large"}


def test_a_manifest_here_may_name_objects_there(tmp_path, bucket):
    (tmp_path / "photos").mkdir()
    write_photos(tmp_path / "photos")
    put(tmp_path / "photos", f"{bucket}/photos")
    (tmp_path / "list.csv").write_text(f"path\n{bucket}/photos/cats/1.png\n")
    [(name, _, _, data)] = offered(f"{tmp_path}/list.csv")
    assert (name, data) == (f"{bucket}/photos/cats/1.png", CONTENT["cats/1.png"])


@pytest.mark.parametrize("path", ["/none", "/photos/none.png", "/photos/*.gif", ""])
def test_a_source_that_is_not_there_is_said_in_one_sentence(path, bucket):
    with pytest.raises(ArtifactError, match=r"(There is no source|No images found in) s3://"):
        list(Source(f"{bucket}{path}", Columns()).items())


def test_a_bucket_that_is_not_there_is_said_in_one_sentence(bucket):
    with pytest.raises((ArtifactError, StorageError), match="no-such-bucket"):
        list(Source("s3://no-such-bucket-here/photos", Columns()).items())


def test_a_remote_file_seeks_and_ends_like_a_local_one(tmp_path, bucket):
    data = bytes(range(256)) * 10
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.bin").write_bytes(data)
    put(tmp_path / "x", bucket)
    here, there = io.BytesIO(data), io.BufferedReader(RemoteFile(f"{bucket}/a.bin"), 100)
    for offset, whence, size in ((0, 0, 7), (100, 1, 300), (-5, 2, 10), (2560, 0, 1), (3, 0, -1)):
        assert there.seek(offset, whence) == here.seek(offset, whence)
        assert there.read(size) == here.read(size) and there.tell() == here.tell()
    with pytest.raises(FileNotFoundError):
        RemoteFile(f"{bucket}/none")
