"""Patches and dictionaries in the report: what was whitened, and what the entries look like."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from selfsup_ray import plots
from selfsup_ray.ops.whitening import whitened_covariance
from selfsup_ray.report_html import Section, figures, paragraph, percent
from selfsup_ray.report_images import Sheet, thumb
from selfsup_ray.report_run import Run, StageFolder
from selfsup_ray.stages.patch_dictionary import PatchDictionary
from selfsup_ray.stages.patch_pictures import by_size, patch_tiles
from selfsup_ray.stages.whiten import PatchSample

Array = np.ndarray[Any, np.dtype[Any]]

SHOWN = 192
"""Entries of a dictionary, or patches of a sample, in one sheet."""
ACROSS = 24
"""Patches in a row of a sheet."""


def patches_section(run: Run) -> Section | str:
    """Covariances before and after whitening, and the dictionary as patches and whitened."""
    stage = run.stage("whiten")
    if stage is None:
        return "No patches: the stage whiten has not finished in this run."
    sample = PatchSample.open(stage.path)
    body = paragraph(_sampled(stage, sample)) + _covariances(sample)
    made = run.stage("patches")
    body += _sample(sample) if made is None else _dictionary(made)
    return Section("patches", "Patches", body)


def _sampled(stage: StageFolder, sample: PatchSample) -> str:
    config, facts = sample.config, stage.facts
    side = f"{config.patch_size} x {config.patch_size} pixels"
    if config.source != "images":
        return f"{len(sample):,} patches of {config.source} noise in place of {side}."
    levels = "[0, 1]" if config.pixel_scale == "zero_one" else "[-1, 1]"
    text = (
        f"{len(sample):,} patches of {side}, levels in {levels}, drawn uniformly from all "
        f"positions of all images."
    )
    if faint := facts.get("faint"):
        text += f" {faint:,} others were passed over: their norm is below {config.min_norm:g}."
    return text


def _covariances(sample: PatchSample) -> str:
    """Return heat-maps of the covariance of raw and of whitened patches."""
    before, after = sample.covariance, whitened_covariance(sample.covariance, sample.matrix)
    facts, config = sample.facts, sample.config
    drawn = [
        plots.svg(
            partial(
                plots.plot_covariance,
                covariance,
                title=f"{name}: {percent(share)} off diagonal",
            ),
            width=3.2,
            height=2.9,
            label=f"covariance of {name} patches",
        )
        for name, covariance, share in (
            ("raw", before, facts["off_diagonal_before"]),
            (f"whitened ({config.whitening})", after, facts["off_diagonal_after"]),
        )
    ]
    note = (
        f"Covariance of {facts['covariance_patches']:,} patches, each map in units of its largest "
        f"value; the share is that of the absolute values off the diagonal. "
        f"{config.regularization:g} is added to each standard deviation."
    )
    return figures(drawn) + paragraph(note, note=True)


def _sample(sample: PatchSample) -> str:
    """Return the first patches of a sample, which are drawn at random."""
    if sample.channels not in (1, 3):
        return ""
    rows = np.asarray(sample.array.shard(0)[:SHOWN])
    patches = rows.reshape(len(rows), sample.channels, sample.patch_size, sample.patch_size)
    titles = [f"patch {i}" for i in range(len(rows))]
    note = f"{len(rows):,} patches of the sample, at random:"
    return sheet_of(patches, titles, note=note)


def _dictionary(stage: StageFolder) -> str:
    made, facts = PatchDictionary.open(stage.path), stage.facts
    text = f"{facts['entries']:,} entries by {_chosen(stage)}; {_code(stage)}."
    body = "<h3>Dictionary</h3>" + paragraph(text)
    if (curve := facts.get("objective_by_iteration")) is not None:
        body += figures([_objective(np.asarray(curve, np.float64))])
    if made.raw.shape[1] not in (1, 3):
        return body
    entries = by_size(made.counts)[:SHOWN]
    return body + entry_sheets(made, entries, note=_order(made))


def _chosen(stage: StageFolder) -> str:
    config, facts = stage.config, stage.facts
    names = {"kmeans": "k-means", "farthest": "farthest points", "sample": "chance"}
    text = f"{names[config['select']]} among {facts['patches']:,} patches"
    copies = [name for name in ("flips", "negatives") if config[name]]
    return f"{text}, {' and '.join(copies)} added" if copies else text


def _code(stage: StageFolder) -> str:
    config, facts = stage.config, stage.facts
    parts = f"averaged over {config['grid']} x {config['grid']} parts of the image"
    match config["code"]:
        case "hard":
            return f"at each position the {facts['k']:,} nearest are 1, {parts}"
        case "kth":
            return f"at each position the one at rank {facts['k']:,} is 1, {parts}"
    return f"at each position those nearer than the average count by how much, {parts}"


def _order(made: PatchDictionary) -> str:
    shown = f"{min(SHOWN, len(made)):,} of {len(made):,} entries"
    if not made.counts.any():
        return f"{shown}, in the order they were chosen"
    return f"{shown}, those that most patches are near first"


def entry_sheets(made: PatchDictionary, entries: Array, *, note: str) -> str:
    """Return two sheets of some entries of a dictionary: as patches, and whitened by ZCA.

    entries: (n,) ids, n > 0, in the order they are shown; note: what they are.
    """
    titles = [f"entry {i}, {made.counts[i]:,} patches" for i in entries]
    raw = sheet_of(made.raw[entries], titles, note=f"{note}; as patches:")
    return raw + sheet_of(made.zca[entries], titles, note="The same, whitened by ZCA:")


def sheet_of(patches: Array, titles: Sequence[str], *, note: str) -> str:
    """Return a contact sheet of patches (n, C, s, s), n > 0, C = 1 or 3, each at full contrast."""
    sheet = Sheet.of(patch_tiles(patches), columns=min(ACROSS, len(patches)))
    tiles = "".join(thumb(sheet, i, title=title) for i, title in enumerate(titles))
    rows = f'<div class="row">{tiles}</div>'
    return (
        paragraph(note, note=True)
        + f'<div class="{sheet.css_class}" style="{sheet.style}">{rows}</div>'
    )


def _objective(values: Array) -> str:
    steps = np.arange(1, len(values) + 1, dtype=np.float64)
    title = f"k-means: {values[-1]:.4g} after {len(values)} rounds"
    draw = partial(
        plots.plot_series,
        steps,
        {"objective": values},
        ylabel="mean squared distance",
        title=title,
    )
    return plots.svg(draw, width=3.4, height=2.3, label="objective of k-means by round")
