"""User mistakes: one sentence that says what, where, got and do; the command line exits with 2."""

from __future__ import annotations

import errno

STORAGE = frozenset(
    (
        *(errno.EIO, errno.EROFS, errno.ENODEV, errno.ENXIO, errno.ESTALE, errno.ETIMEDOUT),
        *(errno.ENOTCONN, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    )
)
"""Error numbers of a storage that fails or is away; the file itself may be as good as ever."""


class UserError(Exception):
    """A mistake the user can mend; printed in one line without a traceback."""


class ConfigError(UserError):
    """A config value is unknown, of the wrong type or out of range; names the dotted key."""


class ArtifactError(UserError):
    """A file or folder is missing, damaged or made for something else; names the path."""


class ResourceError(UserError):
    """More CPUs, GPUs, memory or disk were asked for than there are; names both amounts."""


class TrainingError(UserError):
    """A training diverged; names the step, the learning rate and the last finite loss."""


class StorageError(UserError):
    """An object store does not answer, refuses, or a copy finds no room; names the URL."""


class ClusterError(UserError):
    """Ray lost or lacks something that it could not replace; says what, and how to go on."""


def failed_storage(error: OSError) -> str:
    """Return the sentence for an error whose number is one of STORAGE."""
    return (
        f"{error.filename or 'A file'} could not be read or written ({error.strerror}): its "
        f"storage fails or is away. Mend or mount it and give the same command again, which goes "
        f"on with what is missing."
    )


def unless_storage(error: BaseException, *, but: int | None = None) -> None:
    """Raise an error again when it is the storage that fails: then the file is not damaged.

    but: an error number that is the file's own here.
    """
    if isinstance(error, OSError) and error.errno in STORAGE - {but}:
        raise error
