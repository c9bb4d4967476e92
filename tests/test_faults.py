"""Faults around a run: a full disk, an MLflow that is away, storage that fails or is slow."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from mlflow import MlflowClient

from selfsup_ray import cli, pipeline, tracking
from selfsup_ray.artifacts import ShardedArray, create_mapped
from selfsup_ray.config import Resources
from selfsup_ray.data import sources
from selfsup_ray.data.shard_files import shard_path
from selfsup_ray.data.synthetic import write_shapes
from selfsup_ray.errors import ArtifactError
from selfsup_ray.models.weights import write_weights
from selfsup_ray.pipeline import run
from selfsup_ray.stages.ingest import IngestConfig, ingest
from selfsup_ray.steps import run_stage
from selfsup_ray.tracking import read_records
from selfsup_ray.training import load_state, save_state

HERE = {"workers": 0}
SMALL = {"epochs": 1, "batch_size": 16, "precision": "float32", "resources": HERE}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an experiment that has run: in `runs/finished`, beside which copies may lie."""
    folder = tmp_path_factory.mktemp("faults")
    path = experiment(folder, out=folder / "runs" / "finished")
    assert cli.main(["--quiet", "run", str(path)]) == 0
    return path


def copied(finished: Path, name: str) -> tuple[Path, str]:
    """Return a copy of the finished run, and `out=` for it."""
    out = finished.parent / "runs" / name
    shutil.copytree(finished.parent / "runs" / "finished", out)
    return out, f"out={out}"


