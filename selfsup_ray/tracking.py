"""Tracking: metrics.jsonl always, and the same numbers in MLflow, nothing lost or twice."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from selfsup_ray.artifacts import read_json, write_json
from selfsup_ray.config import flatten, to_dict
from selfsup_ray.credentials import masked
from selfsup_ray.interrupts import interrupts_held
from selfsup_ray.mlflow_store import Store, TrackingConfig, connect, experiment_id
from selfsup_ray.storage import AppendedFile, StoredPath, located

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]

UNSENT = "mlflow-unsent.json"
"""File in a folder whose run MLflow does not have whole; names the artifacts that it lacks."""
RETRY_AFTER_S = 300.0
"""Seconds until an unreachable MLflow is tried again."""
MAX_METRICS, MAX_PARAMS, MAX_KEY, MAX_PARAM = 1000, 100, 250, 6000  # MLflow's limits of one call


class Value(NamedTuple):
    """One number of one step, as MLflow stores it."""

    key: str
    step: int
    value: float
    time: float


class Tracker:
    """Records of one stage or experiment: `metrics.jsonl` in its folder, and an MLflow run.

    Made by `open_run`. As a context manager it finishes the run: FINISHED, FAILED after an
    exception, KILLED after an interrupt.
    """

    def __init__(self, folder: Path, remote: MLflowRun | None) -> None:
        self.folder, self.remote = folder, remote
        self.path = folder / "metrics.jsonl"
        self._file = AppendedFile(self.path)
        mend(self.path)
        earlier = read_records(self.path)
        self.values = [value for record in earlier for value in values_of(record)]
        self._seen = {(key, int(record["step"])) for record in earlier for key in record}
        if remote is not None:
            remote.sync(self.values)

    def log(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add records: numbers by name, and the `step` they belong to (0 without one).

        A name that already has a number at that step keeps it, so a resumed run may log again.
        """
        lines, fresh = [], list[Value]()
        for record in records:
            step, now = int(record.get("step", 0)), time.time()
            new = {k: v for k, v in record.items() if k != "step" and (k, step) not in self._seen}
            if not new:
                continue
            self._seen |= {(key, step) for key in new}
            lines.append(json.dumps({"step": step, "time": round(now, 3), **new}))
            fresh += values_of({"step": step, "time": now, **new})
        if not lines:
            return
        # The file first: what is only here is sent later.
        self._file.append("".join(line + "\n" for line in lines))
        self.values += fresh
        if self.remote is not None:
            self.remote.send(fresh, everything=self.values)

    def artifact(self, path: Path) -> None:
        """Add a file or folder to the MLflow run; its place in the run folder stays as it is."""
        if self.remote is not None:
            self.remote.add_artifact(path)

    def finish(self, status: Status = "FINISHED") -> None:
        """Close the MLflow run; what it could not take so far is sent once more."""
        self._file.publish()
        if self.remote is not None:
            self.remote.finish(status, everything=self.values)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if kind is None:
            return self.finish("FINISHED")
        return self.finish("FAILED" if issubclass(kind, Exception) else "KILLED")


