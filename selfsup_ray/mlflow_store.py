"""The MLflow tracking store: where it is, a client of it, its database file and its experiment."""

from __future__ import annotations

import logging
import os
import sqlite3
import tempfile
import uuid
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from selfsup_ray.config import config
from selfsup_ray.credentials import require_no_credentials
from selfsup_ray.storage import local_beside

if TYPE_CHECKING:
    from mlflow import MlflowClient


@config
class TrackingConfig:
    """Where runs are recorded besides the run folder."""

    uri: str | None = None
    """MLflow tracking URI. None: $MLFLOW_TRACKING_URI, else mlflow.db beside the run folder."""
    experiment: str = "selfsup_ray"
    """MLflow experiment that the runs belong to."""


class Store(NamedTuple):
    """An MLflow tracking store and the experiment in it."""

    uri: str
    artifacts: str | None
    experiment: str
    given: str | None
    """The URI that was asked for; None stands for the store beside the run folder."""

    @classmethod
    def beside(cls, folder: Path, tracking: TrackingConfig) -> Store:
        """Return the configured store, or the sqlite file next to the run folder."""
        require_no_credentials(tracking.uri, key="tracking.uri")
        given = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or None
        if given:
            return cls(given, None, tracking.experiment, given)
        place = local_beside(folder.resolve().parent)  # sqlite: on this machine's disk
        artifacts = (place / "mlartifacts").as_uri()
        return cls(f"sqlite:///{place / 'mlflow.db'}", artifacts, tracking.experiment, None)


def connect(uri: str) -> MlflowClient:
    """Return a quiet MLflow client that gives up on a dead server within seconds."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # we try again ourselves
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    from mlflow import MlflowClient  # sets its loggers up, so their level comes after it

    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    make_database(uri)
    return MlflowClient(tracking_uri=uri)


def make_database(uri: str) -> None:
    """Make the file of an sqlite store unless it is there, whole or not at all.

    MLflow makes its tables in dozens of steps, and a file that a kill left between two of them it
    refuses ever after. So they are made elsewhere.
    """
    from mlflow import MlflowClient
    from sqlalchemy.engine import make_url

    place = make_url(uri).database if uri.startswith("sqlite:") else None
    if place is None or place == ":memory:" or os.path.exists(place):
        return
    path = Path(place)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "mlflow.db")
        MlflowClient(tracking_uri=f"sqlite:///{made}").search_experiments()
        with closing(sqlite3.connect(made)) as database:
            database.execute("VACUUM INTO ?", (str(whole),))
    with suppress(FileExistsError):  # another process was faster, and runs may be in its file
        os.link(whole, path)
    whole.unlink()


def experiment_id(client: MlflowClient, store: Store) -> str:
    """Return the id of the store's experiment, which is made if need be."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(store.experiment)
    if found is not None:
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(store.experiment, artifact_location=store.artifacts))
    except MlflowException:  # another trial made it in between
        found = client.get_experiment_by_name(store.experiment)
        if found is None:
            raise
        return str(found.experiment_id)
