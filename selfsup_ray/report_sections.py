"""Sections of the report made of text, tables and curves: summary, corpus, training, versions."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from functools import partial
from html import escape
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from selfsup_ray import plots
from selfsup_ray.config import flatten
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.models.collapse import collapse_warning
from selfsup_ray.report_html import (
    Section,
    bar,
    counted,
    details,
    duration,
    figures,
    listing,
    numbers,
    paragraph,
    percent,
    plain,
    table,
)
from selfsup_ray.report_images import Sheet, thumb, thumbnails
from selfsup_ray.report_run import Run, StageFolder, sample_ids, thinned
from selfsup_ray.report_scores import headline_scores

Array = np.ndarray[Any, np.dtype[Any]]

CURVE_POINTS = 600
"""Points drawn of a curve; more are averaged."""
MOST_CURVES = 12
"""Panels of one stage."""
EXAMPLES = 3
"""Files named for each reason of quarantine, and of each group of duplicates."""
DUPLICATES = 5
"""Groups of duplicates shown."""
SAMPLE = 24
"""Images shown of the corpus."""

NOT_CURVES = ("step", "epoch", "time", "loss", "lr", "images_per_s", "data_wait_share", "collapsed")
EXPLAINED = {
    "embedding_std": "standard deviation of the unit embeddings, averaged over dimensions, times "
    "√d: 1 when they spread evenly, 0 when they collapse",
    "effective_rank": "exp of the entropy of the eigenvalues of the embeddings' covariance, of one "
    "batch: the dimensions in use",
    "positive_similarity": "cosine of two views of one image",
    "online_accuracy": "of a linear probe on the features as they are, on augmented views before "
    "it learns from them; the encoder does not see it",
    "queue_fill": "share of the queue that holds keys",
    "consistency": "SCAN's first term: -ln of the agreement of an image and its neighbor",
    "entropy": "of the mean assignment: ln K when clusters are balanced, 0 when they collapse",
    "confident_share": "share of images above the threshold, which train",
    "confident_clusters": "clusters with at least one such image in the batch",
    "largest_confident_share": "share of such images in the largest cluster: 1 is collapse",
    "threshold": "probability from which an image trains",
    "skipped_steps": "steps without any image above the threshold",
}


def summary_section(run: Run, missing: list[str]) -> Section:
    """Headline numbers, the time of each stage, and what the run gave no ground for."""
    body = numbers(_headline(run)) + "<h3>Stages</h3>" + _stage_table(run)
    if missing:
        body += "<h3>Not in this report</h3>" + listing(missing)
    return Section("summary", "Summary", body)


def _headline(run: Run) -> Iterator[tuple[str, str, str]]:
    corpus, clusters = run.corpus, run.clusters
    if corpus is not None:
        size = corpus.image_size
        yield "images", f"{len(corpus):,}", f"{size} x {size} pixels"
    if clusters is not None and run.clustering is not None:
        yield "clusters", f"{int((clusters.sizes > 0).sum()):,}", f"by {run.clustering[0]}"
    yield from headline_scores(run)
    seconds = sum(stage.done.seconds for stage in run.stages if stage.done is not None)
    unfinished = sum(stage.done is None for stage in run.stages)
    yield "time", duration(seconds), f"{unfinished} unfinished" if unfinished else "all stages"


def _stage_table(run: Run) -> str:
    longest = max((s.done.seconds for s in run.stages if s.done is not None), default=0.0)
    rows = []
    for stage in run.stages:
        if stage.done is None:
            rows.append((stage.path.name, "", "not finished", ""))
            continue
        share = stage.done.seconds / longest if longest else 0.0
        rows.append(
            (stage.path.name, duration(stage.done.seconds), bar(share), _facts(stage.done.facts))
        )
    return table(("stage", "time", "", "facts"), rows, numeric=(1,))


def _facts(facts: Mapping[str, Any], *, most: int = 6) -> str:
    """Return a stage's facts in one line: the first few scalars."""
    scalars = [
        (key, value)
        for key, value in flatten(facts).items()
        if isinstance(value, int | float | str) and len(str(value)) <= 40
    ]
    return ", ".join(f"{key.replace('_', ' ')} {plain(value)}" for key, value in scalars[:most])


def training_section(run: Run) -> Section | str:
    """Curves of every stage that logged a loss."""
    trained = [stage for stage in run.stages if stage.is_trained]
    if not trained:
        return "No training curves: no stage of this run has logged a loss."
    return Section("training", "Training", "".join(_curves(stage) for stage in trained))


