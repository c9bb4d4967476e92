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
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from selfsup_ray.errors import ClusterError, UserError

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
REFUSED_S = 3.0
"""How long nobody must listen on a living machine before a process counts as lost."""
SILENT_S = 30.0
"""The same for the GCS of a cluster, which may be restarted, and for a machine that is silent.
Less than the minute after which Ray ends the program."""
LEAVE_S = 20.0
"""Time for the program to end in order once Ray is lost; then it is ended."""
AGAIN = "Give the same command again: it goes on with what is missing."


class _Lost(BaseException):
    """Raised in the main thread by the watch; nothing between there and the session stops it."""


class Watch:
    """Looks every second whether the GCS and this machine's raylet still listen.

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
        return REFUSED_S if gone else SILENT_S

    def follow(self) -> None:
        """Look until the block is left or something is lost; then see that it is left."""
        while self.sentence is None:
            if self._left.wait(LOOK_EVERY_S):
                return
            self.look(seconds=LOOK_EVERY_S)
        signal.pthread_kill(self._main, signal.SIGUSR2)
        if not self._left.wait(LEAVE_S):  # Ray would end the program itself, without a word
            log.error("%s", self.sentence)
            os._exit(2)

    def is_lost(self) -> bool:
        """Return whether something is lost, now that a Ray call has failed."""
        for _ in range(int(REFUSED_S / LOOK_EVERY_S) + 1):
            if self.sentence is not None or not any(map(refusal, self.places.values())):
                break
            self._left.wait(LOOK_EVERY_S)
            self.look(seconds=LOOK_EVERY_S)
        return self.sentence is not None

    def leave(self) -> None:
        """Stop looking."""
        self._left.set()


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
    host, _, port = context.gcs_address.rpartition(":")
    found = {"GCS": (host.strip("[]"), int(port))}
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["NodeID"] == context.get_node_id():
            found["raylet"] = (node["NodeManagerAddress"], int(node["NodeManagerPort"]))
    return {name: place for name, place in found.items() if refusal(place) is None}


@contextmanager
def watched(*, local: bool) -> Iterator[None]:
    """Run a block on a connected Ray; what Ray cannot mend is raised as a ClusterError.

    local: Ray was started by this process. In the main thread a lost GCS or raylet ends the block;
    in another thread it is only told from what Ray raises.
    """
    watch = Watch(places_of_ray(), local=local)
    in_main = threading.current_thread() is threading.main_thread()
    before: Any = signal.signal(signal.SIGUSR2, _raise_lost) if in_main else None
    if in_main:
        threading.Thread(target=watch.follow, name="watch", daemon=True).start()
    try:
        yield
    except _Lost:
        raise ClusterError(str(watch.sentence)) from None
    except UserError:
        raise
    except Exception as error:
        if watch.is_lost():
            raise ClusterError(str(watch.sentence)) from error
        raise explained(error) from error
    finally:
        watch.leave()
        if in_main:
            signal.signal(signal.SIGUSR2, before)
        if watch.sentence is not None:
            abandon()


def _raise_lost(signum: int, frame: FrameType | None) -> NoReturn:
    raise _Lost


def abandon() -> None:
    """Leave a Ray that is lost as it is: its own shutdown would end the program, or wait."""
    import ray
    from ray._private import worker

    atexit.unregister(ray.shutdown)
    node = worker._global_node
    if node is not None:
        with suppress(Exception):  # whatever is left of a local Ray ends with this process, too
            node.kill_all_processes(check_alive=False, allow_graceful=False)


def explained(error: Exception) -> Exception:
    """Return an error as the user should see it: a UserError or OSError inside it, a ClusterError
    for what Ray gave up, itself when it is neither (a bug).
    """
    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, UserError | OSError) and not _is_ray(cause):
            return cause
    for cause in chain:
        sentence = _sentence(cause)
        if sentence is not None:
            return ClusterError(sentence)
    return error


def _is_ray(error: Exception) -> bool:
    from ray.exceptions import RayError

    return isinstance(error, RayError)


def _causes(error: BaseException | None) -> Iterator[Exception]:
    """Yield an error and those inside it, innermost first where Ray wraps them."""
    if not isinstance(error, Exception):
        return
    inside = [getattr(error, name, None) for name in ("cause", "controller_failure", "__cause__")]
    for cause in [*getattr(error, "worker_failures", {}).values(), *inside]:
        if cause is not error:
            yield from _causes(cause)
    yield error


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
