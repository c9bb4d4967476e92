"""Accuracy of every class, in the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from selfsup_ray.report_html import bar, details, table
from selfsup_ray.report_run import Run


def class_table(run: Run, columns: Mapping[str, Sequence[float | None]]) -> str:
    """Return accuracies by class, to open on a click; columns: name -> (C,), None: no image."""
    first = next(iter(columns.values()))
    shown = [c for c in range(len(first)) if first[c] is not None]
    shown.sort(key=lambda c: (first[c], c))
    rows = [
        (
            run.class_of(c) or str(c),
            *(_percent(values[c]) for values in columns.values()),
            bar(first[c] or 0.0),
        )
        for c in shown
    ]
    made = table(
        ("class", *(f"{name}, %" for name in columns), ""), rows, numeric=range(1, 1 + len(columns))
    )
    return details("Accuracy of every class, the worst first", made)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"