def _curves(stage: StageFolder) -> str:
    records = stage.history
    steps = np.array([record["step"] for record in records], dtype=np.float64)
    values = {
        key: np.array([_number(record.get(key)) for record in records])
        for key in dict.fromkeys(key for record in records for key in record)
        if any(np.isfinite(_number(record.get(key))) for record in records)
    }
    panels = list(_panels(values))
    drawn = [
        plots.svg(
            partial(
                plots.plot_series,
                thinned(steps, CURVE_POINTS),
                {name: thinned(series, CURVE_POINTS) for name, series in group.items()},
                ylabel=ylabel,
                title=title,
            ),
            width=3.4,
            height=2.3,
            label=f"{stage.path.name} {title}",
        )
        for group, ylabel, title in panels[:MOST_CURVES]
    ]
    notes = [f"Warning: {collapse_warning(r)}" for r in records if "collapsed" in r]
    if explained := [f"{key}: {text}" for key, text in EXPLAINED.items() if key in values]:
        notes.append(f"{'; '.join(explained)}.")
    if len(panels) > MOST_CURVES:
        notes.append(f"{len(panels) - MOST_CURVES} more metrics are in metrics.jsonl.")
    if stage.done is None:
        notes.append("This stage has not finished.")
    head = f"<h3>{escape(stage.path.name)}</h3>" + paragraph(_setting(stage, steps), note=True)
    return head + figures(drawn) + "".join(paragraph(note, note=True) for note in notes)


def _panels(values: Mapping[str, Array]) -> Iterator[tuple[dict[str, Array], str, str]]:
    """Yield (curves, y label, title that states the finding) of one stage's panels."""
    if "loss" in values:
        loss = values["loss"][np.isfinite(values["loss"])]
        yield {"loss": values["loss"]}, "loss", f"loss {loss[0]:.3g} to {loss[-1]:.3g}"
    parts = {key: series for key, series in values.items() if key.startswith("loss_")}
    if len(parts) > 1:
        yield parts, "loss", f"loss of {len(parts)} parts"
    if "lr" in values:
        peak = np.nanmax(values["lr"])
        yield {"lr": values["lr"]}, "learning rate", f"learning rate, peak {peak:.3g}"
    if "images_per_s" in values:
        median = np.nanmedian(values["images_per_s"])
        yield {"images/s": values["images_per_s"]}, "images / s", f"{median:,.0f} images/s (median)"
    if "data_wait_share" in values:
        percent = 100 * values["data_wait_share"]
        title = f"{np.nanmean(percent):.1f} % of the time waiting for data"
        yield {"waiting": percent}, "% of time", title
    rest = [
        key for key in values if key not in NOT_CURVES and not (key in parts and len(parts) > 1)
    ]
    for key in rest:
        last = values[key][np.isfinite(values[key])][-1]
        yield {key: values[key]}, key, f"{key} → {plain(float(last))}"


