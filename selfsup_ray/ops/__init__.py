"""The mathematics: functions of arrays and plain numbers, without cluster, config or folders.

`selfsup_ray.ops.losses.nt_xent` and the like; a module is imported when it is first used.
"""

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name not in {module.name for module in iter_modules(__path__)}:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")
