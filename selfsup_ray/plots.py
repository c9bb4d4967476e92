"""The report's figures: arrays in, one thing drawn on one Axes; `svg` owns figure and style."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = np.ndarray[Any, np.dtype[Any]]

INK = "#1b2530"
"""Text and axes while drawing; becomes `currentColor`, so that a figure follows the theme."""
MUTED = "#7d8894"
ACCENT = "#2f6fb3"
"""What a figure shows first; becomes the page's `--accent`, which is lighter on a dark page."""
SERIES = (ACCENT, "#d9822b", "#3f9a63", "#b04a5a", "#7a5ea8", "#8a6d3b", "#c76fa5", "#4d9fa8")
"""Line colours of different lightness, so that they stay apart in grey print."""
HUES = (
    *("#4477aa", "#ee7733", "#228833", "#cc3311", "#aa3377", "#66ccee", "#ccbb44", "#997755"),
    *("#ee99aa", "#777777", "#1b4f72", "#88cc66", "#663399", "#b8860b", "#008080", "#ff99cc"),
)
"""Colours of groups of points, reused in this order when there are more groups."""

_STYLE: Any = {  # matplotlib types the keys of this mapping one by one
    "svg.fonttype": "none",  # text stays text: searchable, and set in the page's own font
    "svg.hashsalt": "selfsup_ray",  # with a fixed salt and no date, equal input gives equal bytes
    "font.size": 9,
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib; wider than what replaces it
    "text.color": INK,
    "text.parse_math": False,  # a class may be called $10
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
}


def svg(draw: Callable[[Axes], None], *, width: float, height: float, label: str) -> str:
    """Return one drawn Axes as an inline SVG that scales to its container and follows the theme.

    width, height: inches at natural size; label: what a screen reader says in place of the figure.
    """
    import matplotlib
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # Harmless here: the page's font draws the text, the missing glyph is only measured.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(buffer, format="svg", transparent=True, dpi=200, metadata={"Date": None})
    return _inline(buffer.getvalue(), label=label)


