"""The run folder: sharded arrays, whole-file writes, and stamps that say what a folder holds."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from selfsup_ray.config import by_place, flatten, parse_yaml, to_dict, unset_keys
from selfsup_ray.credentials import require_no_credentials
from selfsup_ray.errors import ArtifactError, UserError, unless_storage
from selfsup_ray.storage import Copies, StoredPath, located, names_in, publish_below, stored

Array = np.ndarray[Any, np.dtype[Any]]

# Keys of a stage's config that may stop a run or speed it up but never change its result: a
# folder may be continued with other values.
WITHOUT_EFFECT = ("resources", "max_bad_share")
FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a disk, or of a user's share of it, that has no room left."""
FULL_BELOW_BYTES = 1_000_000
"""Room below which a failed write is put down to a full disk: not every library says why."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes `path` when the block ends without error.

    The file is flushed to disk before the rename, so a file that exists is complete, even after
    a power cut. Two writers of the same file do not meet: the temporary name holds the process id.
    On an object store the block ends when the whole file is there. Raises ArtifactError when the
    disk is full, StorageError when the store does not take it.
    """
    here = path.scratch if isinstance(path, StoredPath) else path
    here.parent.mkdir(parents=True, exist_ok=True)
    temporary = here.with_name(f"{path.name}.{platform.node()}-{os.getpid()}.tmp")
    try:
        yield temporary
        if isinstance(path, StoredPath):
            stored(temporary, path)
            return
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:
        if not _is_full(error, here.parent):
            raise
        raise ArtifactError(full_disk(here)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _is_full(error: Exception, folder: Path) -> bool:
    if isinstance(error, UserError):
        return False
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FULL
    # safetensors gives the system's words only; torch and numpy not even those.
    said = os.strerror(errno.ENOSPC) in str(error)
    return said or shutil.disk_usage(folder).free < FULL_BELOW_BYTES


def full_disk(path: Path | str) -> str:
    """Return the sentence for a file that found no room."""
    return (
        f"{path} cannot be written: its disk is full. Free some space and give the same command "
        f"again, which goes on with what is missing, or choose another `out`."
    )


def create_mapped(path: Path, shape: tuple[int, ...], dtype: Any) -> np.memmap[Any, np.dtype[Any]]:
    """Return a new .npy file as a writable memory map, with its room on the disk taken at once.

    A sparse file would end the process by a signal when the disk fills up under a mapped page.
    Raises OSError when there is no room.
    """
    out: np.memmap[Any, np.dtype[Any]]
    out = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate") and out.nbytes:
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    return out


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Return the value in a JSON file.

    Raises ArtifactError when the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        unless_storage(error)
        raise ArtifactError(
            f"{path} cannot be read ({error}). Run the stage that makes it again."
        ) from None


class ShardedArray:
    """An (N, …) array in a folder of 00000.npy, 00001.npy …, cut at the corpus's rows.

    `shard_rows[i]` rows are in shard i; a shard file that exists is complete. float16 is a way to
    store: `rows` and the whole array come as float32, only `shard` as the file has them.
    """

    MANIFEST = "array.json"

    def __init__(
        self, path: Path, shard_rows: Sequence[int], row_shape: tuple[int, ...], dtype: str
    ):
        self.path = path
        self.shard_rows = tuple(shard_rows)
        self.offsets = np.concatenate([[0], np.cumsum(self.shard_rows)]).astype(np.int64)
        self.dtype = np.dtype(dtype)
        self.read_dtype = np.dtype(np.float32) if self.dtype == np.float16 else self.dtype
        self.shape: tuple[int, ...] = (int(self.offsets[-1]), *row_shape)
        self._copies = Copies()

    @classmethod
    def create(
        cls, path: Path, *, shard_rows: Sequence[int], row_shape: tuple[int, ...], dtype: str
    ) -> ShardedArray:
        """Return an array whose shards are still to be written; an existing one is continued."""
        array = cls(located(path), shard_rows, row_shape, dtype)
        manifest = {"shard_rows": list(array.shard_rows), "row_shape": list(row_shape)}
        write_json(located(path) / cls.MANIFEST, manifest | {"dtype": array.dtype.name})
        return array

    @classmethod
    def open(cls, path: Path) -> ShardedArray:
        """Return the array stored in a folder."""
        manifest = read_json(located(path) / cls.MANIFEST)
        shape = tuple(manifest["row_shape"])
        return cls(located(path), manifest["shard_rows"], shape, manifest["dtype"])

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def num_shards(self) -> int:
        return len(self.shard_rows)

    def shard_path(self, i: int) -> Path:
        """Return the file of shard i."""
        return self.path / f"{i:05d}.npy"

    def is_written(self, i: int) -> bool:
        """Return whether shard i is complete."""
        return self.shard_path(i).exists()

    def unwritten(self) -> list[int]:
        """Return the shards that are still to be written, found by one listing."""
        there = names_in(self.path)
        return [i for i in range(self.num_shards) if self.shard_path(i).name not in there]

    def write_shard(self, i: int, rows: Array) -> None:
        """Write shard i whole or not at all."""
        expected = (self.shard_rows[i], *self.shape[1:])
        assert rows.shape == expected, f"shard {i} of {self.path}: {rows.shape}, want {expected}"
        with whole_file(self.shard_path(i)) as temporary, open(temporary, "wb") as file:
            np.save(file, np.ascontiguousarray(rows, dtype=self.dtype))

    def shard(self, i: int) -> Array:
        """Return shard i as a read-only memory map.

        Raises ArtifactError when it has not been written, or cannot be read.
        """
        path = self.shard_path(i)
        try:
            file = self._copies.of(path)
            if 0 in (self.shard_rows[i], *self.shape[1:]):  # nothing to map
                return np.load(file)  # type: ignore[no-any-return]
            return np.load(file, mmap_mode="r")  # type: ignore[no-any-return]
        except FileNotFoundError:
            raise ArtifactError(f"{path} is missing. Run the stage that writes it again.") from None
        except (OSError, ValueError, EOFError) as error:
            unless_storage(error)
            raise ArtifactError(
                f"{path} cannot be read as numbers ({' '.join(str(error).split())}). Delete it and "
                f"the done.json of its stage; the same command then makes this shard again."
            ) from None

    def rows(self, ids: Array) -> Array:
        """Return the rows of these global ids, in their order, as a new array."""
        ids = np.asarray(ids, dtype=np.int64)
        inside = len(ids) == 0 or (ids.min() >= 0 and ids.max() < len(self))
        assert inside, f"{self.path}: ids must lie in [0, {len(self)}), got up to {ids.max()}"
        out = np.empty((len(ids), *self.shape[1:]), dtype=self.read_dtype)
        owner = np.searchsorted(self.offsets, ids, side="right") - 1
        for i in np.unique(owner):
            here = np.flatnonzero(owner == i)
            out[here] = self.shard(int(i))[ids[here] - self.offsets[i]]
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        whole = np.concatenate([self.shard(i) for i in range(self.num_shards)])
        return whole.astype(self.read_dtype if dtype is None else dtype, copy=False)


def fingerprint(config: Any, inputs: Mapping[str, str]) -> str:
    """Return a hash of what decides a result: the config less WITHOUT_EFFECT, and the inputs."""
    text = json.dumps([_deciding(config), dict(sorted(inputs.items()))], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _deciding(config: Any) -> dict[str, Any]:
    values = to_dict(config)
    return {key: item for key, item in values.items() if key not in WITHOUT_EFFECT}


@dataclasses.dataclass(frozen=True)
class Done:
    """A finished stage's stamp: fingerprint of config and inputs, seconds spent, and facts."""

    stage: str
    fingerprint: str
    seconds: float
    facts: dict[str, Any]


def begin(out: Path, *, stage: str, config: Any, inputs: Mapping[str, str]) -> bool:
    """Return True when `out` already holds this stage's result; else claim the folder for it.

    inputs: fingerprint of each artifact the stage reads, by name. The resolved config is written
    to `out/config.yaml` before any work, so that an unfinished folder is protected too.
    Raises ArtifactError naming the first differing value when the folder was made otherwise.
    """
    wanted = {"stage": stage, "config": to_dict(config), "inputs": dict(inputs)}
    require_no_credentials(wanted["config"], key=stage)
    path = out / "config.yaml"
    if not path.exists():
        write_text(path, yaml.safe_dump(wanted, sort_keys=False))
        write_json(out / "versions.json", versions())
        return False
    require_same(out, wanted, read_claim(path), unset=unset_keys(config))
    return (out / "done.json").exists()


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a stage's folder is, and the fingerprints of the inputs it was begun with."""

    state: Literal["absent", "unfinished", "finished"]
    inputs: dict[str, str]


def progress(out: Path, *, stage: str, config: Any) -> Progress:
    """Return how far `out` is, without touching it: what `begin` would find, for planning.

    Raises ArtifactError naming both values when the folder was made with another config.
    """
    path = out / "config.yaml"
    if not path.exists():
        return Progress("absent", {})
    stored = read_claim(path)
    wanted = {"stage": stage, "config": to_dict(config), "inputs": stored["inputs"]}
    require_same(out, wanted, stored, unset=unset_keys(config))
    return Progress("finished" if (out / "done.json").exists() else "unfinished", stored["inputs"])


def require_same(
    out: Path,
    wanted: Mapping[str, Any],
    stored: Mapping[str, Any],
    *,
    unset: frozenset[str] = frozenset(),
) -> None:
    """Raise ArtifactError unless the folder was made with this stage, config and inputs.

    unset: keys of the config at their default: a folder older than such a key was made so.
    """
    asked, has = flatten(_comparable(wanted)), flatten(_comparable(stored))
    for key in sorted(asked.keys() | has.keys()):
        new, old = asked.get(key, "nothing"), has.get(key, "nothing")
        if new == old or (key not in has and key.removeprefix("config.") in unset):
            continue
        if key.startswith("inputs."):
            what = f"another {key.removeprefix('inputs.')} ({str(old)[:12]}, now {str(new)[:12]})"
            raise ArtifactError(
                f"{out} was built from {what}. "
                f"Choose another `out`, or delete the folder to rebuild it."
            )
        name = f"{wanted['stage']}.{key.removeprefix('config.')}"
        raise ArtifactError(
            f"{out} was built with {name}={old!r}, but this run asks for {new!r}. "
            f"Choose another `out`, or delete the folder to rebuild it."
        )


def _comparable(described: Mapping[str, Any]) -> dict[str, Any]:
    config = {k: by_place(v) for k, v in described["config"].items() if k not in WITHOUT_EFFECT}
    return {"stage": described["stage"], "config": config, "inputs": described["inputs"]}


def finish(
    out: Path,
    *,
    stage: str,
    config: Any,
    inputs: Mapping[str, str],
    seconds: float,
    facts: Mapping[str, Any] | None = None,
) -> Done:
    """Write `out/done.json`, the last file of a stage, and return the stamp."""
    publish_below(out)
    done = Done(stage, fingerprint(config, inputs), round(seconds, 3), dict(facts or {}))
    write_json(out / "done.json", dataclasses.asdict(done) | {"time": time.time()})
    return done


def read_done(out: Path) -> Done:
    """Return the stamp of a finished stage.

    Raises ArtifactError when the stage has not finished.
    """
    path = located(out) / "done.json"
    if not path.exists():
        raise ArtifactError(f"{out} holds no finished stage. Run the stage that makes it first.")
    values = read_json(path)
    return Done(**{key: values[key] for key in ("stage", "fingerprint", "seconds", "facts")})


def read_config(out: Path) -> dict[str, Any]:
    """Return the resolved config a stage folder was made with, as plain values."""
    path = located(out) / "config.yaml"
    if not path.exists():
        raise ArtifactError(f"{out} is not the folder of a stage: it has no config.yaml.")
    return dict(read_claim(path)["config"])


def read_claim(path: Path) -> dict[str, Any]:
    """Return the stage, config and inputs in a stage's config.yaml, read with the safe loader.

    Raises ArtifactError when it holds anything but plain values.
    """
    try:
        stored = parse_yaml(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        unless_storage(error)
        reason = " ".join(str(error).split())
        raise ArtifactError(
            f"{path} cannot be read as plain YAML ({reason}). Delete the folder to rebuild it."
        ) from None
    if not isinstance(stored, dict) or not {"stage", "config", "inputs"} <= stored.keys():
        raise ArtifactError(
            f"{path} is not the config.yaml of a stage. Delete the folder to rebuild it."
        )
    return stored


def require_disk(path: Path, *, size_bytes: int) -> None:
    """Raise ArtifactError unless the disk that holds `path` has room for `size_bytes`.

    An object store has room; what a node keeps of it is bounded by its cache.
    """
    if isinstance(path, StoredPath):
        return
    folder = next(p for p in [path, *path.resolve().parents] if p.exists())
    free = shutil.disk_usage(folder).free
    if free < size_bytes:
        raise ArtifactError(
            f"{path} needs about {size_bytes / 1e9:.1f} GB, but the disk has {free / 1e9:.1f} GB "
            f"free. Free some space, or choose another `out`."
        )


def versions() -> dict[str, str]:
    """Return the versions of what a result depends on."""
    packages = ("selfsup-ray", "torch", "torchvision", "numpy", "ray", "faiss-gpu", "faiss-cpu")
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in packages:
        try:
            found[package] = version(package)
        except ModuleNotFoundError:  # importlib's PackageNotFoundError: not installed here
            continue
    return found
