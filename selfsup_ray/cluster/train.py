"""train: training.fit in Ray Train's workers, or in this process when workers is 0."""

from __future__ import annotations

import itertools
import logging
import shutil
import signal
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from selfsup_ray.cluster.failures import started_here
from selfsup_ray.cluster.records import Channel, channel_for, temporary_folder
from selfsup_ray.cluster.session import connect, require_resources
from selfsup_ray.cluster.stream import on_ray
from selfsup_ray.collectives import rank
from selfsup_ray.config import Resources
from selfsup_ray.errors import ConfigError, TrainingError, UserError
from selfsup_ray.memory import WORKER_ENVIRONMENT
from selfsup_ray.models.collapse import collapse_warning
from selfsup_ray.progress import Track, track
from selfsup_ray.resources import TrainResources
from selfsup_ray.storage import located
from selfsup_ray.tracking import Tracker
from selfsup_ray.training import Record, State, TrainJob, fit, load_state, on_any_rank, save_state

if TYPE_CHECKING:
    from ray.train import ControllerError, ScalingConfig

    from selfsup_ray.cluster.trainer import Trainer

log = logging.getLogger(__name__)

POLL_S = 0.5
"""Seconds between two looks at the records that the workers have written."""

REPORT_EVERY_S = 10.0
"""Seconds between two reports of predictions to Ray Train."""

RESIZE_CHECK_S = 30.0
"""Seconds between two looks whether there is room for more workers."""


def train(
    job: TrainJob, *, out: Path, tracker: Tracker, address: str | None = None, label: str = "train"
) -> State:
    """Train a job to its end and return its state; continue from `out/checkpoint.pt`.

    Every checkpoint replaces that file, so the same call goes on after a worker, the driver or
    the machine was killed, and ends with the same weights. `out` must be seen by all workers: on a
    disk they share, or on an object store. Records go from rank 0 to this process, which alone
    talks to the tracker.
    Raises what `fit` raises, and ResourceError at once when Ray cannot place the workers.
    """
    out = located(out).resolve()
    state = load_state(out / "checkpoint.pt")
    with Live(job, tracker, label) as live:
        if state is not None:
            # A kill may have come before they were logged.
            live.take(state["history"], earlier=True)
        if job.config.resources.workers == 0:
            return _fit_here(job, out, state, live)
        connect(address)
        require_resources(job.config.resources, stage=label)
        _fit_on_ray(job, out, live)
        final = load_state(out / "checkpoint.pt")
        assert final is not None, f"{out} has no checkpoint after a finished training"
        live.take(final["history"])  # if a node took its last records along
    return final


class Live:
    """Takes records in this process: into the tracker and onto the progress bar, each once."""

    def __init__(self, job: TrainJob, tracker: Tracker, label: str) -> None:
        self.job, self.tracker, self.label = job, tracker, label
        self.step = 0
        self._bar: Track | None = None
        self._predictions: Track | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def take(self, records: list[Record], *, earlier: bool = False) -> None:
        """Log new records; steps that were taken before are left out.

        earlier: a run before this one made the steps, so they are not part of the rate.
        """
        new = [record for record in records if record.get("step", 0) > self.step]
        if new:
            self._trained(new, earlier=earlier)
        for record in records:
            if "done" in record:
                self._predicted(int(record["done"]), of=int(record["of"]))

    def _trained(self, new: list[Record], *, earlier: bool) -> None:
        self.tracker.log(new)
        for record in new:
            if "collapsed" in record:
                log.warning("%s: %s", self.label, collapse_warning(record))
        size, last, start = self.job.config.batch_size, new[-1], self.step
        if self._bar is None:
            steps = round(self.job.config.epochs * last["step"] / last["epoch"])
            self._bar = self._stack.enter_context(track(self.label, steps * size, "images"))
            start = start or int(new[0]["step"])  # made with the first record, the bar begins there
            self._bar.skip(start * size)
        note = f"epoch {last['epoch']:.1f}, loss {last['loss']:.4g}, lr {last['lr']:.3g}"
        images = int(last["step"] - start) * size
        if earlier:
            self._bar.skip(images)
        self._bar.advance(0 if earlier else images, note)
        self.step = int(last["step"])

    def _predicted(self, done: int, *, of: int) -> None:
        """Show how many images are predicted; at first those of earlier runs."""
        if self._predictions is None:
            self._stack.close()  # the training is at its end
            bar = track(f"{self.label}: predict", of, "images")
            self._predictions, self._bar = self._stack.enter_context(bar), None
            self._predictions.skip(done)
        self._predictions.advance(done - self._predictions.done)


