"""A Ray cluster as people start one: `ray start --head`, in processes of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

StartHead = Callable[..., "Head"]
BIN = Path(sys.executable).parent


@dataclass
class Head:
    """A head node that listens; `address` for drivers, `dashboard` for jobs."""

    address: str
    dashboard: str
    folder: Path
    """Its session: logs, and what jobs shipped."""
    process: subprocess.Popen[bytes]
    log: IO[bytes]

    @property
    def environment(self) -> dict[str, str]:
        """Environment of a driver or a client that is to join this cluster and no other."""
        return {**clean_environment(), "RAY_ADDRESS": self.address}

    def stop(self) -> None:
        """End the head, and whatever it started, by process id."""
        from ray._private.services import psutil  # Ray's own copy

        started = psutil.Process(self.process.pid).children(recursive=True)
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=10)
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.kill()
        self.process.wait()
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def clean_environment() -> dict[str, str]:
    """Return this process's environment without another Ray's, its own Python first on the path."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return environment | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on, all different."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_until(true: Callable[[], bool], *, seconds: float, what: Callable[[], str]) -> None:
    """Return when a condition holds; fail with what() when it does not within some seconds."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what()}"
        time.sleep(0.1)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def _takes_jobs(address: str) -> bool:
    """Return whether a node's agent, which starts jobs, has told the head where it listens."""
    from ray._raylet import GcsClient
    from ray.dashboard.consts import DASHBOARD_AGENT_ADDR_NODE_ID_PREFIX

    prefix = DASHBOARD_AGENT_ADDR_NODE_ID_PREFIX.encode()
    return bool(GcsClient(address).internal_kv_keys(prefix, b"dashboard", timeout=30))


@pytest.fixture(scope="module")
def start_head() -> Iterator[StartHead]:
    """Return `start(*options, launch_file=, environment=)`; every head ends with the module.

    launch_file: makes the autoscaler's file for a head that listens on a port.
    """
    heads = list[Head]()

    def start(
        *options: str,
        launch_file: Callable[[int], Path] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Head:
        gcs, dashboard, client = free_ports(3)
        folder = Path(tempfile.mkdtemp(prefix="ray"))  # short: unix sockets lie below it
        log = open(folder / "head.log", "wb")
        command = [
            *(str(BIN / "ray"), "start", "--head", "--block"),
            *(f"--port={gcs}", f"--dashboard-port={dashboard}", "--node-ip-address=127.0.0.1"),
            *(f"--ray-client-server-port={client}", "--dashboard-agent-listen-port=0"),
            *(f"--temp-dir={folder}", f"--object-store-memory={150 * 2**20}"),
            *options,
        ]
        if launch_file is not None:
            command.append(f"--autoscaling-config={launch_file(gcs)}")
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**clean_environment(), **(environment or {})},
            start_new_session=True,
        )
        url = f"http://127.0.0.1:{dashboard}"
        heads.append(Head(f"127.0.0.1:{gcs}", url, folder, process, log))
        wait_until(
            lambda: process.poll() is not None or _answers(f"{url}/api/version"),
            seconds=120,
            what=lambda: (folder / "head.log").read_text(),
        )
        assert process.poll() is None, (folder / "head.log").read_text()
        wait_until(lambda: _takes_jobs(heads[-1].address), seconds=120, what=lambda: "no agent")
        return heads[-1]

    yield start
    for head in heads:
        head.stop()
