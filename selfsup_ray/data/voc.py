"""The image lists of Pascal VOC 2007: which images show which of 20 classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from selfsup_ray.artifacts import Array
from selfsup_ray.errors import ArtifactError

LISTS = Path("ImageSets") / "Main"


@dataclass(frozen=True)
class Lists:
    """One part of the data, e.g. trainval.

    names: of the images, without folder and extension. marks: (images, classes) int8, 1 where the
    image shows the class, -1 where not, 0 where only as an object that is marked difficult.
    """

    names: tuple[str, ...]
    classes: tuple[str, ...]
    marks: Array


def read_lists(folder: Path, part: str) -> Lists:
    """Return the lists `<class>_<part>.txt` of a VOC2007 folder.

    Raises ArtifactError when there are none, or when two disagree about the images.
    """
    files = sorted((folder / LISTS).glob(f"*_{part}.txt"))
    if not files:
        raise ArtifactError(
            f"{folder / LISTS} has no lists such as aeroplane_{part}.txt. Give the folder that "
            f"holds ImageSets and JPEGImages, e.g. VOCdevkit/VOC2007."
        )
    tables = [_read(file) for file in files]
    names = tuple(name for name, _ in tables[0])
    for file, table in zip(files, tables, strict=True):
        if tuple(name for name, _ in table) != names:
            raise ArtifactError(
                f"{file} lists other images than {files[0].name}. Unpack the archive again."
            )
    marks = np.array([[mark for _, mark in table] for table in tables], np.int8)
    classes = tuple(file.stem.removesuffix(f"_{part}") for file in files)
    return Lists(names, classes, marks.reshape(len(files), len(names)).T)


def _read(file: Path) -> list[tuple[str, int]]:
    """Return (image name, mark) of each line of a list."""
    found = []
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        words = line.split()
        if len(words) != 2 or words[1] not in ("1", "0", "-1"):
            raise ArtifactError(
                f"{file}, line {number}: expected an image name and 1, 0 or -1, got {line!r}. "
                f"Unpack the archive again."
            )
        found.append((words[0], int(words[1])))
    return found
