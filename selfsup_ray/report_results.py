"""Many runs of labelled networks in one table: the rows of a study, beside the published ones."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from selfsup_ray.artifacts import whole_file, write_text
from selfsup_ray.data.published_contrastive import LINEAR_RUNS
from selfsup_ray.errors import ArtifactError
from selfsup_ray.report_classify import TITLES, Row, percent_or_nothing, result_rows
from selfsup_ray.report_html import Section, duration, page, paragraph, table
from selfsup_ray.report_run import Run

HEAD = (
    *("run", "network", "layer", "k", "parameters", "images", "epochs", "seed"),
    *("max, %", "at epoch", "last, %", "chosen, %", "published max, %", "published last, %"),
    "time",
)
LINEAR_HEAD = (
    *("run", "method", "network", "epochs", "batch", "seed", "test images"),
    *("max, %", "last, %", "published max, %", "time"),
)


def is_collection(folder: Path) -> bool:
    """Return whether a folder holds runs, rather than the stages of one run."""
    return not any(folder.glob("*/config.yaml")) and any(folder.glob("*/*/config.yaml"))


def write_results(folder: Path) -> Path:
    """Write `report.html` and the tables in it into a folder of runs and return the page's path.

    One row for each network of each run whose stage classify has finished (`results.csv`), and one
    for each run whose stage linear has (`linear.csv`). Raises ArtifactError when there is none.
    """
    runs = [Run.open(path) for path in _run_folders(folder)]
    networks = [run for run in runs if run.stage("classify") is not None]
    probed = [run for run in runs if run.stage("linear") is not None]
    if not networks and not probed:
        raise ArtifactError(
            f"{folder} holds {len(runs)} runs, but the stages classify and linear have finished in "
            f"none of them. Give the folder of one run, or run one of experiments/patches/ or "
            f"experiments/contrastive/."
        )
    sections = []
    if networks:
        lines = [line for run in networks for line in _lines(run)]
        body = _listed(folder / "results.csv", HEAD, lines, numeric=range(2, len(HEAD)))
        note = (
            "Accuracy on test images: the maximum over the epochs, which is the published measure, "
            "and after the last epoch. Published: CIFAR-10, 200 epochs, single runs."
        )
        body = paragraph(note, note=True) + body
        sections.append(Section("networks", "Labelled networks", body))
    if probed:
        lines = [_linear_line(run) for run in probed]
        body = _listed(folder / "linear.csv", LINEAR_HEAD, lines, numeric=range(3, 10))
        note = (
            "Accuracy on test images of a linear classifier on the frozen encoder: the maximum "
            "over the epochs, which is the published measure, and after the last epoch."
        )
        body = paragraph(note, note=True) + body
        sections.append(Section("linear", "Linear probes", body))
    path = folder / "report.html"
    found = f"{len(networks)} runs with labelled networks" if networks else ""
    also = f"{len(probed)} runs with linear probes" if probed else ""
    lead = f"{' and '.join(filter(None, [found, also]))}, of {len(runs)} runs in this folder."
    write_text(path, page(folder.resolve().name, lead=lead, sections=sections))
    return path


def _listed(
    path: Path, head: Sequence[str], lines: Sequence[Sequence[str]], *, numeric: Sequence[int]
) -> str:
    """Write lines as CSV and return them as a table."""
    with whole_file(path) as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file).writerows([head, *lines])
    return table(head, lines, numeric=numeric)


def _linear_line(run: Run) -> tuple[str, ...]:
    linear, pretext = run.stage("linear"), run.stage("pretext")
    assert linear is not None and linear.done is not None, "finished"
    made = {} if pretext is None else pretext.config
    published = LINEAR_RUNS.get(run.path.resolve().name)
    return (
        run.path.name,
        str(made.get("method", {}).get("name", "")),
        str(made.get("backbone", {}).get("name", "")),
        *(str(made.get(key, "")) for key in ("epochs", "batch_size", "seed")),
        f"{linear.facts['num_test']:,}",
        percent_or_nothing(float(linear.facts["max_accuracy"])),
        percent_or_nothing(float(linear.facts["last_accuracy"])),
        percent_or_nothing(published),
        duration(linear.done.seconds + (pretext.done.seconds if pretext and pretext.done else 0)),
    )


def _run_folders(folder: Path) -> Sequence[Path]:
    return sorted({path.parent.parent for path in folder.glob("*/*/config.yaml")})


def _lines(run: Run) -> Iterator[tuple[str, ...]]:
    stage = run.stage("classify")
    assert stage is not None and stage.done is not None, "finished"
    config, name = stage.config, str(stage.config["model"]["name"])
    for i, row in enumerate(result_rows(run)):
        shared = (f"{stage.facts['num_train']:,}", str(config["epochs"]), str(config["seed"]))
        spent = duration(stage.done.seconds) if i == 0 else ""
        start = (run.path.name, TITLES.get(name, name), str(row.layer), row.k)
        yield (*start, f"{row.parameters:,}", *shared, *_numbers(row), spent)


def _numbers(row: Row) -> tuple[str, ...]:
    last = (row.last, row.chosen, row.published_max, row.published_last)
    return (percent_or_nothing(row.max), str(row.max_epoch), *map(percent_or_nothing, last))