def experiment(folder: Path, *, out: Path) -> Path:
    """Write an experiment on folder/photos that takes seconds, all in this process."""
    values = {
        "out": str(out),
        "ingest": {
            "source": str(folder / "photos"),
            "image_size": 16,
            "shard_size": 16,
            "resources": HERE,
        },
        "pretext": {**SMALL, "backbone": {"name": "resnet18", "stem": "stl", "width": 4}},
        "embed": {"resources": HERE},
        "graph": {"k": 5, "resources": HERE},
    }
    if not (folder / "photos").exists():
        write_shapes(folder / "photos", 40, size=16)
    path = folder / "photos.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def contents(out: Path) -> dict[str, str]:
    """Return the hashes of the arrays and weights below a run folder."""
    files = [p for p in out.rglob("*") if p.suffix in (".arrow", ".npy", ".safetensors")]
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2 MB, if this machine lets us mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        made = subprocess.run(mount, capture_output=True, text=True, timeout=30)
    except OSError as error:
        pytest.skip(f"there is no mount: {error}")
    if made.returncode:
        pytest.skip(f"mounting is not allowed here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True, timeout=30)


# A full disk.


@pytest.mark.parametrize("what", ["array", "weights", "state"])
def test_a_file_that_finds_no_room_is_not_there_and_the_error_says_what_to_do(small_disk, what):
    big = torch.zeros(1_000_000)  # 4 MB
    path = small_disk / f"big.{what}"
    with pytest.raises(ArtifactError, match="its disk is full") as caught:
        if what == "array":
            rows = ShardedArray.create(
                small_disk / "rows", shard_rows=[1000], row_shape=(1000,), dtype="float32"
            )
            path = rows.shard_path(0)
            rows.write_shard(0, big.reshape(1000, 1000).numpy())
        elif what == "weights":
            module = torch.nn.Module()
            module.register_buffer("big", big)
            write_weights(path, {"": module})
        else:
            save_state(path, {"objective": {"big": big}})  # type: ignore[typeddict-item]
    assert str(path) in str(caught.value)
    left = [p for p in small_disk.rglob("*") if p.suffix != ".json" and p.is_file()]
    assert left == [], "neither half a file nor a temporary one"


def test_a_mapped_file_that_finds_no_room_is_an_error_not_a_signal(small_disk):
    code = (
        "import sys, numpy as np; from pathlib import Path;"
        "from selfsup_ray.artifacts import create_mapped;"
        "create_mapped(Path(sys.argv[1]), (4_000_000,), np.uint8)[:] = 1"
    )
    command = [sys.executable, "-c", code, str(small_disk / "mapped.npy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "No space left on device" in done.stderr
    assert create_mapped(small_disk / "fits.npy", (3,), np.float32).tolist() == [0, 0, 0]


def test_a_run_on_a_disk_that_fills_up_stops_in_one_sentence_and_then_ends_the_same(
    finished, tmp_path, small_disk, capsys, monkeypatch
):
    run_it = ["--quiet", "run", str(finished), f"out={small_disk / 'run'}"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{finished.parent / 'runs/mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(1_990_000))
    for module in ("planning", "stages.ingest"):  # the check in advance would stop it sooner
        monkeypatch.setattr(f"selfsup_ray.{module}.require_disk", lambda *a, **k: None)
    capsys.readouterr()
    assert cli.main(run_it) == 2
    [line] = [s for s in capsys.readouterr().err.splitlines() if s.startswith("selfsup-ray:")]
    assert "cannot be written: its disk is full" in line and str(small_disk) in line
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True, timeout=30)
    assert cli.main(run_it) == 0
    assert contents(small_disk / "run") == contents(finished.parent / "runs" / "finished")


# MLflow.


def test_a_run_whose_mlflow_is_away_warns_once_and_sends_its_numbers_later(
    tmp_path, monkeypatch, caplog
):
    path = experiment(tmp_path, out=tmp_path / "run")
    with socket.socket() as closed:  # a port where nothing listens
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with caplog.at_level(logging.WARNING, logger="selfsup_ray"):
            run(path)
    [warning] = [m for m in caplog.messages if "MLflow" in m]
    assert "cannot be reached" in warning and "The run goes on" in warning
    assert any("loss" in r for r in read_records(tmp_path / "run/pretext/metrics.jsonl"))
    before = contents(tmp_path / "run")

    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.chdir(tmp_path)
    run(path)  # every stage is current: nothing but the numbers is left
    client = MlflowClient(store)
    [found] = client.search_experiments(filter_string="name = 'selfsup_ray'")
    runs = {r.info.run_name: r for r in client.search_runs([found.experiment_id])}
    assert set(runs) == {"run", *(f"run/{s}" for s in ("ingest", "pretext", "embed", "graph"))}
    assert "loss" in runs["run/pretext"].data.metrics
    assert {r.info.status for r in runs.values()} == {"FINISHED"}
    parent = runs["run"].info.run_id
    assert runs["run/pretext"].data.tags["mlflow.parentRunId"] == parent
    assert contents(tmp_path / "run") == before
    run(path)
    assert len(client.search_runs([found.experiment_id])) == len(runs), "sent once"


SERVER = """
import os, sys
os.environ["_MLFLOW_SERVER_FILE_STORE"] = sys.argv[1]
os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = sys.argv[2]
from mlflow.server import app
from werkzeug.serving import make_server
server = make_server("127.0.0.1", int(sys.argv[3]), app, threaded=True)
print("listens", flush=True)
server.serve_forever()
"""


def mlflow_server(folder: Path, port: int) -> subprocess.Popen[str]:
    """Return a tracking server that listens; what it is told it keeps in a file."""
    store, artifacts = f"sqlite:///{folder / 'server.db'}", (folder / "artifacts").as_uri()
    command = [sys.executable, "-c", SERVER, store, artifacts, str(port)]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=folder
    )
    assert server.stdout is not None and server.stdout.readline() == "listens\n"
    return server


@pytest.mark.slow
def test_an_mlflow_server_killed_in_the_middle_and_started_again_lacks_nothing(
    finished, tmp_path, monkeypatch, caplog
):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    servers = [mlflow_server(tmp_path, port)]

    def stage_with_fault(stage: str, *rest: Any) -> None:
        if stage == "pretext":
            servers[0].kill()
        if stage == "graph":
            servers.append(mlflow_server(tmp_path, port))
        run_stage(stage, *rest)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(tracking, "RETRY_AFTER_S", 0.0)
    monkeypatch.setattr(pipeline, "run_stage", stage_with_fault)
    try:
        with caplog.at_level(logging.WARNING, logger="selfsup_ray"):
            run(finished, {"out": str(tmp_path / "finished")})
    finally:
        for server in servers:
            server.kill()
            server.communicate()
    assert len([m for m in caplog.messages if "MLflow" in m]) == 1
    client = MlflowClient(f"sqlite:///{tmp_path / 'server.db'}")
    [found] = client.search_experiments(filter_string="name = 'selfsup_ray'")
    runs = {r.info.run_name: r for r in client.search_runs([found.experiment_id])}
    stages = ("ingest", "pretext", "embed", "graph")
    assert set(runs) == {"finished", *(f"finished/{stage}" for stage in stages)}
    assert {r.info.status for r in runs.values()} == {"FINISHED"}
    sent = client.get_metric_history(runs["finished/pretext"].info.run_id, "loss")
    records = read_records(tmp_path / "finished/pretext/metrics.jsonl")
    assert [m.step for m in sent] == [r["step"] for r in records if "loss" in r]
    assert contents(tmp_path / "finished") == contents(finished.parent / "runs" / "finished")


# Storage.


def failing(call: Any, name: str, number: int, times: list[int]) -> Any:
    """Return a function that raises an error of the storage `times[0]` times for files `name`."""

    def fails(path: Any, *rest: Any, **options: Any) -> Any:
        places = [os.fspath(p) for p in (path, *rest) if isinstance(p, str | os.PathLike)]
        if any(place.endswith(name) for place in places) and times[0] > 0:
            times[0] -= 1
            raise OSError(number, os.strerror(number), places[-1])
        return call(path, *rest, **options)

    return fails


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize(
    ("module", "name", "file"),
    [
        (os, "replace", "embed/rows/00001.npy"),
        (np, "load", "embed/rows/00001.npy"),
    ],
)
def test_a_storage_that_fails_stops_the_run_in_one_sentence_and_damages_nothing(
    finished, capsys, monkeypatch, module, name, file, number
):
    out, here = copied(finished, f"{module.__name__}-{name}-{number}")
    for stage in ("embed", "graph"):
        shutil.rmtree(out / stage)
    with monkeypatch.context() as broken:
        broken.setattr(module, name, failing(getattr(module, name), file, number, [99]))
        capsys.readouterr()
        assert cli.main(["--quiet", "run", str(finished), here]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "its storage fails or is away" in line and file in line and "elete" not in line
    assert not list(out.rglob("*.tmp")), "no half file is left"
    assert cli.main(["--quiet", "run", str(finished), here]) == 0
    assert contents(out) == contents(finished.parent / "runs" / "finished")


def test_a_checkpoint_that_cannot_be_reached_is_not_one_to_delete(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_state(path, {"objective": {}})  # type: ignore[typeddict-item]
    monkeypatch.setattr(torch, "load", failing(torch.load, path.name, errno.EIO, [1]))
    with pytest.raises(OSError, match="Input/output error"):
        load_state(path)
    assert load_state(path) == {"objective": {}}


def test_an_image_is_read_again_after_an_error_that_passes_and_bad_only_if_it_stays(
    tmp_path, monkeypatch
):
    write_shapes(tmp_path / "photos", 8, size=16)
    config = IngestConfig(image_size=16, resources=Resources(workers=0), max_bad_share=0.2)
    first = str(sorted((tmp_path / "photos").rglob("*.*"))[0])
    read = Path.read_bytes
    monkeypatch.setattr(sources, "READ_AGAIN_S", (0.0, 0.0, 0.0))
    for times, kept in ((3, 8), (4, 7)):
        fails = failing(read, first, errno.EIO, [times])
        monkeypatch.setattr(Path, "read_bytes", lambda path, fails=fails: fails(path))
        assert len(ingest(tmp_path / "photos", config, out=tmp_path / f"corpus{times}")) == kept
    assert "unreadable" in (tmp_path / "corpus4/quarantine.csv").read_text()
    fails_away = failing(read, first, errno.ESTALE, [99])
    monkeypatch.setattr(Path, "read_bytes", lambda path: fails_away(path))
    with pytest.raises(OSError, match="handle"):  # a share that is away has no bad images
        ingest(tmp_path / "photos", config, out=tmp_path / "away")


def test_a_slow_storage_changes_nothing_but_the_time(finished, tmp_path, monkeypatch):
    def slow(call: Any) -> Any:
        def later(*arguments: Any, **options: Any) -> Any:
            time.sleep(0.03)
            return call(*arguments, **options)

        return later

    for module, name in ((os, "replace"), (os, "fsync"), (np, "load"), (Path, "read_bytes")):
        monkeypatch.setattr(module, name, slow(getattr(module, name)))
    began = time.monotonic()
    run(finished, {"out": str(tmp_path / "finished")})
    assert time.monotonic() - began > 1, "the storage was slow"
    assert contents(tmp_path / "finished") == contents(finished.parent / "runs" / "finished")


def test_a_shard_that_cannot_be_read_stops_the_run_and_is_made_again_the_same(finished, capsys):
    out, here = copied(finished, "damaged")
    shutil.rmtree(out / "graph")
    broken = ShardedArray.open(next((out / "embed").rglob("array.json")).parent).shard_path(1)
    data = broken.read_bytes()
    for damage in (data[:200], b"\0" * len(data), b"", None):  # None: no file at all
        broken.unlink(missing_ok=True)
        if damage is not None:
            broken.write_bytes(damage)
        capsys.readouterr()
        assert cli.main(["--quiet", "run", str(finished), here]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert str(broken) in line
    (out / "embed" / "done.json").unlink()  # as the sentence says
    assert cli.main(["--quiet", "run", str(finished), here]) == 0
    assert contents(out) == contents(finished.parent / "runs" / "finished")


def test_a_damaged_corpus_shard_stops_the_run_and_ingest_makes_the_same_again(finished, capsys):
    out, here = copied(finished, "damaged-corpus")
    for stage in ("embed", "graph"):
        shutil.rmtree(out / stage)
    broken = shard_path(out / "ingest", 1)
    os.truncate(broken, 500)
    capsys.readouterr()
    assert cli.main(["--quiet", "run", str(finished), here]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert str(broken) in line and f"Delete the folder {out / 'ingest'}" in line
    shutil.rmtree(out / "ingest")
    assert cli.main(["--quiet", "run", str(finished), here]) == 0
    assert contents(out) == contents(finished.parent / "runs" / "finished")


def test_a_disk_that_is_full_where_no_stage_expects_it_is_one_sentence_too(
    tmp_path, capsys, monkeypatch
):
    def no_room(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x/metrics.jsonl")

    monkeypatch.setattr(cli, "_run", no_room)
    assert cli.main(["run", str(experiment(tmp_path, out=tmp_path / "run"))]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("selfsup-ray: runs/x/metrics.jsonl cannot be written: its disk is full")
