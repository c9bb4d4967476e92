"""Labels: from folders, from a column, or from a CSV that covers only a few images; or none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import pyarrow.compute as pc

from selfsup_ray.data.listing import Item, Listing
from selfsup_ray.data.tables import Columns, csv_rows, label_text
from selfsup_ray.errors import ArtifactError

Labels = Literal["found", "folder", "column", "none"]
MAX_LABEL = 1_000_000


@dataclass(frozen=True)
class LabelTable:
    """How the items of a listing become labels 0..C-1, with one name per class.

    kind `folder`: the class is the path component at `depth`; `column`: the item's label text.
    """

    kind: Literal["none", "folder", "column"]
    ids: dict[str, int]
    class_names: list[str] | None
    depth: int = 0

    def label_of(self, item: Item) -> int:
        """Return the label of an item, -1 when it has none."""
        if self.kind == "none":
            return -1
        text = item.label
        if self.kind == "folder":
            parts = PurePosixPath(item.folder).parts
            text = parts[self.depth] if len(parts) > self.depth else None
        return -1 if text is None else self.ids[text]

    def to_json(self) -> dict[str, Any]:
        """Return plain values that `LabelTable(**values)` reads back."""
        return asdict(self)


NO_LABELS = LabelTable("none", {}, None)


def label_table(listing: Listing, labels: Labels) -> LabelTable:
    """Return the classes of a whole listing; see IngestConfig.labels for what each choice means.

    Raises ArtifactError when labels are asked for that the source does not have.
    """
    if labels == "none":
        return NO_LABELS
    names = _class_names(listing) if labels in ("found", "column") else {}
    if names:
        return _column_table(names)
    if labels == "column":
        raise ArtifactError(
            "labels is `column`, but no image has one. Name it with label_column, "
            "or choose labels: folder, found or none."
        )
    return _folder_table(listing, explicit=labels == "folder")


def _class_names(listing: Listing) -> dict[str, str]:
    """Return every label text with the best name there is for it."""
    names: dict[str, str] = {}
    for table in listing.columns(["label", "class_name"]):
        seen = table.filter(pc.is_valid(table.column("label"))).group_by(["label", "class_name"])
        for row in seen.aggregate([]).to_pylist():
            name = row["class_name"] or names.get(row["label"], row["label"])
            names[row["label"]] = name
    return names


def _column_table(names: dict[str, str]) -> LabelTable:
    """Return whole numbers as they are, other texts by their rank."""
    if not all(text.isascii() and text.isdigit() for text in names):
        order = sorted(names)
        return LabelTable("column", _ranks(order), [names[text] for text in order])
    largest = max(map(int, names))
    if largest > MAX_LABEL:
        raise ArtifactError(
            f"A label is {largest}; whole-number labels may be at most {MAX_LABEL}. "
            f"Give names instead, or numbers from 0."
        )
    by_number = {int(text): name for text, name in names.items()}
    class_names = [by_number.get(i, str(i)) for i in range(largest + 1)]
    return LabelTable("column", {text: int(text) for text in names}, class_names)


def _folder_table(listing: Listing, *, explicit: bool) -> LabelTable:
    """Return classes by the first folder in which images differ.

    Unless asked for (`explicit`), only a layout of one folder per class counts: every image
    exactly one folder below the common one, and at least two such folders.
    """
    common: tuple[str, ...] | None = None
    for folder in _folders(listing):
        parts = PurePosixPath(folder).parts
        common = parts if common is None else _shared(common, parts)
    depth = len(common or ())
    if explicit and depth and all(len(PurePosixPath(f).parts) == depth for f in _folders(listing)):
        depth -= 1  # all images in one folder: one class
    classes: set[str] = set()
    for folder in _folders(listing):
        parts = PurePosixPath(folder).parts
        if not explicit and len(parts) != depth + 1:
            return NO_LABELS
        classes.update(parts[depth : depth + 1])
    if explicit and not classes:
        raise ArtifactError("labels is `folder`, but all images lie at the top of the source.")
    if not explicit and len(classes) < 2:
        return NO_LABELS
    numeric = all(name.isascii() and name.isdigit() for name in classes)
    order = sorted(classes, key=lambda name: (int(name) if numeric else 0, name))
    return LabelTable("folder", _ranks(order), order, depth)


def _folders(listing: Listing) -> Iterator[str]:
    for table in listing.columns(["folder"]):
        yield from pc.unique(table.column("folder")).to_pylist()


def _shared(a: tuple[str, ...], b: tuple[str, ...]) -> tuple[str, ...]:
    same = 0
    while same < min(len(a), len(b)) and a[same] == b[same]:
        same += 1
    return a[:same]


def _ranks(order: list[str]) -> dict[str, int]:
    return {text: rank for rank, text in enumerate(order)}


# A CSV of labels beside the images.


class LabelFile:
    """Labels of a few images: a CSV whose paths are as long as it takes to name one image each.

    A path matches an image by its whole source path, by its path below the source, by its file
    name, or by its file name without suffix, in this order.
    """

    def __init__(self, path: Path, columns: Columns) -> None:
        self.path = path
        self.matched: Counter[str] = Counter()
        self.labels: dict[str, str] = {}
        for row in csv_rows(path, needs=(columns.path, columns.label)):
            label = label_text(row[columns.label])
            if label is not None:
                self.labels[row[columns.path].strip().removeprefix("./")] = label
        if not self.labels:
            raise ArtifactError(f"{path} holds no labels.")

    def applied(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield items with the labels of the file and no others.

        Raises ArtifactError at the end when a path named several images or none matched at all.
        """
        for item in items:
            key = next((name for name in _known_as(item) if name in self.labels), None)
            if key is not None:
                self.matched[key] += 1
            yield replace(item, label=None if key is None else self.labels[key], class_name=None)
        self._require_sound()

    @property
    def num_unmatched(self) -> int:
        """Rows of the file that name no image."""
        return len(self.labels) - len(self.matched)

    def _require_sound(self) -> None:
        twice = next((key for key, count in self.matched.items() if count > 1), None)
        if twice is not None:
            raise ArtifactError(
                f"{self.path}: `{twice}` names {self.matched[twice]} images. "
                f"Write more of the path, as it is below the source."
            )
        if not self.matched:
            example = next(iter(self.labels))
            raise ArtifactError(
                f"{self.path}: none of its {len(self.labels)} paths (such as `{example}`) "
                f"names an image of the source."
            )