def open_run(
    folder: Path,
    tracking: TrackingConfig | None = None,
    *,
    name: str,
    params: Any = None,
    parent: Tracker | None = None,
) -> Tracker:
    """Return the tracker of a run folder, continuing its MLflow run when it has one.

    tracking None: metrics.jsonl only. params: a config or nested mapping, logged as flat keys.
    parent: the experiment's tracker; the run is then nested in its run and in its store.
    MLflow that cannot be reached is warned about once and caught up with later.
    """
    folder = located(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if tracking is None:
        return Tracker(folder, None)
    above = parent.remote if parent is not None else None
    store = above.store if above else Store.beside(folder, tracking)
    remote = MLflowRun(folder, store, name=name, params=flat_params(params), parent=above)
    return Tracker(folder, remote)


class Opened(NamedTuple):
    """A run that MLflow knows and that is open."""

    client: MlflowClient
    run_id: str


class MLflowRun:
    """One MLflow run that belongs to a run folder; its ids live in the folder's mlflow.json.

    No method raises: an MLflow that fails must not end a training. The first failure is warned
    about, the numbers stay in metrics.jsonl, and `sync` brings them over when MLflow is back.
    """

    def __init__(
        self,
        folder: Path,
        store: Store,
        *,
        name: str,
        params: Mapping[str, str],
        parent: MLflowRun | None,
    ) -> None:
        self.ids, self.store, self.name = folder / "mlflow.json", store, name
        self.params, self.parent = dict(params), parent
        self.unsent = folder / UNSENT
        left = read_json(self.unsent)["artifacts"] if self.unsent.exists() else []
        self.artifacts = [path for path in map(located, left) if path.exists()]
        self._there = set[tuple[str, int]]()
        self._opened: Opened | None = None
        # The top one knows whether the server answers.
        self._top: MLflowRun = self if parent is None else parent._top
        self._retry_at = 0.0
        self._warned = self._behind = False

    def sync(self, everything: Sequence[Value]) -> None:
        """Send the values that MLflow does not have; opens or continues the run first."""
        self._try(lambda: self._push(everything))
        self._try(self._upload)

    def send(self, fresh: Sequence[Value], *, everything: Sequence[Value]) -> None:
        """Send new values, or all that are missing when earlier ones could not be sent."""
        if self._behind:
            self.sync(everything)
        else:
            self._try(lambda: self._push(fresh))

    def add_artifact(self, path: Path) -> None:
        """Upload a file or folder, now or at the next chance."""
        self.artifacts.append(path)
        self._try(self._upload)

    def finish(self, status: Status, *, everything: Sequence[Value]) -> None:
        """Send what is missing and close the run, or note in the run folder what is left."""
        self._top._retry_at = 0.0
        if self._behind:
            self.sync(everything)
        self._try(lambda: self._close(status))
        if self._behind:
            write_json(self.unsent, {"artifacts": [str(path.resolve()) for path in self.artifacts]})
        else:
            self.unsent.unlink(missing_ok=True)

    def _try(self, action: Callable[[], object]) -> None:
        if time.monotonic() < self._top._retry_at:
            self._behind = True
            return
        try:
            with interrupts_held():  # a transaction cut in two would leave the database locked
                action()
            self._behind = bool(self.artifacts)
        except Exception as error:  # whatever a tracking server does, the training goes on
            self._behind, self._top._retry_at = True, time.monotonic() + RETRY_AFTER_S
            if not self._top._warned:
                self._top._warned = True
                log.warning(
                    "MLflow at %s cannot be reached (%s). The run goes on; its numbers are in "
                    "%s and will be sent when MLflow is back or the run is started again.",
                    masked(self.store.uri),
                    masked(" ".join(str(error).split()))[:200],
                    self._top.ids.with_name("metrics.jsonl"),
                )

    def _push(self, values: Sequence[Value]) -> None:
        from mlflow.entities import Metric

        client, run_id = self.open()
        missing = [value for value in values if (value.key, value.step) not in self._there]
        for i in range(0, len(missing), MAX_METRICS):
            some = missing[i : i + MAX_METRICS]
            metrics = [Metric(v.key, v.value, int(v.time * 1000), v.step) for v in some]
            client.log_batch(run_id, metrics=metrics)
            self._there |= {(value.key, value.step) for value in some}

    def _upload(self) -> None:
        client, run_id = self.open()
        while self.artifacts:
            path = self.artifacts[0]
            put = client.log_artifacts if path.is_dir() else client.log_artifact
            put(run_id, os.fspath(path))
            self.artifacts.pop(0)

    def _close(self, status: Status) -> None:
        client, run_id = self.open()
        client.set_terminated(run_id, status)
        write_json(self.ids, {**read_json(self.ids), "status": status})

    def open(self) -> Opened:
        """Return client and run id; the first call continues or creates the run.

        Raises whatever MLflow raises.
        """
        if self._opened is None:
            client = connect(self.store.uri)
            experiment = experiment_id(client, self.store)
            run_id = self._continued(client, experiment) or self._created(client, experiment)
            self._opened = Opened(client, run_id)
        return self._opened

    def _continued(self, client: MlflowClient, experiment: str) -> str | None:
        ids = read_json(self.ids) if self.ids.exists() else {}
        if ids.get("uri") != self._known_as or "key" not in ids:
            return None
        same = f"tags.`selfsup_ray.key` = '{ids['key']}'"  # found even if its id was never stored
        runs = client.search_runs([experiment], filter_string=same, max_results=1)
        if not runs:
            return None
        run_id = str(runs[0].info.run_id)
        client.update_run(run_id, status="RUNNING")
        self._log_params(client, run_id, known=runs[0].data.params)
        for key in runs[0].data.metrics:
            self._there |= {(key, m.step) for m in client.get_metric_history(run_id, key)}
        self._remember(ids["key"], experiment, run_id)
        return run_id

    @property
    def _known_as(self) -> str | None:
        """The store as the run folder may name it: without a password."""
        return None if self.store.given is None else masked(self.store.given)

    def _created(self, client: MlflowClient, experiment: str) -> str:
        key = uuid.uuid4().hex
        self._remember(key, experiment, None)  # before the run: a kill in between leaves its key
        tags = {"selfsup_ray.key": key}
        if self.parent is not None:
            tags["mlflow.parentRunId"] = self.parent.open().run_id
        run_id = str(client.create_run(experiment, run_name=self.name, tags=tags).info.run_id)
        self._log_params(client, run_id, known={})
        self._remember(key, experiment, run_id)
        return run_id

    def _remember(self, key: str, experiment: str, run_id: str | None) -> None:
        ids = {"uri": self._known_as, "experiment_id": experiment, "run_id": run_id, "key": key}
        write_json(self.ids, ids)

    def _log_params(self, client: MlflowClient, run_id: str, *, known: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        # MLflow refuses another value for a parameter; `resources` may differ after a restart.
        new = [Param(key, value) for key, value in self.params.items() if key not in known]
        for i in range(0, len(new), MAX_PARAMS):
            client.log_batch(run_id, params=new[i : i + MAX_PARAMS])


def is_recorded(folder: Path) -> bool:
    """Return whether the MLflow run of a run folder is FINISHED and has all that is its."""
    ids = folder / "mlflow.json"
    ended = read_json(ids).get("status") if ids.exists() else None
    return ended == "FINISHED" and not (folder / UNSENT).exists()


def flat_params(params: Any) -> dict[str, str]:
    """Return a config as MLflow parameters: dotted keys, values cut to MLflow's limit."""
    flat = flatten(to_dict(params)) if params is not None else {}
    return {clean(key): str(value)[:MAX_PARAM] for key, value in flat.items()}


def clean(key: str) -> str:
    """Return a name with the characters and length that MLflow allows."""
    return re.sub(r"[^\w\-. :/]", "_", key)[:MAX_KEY]


def values_of(record: Mapping[str, Any]) -> list[Value]:
    """Return the finite numbers of one record."""
    step, when = int(record.get("step", 0)), float(record.get("time", 0.0))
    numbers = [(k, float(v)) for k, v in record.items() if isinstance(v, int | float)]
    finite = [(k, v) for k, v in numbers if math.isfinite(v) and k not in ("step", "time")]
    return [Value(clean(key), step, value, when) for key, value in finite]


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl, oldest first; none when there is no file.

    A last line that a kill cut short is left out.
    """
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def mend(path: Path) -> None:
    """Cut off the last line of a metrics.jsonl if a kill left it unfinished."""
    if path.exists() and not isinstance(path, StoredPath):  # an object is whole
        whole = path.read_bytes().rfind(b"\n") + 1
        if whole < path.stat().st_size:
            os.truncate(path, whole)
