"""What every test shares: a quiet one-thread environment, gloo ranks, one Ray session."""

import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

for _name, _value in {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_DATA_USE_DATASOURCE_V2": "0",
    "OMP_NUM_THREADS": "1",
}.items():
    os.environ.setdefault(_name, _value)  # before the first import of ray, torch or faiss

OnRanks = Callable[..., list[Any]]


def pytest_configure(config: pytest.Config) -> None:
    """Keep torch on one thread: the tests' tensors are tiny and the cores shared."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray for all tests that need it: 4 logical CPUs, whatever the machine has."""
    import ray

    # A short path: Ray's unix sockets live below it and may have 107 bytes in all.
    folder = tempfile.mkdtemp(prefix="ray")
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        object_store_memory=300 * 2**20,
        _temp_dir=folder,
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def on_ranks(tmp_path: Path) -> OnRanks:
    """Return `run(function, *args, size)`: function(*args) on `size` gloo ranks, results by rank.

    Results go through torch.save, so tensors, numbers and plain containers of them. The processes
    are forked: the function may be a closure.
    """
    calls = 0

    def run(function: Callable[..., Any], *args: Any, size: int) -> list[Any]:
        nonlocal calls
        calls += 1
        folder = tmp_path / f"ranks{calls}"
        folder.mkdir()
        context = multiprocessing.get_context("fork")
        processes = [
            context.Process(target=_rank, args=(function, args, rank, size, folder))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=120)
            if process.is_alive():
                process.kill()
        codes = [process.exitcode for process in processes]
        assert codes == [0] * size, f"ranks ended with {codes}; see the captured standard error"
        import torch

        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]

    return run


def _rank(
    function: Callable[..., Any], args: tuple[Any, ...], rank: int, size: int, folder: Path
) -> None:
    import torch
    import torch.distributed as dist

    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    try:
        torch.save(function(*args), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an S3 server of this test run: moto's, in a process of its own."""
    port = _free_port()
    log = open(tmp_path_factory.mktemp("s3") / "server.log", "wb")
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    deadline = time.monotonic() + 120
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            break
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, "moto does not start"
            time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    server.kill()
    server.wait()
    log.close()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def bucket(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty bucket that this process and its children reach, with an empty cache."""
    import boto3

    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "SELFSUP_RAY_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    name = f"test-{uuid.uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=s3_server).create_bucket(Bucket=name)
    return f"s3://{name}"
