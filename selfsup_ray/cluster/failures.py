"""What Ray raises or does when it loses something, as one sentence and a clean end.

Ray repeats the work of lost workers by itself. What it cannot mend arrives as one of a dozen
exceptions, or not at all: without its GCS, Ray ends the program from C++ after a minute, without
its raylet perhaps at once. So both are watched while a session lasts.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from types import FrameType
from typing import Any, NoReturn

from selfsup_ray.errors import ClusterError, UserError
from selfsup_ray.last_word import spoken

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.2
"""Only a port without a process refuses, so the first refusal of a living machine counts; at the
next call that needs the raylet Ray would end the program itself."""
STARTING_S = 1.0
"""Between two looks at the processes of a Ray that starts."""
RAISED_S = 1.0
"""How long what Ray raised may come before the process it lost is gone."""
SILENT_S = 30.0
"""The same for the GCS of a cluster, which may be restarted, and for a machine that is silent.
Less than the minute after which Ray ends the program."""
LEAVE_S = 20.0
"""Time for the program to end in order once Ray is lost; then it is ended."""
EXIT_CODE = 2
"""Of a program whose Ray was lost: that of every UserError."""
AGAIN = "Give the same command again: it goes on with what is missing."


class _Lost(BaseException):
    """Raised in the main thread by the watch; nothing between there and the session stops it."""


class Watch:
    """Looks again and again whether the GCS and this machine's raylet still listen.

    When one is lost, `sentence` says so, and the block around which it was made is left by an
    exception in the main thread: a signal interrupts whatever Ray call it waits in.
    """

    def __init__(self, places: dict[str, tuple[str, int]], *, local: bool) -> None:
        """places: name of a process -> host and port. local: Ray was started by this process."""
        self.places, self.local = places, local
        self.failing = dict.fromkeys(places, 0.0)
        self.sentence: str | None = None
        self._left = threading.Event()
        self._main = threading.get_ident()

    def look(self, *, seconds: float) -> None:
        """Count `seconds` more for each process that does not answer; note the first lost one."""
        for name, place in self.places.items():
            error = refusal(place)
            self.failing[name] = self.failing[name] + seconds if error else 0.0
            if error and self.failing[name] >= self._patience(name, error):
                self.sentence = self.sentence or lost(name, place)

    def _patience(self, name: str, error: OSError) -> float:
        gone = isinstance(error, ConnectionRefusedError) and (self.local or name == "raylet")
        return 0.0 if gone else SILENT_S

    def follow(self) -> None:
        """Look until the block is left or something is lost; then see that it is left."""
        while self.sentence is None:
            if self._left.wait(LOOK_EVERY_S):
                return
            self.look(seconds=LOOK_EVERY_S)
        signal.pthread_kill(self._main, signal.SIGUSR2)
        if not self._left.wait(LEAVE_S):  # Ray would end the program itself, without a word
            log.error("%s", self.sentence)
            _leave()

    def is_lost(self) -> bool:
        """Return whether something is lost, now that a Ray call has failed."""
        for _ in range(int(RAISED_S / LOOK_EVERY_S) + 1):
            if self.sentence is not None or not any(map(refusal, self.places.values())):
                break
            time.sleep(LOOK_EVERY_S)
            self.look(seconds=LOOK_EVERY_S)
        return self.sentence is not None

    @contextmanager
    def following(self) -> Iterator[None]:
        """Look while the block runs; from the main thread it is interrupted when Ray is lost."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGUSR2, _raise_lost)
        threading.Thread(target=self.follow, name="watch", daemon=True).start()
        try:
            yield
        finally:
            self._left.set()
            signal.signal(signal.SIGUSR2, before)


def _raise_lost(signum: int, frame: FrameType | None) -> NoReturn:
    raise _Lost


def refusal(place: tuple[str, int]) -> OSError | None:
    """Return why nothing answers at a host and port; None when something does."""
    try:
        socket.create_connection(place, timeout=5).close()
    except OSError as error:
        return error
    return None


def lost(name: str, place: tuple[str, int]) -> str:
    """Return the sentence for a lost process of Ray."""
    where = f"{place[0]}:{place[1]}"
    if name == "raylet":
        return f"Ray on this machine was lost: its raylet at {where} no longer answers. {AGAIN}"
    return f"The head of Ray was lost: its GCS at {where} no longer answers. {AGAIN}"


def places_of_ray() -> dict[str, tuple[str, int]]:
    """Return where the GCS and this node's raylet listen, so far as they can be reached here."""
    import ray

    context = ray.get_runtime_context()
    return _places(context.gcs_address, context.get_node_id())


@lru_cache(maxsize=1)
def _places(gcs_address: str, node_id: str) -> dict[str, tuple[str, int]]:
    import ray

    host, _, port = gcs_address.rpartition(":")
    found = {"GCS": (host.strip("[]"), int(port))}
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["NodeID"] == node_id:
            found["raylet"] = (node["NodeManagerAddress"], int(node["NodeManagerPort"]))
    return {name: place for name, place in found.items() if refusal(place) is None}


