"""Hostile input: no file runs code, no archive leaves its folder, no password is written down."""

from __future__ import annotations

import io
import logging
import os
import pickle
import re
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from selfsup_ray import cli
from selfsup_ray.artifacts import ShardedArray, begin
from selfsup_ray.config import Resources, build, load
from selfsup_ray.credentials import masked
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.shard_files import shard_path
from selfsup_ray.data.synthetic import write_shapes
from selfsup_ray.errors import ConfigError, UserError
from selfsup_ray.experiment import Experiment
from selfsup_ray.mlflow_store import TrackingConfig
from selfsup_ray.models.backbones import ResNetConfig
from selfsup_ray.models.weights import load_foreign, read_weights
from selfsup_ray.pipeline import run
from selfsup_ray.stages.imported import ImportFeaturesConfig, import_features
from selfsup_ray.stages.ingest import IngestConfig, ingest
from selfsup_ray.tracking import open_run
from selfsup_ray.training import load_state

ROOT = Path(__file__).parent.parent
HERE = Resources(workers=0)
PASSWORD = "correct-horse-battery"


class Bomb:
    """Unpickling it makes a folder: the proof that code of a file has run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The folder that appears when a Bomb goes off."""
    return tmp_path / "code-has-run"


@pytest.fixture
def bomb(mark: Path) -> bytes:
    """A pickle that goes off; shown to do so, lest the tests prove nothing."""
    data = pickle.dumps(Bomb(mark), protocol=2)
    pickle.loads(data)
    mark.rmdir()
    return data


def refused(mark: Path, call: Any) -> str:
    """Return the one sentence with which a call refuses a hostile file."""
    with pytest.raises(UserError) as caught:
        call()
    assert not mark.exists(), "the file's code has run"
    text = str(caught.value)
    assert "\n" not in text
    return text


# Weights, states and arrays.


@pytest.mark.parametrize("how", ["pickle", "torch.save", "torch.save, old format"])
def test_a_checkpoint_that_is_a_pickle_bomb_is_refused(tmp_path, mark, bomb, how):
    path = tmp_path / "moco.pth.tar"
    if how == "pickle":
        path.write_bytes(bomb)
    else:
        state = {"state_dict": {"conv1.weight": torch.zeros(1)}, "args": Bomb(mark)}
        torch.save(state, path, _use_new_zipfile_serialization=how == "torch.save")
    text = refused(mark, lambda: load_foreign(path, ResNetConfig()))
    assert str(path) in text and "safetensors" in text
    text = refused(mark, lambda: load_state(path))
    assert str(path) in text and "Delete it" in text


def test_a_pickle_named_safetensors_is_refused(tmp_path, mark, bomb):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(bomb)
    assert str(path) in refused(mark, lambda: read_weights(path))
    torch.save({"x": Bomb(mark)}, path)
    assert str(path) in refused(mark, lambda: load_foreign(path, ResNetConfig()))


@pytest.mark.parametrize("how", ["object array", "pickle"])
def test_a_shard_of_pickled_objects_is_refused(tmp_path, mark, bomb, how):
    array = ShardedArray.create(tmp_path / "rows", shard_rows=[2], row_shape=(3,), dtype="float32")
    if how == "pickle":
        array.shard_path(0).write_bytes(bomb)
    else:
        np.save(array.shard_path(0), np.array([Bomb(mark)] * 2, dtype=object), allow_pickle=True)
    text = refused(mark, lambda: array.rows(np.array([0])))
    assert str(array.shard_path(0)) in text


@pytest.mark.parametrize("name", ["rows.npy", "rows.h5", "rows.index"])
def test_features_to_import_that_are_a_pickle_are_refused(tmp_path, mark, bomb, name):
    path = tmp_path / name
    path.write_bytes(bomb)
    out = tmp_path / "embed"
    refused(mark, lambda: import_features(path, ImportFeaturesConfig(dim=1009), out=out))


