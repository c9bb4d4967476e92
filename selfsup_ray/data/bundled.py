"""The small corpus that ships with the package, for a first run without network or data."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from selfsup_ray.errors import ConfigError

PREFIX = "bundled:"
BUNDLED = {"fashion-mnist": "fashion_mnist.parquet"}


def bundled_path(source: str) -> Path:
    """Return the Parquet file behind a source like `bundled:fashion-mnist`.

    Raises ConfigError naming the corpora there are.
    """
    name = source.removeprefix(PREFIX)
    if name not in BUNDLED:
        known = ", ".join(f"{PREFIX}{known}" for known in BUNDLED)
        raise ConfigError(f"No corpus `{source}` ships with this package. There is: {known}.")
    return Path(str(files("selfsup_ray.data"))) / BUNDLED[name]
