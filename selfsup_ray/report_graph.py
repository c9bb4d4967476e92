"""Sections of the report made of the graph: near duplicates, outliers, hubs."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from selfsup_ray import plots
from selfsup_ray.artifacts import write_text
from selfsup_ray.data.corpus import Corpus
from selfsup_ray.report_html import Section, counted, figures, paragraph, percent
from selfsup_ray.report_images import Sheet, thumb, thumbnails
from selfsup_ray.report_neighbors import (
    MOST_PAIRS,
    NEAR_IMAGES,
    NEAR_SHARE,
    NEAR_SIMILARITY,
    NearDuplicates,
    in_degrees,
    near_duplicates,
    outliers,
    same_file,
)
from selfsup_ray.report_run import Run

Array = np.ndarray[Any, np.dtype[Any]]

GROUPS, GROUP_IMAGES = 24, 12
"""Groups of near duplicates shown, and images shown of each."""
COLUMNS, CARD_COLUMNS = 12, 6
"""Images in a row over the page's width, and in a row of a group's card."""


def duplicates_section(run: Run) -> Section | str:
    """Images that are nearly the same without coming from one file, by connected groups.

    All pairs are written to near-duplicates.csv in the run folder.
    """
    graph, corpus = run.graph, run.corpus
    if graph is None or corpus is None:
        return "No near duplicates: the stage graph has not finished in this run."
    found = near_duplicates(graph, same_file(corpus))
    path = run.path / "near-duplicates.csv"
    if not len(found.pairs):
        path.unlink(missing_ok=True)
        return f"No near duplicates: no two images have a similarity of {found.from_:.2f} or more."
    _write_pairs(path, found, corpus)
    cut = f" (the {MOST_PAIRS:,} most similar ones)" if found.is_cut else ""
    chosen = (
        f", which {percent(NEAR_SHARE)} of the images (at least {NEAR_IMAGES}) have with another"
    )
    text = (
        f"{counted(len(found.pairs), 'pair')}{cut} in {counted(found.num_groups, 'group')} from a "
        f"similarity of {found.from_:.3f} on{chosen if found.from_ > NEAR_SIMILARITY else ''}. "
        f"Whether these are copies, series or different things only a look can tell; files with "
        f"the same bytes are not among them. {path.name} names all."
    )
    shown = range(min(found.num_groups, GROUPS))
    cards = "".join(_group(run, corpus, found, group) for group in shown)
    body = paragraph(text) + f'<div class="cards">{cards}</div>'
    return Section("duplicates", "Near duplicates", body)


def _write_pairs(path: Path, found: NearDuplicates, corpus: Corpus) -> None:
    """Write the pairs by group as CSV, unless the file holds them already."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("group", "similarity", "id", "other_id", "source", "other_source"))
    sources = [corpus.sources(found.pairs[:, i]) for i in (0, 1)]
    for i in np.argsort(found.group, kind="stable").tolist():
        a, b = found.pairs[i].tolist()
        row = (found.group[i], f"{found.similarity[i]:.6f}", a, b, sources[0][i], sources[1][i])
        writer.writerow(row)
    if not path.exists() or path.read_text() != buffer.getvalue():
        write_text(path, buffer.getvalue())


def _group(run: Run, corpus: Corpus, found: NearDuplicates, group: int) -> str:
    here = found.group == group
    ids, best = found.members(group), found.similarity[here]
    shown = ids[:GROUP_IMAGES]
    more = f", {len(shown)} of them shown" if len(shown) < len(ids) else ""
    between = f"{best.max():.4f}" if len(best) == 1 else f"{best.min():.4f} to {best.max():.4f}"
    head = f"<p>{len(ids):,} images{more}; similarity {between}</p>"
    return _sheet(run, corpus, shown, [""] * len(shown), head=head, columns=CARD_COLUMNS)


def _sheet(
    run: Run,
    corpus: Corpus,
    ids: Array,
    facts: Sequence[str],
    *,
    head: str = "",
    columns: int = COLUMNS,
) -> str:
    """Return images in rows, each with id, class, source and a fact on hover; a card with a head.

    head: HTML above the images.
    """
    sheet = Sheet.of(thumbnails(corpus, ids, side=64), columns=columns)
    labels, sources = corpus.labels(ids).tolist(), corpus.sources(ids)
    tiles = []
    for i, (id, fact) in enumerate(zip(ids.tolist(), facts, strict=True)):
        name = " ".join(filter(None, [f"image {id}", run.class_of(labels[i]), fact]))
        tiles.append(thumb(sheet, i, title=f"{name}\n{sources[i]}"))
    kind = f"card {sheet.css_class}" if head else sheet.css_class
    rows = f'{head}<div class="row">{"".join(tiles)}</div>'
    return f'<div class="{kind}" style="{sheet.style}">{rows}</div>'


def outliers_section(run: Run) -> Section | str:
    """The images whose last neighbor is farthest."""
    graph, corpus = run.graph, run.corpus
    if graph is None or corpus is None:
        return "No outliers: the stage graph has not finished in this run."
    if not len(graph) or not graph.k:
        return "No outliers: the graph is empty."
    found = outliers(graph)
    text = (
        f"The images that are least like any other: their neighbor number {graph.k} has a "
        f"similarity of {found.scores.min():.3f} to {found.scores.max():.3f}. Broken or foreign "
        f"images are often among them, and rare ones."
    )
    facts = [f"(similarity {score:.3f})" for score in found.scores]
    return Section("outliers", "Outliers", paragraph(text) + _sheet(run, corpus, found.ids, facts))


def hubs_section(run: Run) -> Section | str:
    """How often images are listed as a neighbor, and the ones listed most."""
    graph, corpus = run.graph, run.corpus
    if graph is None or corpus is None:
        return "No hubs: the stage graph has not finished in this run."
    if not len(graph) or not graph.k:
        return "No hubs: the graph is empty."
    found = in_degrees(graph)
    most = found.hubs.scores.max()
    text = (
        f"An image is a neighbor of {found.mean:.1f} others on average, at most of {most:,.0f}; "
        f"{percent(found.never)} are nobody's neighbor. Skewness {found.skewness:.1f}: beyond "
        f"about 1 a few hubs are in many lists, which blurs clusters and labels that spread along "
        f"the graph. The images listed most:"
    )
    draw = partial(plots.plot_in_degrees, found.counts)
    figure = figures([plots.svg(draw, width=5.2, height=2.6, label="in-degrees")])
    facts = [f"(neighbor of {score:,.0f})" for score in found.hubs.scores]
    sheet = _sheet(run, corpus, found.hubs.ids[:COLUMNS], facts[:COLUMNS])
    return Section("hubs", "Hubs", figure + paragraph(text) + sheet)
