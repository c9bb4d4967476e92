"""A store that fails, refuses, answers slowly, or changes and dies in the middle of a request."""

from __future__ import annotations

import hashlib
import http.client
import http.server
import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
import yaml

from selfsup_ray import object_store
from selfsup_ray.artifacts import write_text
from selfsup_ray.data.synthetic import write_shapes
from selfsup_ray.errors import StorageError
from selfsup_ray.object_store import download, version_of
from selfsup_ray.pipeline import run
from selfsup_ray.storage import fetched, located

DROPPED, LOST = -1, -2
"""In place of a code: the connection ends before the request is passed on, or before its answer."""


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests on to the S3 server; `fault` may answer one first, or only take its time."""

    def __init__(self, server: str) -> None:
        super().__init__(("127.0.0.1", 0), _Pass)
        self.target = server.removeprefix("http://")
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.seen = list[str]()
        self.fault: Callable[[str], int] = lambda method: 0

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that are gone."""


class _Pass(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def _pass(self) -> None:
        body = self._body()
        self.server.seen.append(self.command)
        code = self.server.fault(self.command)
        if code == DROPPED:
            self.close_connection = True
            return None
        if code > 0:
            return self._answer(code, {}, b"")
        connection = http.client.HTTPConnection(self.server.target, timeout=60)
        dropped = ("expect", "transfer-encoding", "content-length", "connection")
        headers = {k: v for k, v in self.headers.items() if k.lower() not in dropped}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        if code == LOST:
            self.close_connection = True
            return None
        self._answer(answer.status, dict(answer.getheaders()), answer.read())
        connection.close()

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, code: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(code)
        for name, value in headers.items():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = headers.get("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass  # noqa: N815  names of the library

    def log_message(self, *words: object) -> None:
        """Be quiet."""


@pytest.fixture
def proxy(bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy that requests go through."""
    made = Proxy(s3_server)
    thread = threading.Thread(target=made.serve_forever, args=(0.05,))
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
    monkeypatch.setattr(object_store, "FIRST_WAIT_S", 0.01)
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def test_requests_that_fail_are_made_again_and_said(
    bucket: str, proxy: Proxy, caplog: pytest.LogCaptureFixture
):
    codes = [503, 500, 503]
    proxy.fault = lambda method: codes.pop() if codes else 0
    with caplog.at_level(logging.WARNING):
        write_text(located(f"{bucket}/a.txt"), "there")
    assert codes == [] and "attempt 2 of 7" in caplog.text
    codes += [503, 503]
    assert located(f"{bucket}/a.txt").read_text() == "there" and codes == []


def test_a_store_that_stays_away_ends_in_one_sentence(
    bucket: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(object_store, "ATTEMPTS", 3)
    proxy.fault = lambda method: 503
    with pytest.raises(StorageError, match=r"/a.txt cannot be written: 3 attempts in .* failed"):
        write_text(located(f"{bucket}/a.txt"), "x")
    with pytest.raises(StorageError, match="the same command again"):
        located(f"{bucket}/a.txt").exists()


def test_a_store_that_refuses_is_not_asked_again(bucket: str, proxy: Proxy):
    proxy.fault = lambda method: 403
    with pytest.raises(StorageError, match=r"refuses .* AWS_ACCESS_KEY_ID"):
        located(f"{bucket}/a.txt").is_file()
    assert proxy.seen == ["HEAD"]


def test_a_store_that_answers_slowly_is_waited_for(bucket: str, proxy: Proxy):
    write_text(located(f"{bucket}/a.txt"), "slow")
    waits = [4.0]

    def fault(method: str) -> int:
        time.sleep(waits.pop() if waits else 0)
        return 0

    proxy.fault = fault
    assert located(f"{bucket}/a.txt").read_text() == "slow"


def test_an_object_that_is_replaced_while_it_is_read_is_read_again(
    bucket: str, proxy: Proxy, s3_server: str, tmp_path: Path
):
    write_text(located(f"{bucket}/a.txt"), "before")
    new = [b"behind"]

    def fault(method: str) -> int:
        if method == "GET" and new:
            client = boto3.client("s3", endpoint_url=s3_server)
            client.put_object(Bucket=bucket.removeprefix("s3://"), Key="a.txt", Body=new.pop())
        return 0

    proxy.fault = fault
    version = download(f"{bucket}/a.txt", tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "behind" and proxy.seen.count("GET") == 2
    assert version == version_of(f"{bucket}/a.txt")


UPLOAD = """
import sys
from pathlib import Path
from selfsup_ray.object_store import upload
upload(Path(sys.argv[1]), sys.argv[2])
"""


def test_a_writer_killed_in_the_middle_of_an_upload_leaves_no_object(
    bucket: str, proxy: Proxy, tmp_path: Path
):
    (tmp_path / "large").write_bytes(os.urandom(30_000_000))
    middle = threading.Event()

    def fault(method: str) -> int:
        if proxy.seen.count("PUT") >= 2:  # the second part
            middle.set()
            time.sleep(1)
        return 0

    proxy.fault = fault
    command = [sys.executable, "-c", UPLOAD, str(tmp_path / "large"), f"{bucket}/large"]
    writer = subprocess.Popen(command)
    assert middle.wait(120)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    proxy.fault = lambda method: 0
    time.sleep(1.5)
    assert version_of(f"{bucket}/large") is None


def test_a_store_counts_as_slow_by_the_mean_of_many_requests_and_is_said_so_now_and_then(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    now = [0.0]
    monkeypatch.setattr(object_store.time, "monotonic", lambda: now[0])
    pace = object_store.Pace()

    def said(seconds: float, requests: int) -> int:
        caplog.clear()
        for _ in range(requests):
            pace.note(seconds, "s3://bucket/x")
        return len(caplog.messages)

    with caplog.at_level(logging.WARNING):
        assert said(1.5, 1) + said(0.03, 24) == 0, "one request makes no slow store: mean 0.089"
        assert said(0.3, 24) == 0
        assert said(0.3, 1) == 1 and "25 small requests took 0.30 s each" in caplog.text
        assert said(0.3, 100) == 0, "it was said"
        now[0] = object_store.SAY_EVERY_S
        assert said(0.3, 25) == 1


def slow_experiment(folder: Path) -> Path:
    """Write an experiment of few files, all in this process."""
    write_shapes(folder / "photos", 24, size=16)
    here = {"workers": 0}
    small = {"epochs": 1, "batch_size": 12, "precision": "float32", "resources": here}
    values = {
        "out": str(folder / "runs" / "local"),
        "ingest": {"source": str(folder / "photos"), "image_size": 16, "resources": here},
        "pretext": {**small, "backbone": {"name": "resnet18", "stem": "stl", "width": 4}},
    }
    (folder / "few.yaml").write_text(yaml.safe_dump(values))
    return folder / "few.yaml"


def hashes(out: str) -> dict[str, str]:
    """Return the hashes of the arrays and weights below a run folder or its URL."""
    kept = (".arrow", ".npy", ".safetensors")
    if "://" in out:
        names = [e.name for e in located(out).entries(recursive=True)]  # type: ignore[attr-defined]
        files = {name: fetched(f"{out}/{name}") for name in names if name.endswith(kept)}
    else:
        below = [p for p in Path(out).rglob("*") if p.suffix in kept]
        files = {str(p.relative_to(out)): p for p in below}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_on_a_store_that_is_slow_and_drops_connections_ends_the_same_and_says_so(
    bucket: str,
    proxy: Proxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr(object_store, "_pace", object_store.Pace())
    path, out = slow_experiment(tmp_path), f"{bucket}/runs/x"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    run(path)
    count = itertools.count(1)

    def fault(method: str) -> int:
        time.sleep(0.15)
        rounds, rest = divmod(next(count), 20)
        return (DROPPED, LOST)[rounds % 2] if rest == 0 else 0

    proxy.fault = fault
    with caplog.at_level(logging.WARNING):
        run(path, {"out": out})
    proxy.fault = lambda method: 0
    assert next(count) > 100, "some 5 connections were dropped"
    assert "The object store is slow" in caplog.text
    local = hashes(str(tmp_path / "runs" / "local"))
    assert len(local) >= 2 and hashes(out) == local
