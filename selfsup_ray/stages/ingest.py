"""The stage `ingest`: images from anywhere become a Corpus; every file is kept or accounted for."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from selfsup_ray.artifacts import begin, finish, read_json, require_disk, write_json
from selfsup_ray.cluster.data import stream_tasks
from selfsup_ray.config import Positive, Resources, Share, config, override
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.data.decode import Fit
from selfsup_ray.data.duplicates import write_duplicates
from selfsup_ray.data.images import MAX_PIXELS
from selfsup_ray.data.labels import LabelFile, Labels, LabelTable, Subset, label_table
from selfsup_ray.data.listing import Item, Listing, write_listing
from selfsup_ray.data.shard_files import Encoding, write_manifest
from selfsup_ray.data.sharding import (
    NOTES_COLUMNS,
    QUARANTINE_COLUMNS,
    ShardFacts,
    ShardWriter,
    merge_csv,
)
from selfsup_ray.data.sources import Source
from selfsup_ray.data.tables import Columns
from selfsup_ray.errors import ArtifactError, ConfigError
from selfsup_ray.object_store import is_url
from selfsup_ray.progress import LINE_EVERY_S, track
from selfsup_ray.storage import located, remove_tree
from selfsup_ray.tracking import Tracker

log = logging.getLogger(__name__)


@config
class IngestConfig:
    """What is read, and how it is stored."""

    source: str | tuple[str, ...] | None = None
    """A folder (searched to its depths), a glob, a CSV or Parquet file that names images, Parquet
    that holds them, tar (WebDataset) or zip archives, `bundled:fashion-mnist`, or a list of these.
    All but the last also as a URL: s3://bucket/photos/, gs://bucket/shards/{000..146}.tar.
    In Python it is the first argument of `ingest`; an experiment file must set it."""
    image_size: Positive = 96
    """Side in pixels of the stored squares; crops for training are cut from them."""
    fit: Fit = "crop"
    """`crop`: the central square; `pad`: the whole image on black; `squash`: stretched."""
    encoding: Encoding = "raw"
    """`raw`: decoded once, fastest to read, size² x 3 bytes. `jpeg`: 5 to 10 times smaller, decoded
    at every read. `png`: smaller without loss, slow to read."""
    quality: Annotated[int, Field(ge=1, le=100)] = 95
    """Of encoding `jpeg`."""
    labels: Labels = "found"
    """Where labels come from; they are never needed. `folder`: the first folder in which images
    differ; `column`: `label_column` of a table, or WebDataset's .cls or .json; `none`. `found`: a
    column if there is one, else folders if they are laid out one per class, else none."""
    labels_csv: Path | None = None
    """A CSV of `path_column` and `label_column` that covers some of the images, instead."""
    classes: Path | None = None
    """Keep only these classes: a file with one line per class, its folder name or label first."""
    path_column: str = "path"
    """Column of a manifest or of `labels_csv` that names an image."""
    label_column: str = "label"
    """Column of a table or of `labels_csv`, or key of WebDataset's .json, that holds a label."""
    image_column: str = "image"
    """Column of a Parquet file that holds the bytes of an image."""
    shard_size: Positive = 2048
    """Images per shard, less the bad ones: the unit of work, held in memory by one task."""
    max_bad_share: Share = 0.05
    """The stage stops when more than this share of the files is bad."""
    max_pixels: Positive = MAX_PIXELS
    """Larger images are quarantined before they are decoded."""
    resources: Resources = Resources(workers=32)
    """At most `workers` tasks run at a time, fewer on fewer CPUs; 0 runs in this process."""

    def __post_init__(self) -> None:
        if self.labels_csv is not None and self.labels in ("folder", "none"):
            raise ValueError(
                f"`labels_csv` and `labels: {self.labels}` exclude each other; leave one out"
            )

    @property
    def columns(self) -> Columns:
        """The names of a table's columns."""
        return Columns(self.image_column, self.path_column, self.label_column)


