"""A program that is ended by force is spoken for, and one that ends by itself is not."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from selfsup_ray.last_word import SENTENCE


def started(body: str) -> subprocess.Popen[str]:
    """Start a program that runs `body` inside last_word; it says `ready` first."""
    code = "import os, signal, sys, time\nfrom selfsup_ray.last_word import last_word, spoken\n"
    code += "with last_word():\n    print('ready', flush=True)\n" + textwrap.indent(body, "    ")
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("os._exit(1)", 1),  # as Ray's C++ does
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("os.abort()", -signal.SIGABRT),
    ],
)
def test_an_end_by_force_is_said_once(body: str, code: int):
    program = started(body)
    _, errors = program.communicate(timeout=60)
    assert program.returncode == code
    assert errors == SENTENCE


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        ("pass", 0, ""),
        ("sys.exit(2)", 2, ""),
        ("raise ValueError('a bug')", 1, "a bug"),
        ("spoken(); spoken(); os._exit(2)", 2, ""),
    ],
)
def test_a_program_that_ends_by_itself_is_not_spoken_for(body: str, code: int, says: str):
    program = started(body)
    _, errors = program.communicate(timeout=60)
    assert program.returncode == code
    assert SENTENCE not in errors and says in errors and bool(says) == bool(errors)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_who_waits_outlives_a_signal_to_the_whole_group(number: signal.Signals):
    program = started("signal.signal(signal.SIGTERM, signal.SIG_DFL); time.sleep(60)")
    assert program.stdout is not None and program.stdout.readline() == "ready\n"
    os.killpg(program.pid, number)
    _, errors = program.communicate(timeout=60)
    if number is signal.SIGINT:  # Python's own way to end
        assert "KeyboardInterrupt" in errors and SENTENCE not in errors
    else:
        assert program.returncode == -number and errors == SENTENCE