def test_a_corpus_shard_with_columns_of_another_type_is_refused(tmp_path, mark, bomb):
    write_shapes(tmp_path / "photos", 4, size=8)
    config = IngestConfig(image_size=8, resources=HERE)
    made = ingest(tmp_path / "photos", config, out=tmp_path / "corpus")
    assert len(made.sources(np.arange(4))) == 4
    path = shard_path(tmp_path / "corpus", 0)
    with pa.memory_map(str(path)) as file:
        table = pa.ipc.open_file(file).read_all()
    table = table.set_column(2, *pickled_column("source", [bomb] * 4))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    opened = Corpus.open(tmp_path / "corpus")
    assert str(path) in refused(mark, lambda: opened.sources(np.arange(4)))


# Tables.


def pickled_column(name: str, values: list[bytes]) -> tuple[pa.Field, pa.Array]:
    """Return a column of Ray Data's own type for Python objects: reading a value unpickles it."""
    import ray.data  # noqa: F401  registers the type
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

    kind = ArrowPythonObjectType()
    array = pa.ExtensionArray.from_storage(kind, pa.array(values, kind.storage_type))
    return pa.field(name, kind), array


def png(color: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (color, color, color)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("column", ["image", "path", "label", "class_name"])
@pytest.mark.parametrize("is_registered", [True, False])
def test_a_parquet_column_of_pickled_objects_is_refused(
    tmp_path, mark, bomb, column, is_registered
):
    plain = {"image": [png()], "path": ["a.png"], "label": [0], "class_name": ["a"]}
    columns = {name: (pa.field(name, pa.array(v).type), pa.array(v)) for name, v in plain.items()}
    columns[column] = pickled_column(column, [bomb])
    fields, arrays = zip(*columns.values(), strict=True)
    path = tmp_path / "photos.parquet"
    pq.write_table(pa.table(list(arrays), schema=pa.schema(list(fields))), path)
    if not is_registered:  # a process that has not imported Ray Data must say the same
        pa.unregister_extension_type("ray.data.arrow_pickled_object")
    try:
        config = IngestConfig(image_size=8, resources=HERE)
        text = refused(mark, lambda: ingest(path, config, out=tmp_path / "out"))
    finally:
        if not is_registered:
            pa.register_extension_type(columns[column][0].type)
    assert f"`{column}`" in text and "pickled_object" in text


# YAML.

CODE = "!!python/object/apply:os.mkdir [{mark}]"


def test_yaml_that_calls_python_is_refused(tmp_path, mark):
    path = tmp_path / "photos.yaml"
    path.write_text(f"out: {CODE.format(mark=mark)}\ningest: {{source: photos}}\n")
    assert str(path) in refused(mark, lambda: load(Experiment, path))


def test_a_value_on_the_command_line_that_calls_python_is_text(mark):
    assert cli.assignment(f"out={CODE.format(mark=mark)}") == ("out", CODE.format(mark=mark))
    assert not mark.exists()


def test_a_run_folder_whose_config_calls_python_is_refused(tmp_path, mark):
    (tmp_path / "config.yaml").write_text(f"stage: {CODE.format(mark=mark)}\n")
    call = lambda: begin(tmp_path, stage="embed", config={}, inputs={})  # noqa: E731
    assert "config.yaml" in refused(mark, call)


def test_yaml_that_unfolds_to_a_billion_values_is_refused_at_once(tmp_path, capsys):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    path = tmp_path / "laughs.yaml"
    path.write_text("\n".join([*lines, "out: *a9", "ingest: {source: *a9}"]))
    assert cli.main(["plan", str(path)]) == 2
    path.write_text("out: &a [*a]")  # a list within itself
    assert cli.main(["plan", str(path)]) == 2
    path.write_text("[" * 100_000)
    assert cli.main(["plan", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(len(line) < 1000 for line in lines)


def test_no_module_loads_yaml_or_arrays_in_a_way_that_runs_code():
    unsafe = re.compile(
        r"yaml\.(unsafe_load|full_load|load\((?!.*Loader=_Loader))|allow_pickle=True|weights_only=False"
        r"|pickle\.loads?\(|joblib\.load|extractall\(|\beval\(|[^.]\bexec\(|shell=True"
    )
    sources = [*(ROOT / "selfsup_ray").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]
    lines = [(p, line) for p in sources for line in p.read_text().splitlines()]
    own = re.compile(r"\.eval\(")  # a network's
    assert [(p, s) for p, s in lines if unsafe.search(own.sub("", s))] == []
    for path, line in lines:
        if "torch.load(" in line:
            assert "weights_only=True" in line, f"{path}: {line}"


# Archives.


def escaping_tar(path: Path, target: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for i, name in enumerate(["good.png", "../../up.png", str(target / "absolute.png")]):
            info = tarfile.TarInfo(name)
            info.size = len(png(i))
            tar.addfile(info, io.BytesIO(png(i)))
        for name, kind in {
            "link.png": tarfile.SYMTYPE,
            "hard.png": tarfile.LNKTYPE,
            "zero.png": tarfile.CHRTYPE,
            "pipe.png": tarfile.FIFOTYPE,
        }.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            info.devmajor, info.devminor = 1, 5  # /dev/zero
            tar.addfile(info)


def escaping_zip(path: Path, target: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for i, name in enumerate(["good.png", "../../up.png", str(target / "absolute.png")]):
            archive.writestr(name, png(i))
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16  # a symbolic link
        archive.writestr(link, "/etc/passwd")


@pytest.mark.parametrize(("name", "make"), [("x.tar", escaping_tar), ("x.zip", escaping_zip)])
def test_members_of_an_archive_never_reach_another_folder(tmp_path, name, make):
    inside, target = tmp_path / "deep" / "inside", tmp_path / "target"
    inside.mkdir(parents=True)
    target.mkdir()
    make(inside / name, target)
    out = tmp_path / "deep" / "out"
    config = IngestConfig(image_size=8, max_bad_share=0.9, resources=HERE)
    corpus = ingest(inside / name, config, out=out)
    assert len(corpus) == 2, "images are read where they lie; a name with `..` counts as hidden"
    elsewhere = [p for p in tmp_path.rglob("*") if not p.is_relative_to(out) and p.is_file()]
    assert elsewhere == [inside / name], "nothing is unpacked"
    assert list((out / "shards").iterdir()) == [shard_path(out, 0)]
    bad = (out / "quarantine.csv").read_text()
    assert "link.png" in bad and "root:" not in bad
    if name == "x.tar":
        assert all(f"{kind}.png" in bad for kind in ("hard", "zero", "pipe"))


# Images that grow.


def png_of(width: int, height: int) -> bytes:
    """Return a PNG of a few kB whose pixels, all black, would fill gigabytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(10_000_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_decompression_bombs_are_quarantined_with_a_reason_and_never_decoded(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "bomb.png").write_bytes(png_of(60_000, 60_000))
    jpeg = io.BytesIO()
    Image.new("RGB", (16, 16)).save(jpeg, "JPEG")
    data = bytearray(jpeg.getvalue())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 65_000, 65_000)  # its header claims so many pixels
    (folder / "bomb.jpg").write_bytes(data)
    (folder / "bomb.gif").write_bytes(b"GIF89a" + struct.pack("<HH", 65_000, 65_000) + bytes(10))
    with zipfile.ZipFile(folder / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("huge.png", bytes(300_000_000))  # 300 kB in the file
    for i in range(6):
        (folder / f"good{i}.png").write_bytes(png(i))
    config = IngestConfig(image_size=8, max_pixels=10_000_000, max_bad_share=0.9, resources=HERE)
    corpus = ingest(folder, config, out=tmp_path / "out")
    assert len(corpus) == 6
    rows = (tmp_path / "out" / "quarantine.csv").read_text().splitlines()
    for name in ("bomb.png", "bomb.jpg", "huge.png"):
        [row] = [row for row in rows if name in row]
        assert "too_large" in row, row
    assert any("bomb.gif" in row for row in rows)


# Servers.


def test_every_server_that_is_started_or_documented_listens_on_loopback_only():
    texts = [*(ROOT / "selfsup_ray").rglob("*.py"), *ROOT.glob("*.yaml"), *ROOT.glob("**/*.md")]
    texts = [path for path in texts if ".venv" not in path.parts]
    for path in texts:
        assert not re.search(r"host[= ]\"?(0\.0\.0\.0|::|\*)", path.read_text()), path
    head = yaml.safe_load((ROOT / "cluster.yaml").read_text())["head_start_ray_commands"]
    assert any("--dashboard-host=127.0.0.1" in command for command in head)


# Credentials.

SECRETS = {
    "tracking.uri": f"http://me:{PASSWORD}@mlflow.example:5000",
    "ingest.source": f"s3://AKIAABCDEFGHIJKLMNOP:{PASSWORD}@bucket/photos",
    "out": f"s3://bucket/run?secret_key={PASSWORD}",
}


@pytest.mark.parametrize("key", SECRETS)
def test_a_password_in_a_config_is_refused_without_being_repeated(key):
    values: dict[str, Any] = {"out": "runs/x", "ingest": {"source": "photos"}, "tracking": {}}
    *above, last = key.split(".")
    (values[above[0]] if above else values)[last] = SECRETS[key]
    with pytest.raises(ConfigError) as caught:
        build(Experiment, values)
    assert f"`{key}`" in str(caught.value) and "environment" in str(caught.value)
    assert PASSWORD not in str(caught.value)


def test_a_stage_called_from_python_refuses_a_password_too(tmp_path):
    source = SECRETS["ingest.source"]
    for call in (
        lambda: ingest(source, out=tmp_path / "out"),
        lambda: ingest(None, IngestConfig(source=source), out=tmp_path / "out"),
        lambda: open_run(tmp_path, TrackingConfig(uri=SECRETS["tracking.uri"]), name="x"),
    ):
        with pytest.raises(ConfigError) as caught:
            call()
        assert PASSWORD not in str(caught.value)


def test_ordinary_addresses_and_paths_are_no_credentials():
    for text in ("s3://bucket/a:b@c.png", "photos/password=3.png", "a@b:c", "http://host:5000"):
        build(Experiment, {"out": "runs/x", "ingest": {"source": text}})
        assert "***" not in masked("s3://bucket/photos http://host:5000 user@host")


def test_a_password_in_the_environment_is_neither_logged_nor_written(
    tmp_path, monkeypatch, caplog, capsys
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{PASSWORD}@127.0.0.1:9")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PASSWORD)
    write_shapes(tmp_path / "photos", 12, size=8)
    path = tmp_path / "photos.yaml"
    values = {"source": str(tmp_path / "photos"), "image_size": 8, "resources": {"workers": 0}}
    path.write_text(yaml.safe_dump({"out": str(tmp_path / "run"), "ingest": values}))
    with caplog.at_level(logging.DEBUG, logger="selfsup_ray"):
        print(run(path).text())
    assert any("cannot be reached" in message for message in caplog.messages)
    assert PASSWORD not in caplog.text
    assert PASSWORD not in "".join(capsys.readouterr())
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert [p for p in written if PASSWORD.encode() in p.read_bytes()] == []


def test_a_class_name_cannot_bring_a_script_into_the_report(tmp_path):
    name = "<script>alert(1)<script>"
    folder = tmp_path / "photos" / name
    folder.mkdir(parents=True)
    for i in range(12):
        (folder / f"{name}{i}.png").write_bytes(png(i))
    path = tmp_path / "photos.yaml"
    values = {"source": str(tmp_path / "photos"), "image_size": 8, "resources": {"workers": 0}}
    path.write_text(yaml.safe_dump({"out": str(tmp_path / "run"), "ingest": values}))
    page = run(path, {"ingest.labels": "folder"}).report.read_text()
    assert name not in page