def _known_as(item: Item) -> tuple[str, ...]:
    name = PurePosixPath(item.source).name
    below = f"{item.folder}/{name}" if item.folder else name
    return item.source, below, name, PurePosixPath(name).stem


# A subset of classes.


class Subset:
    """The classes to keep: a file with one line per class, `id description`, as SCAN's subsets.

    The id is a folder name, a label or a class name; labels are the ranks of the sorted ids.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            lines = [line.split(maxsplit=1) for line in path.read_text().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ArtifactError(f"{path} cannot be read ({error}).") from None
        self.names = {
            line[0]: line[1] if line[1:] else line[0] for line in sorted(filter(None, lines))
        }
        if not self.names:
            raise ArtifactError(f"{path} names no classes; it needs one line per class.")
        self.found: set[str] = set()

    def applied(self, items: Iterable[Item], skipped: Counter[str]) -> Iterator[Item]:
        """Yield the items of these classes, labelled by class id; count the others in `skipped`.

        Raises ArtifactError at the end when a class has no image.
        """
        for item in items:
            known = (item.label, item.class_name, *PurePosixPath(item.folder).parts)
            key = next((name for name in known if name in self.names), None)
            if key is None:
                skipped["other classes"] += 1
                continue
            self.found.add(key)
            yield replace(item, label=key, class_name=self.names[key])
        missing = sorted(self.names.keys() - self.found)
        if missing:
            shown = ", ".join(missing[:3]) + (" …" if missing[3:] else "")
            raise ArtifactError(
                f"{self.path} names {len(missing)} classes that the source does not have: {shown}."
            )
