"""Says that the program was ended by force, which it cannot say itself.

Ray's C++ ends a program that loses its raylet in the midst of a call, the kernel one that takes
too much memory; neither lets Python speak. So a small process of its own waits beside the program.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

SENTENCE = (
    "selfsup-ray: This program was ended from outside: by Ray, because it lost a process of its "
    "own, by the kernel, because memory ran out, or by somebody's signal. Give the same command "
    "again: it goes on with what is missing.\n"
)
GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Sent to a whole group of processes; who waits does not end by them."""
_open = list[int]()
"""The end of the pipe that closes with this program; empty when nobody waits beside it."""


@contextmanager
def last_word() -> Iterator[None]:
    """Say SENTENCE on standard error when the program ends inside the block.

    Enter it before there are threads, and before large modules are loaded: the process that waits
    is a fork. A block that is left, in order or by an exception, speaks for itself.
    """
    reading, writing = os.pipe()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
    waiting = os.fork()
    if waiting == 0:
        os.close(writing)
        _wait_and_speak(reading)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    os.close(reading)
    _open.append(writing)
    try:
        yield
    finally:
        spoken()
        os.waitpid(waiting, 0)


def spoken() -> None:
    """Tell whoever waits beside this program that it has said why it ends."""
    while _open:
        writing = _open.pop()
        os.write(writing, b".")
        os.close(writing)


def _wait_and_speak(reading: int) -> NoReturn:
    try:
        if not os.read(reading, 1):
            os.write(2, SENTENCE.encode())
    finally:
        os._exit(0)