def ingest(
    source: str | Path | Sequence[str | Path] | None = None,
    config: IngestConfig | None = None,
    *,
    out: Path | str,
    tracker: Tracker | None = None,
) -> Corpus:
    """Read, check, decode and store every image of a source; return the corpus.

    source: see `IngestConfig.source`, which it replaces. Every image gets an id 0..N-1, the same
    on every rerun and with any number of workers. Files that are no right image are listed with
    a reason in quarantine.csv, exact duplicates in duplicates.csv. Shards that an interrupted run
    wrote are kept; a finished corpus is not compared with its source again. Raises ArtifactError
    when nothing is found or too much of it is bad.
    """
    config, out, began = _complete(source, config or IngestConfig()), located(out), time.monotonic()
    inputs = _inputs(config)
    if begin(out, stage="ingest", config=config, inputs=inputs):
        log.info("ingest: %s is current", out)
        return Corpus.open(out)
    listing, table = _listed(config, out)
    writer = _writer(config, out, table)
    _require_room(config, out, listing)
    total = _write_shards(writer, listing, config)
    facts = _finish_tables(writer, listing, config, total)
    seconds = time.monotonic() - began
    finish(out, stage="ingest", config=config, inputs=inputs, seconds=seconds, facts=facts)
    _tidy(out)
    corpus = Corpus.open(out)
    counted = f"{len(corpus):,} of {len(listing):,}"
    log.info("ingest: %s files kept, %s, %.1f s", counted, _bad_text(total), seconds)
    if tracker is not None:
        tracker.log([{k: v for k, v in facts.items() if isinstance(v, int | float)}])
    return corpus


def _complete(
    source: str | Path | Sequence[str | Path] | None, config: IngestConfig
) -> IngestConfig:
    """Return the config with its source. Raises ConfigError when there is none."""
    if source is not None:
        many = [source] if isinstance(source, str | Path) else source
        texts = tuple(str(one) for one in many)
        config = override(config, {"source": texts[0] if len(texts) == 1 else texts})
    if not config.source:
        raise ConfigError(
            "`ingest.source` is required: a folder, glob, CSV, Parquet, tar or zip file, or "
            "bundled:fashion-mnist."
        )
    return config


def _inputs(config: IngestConfig) -> dict[str, str]:
    """Return the hashes of the small files that say what images are. Raises ArtifactError."""
    files = {"labels_csv": config.labels_csv, "classes": config.classes}
    return {name: _content(path) for name, path in files.items() if path is not None}


def _content(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}).") from None


def _listed(config: IngestConfig, out: Path) -> tuple[Listing, LabelTable]:
    """Return the listing of the source, and its classes; from disk when there is one."""
    path, table_path = out / "listing", out / "listing" / "labels.json"
    if table_path.exists():
        return Listing.open(path), LabelTable(**read_json(table_path))
    # What lies on an object store is listed by a task, on a node beside the store; what lies on a
    # disk by the process that was given its path.
    given = (config.source,) if isinstance(config.source, str) else config.source or ()
    workers = min(config.resources.workers, 1) if any(map(is_url, given)) else 0
    if workers:
        log.info("ingest: a task lists %s", ", ".join(given))
    ask = replace(config.resources, workers=workers)
    [(_, labels)] = stream_tasks(partial(_list, config, out.absolute()), [0], ask, stage="ingest")
    if labels["unmatched"]:
        text = "%s: %d of its %d rows name no image of the source"
        log.warning(text, config.labels_csv, labels["unmatched"], labels["rows"])
    listing = Listing.open(path)
    log.info("ingest: %s files listed in %d units", f"{len(listing):,}", listing.num_units)
    return listing, LabelTable(**read_json(table_path))


def _list(config: IngestConfig, out: Path, _: int) -> dict[str, Any]:
    """Write the listing of the source and its classes; return what became of `labels_csv`."""
    path = out / "listing"
    assert config.source is not None
    source = Source(config.source, config.columns)
    items, label_file = source.items(), None
    if config.labels_csv is not None:
        label_file = LabelFile(config.labels_csv, config.columns)
        items = label_file.applied(items)
    if config.classes is not None:
        items = Subset(config.classes).applied(items, source.skipped)
    items = _announced(items)
    listing = write_listing(path, items, shard_size=config.shard_size, skipped=source.skipped)
    given = config.labels_csv or config.classes
    table = label_table(listing, "column" if given else config.labels)
    write_json(path / "labels.json", table.to_json())
    if label_file is None:
        return {"rows": 0, "unmatched": 0}
    return {"rows": len(label_file.labels), "unmatched": label_file.num_unmatched}


def _announced(items: Iterator[Item]) -> Iterator[Item]:
    """Yield the items and say now and then how many there were: a large source takes minutes."""
    spoke = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        if count % 1024 == 0 and time.monotonic() - spoke > LINE_EVERY_S:
            spoke = time.monotonic()
            log.info("ingest: %s files listed so far", f"{count:,}")


def _writer(config: IngestConfig, out: Path, table: LabelTable) -> ShardWriter:
    return ShardWriter(
        out=out.absolute(),
        labels=table,
        image_size=config.image_size,
        fit=config.fit,
        encoding=config.encoding,
        quality=config.quality,
        max_pixels=config.max_pixels,
        image_column=config.image_column,
    )


