"""Measured numbers beside published ones: a figure and a table, for the report and for sweeps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

from selfsup_ray import plots
from selfsup_ray.report_html import figures, table

Points = Mapping[float, float]
"""x -> value."""


def beside(
    measured: Mapping[str, Points],
    published: Mapping[str, Points],
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    digits: int = 2,
    width: float = 5.4,
) -> str:
    """Return a figure of all series by x, and a table of them; published ones in its own columns.

    A published series belongs to the measured one of its name. The axis of x is logarithmic where
    all of x is positive and spans a factor of 8 and more. With more than 40 values of x the
    table shows those that were published, and the powers of two.
    """
    every = [x for series in (measured, published) for points in series.values() for x in points]
    draw = partial(
        plots.plot_beside,
        measured,
        published,
        xlabel=xlabel,
        ylabel=ylabel,
        title=title,
        log_x=min(every) > 0 and max(every) >= 8 * min(every),
    )
    drawn = plots.svg(draw, width=width, height=3.4, label=title)
    return figures([drawn]) + beside_table(measured, published, xlabel=xlabel, digits=digits)


def beside_table(
    measured: Mapping[str, Points],
    published: Mapping[str, Points],
    *,
    xlabel: str,
    digits: int = 2,
) -> str:
    """Return the table of `beside`: one row for each x."""
    names = list(dict.fromkeys([*measured, *published]))
    head, columns = [xlabel], list[Points]()
    for name in names:
        for kind, series in (("", measured), (", published", published)):
            if name in series:
                head.append(f"{name}{kind}")
                columns.append(series[name])
    rows = [
        (f"{x:,g}", *(_number(column.get(x), digits) for column in columns))
        for x in _shown(measured, published)
    ]
    return table(head, rows, numeric=range(len(head)))


def _shown(measured: Mapping[str, Points], published: Mapping[str, Points]) -> list[float]:
    known = {x for points in published.values() for x in points}
    every = known | {x for points in measured.values() for x in points}
    if len(every) <= 40:
        return sorted(every)
    return sorted(x for x in every if x in known or (x > 0 and math.log2(x).is_integer()))


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"