def _number(value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else float("nan")


def _setting(stage: StageFolder, steps: Array) -> str:
    """Return what was trained in one line, from the stage's config."""
    config = stage.config
    method = config.get("method")
    parts = [str(method["name"])] if isinstance(method, dict) and "name" in method else []
    for key in ("epochs", "batch_size", "precision", "seed"):
        if key in config:
            parts.append(f"{key.replace('_', ' ')} {config[key]}")
    return (
        f"{', '.join(parts)}{'; ' if parts else ''}{int(steps[-1]):,} steps" if len(steps) else ""
    )


def corpus_section(run: Run) -> Section | str:
    """What was ingested, what was refused and why, and which files are the same."""
    stage, corpus = run.stage("ingest"), run.corpus
    if stage is None or corpus is None:
        return "No corpus: the stage ingest has not finished in this run."
    if corpus.has_labels:
        labels = f"{corpus.num_labelled:,} of them have a label ({len(run.class_names):,} classes)."
    else:
        labels = "None of them has a label."
    text = f"{counted(len(corpus), 'image')} in {counted(corpus.num_shards, 'shard')}. {labels}"
    body = paragraph(text) + _sample(run, corpus)
    body += _notes(corpus.counts.get("notes", {}))
    body += "<h3>Quarantine</h3>" + _quarantine(stage.path / "quarantine.csv", len(corpus))
    body += "<h3>Duplicates</h3>" + _duplicates(stage.path / "duplicates.csv")
    return Section("corpus", "Corpus", body)


def _sample(run: Run, corpus: Corpus) -> str:
    if not len(corpus):
        return ""
    ids = sample_ids(len(corpus), SAMPLE)
    sheet = Sheet.of(thumbnails(corpus, ids, side=64), columns=min(12, len(ids)))
    labels, sources = corpus.labels(ids).tolist(), corpus.sources(ids)
    tiles = "".join(
        thumb(sheet, i, title=f"image {id} {run.class_of(labels[i])}\n{sources[i]}")
        for i, id in enumerate(ids.tolist())
    )
    rows = f'<div class="row sample">{tiles}</div>'
    return (
        paragraph(f"{len(ids)} images at random:", note=True)
        + f'<div class="{sheet.css_class}" style="{sheet.style}">{rows}</div>'
    )


def _notes(counts: Mapping[str, int]) -> str:
    """Return what was put right on the way in, such as grey images made RGB."""
    if not counts:
        return ""
    text = ", ".join(f"{name.replace('_', ' ')} {n:,}" for name, n in counts.items())
    return paragraph(f"Handled on the way in: {text}.")


def _quarantine(path: Path, kept: int) -> str:
    """Return the refused files by reason, the most frequent first, with examples."""
    counts: dict[str, int] = {}
    examples: dict[str, list[str]] = {}
    for row in _csv(path):
        reason = row.get("reason", "unknown")
        counts[reason] = counts.get(reason, 0) + 1
        named = examples.setdefault(reason, [])
        if len(named) < EXAMPLES:
            named.append(row.get("source", ""))
    total = sum(counts.values())
    if not total:
        return paragraph("No file was refused.")
    share = total / (total + kept)
    where = f"{path.parent.name}/{path.name}"
    text = f"{counted(total, 'file')} ({percent(share)}) refused; {where} names all."
    rows = [
        (reason, f"{n:,}", bar(n / max(counts.values())), "; ".join(examples[reason]))
        for reason, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]
    return paragraph(text) + table(("reason", "files", "", "for example"), rows, numeric=(1,))


def _duplicates(path: Path) -> str:
    """Return how many images share their file's content with another, with examples."""
    groups, files, shown = 0, 0, list[tuple[str, str, str]]()
    for _, rows in groupby(_csv(path), key=itemgetter("digest")):
        named, copies = list[dict[str, str]](), 0
        for row in rows:
            copies += 1
            if copies <= EXAMPLES:
                named.append(row)
        groups, files = groups + 1, files + copies
        if groups <= DUPLICATES:
            sources = "; ".join(row["source"] for row in named)
            shown.append((str(copies), ", ".join(row["id"] for row in named), sources))
    if not groups:
        return paragraph("No two images come from files with the same content.")
    text = (
        f"{files:,} images come from files of which another is the same, byte for byte, in "
        f"{counted(groups, 'group')}. All are kept; {path.parent.name}/{path.name} names them."
    )
    head = ("copies", "ids, for example", "sources, for example")
    return paragraph(text) + table(head, shown, numeric=(0,))


def _csv(path: Path) -> Iterator[dict[str, str]]:
    if not path.exists():
        return
    with path.open(newline="") as file:
        yield from csv.DictReader(file)


def reproduce_section(run: Run) -> Section:
    """The experiment file and command that make this run again, and what each stage ran with."""
    body = paragraph("The same configuration gives the same run. Save it as experiment.yaml, then:")
    body += "<pre>selfsup-ray run experiment.yaml</pre>"
    if run.stage("export") is not None:
        body += paragraph("export/ holds what others need: weights and tables; see export/use.py.")
    body += details("experiment.yaml: every stage, defaults included", _experiment(run))
    body += "".join(
        details(
            f"{stage.path.name}: as it ran", _code(yaml.safe_dump(stage.config, sort_keys=False))
        )
        for stage in run.stages
    )
    return Section("reproduce", "How to make it again", body + _versions(run))


def _experiment(run: Run) -> str:
    """Return the experiment file the run wrote, or one put together from its stages."""
    path = run.path / "experiment.yaml"
    if path.exists():
        return _code(path.read_text())
    whole = {"out": f"runs/{run.path.resolve().name}"} | {s.name: s.config for s in run.stages}
    return _code(yaml.safe_dump(whole, sort_keys=False))


def _code(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def _versions(run: Run) -> str:
    """Return the versions each stage ran with; stages with equal versions share a line."""
    groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for stage in run.stages:
        groups.setdefault(tuple(stage.versions.items()), []).append(stage.path.name)
    groups.pop((), None)
    if not groups:
        return paragraph("The stages stored no versions.")
    names = list(dict.fromkeys(name for versions in groups for name, _ in versions))
    rows = [[name, *(dict(versions).get(name, "") for versions in groups)] for name in names]
    head = ["", *(", ".join(stages) for stages in groups.values())]
    prints = [
        (stage.path.name, stage.done.fingerprint[:16])
        for stage in run.stages
        if stage.done is not None
    ]
    body = "<h3>Versions</h3>" + table(head, rows, numeric=())
    made = table(("stage", "fingerprint"), prints, numeric=())
    return body + details("Fingerprints", made)
