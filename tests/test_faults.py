"""Faults around a run: a full disk, an MLflow that is away, storage that cannot be read."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from mlflow import MlflowClient

from selfsup_ray import cli
from selfsup_ray.artifacts import ShardedArray, create_mapped
from selfsup_ray.data.shard_files import shard_path
from selfsup_ray.data.synthetic import write_shapes
from selfsup_ray.errors import ArtifactError
from selfsup_ray.models.weights import write_weights
from selfsup_ray.pipeline import run
from selfsup_ray.tracking import read_records
from selfsup_ray.training import save_state

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


# Storage.


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