def _fit_here(job: TrainJob, out: Path, state: State | None, live: Live) -> State:
    with threads(job.config.resources):
        objective, dataset, make_views = job.built()
        final = fit(
            objective,
            dataset,
            make_views,
            job.config,
            device=job.device,
            state=state,
            on_checkpoint=partial(save_state, out / "checkpoint.pt"),
            on_log=lambda record: live.take([record]),
        )
        for record in job.predict(objective) if job.predict else ():
            live.take([record])
    return final


@contextmanager
def threads(resources: Resources) -> Iterator[None]:
    """Give torch as many threads as a worker has CPUs: the order of sums depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, int(resources.cpus)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fit_on_ray(job: TrainJob, out: Path, live: Live) -> None:
    """Run `_worker` on every rank, again when workers are lost where Ray Train does not go on."""
    from ray.train import ControllerError

    folder, records = temporary_folder(out), channel_for(out)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with followed(records, live.take), interruptible():
        for failures in itertools.count(1):
            try:
                outcome = _outcome(_trainer(job, out, folder, records).fit)
                break
            except ControllerError as error:
                if not _was_lost_at_the_start(error) or failures > job.config.max_failures:
                    raise
                log.warning("%s: a worker was lost while it started; starting again", live.label)
    shutil.rmtree(folder, ignore_errors=True)
    if outcome is None:  # Ray Train takes Ctrl-C itself and returns
        raise KeyboardInterrupt
    if "error" in outcome:
        raise {"ConfigError": ConfigError, "TrainingError": TrainingError}[outcome["error"]](
            outcome["message"]
        )


def _trainer(job: TrainJob, out: Path, folder: Path, records: Channel) -> Trainer:
    """Return a run of Ray's own, which is new each time and whose folder is temporary."""
    from ray.train import FailureConfig, RunConfig

    from selfsup_ray.cluster.notice import Notice
    from selfsup_ray.cluster.patience import Patience
    from selfsup_ray.cluster.process_group import ProcessGroup
    from selfsup_ray.cluster.trainer import Trainer

    run_config = RunConfig(
        name=f"{out.name}-{uuid.uuid4().hex[:12]}",  # a used name would resume that run
        storage_path=str(folder),
        failure_config=FailureConfig(max_failures=-1),  # Patience counts
        callbacks=[Patience(job.config.max_failures), Notice()],  # type: ignore[list-item]
        worker_runtime_env={"env_vars": _environment(job)},  # type: ignore[call-arg]
    )
    # Not as train_loop_config: the controller reads that, and would import torch for the job.
    body = partial(_worker, {"job": job, "out": str(out), "records": records})
    return Trainer(
        body,  # type: ignore[arg-type]  # its answer is result.return_value
        scaling_config=_scaling(job.config.resources),
        torch_config=ProcessGroup(job.config.resources.transport),  # type: ignore[arg-type]
        run_config=run_config,
    )


def _was_lost_at_the_start(error: ControllerError) -> bool:
    """Return whether Ray Train's controller itself met a dead actor.

    So it does when a worker dies between its start and that of its loop; it retries by itself the
    loss of a worker before and after.
    """
    from ray.exceptions import RayActorError

    return isinstance(error.controller_failure, RayActorError)


def _scaling(resources: TrainResources) -> ScalingConfig:
    """Return how many workers Ray Train starts, and where."""
    from ray.train import ScalingConfig

    asked = {"CPU": float(resources.cpus), "GPU": float(resources.gpus)}
    elastic = (resources.fewest, resources.workers)
    return ScalingConfig(
        num_workers=elastic if resources.is_elastic else resources.workers,  # type: ignore[arg-type]
        elastic_resize_monitor_interval_s=RESIZE_CHECK_S,  # type: ignore[call-arg]
        use_gpu=resources.gpus > 0,
        resources_per_worker={kind: amount for kind, amount in asked.items() if amount > 0},
        placement_strategy=resources.placement.upper(),
    )