def _inline(text: str, *, label: str) -> str:
    """Return what of a matplotlib SVG belongs inside a page: no prologue, metadata, fixed size."""
    body = text[text.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = body.replace(INK, "currentColor").replace(ACCENT, f"var(--accent, {ACCENT})")
    body = body.replace("'DejaVu Sans'", "system-ui")
    view = re.search(r'viewBox="([^"]*)"', body)
    assert view is not None, "matplotlib's SVG has no viewBox"
    natural = f"max-width:{float(view[1].split()[2]) * 4 / 3:.0f}px"
    escaped = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    head = f'<svg viewBox="{view[1]}" style="{natural}" role="img" aria-label="{escaped}" '
    head += 'xmlns:xlink="http://www.w3.org/1999/xlink">'
    # Identifiers are unique within a figure only; the page holds many.
    mark = re.sub(r"\W+", "-", label)
    body = re.sub(r'(id="|url\(#|href="#)', rf"\1{mark}-", body[body.index(">") + 1 :])
    return head + body.strip()


def plot_series(
    steps: Array, series: Mapping[str, Array], ax: Axes, *, ylabel: str, title: str
) -> None:
    """One or more quantities by optimizer step; non-finite values leave gaps."""
    for (name, values), color in zip(series.items(), _cycle(SERIES, len(series)), strict=True):
        marker = "o" if len(steps) == 1 else None
        ax.plot(steps, values, color=color, linewidth=1.2, label=name, marker=marker, markersize=3)
    ax.set(xlabel="step", ylabel=ylabel, title=title)
    ax.margins(x=0.01)
    _whole_ticks(ax)
    ax.grid(axis="y", color=MUTED, alpha=0.25, linewidth=0.5)
    if 1 < len(series) <= len(SERIES):
        ax.legend()


def plot_steps(
    series: Mapping[str, Array], chosen: Mapping[str, int], ax: Axes, *, ylabel: str, title: str
) -> None:
    """Curves over the number of diffusion steps t = 0, 1, …; a dot at the chosen t of each."""
    for (name, values), color in zip(series.items(), _cycle(SERIES, len(series)), strict=True):
        ax.plot(np.arange(len(values)), values, color=color, linewidth=1.2, label=name)
        t = chosen[name]
        ax.plot([t], [values[t]], "o", color=color, markersize=4)
    ax.set(xlabel="steps", ylabel=ylabel, title=title)
    ax.margins(x=0.02)
    _whole_ticks(ax)
    ax.grid(axis="y", color=MUTED, alpha=0.25, linewidth=0.5)
    ax.legend(ncols=2)


def plot_beside(
    measured: Mapping[str, Mapping[float, float]],
    published: Mapping[str, Mapping[float, float]],
    ax: Axes,
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    log_x: bool = False,
) -> None:
    """Measured values by x, one line a series; the published ones dashed, hollow, in its color."""
    names = list(dict.fromkeys([*measured, *published]))
    for name, color in zip(names, _cycle(SERIES, len(names)), strict=True):
        for by_x, line, face in ((measured, "-", color), (published, "--", "none")):
            if name not in by_x:
                continue
            x = np.array(sorted(by_x[name]), float)
            y = np.array([by_x[name][at] for at in sorted(by_x[name])], float)
            marker: Any = {"marker": "o", "markersize": 3.5} if len(x) <= 40 else {}
            label = name if face == color else f"{name}, published"
            ax.plot(
                x, y, line, color=color, linewidth=1.2, markerfacecolor=face, label=label, **marker
            )
    if log_x:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    ax.grid(axis="y", color=MUTED, alpha=0.25, linewidth=0.5)
    if len(ax.get_lines()) > 1:
        ax.legend(ncols=2 if len(ax.get_lines()) > 4 else 1)


def plot_values(names: Sequence[str], values: Array, ax: Axes, *, xlabel: str, title: str) -> None:
    """One bar a name, from the top, with its value; the axis starts near the smallest."""
    place = np.arange(len(names))
    ax.barh(place, values, color=ACCENT, height=0.65)
    for y, value in zip(place.tolist(), values.tolist(), strict=True):
        ax.text(value, y, f" {value:.4g}", va="center", fontsize=8)
    ax.set_yticks(place, [shortened(name, 40) for name in names])
    low, high = float(values.min()), float(values.max())
    room = max(high - low, 0.02 * abs(high), 1e-9)
    ax.set_xlim(low - 0.5 * room, high + 0.25 * room)
    ax.invert_yaxis()
    ax.set(xlabel=xlabel, title=title)


class Column(NamedTuple):
    """One axis of parallel coordinates: (n,) heights in [0, 1], and the labels at some heights."""

    name: str
    heights: Array
    ticks: Sequence[tuple[float, str]]


def plot_parallel(columns: Sequence[Column], quality: Array, ax: Axes, *, title: str) -> None:
    """Parallel coordinates: a line a trial over all axes; the best darkest and drawn last.

    quality: (n,) in [0, 1], 1 is the best.
    """
    x = np.arange(len(columns))
    heights = np.stack([column.heights for column in columns], axis=1)
    for i in np.argsort(quality, kind="stable"):
        best = i == int(np.argmax(quality))
        color, width = (ACCENT, 2.2) if best else (INK, 0.8)
        alpha = 1.0 if best else 0.1 + 0.6 * float(quality[i]) ** 2
        ax.plot(x, heights[i], color=color, linewidth=width, alpha=alpha)
    for at, column in enumerate(columns):
        ax.axvline(at, color=MUTED, linewidth=0.8)
        for height, label in column.ticks:
            ax.text(at, height, f" {shortened(label, 16)}", fontsize=8, va="bottom")
    ax.set_xticks(x, [shortened(column.name, 24) for column in columns])
    ax.set_yticks([])
    ax.set(xlim=(-0.1, len(columns) - 0.55), ylim=(-0.04, 1.1), title=title)
    ax.spines[["left", "bottom"]].set_visible(False)


def plot_response(
    x: Array,
    y: Array,
    best: Literal["min", "max"],
    ax: Axes,
    *,
    names: Sequence[str] | None,
    xlabel: str,
    ylabel: str,
    log_x: bool,
) -> None:
    """A dot a trial; lines through the mean and the best at each x, where an x comes twice.

    names: what x = 0, 1, ... stand for; None: x is a number.
    """
    ax.plot(x, y, "o", color=MUTED, markersize=3.5, alpha=0.6)
    at, counts = np.unique(x, return_counts=True)
    if counts.max() > 1:
        choose = np.min if best == "min" else np.max
        groups = [y[x == value] for value in at]
        ax.plot(at, [np.mean(g) for g in groups], color=SERIES[1], linewidth=1.2, label="mean")
        ax.plot(at, [choose(g) for g in groups], color=ACCENT, linewidth=1.2, label="best")
        ax.legend()
    if names is not None:
        ax.set_xticks(np.arange(len(names)), [shortened(name, 12) for name in names])
    elif log_x:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.4g}")
    ax.set(xlabel=xlabel, ylabel=ylabel, title=f"{ylabel} by {xlabel}")
    ax.grid(axis="y", color=MUTED, alpha=0.25, linewidth=0.5)


