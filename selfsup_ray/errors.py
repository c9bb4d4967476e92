"""User mistakes: one sentence that says what, where, got and do; the command line exits with 2."""


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