def _environment(job: TrainJob) -> dict[str, str]:
    from selfsup_ray.cluster.ahead import IMPORTS_AT_START

    if job.device != "cpu":  # nothing may look for GPUs before Ray has said which are the worker's
        return {}
    return WORKER_ENVIRONMENT | (IMPORTS_AT_START if started_here() else {})


def _outcome(run: Callable[[], Any]) -> dict[str, str] | None:
    """Return what rank 0's `_worker` returned, None if it was interrupted.

    Raises a worker's UserError as itself, anything else as Ray Train's error.
    """
    from ray.train import TrainingFailedError

    from selfsup_ray.cluster.patience import worker_errors

    try:
        value: dict[str, str] | None = run().return_value
    except TrainingFailedError as error:
        for cause in worker_errors(error).values():
            if isinstance(cause, UserError):
                raise cause from error
        raise
    return value


def _worker(task: dict[str, Any]) -> dict[str, str]:
    """Body of one Ray Train worker: build here, continue if restarted, fit, predict."""
    from selfsup_ray.cluster.notice import is_told

    job, out = task["job"], located(task["out"])
    path, device = out / "checkpoint.pt", _device(job)
    with threads(job.config.resources):
        objective, dataset, make_views = job.built()
        try:
            fit(
                objective,
                on_ray(dataset),
                make_views,
                job.config,
                device=device,
                state=load_state(path),
                on_checkpoint=partial(_report, path),
                on_log=partial(_write_record, task["records"]),
                is_asked=is_told,
            )
            if job.predict is not None:
                _follow(job.predict(objective), task["records"], device)
        except (ConfigError, TrainingError) as error:
            # Raised by every rank alike, and again after a restart: so an answer, not a failure.
            return {"error": type(error).__name__, "message": str(error)}
        except Exception as error:
            error.add_note(traceback.format_exc())  # a note travels to the driver, a traceback not
            raise
    return {"finished": str(out)}


def _device(job: TrainJob) -> torch.device:
    """Return the device that Ray gave to this worker; a GPU becomes the current one."""
    if job.device == "cpu":
        return torch.device("cpu")
    from ray.train.torch import get_device

    device = get_device()
    assert isinstance(device, torch.device), "a worker has one device"
    torch.cuda.set_device(device)
    return device


def _report(path: Path, state: State) -> None:
    """Write the checkpoint on rank 0, then report from every rank, since that is a barrier.

    The file itself is what a restarted worker or driver continues from, so Ray gets no copy.
    """
    import ray.train

    from selfsup_ray.cluster import notice

    if rank() == 0:
        save_state(path, state)
    notice.saved()
    ray.train.report(state["history"][-1])


def _follow(predicted: Iterator[Record], records: Channel, device: torch.device) -> None:
    """Run predictions to their end; every rank calls it.

    A report now and then tells Ray Train's controller that things go on, so that it counts lost
    workers anew. Not each time: a report waits until the controller has seen the one before.
    """
    import ray.train

    from selfsup_ray.cluster import notice

    reported = time.monotonic()
    for record in predicted:
        is_due = on_any_rank(time.monotonic() - reported > REPORT_EVERY_S, device)
        _write_record(records, record)  # all ranks have done their part of it
        notice.saved()
        if is_due:
            ray.train.report(record)
            reported = time.monotonic()


def _write_record(records: Channel, record: Record) -> None:
    if rank() == 0:
        records.write(record)


@contextmanager
def followed(source: Channel, take: Callable[[list[Record]], None]) -> Iterator[None]:
    """Give the records that come through a channel to `take`, in a thread, while the block runs.

    An error of `take` is raised at the end of the block.
    """
    done, errors = threading.Event(), list[Exception]()

    def follow() -> None:
        place = 0
        while True:
            ending = done.wait(POLL_S)
            try:
                records, place = source.read_new(place)
                take(records)
            except Exception as error:
                errors.append(error)
                return
            if ending:
                return

    thread = threading.Thread(target=follow, name="records", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    if errors:
        raise errors[0]


@contextmanager
def interruptible() -> Iterator[None]:
    """Put Ctrl-C back as it was: Ray Train leaves a handler behind that ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        signal.signal(signal.SIGINT, before)