def plot_cluster_sizes(sizes: Array, ax: Axes) -> None:
    """Images per cluster, largest first; the dashed line marks a balanced split."""
    order = np.sort(sizes)[::-1]
    if len(order) <= 200:
        ax.bar(np.arange(len(order)), order, color=ACCENT, width=0.8)
    else:  # bars narrower than a pixel print as noise
        ax.fill_between(np.arange(len(order)), order, step="mid", color=ACCENT, linewidth=0)
    ax.axhline(sizes.mean(), linestyle="--", color=INK, linewidth=0.8, label="balanced")
    title = f"{len(sizes):,} clusters, {sizes.sum():,} images"
    ax.set(xlabel="cluster, by size", ylabel="images", title=title)
    _whole_ticks(ax)
    ax.legend()


def plot_confidence(counts: Array, edges: Array, ax: Axes) -> None:
    """Share of images by probability of their own cluster.

    counts: (bins,) images; edges: (bins + 1,) in [0, 1].
    """
    share = 100 * counts / max(counts.sum(), 1)
    ax.bar(edges[:-1], share, width=np.diff(edges), align="edge", color=ACCENT, linewidth=0)
    sure = 100 * counts[edges[:-1] >= 0.9 - 1e-9].sum() / max(counts.sum(), 1)
    title = f"{sure:.0f} % of images above 0.9"
    ax.set(xlabel="probability of the image's cluster", ylabel="% of images", title=title)
    ax.set_xlim(0, 1)


def plot_neighbor_ranks(
    similarity: Array, agreement: Array | None, ax: Axes, *, num_images: int
) -> None:
    """Cosine similarity by neighbour rank: median and the middle 80 %; agreement where labels are.

    similarity: (k, 3) quantiles 0.1, 0.5, 0.9; agreement: (k,) share in [0, 1] of neighbours with
    the image's own label, or None.
    """
    ranks = np.arange(1, len(similarity) + 1)
    ax.fill_between(ranks, similarity[:, 0], similarity[:, 2], color=ACCENT, alpha=0.2, linewidth=0)
    ax.plot(
        ranks, similarity[:, 1], color=ACCENT, linewidth=1.4, label="similarity, median and 80 %"
    )
    if agreement is not None:
        ax.plot(
            ranks, agreement, "s--", color=SERIES[1], markersize=3, linewidth=1, label="same label"
        )
    top = max(1.0, float(similarity.max()))
    ax.set(xlabel="neighbor rank", ylabel="cosine similarity, share", ylim=(None, top * 1.02))
    ax.set_title(f"neighbors of {num_images:,} images")
    _whole_ticks(ax)
    ax.legend(loc="best")


def plot_in_degrees(counts: Array, ax: Axes) -> None:
    """Share of images by how often they are listed as a neighbor, both axes logarithmic.

    counts: (m + 1,) images that are listed 0..m times; below 1 the horizontal axis is linear.
    """
    degrees = np.flatnonzero(counts)
    share = 100 * counts[degrees] / counts.sum()
    ax.scatter(degrees, share, s=9, color=ACCENT, linewidths=0)
    mean = float((np.arange(len(counts)) * counts).sum() / counts.sum())
    ax.axvline(mean, linestyle="--", color=INK, linewidth=0.8, label=f"mean {mean:.3g}")
    ax.set_xscale("symlog", linthresh=1)
    ax.set_yscale("log")
    ax.set_xlim(left=-0.3)
    for axis in (ax.xaxis, ax.yaxis):  # the scale's own labels are formulas: 10^{0}
        axis.set_major_formatter(lambda value, _: f"{value:,g}")
        axis.set_minor_formatter(lambda value, _: "")
    title = f"listed at most {int(degrees.max()):,} times"
    ax.set(xlabel="times listed as a neighbor", ylabel="% of images", title=title)
    ax.legend()


