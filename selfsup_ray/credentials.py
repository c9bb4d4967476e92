"""Credentials stay out of files and logs: refused in configs, masked in whatever is printed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from selfsup_ray.errors import ConfigError

_IN_URI = re.compile(r"(?<=://)[^/\s@]+@(?=[^/\s])")
_PASSWORD_IN_URI = re.compile(r"://[^/\s:@]*:[^/\s@]+@[^/\s]")
_NAMED = re.compile(
    r"((?:secret|password|passwd|session_token|access_key|auth_token)\w*\s*[=:]\s*)([^\s&,;'\"]+)",
    re.IGNORECASE,
)
_AWS_ID = re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b")


def masked(text: str) -> str:
    """Return a text with user names and passwords in URIs, and keys in options, as `***`."""
    text = _IN_URI.sub("***@", text)
    return _AWS_ID.sub("***", _NAMED.sub(r"\1***", text))


def require_no_credentials(values: Any, *, key: str = "") -> None:
    """Raise ConfigError naming the dotted key of a value that holds a password or a secret key.

    values: nested plain values. Configs are written to config.yaml and to MLflow as they are.
    """
    if isinstance(values, Mapping):
        for name, item in values.items():
            require_no_credentials(item, key=f"{key}.{name}" if key else str(name))
    elif isinstance(values, list | tuple):
        for item in values:
            require_no_credentials(item, key=key)
    elif isinstance(values, str) and _holds_secret(values):
        raise ConfigError(
            f"`{key}` holds a password or a secret key, and configs are written to the run folder "
            f"and to MLflow. Give {masked(values)} without it, and the credentials in the "
            f"environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_USERNAME "
            f"and MLFLOW_TRACKING_PASSWORD, or the whole address in MLFLOW_TRACKING_URI."
        )


def _holds_secret(text: str) -> bool:
    if _PASSWORD_IN_URI.search(text) or _AWS_ID.search(text):
        return True
    return "://" in text and _NAMED.search(text) is not None