def _require_room(config: IngestConfig, out: Path, listing: Listing) -> None:
    """Raise ArtifactError when the disk will not hold the shards; 1/6 is a guess for JPEG."""
    share = {"raw": 1.0, "jpeg": 1 / 6, "png": 0.7}[config.encoding]
    size_bytes = int(len(listing) * config.image_size**2 * 3 * share)
    done = sum(file.stat().st_size for file in (out / "shards").glob("*.arrow"))
    require_disk(out, size_bytes=max(0, size_bytes - done))


@dataclass
class _Total:
    """Sums over the shards that are written."""

    kept: int
    labelled: int
    reasons: Counter[str]
    notes: Counter[str]

    @property
    def quarantined(self) -> int:
        return self.reasons.total()

    def add(self, facts: ShardFacts) -> None:
        self.kept += facts.kept
        self.labelled += facts.labelled
        self.reasons.update(facts.reasons)
        self.notes.update(facts.notes)


def _write_shards(writer: ShardWriter, listing: Listing, config: IngestConfig) -> _Total:
    """Write the missing shards and return the sums over all.

    Raises ArtifactError as soon as the share of bad files is certain to be above its limit.
    """
    total = _Total(0, 0, Counter(), Counter())
    missing = writer.unwritten(listing.num_units)
    with track("ingest", len(listing), "images") as progress:
        for unit in sorted(set(range(listing.num_units)) - set(missing)):
            total.add(writer.facts(unit))
            progress.skip(listing.unit_sizes[unit])
        _require_mostly_good(writer, listing, config, total)
        for unit, values in stream_tasks(writer, missing, config.resources, stage="ingest"):
            total.add(ShardFacts(**values))
            progress.advance(listing.unit_sizes[unit], note=_bad_text(total))
            _require_mostly_good(writer, listing, config, total)
    if not total.kept:
        path = _merge_quarantine(writer, listing)
        raise ArtifactError(f"None of the {len(listing)} files is a right image; see {path}.")
    return total


def _bad_text(total: _Total) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in total.reasons.most_common())
    return f"{total.quarantined} bad ({reasons})" if reasons else "none bad"


def _require_mostly_good(
    writer: ShardWriter, listing: Listing, config: IngestConfig, total: _Total
) -> None:
    if total.quarantined <= config.max_bad_share * len(listing):
        return
    path = _merge_quarantine(writer, listing)
    raise ArtifactError(
        f"At least {total.quarantined} of {len(listing)} files are bad "
        f"({_bad_text(total)}), more than ingest.max_bad_share={config.max_bad_share:g}. "
        f"{path} lists them; mend the source and choose another `out`, or raise the share."
    )


def _merge_quarantine(writer: ShardWriter, listing: Listing) -> Path:
    path = writer.out / "quarantine.csv"
    parts = [writer.out / "quarantine" / f"{unit:05d}.csv" for unit in range(listing.num_units)]
    merge_csv(parts, path, QUARANTINE_COLUMNS)
    return path


def _finish_tables(
    writer: ShardWriter, listing: Listing, config: IngestConfig, total: _Total
) -> dict[str, Any]:
    """Write quarantine, notes, manifest and duplicates, and return the stage's facts."""
    out = writer.out
    _merge_quarantine(writer, listing)
    notes = [out / "notes" / f"{unit:05d}.csv" for unit in range(listing.num_units)]
    merge_csv(notes, out / "notes.csv", NOTES_COLUMNS)
    every = [writer.facts(unit) for unit in range(listing.num_units)]
    counts: dict[str, Any] = {
        "listed": len(listing),
        "kept": total.kept,
        "quarantined": total.quarantined,
        "labelled": total.labelled,
        "reasons": dict(sorted(total.reasons.items())),
        "notes": dict(sorted(total.notes.items())),
        "skipped": listing.skipped,
    }
    assert total.kept + total.quarantined == len(listing), f"files were lost: {counts}"
    write_manifest(
        out,
        shard_rows=[facts.kept for facts in every],
        image_size=writer.image_size,
        encoding=writer.encoding,
        class_names=writer.labels.class_names,
        num_labelled=total.labelled,
        content=hashlib.sha256("".join(facts.content for facts in every).encode()).hexdigest(),
        counts=counts,
    )
    groups, extra = write_duplicates(
        Corpus(out, read_json(out / "corpus.json"), fingerprint=""), out / "duplicates.csv"
    )
    return counts | {"duplicate_groups": groups, "duplicates": extra}


def _tidy(out: Path) -> None:
    """Remove what a restart would have needed; after the stamp, or a kill here would lose it."""
    for folder in ("listing", "quarantine", "notes"):
        remove_tree(out / folder)
    for half in (out / "shards").glob("*.tmp"):  # of a worker that was killed while writing
        half.unlink()
