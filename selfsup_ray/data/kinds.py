"""Which of the files a source holds are meant to be images."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Callable

from selfsup_ray.data.formats import SUFFIX_FORMATS, signature

IMAGE_SUFFIXES = frozenset(SUFFIX_FORMATS) | {".heic", ".heif", ".jxl", ".svg"}
# What usually lies beside images; everything else of unknown suffix is looked into.
SIDE_SUFFIXES = frozenset(
    ".cls .csv .gz .h5 .html .json .jsonl .log .mat .md .npy .npz .parquet .pdf .pkl .pt .py "
    ".tar .tsv .txt .xml .yaml .yml .zip".split()
)
HEAD_BYTES = 16


# String functions, not pathlib: these run for every file of a source, and are ten times faster.


def suffix_of(name: str) -> str:
    """Return the lower-case suffix of a path, "" when it has none."""
    return posixpath.splitext(name)[1].lower()


def folder_of(name: str) -> str:
    """Return the folder of a path, "" for the top."""
    folder = posixpath.normpath(posixpath.dirname(name))
    return "" if folder == "." else folder


def is_hidden(name: str) -> bool:
    """Return whether a path has a part that systems hide: `.name`, or macOS's `__MACOSX`."""
    return "/." in f"/{name.removeprefix('./')}" or "__MACOSX" in name


def is_candidate(name: str, head: Callable[[], bytes], skipped: Counter[str]) -> bool:
    """Return whether a file is to be read as an image: by its suffix, else by its first bytes.

    head gives the first HEAD_BYTES and is called only for an unknown suffix. A file that is no
    candidate is counted in `skipped` by suffix.
    """
    suffix = suffix_of(name)
    if is_hidden(name):
        skipped["hidden"] += 1
        return False
    if suffix in IMAGE_SUFFIXES or (suffix not in SIDE_SUFFIXES and signature(head()) is not None):
        return True
    skipped[suffix or "no suffix"] += 1
    return False
