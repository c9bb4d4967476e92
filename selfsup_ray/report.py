"""One self-contained HTML page about a run, made from the run folder's artifacts alone."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from selfsup_ray.artifacts import read_json, write_text
from selfsup_ray.report_classify import classify_section
from selfsup_ray.report_clusters import (
    clusters_section,
    map_section,
    neighbors_section,
)
from selfsup_ray.report_confusion import confusion_section
from selfsup_ray.report_diffuse import diffuse_section
from selfsup_ray.report_dimension import dimension_section
from selfsup_ray.report_graph import duplicates_section, hubs_section, outliers_section
from selfsup_ray.report_html import Section, page
from selfsup_ray.report_labelled import labelled_section, maps_section
from selfsup_ray.report_lowshot import lowshot_section
from selfsup_ray.report_patches import patches_section
from selfsup_ray.report_results import is_collection, write_results
from selfsup_ray.report_run import Run
from selfsup_ray.report_scores import scores_section
from selfsup_ray.report_sections import (
    corpus_section,
    reproduce_section,
    summary_section,
    training_section,
)
from selfsup_ray.report_sela import sela_section
from selfsup_ray.storage import located

SECTIONS = (
    clusters_section,
    sela_section,
    confusion_section,
    scores_section,
    diffuse_section,
    lowshot_section,
    labelled_section,
    classify_section,
    patches_section,
    dimension_section,
    map_section,
    maps_section,
    neighbors_section,
    duplicates_section,
    outliers_section,
    hubs_section,
    training_section,
    corpus_section,
)
"""In the order of the page; each returns a Section, or a sentence that says why there is none."""


def write_report(run: Path) -> Path:
    """Write `report.html` into a run folder and return its path.

    The page needs nothing but itself: figures are inline SVG, images are data URIs. What the run
    has not made is left out, with the reason. Memory does not grow with the corpus: images, map
    and neighbors come from bounded samples, sizes and extremes from passes over the shards; only
    the in-degrees of the graph take 4 bytes an image. Pairs of near duplicates are written beside.
    Of a folder of runs the page is the table of their labelled networks. Raises ArtifactError when
    the folder holds no stage of a run.
    """
    if is_collection(located(run)):
        return write_results(located(run))
    opened = Run.open(located(run))
    made = [section(opened) for section in SECTIONS]
    shown = [item for item in made if isinstance(item, Section)]
    missing = [item for item in made if isinstance(item, str)]
    sections = [summary_section(opened, missing), *shown, reproduce_section(opened)]
    path = opened.path / "report.html"
    title = opened.path.resolve().name
    write_text(path, page(title, lead=_lead(opened), sections=sections))
    return path


def _lead(run: Run) -> str:
    """Return who made the run, and when its last stage finished."""
    times = [read_json(s.path / "done.json").get("time") for s in run.stages if s.done is not None]
    versions = next((s.versions for s in run.stages if s.versions), {})
    tool = f"selfsup-ray {versions.get('selfsup-ray', '')}".strip()
    known = [time for time in times if time is not None]
    if not known:
        return f"Made by {tool}; no stage has finished."
    finished = datetime.fromtimestamp(max(known), tz=UTC)
    return f"Made by {tool}; last stage finished {finished:%Y-%m-%d %H:%M} UTC."