def plot_confusion(
    confusion: Array,
    ax: Axes,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    share_of: Literal["class", "cluster"],
) -> None:
    """Classes (rows) by clusters (columns); numbers are images, the shade is a share.

    confusion: (C, K) counts, columns already in the order to draw.
    """
    axis = 1 if share_of == "class" else 0
    share = confusion / np.maximum(confusion.sum(axis=axis, keepdims=True), 1)
    cells = np.zeros((*share.shape, 4))
    cells[..., :3] = np.array([0x2F, 0x6F, 0xB3]) / 255
    cells[..., 3] = np.sqrt(
        share
    )  # alpha, not white: works on a dark page; the root shows rare mixes
    ax.imshow(cells, aspect="auto", interpolation="nearest")
    if confusion.size <= 600:
        for (i, j), count in np.ndenumerate(confusion):
            color = "white" if share[i, j] > 0.35 else INK
            if count:
                ax.text(j, i, f"{count:,}", ha="center", va="center", color=color, fontsize=7)
    few = [shortened(name, 22) for name in rows] if len(rows) <= 60 else []
    ax.set_yticks(np.arange(len(few)), few)
    few = list(columns) if len(columns) <= 60 else []
    ax.set_xticks(np.arange(len(few)), few)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set(xlabel="cluster, in the order of its class", ylabel="class")


def plot_covariance(covariance: Array, ax: Axes, *, title: str) -> None:
    """A covariance (d, d) as a heat-map in units of its largest value: positive blue, else orange.

    The root of a value is its opacity, so that small ones are seen.
    """
    ax.imshow(covariance_cells(covariance), interpolation="nearest")
    ax.tick_params(length=0)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set(xlabel="channel, row, column of a pixel", title=title)


def covariance_cells(covariance: Array) -> Array:
    """Return the colors of a covariance (d, d) with their opacity: (d, d, 4) in [0, 1]."""
    sizes = np.abs(covariance) / max(float(np.abs(covariance).max()), 1e-300)
    cells = np.zeros((*covariance.shape, 4))
    blue, orange = np.array([0x2F, 0x6F, 0xB3]) / 255, np.array([0xD9, 0x82, 0x2B]) / 255
    cells[..., :3] = np.where((covariance >= 0)[..., None], blue, orange)
    cells[..., 3] = np.sqrt(sizes)
    return cells


def plot_map(
    xy: Array, groups: Array, ax: Axes, *, names: Mapping[int, str], title: str, hues: Array
) -> None:
    """A 2-D map of images coloured by group, each large group named at its median point.

    xy: (n, 2); groups: (n,) int, -1 = unknown (grey); names: the text at each group to be named;
    hues: (n,) int index into HUES, taken modulo their number.
    """
    known = groups >= 0
    colors = np.array(HUES)[hues % len(HUES)]
    size = float(np.clip(22000 / max(len(xy), 1), 5, 40))
    dot: Any = {"s": size, "linewidths": 0, "rasterized": True}
    ax.scatter(xy[~known, 0], xy[~known, 1], color=MUTED, alpha=0.35, **dot)
    ax.scatter(xy[known, 0], xy[known, 1], color=list(colors[known]), alpha=0.75, **dot)
    for group, name in names.items():
        x, y = np.median(xy[groups == group], axis=0)
        box = {"boxstyle": "round,pad=0.2", "fc": "white", "ec": "none", "alpha": 0.8}
        text = shortened(name, 18)
        ax.text(x, y, text, ha="center", va="center", fontsize=7.5, color="#111111", bbox=box)
    ax.set(xticks=[], yticks=[], title=title, aspect="equal")
    ax.spines[:].set_visible(False)


def shortened(text: str, length: int) -> str:
    """Return text cut to at most `length` characters, with an ellipsis where cut."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def _cycle(colors: Sequence[str], n: int) -> list[str]:
    return [colors[i % len(colors)] for i in range(n)]


def _whole_ticks(ax: Axes) -> None:
    """Put ticks at whole numbers only: there is no cluster 2.5."""
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
