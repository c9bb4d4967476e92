"""Many runs of labelled networks in one table: the rows of a study, beside the published ones."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from selfsup_ray.artifacts import whole_file, write_text
from selfsup_ray.errors import ArtifactError
from selfsup_ray.report_classify import TITLES, Row, percent_or_nothing, result_rows
from selfsup_ray.report_html import Section, duration, page, paragraph, table
from selfsup_ray.report_run import Run

HEAD = (
    *("run", "network", "layer", "k", "parameters", "images", "epochs", "seed"),
    *("max, %", "at epoch", "last, %", "chosen, %", "published max, %", "published last, %"),
    "time",
)


def is_collection(folder: Path) -> bool:
    """Return whether a folder holds runs, rather than the stages of one run."""
    return not any(folder.glob("*/config.yaml")) and any(folder.glob("*/*/config.yaml"))


def write_results(folder: Path) -> Path:
    """Write `report.html` and `results.csv` into a folder of runs and return the page's path.

    One row for each network of each run whose stage classify has finished. Raises ArtifactError
    when there is none.
    """
    runs = [Run.open(path) for path in _run_folders(folder)]
    finished = [run for run in runs if run.stage("classify") is not None]
    if not finished:
        raise ArtifactError(
            f"{folder} holds {len(runs)} runs, but the stage classify has finished in none of "
            f"them. Give the folder of one run, or run one of experiments/patches/."
        )
    lines = [line for run in finished for line in _lines(run)]
    with whole_file(folder / "results.csv") as path, open(path, "w", newline="") as file:
        csv.writer(file).writerows([HEAD, *lines])
    note = (
        "Accuracy on test images: the maximum over the epochs, which is the published measure, and "
        "after the last epoch. Published: CIFAR-10, 200 epochs, single runs."
    )
    body = paragraph(note, note=True) + table(HEAD, lines, numeric=range(2, len(HEAD)))
    sections = [Section("networks", "Labelled networks", body)]
    path = folder / "report.html"
    lead = f"{len(finished)} runs with labelled networks, of {len(runs)} in this folder."
    write_text(path, page(folder.resolve().name, lead=lead, sections=sections))
    return path


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