def answers_still() -> bool:
    """Return whether Ray can be asked to end tasks and actors: lost, it would end the program."""
    return not any(map(refusal, places_of_ray().values()))


def end_actors(actors: Sequence[Any]) -> None:
    """End actors; when Ray is lost they end anyway."""
    import ray

    if answers_still():
        for actor in actors:
            ray.kill(actor)


@contextmanager
def supervised() -> Iterator[None]:
    """Run a block on a connected Ray, then disconnect; what Ray cannot mend is a ClusterError.

    In the main thread a lost GCS or raylet ends the block; in another thread it is only told from
    what Ray raises.
    """
    import ray

    watch = Watch(places_of_ray(), local=started_here())
    try:
        with watch.following():
            yield
    except _Lost:
        raise ClusterError(str(watch.sentence)) from None
    except UserError:
        raise
    except Exception as error:
        if watch.is_lost():
            raise ClusterError(str(watch.sentence)) from error
        found = explained(error)
        if found is error:
            raise
        raise found from error
    finally:
        if watch.sentence is None:
            ray.shutdown()
        else:
            abandon()


@contextmanager
def starting() -> Iterator[None]:
    """Run a block that starts a local Ray; end the program when a process of Ray dies on the way.

    ray.init would wait for it, and after a minute end the program from C++.
    """
    done = threading.Event()
    threading.Thread(target=_see_it_start, args=(done,), name="start", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _see_it_start(done: threading.Event) -> None:
    seen = set[str]()
    while not done.wait(STARTING_S):
        living = _living_children()
        seen |= living & {"gcs_server", "raylet"}
        for name in seen - living:
            if not done.is_set():
                log.error("Ray was lost while it started: its %s ended. %s", name, AGAIN)
                _leave()


def _living_children() -> set[str]:
    import psutil  # type: ignore[import-untyped]  # comes with ray

    names = set[str]()
    for child in psutil.Process().children():
        with suppress(psutil.Error):  # it ended just now
            if child.status() != psutil.STATUS_ZOMBIE:
                names.add(child.name())
    return names


def started_here() -> bool:
    """Return whether this process started the Ray that it is connected to."""
    from ray._private import worker

    node = worker._global_node
    return node is not None and bool(node.is_head())


def abandon() -> None:
    """Leave a Ray that is lost as it is: its own shutdown would end the program, or wait.

    So would, or crash, the end of the program itself, which is therefore cut short.
    """
    from ray._private import worker

    if started_here() and worker._global_node is not None:
        worker._global_node.kill_all_processes(check_alive=False, allow_graceful=False)
    atexit.register(_leave)  # before all that was registered earlier, by Ray too


def _leave() -> NoReturn:
    spoken()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_CODE)


def explained(error: Exception) -> Exception:
    """Return an error as the user should see it: what is inside Ray's wrapping, or itself.

    A UserError or OSError that a worker raised comes out; what Ray gave up is a ClusterError; an
    error that is neither is a bug and stays as it is.
    """
    chain = _chain(error)
    if not any(map(_is_rays, chain)):
        return error
    for cause in chain:
        if isinstance(cause, UserError | OSError) and not _is_rays(cause):
            return cause
    sentences = filter(None, map(_sentence, chain))
    return next(map(ClusterError, sentences), error)


def _is_rays(error: Exception) -> bool:
    return type(error).__module__.startswith("ray.")


def _chain(error: Exception) -> list[Exception]:
    """Return an error and all that are inside it, the outermost first."""
    found = [error]
    for outer in found:
        inside = [getattr(outer, name, None) for name in ("cause", "controller_failure")]
        inside += [*getattr(outer, "worker_failures", {}).values(), outer.__cause__]
        found += [e for e in inside if isinstance(e, Exception) and e not in found]
    return found


def _sentence(error: Exception) -> str | None:
    """Return what to tell of something that Ray lost or lacked; None for any other error."""
    from ray import exceptions as ray

    first = next(iter(str(error).splitlines()), "")[:200]
    match error:
        case ray.OutOfMemoryError():
            return (
                f"A node of Ray ran out of memory and its workers were killed again and again "
                f"({first}). Lower the stage's batch_size or resources.workers, or raise "
                f"resources.cpus, so that fewer workers share a node. {AGAIN}"
            )
        case ray.ObjectStoreFullError() | ray.OutOfDiskError():
            return (
                f"Ray's object store is full and the disk it spills to has no room ({first}). Free "
                f"some space below Ray's folder (/tmp/ray unless told otherwise). {AGAIN}"
            )
        case (
            ray.WorkerCrashedError()
            | ray.NodeDiedError()
            | ray.RayActorError()
            | ray.ObjectLostError()
            | ray.LocalRayletDiedError()
        ):
            return f"Ray lost more workers or nodes than it could replace ({first}). {AGAIN}"
        case ray.RuntimeEnvSetupError():
            return f"Ray could not set up a worker's environment ({first}). {AGAIN}"
    return None
