"""Two runs of one experiment at once: the second is told, nothing is mixed."""

import os
import signal
import subprocess
import sys

import pytest

from selfsup_ray.errors import ArtifactError
from selfsup_ray.run_lock import alone

HOLDER = """
import sys, time
from pathlib import Path
from selfsup_ray.run_lock import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_is_refused_until_the_first_is_gone_even_by_sigkill(tmp_path):
    out = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, out], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ArtifactError, match=f"being written by process {holder.pid} on "):
            with alone(out):
                raise AssertionError("both run")
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.communicate()
    with alone(out):
        assert (out / ".running").exists()
    assert not (out / ".running").exists()


def test_the_lock_is_free_again_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), alone(tmp_path):
        _ = 1 / 0
    with alone(tmp_path):
        pass
