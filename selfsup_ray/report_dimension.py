"""How many dimensions patches fill, in the report: distances to centroids, and the estimates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from selfsup_ray.artifacts import read_json
from selfsup_ray.data.published_patches import MEAN_SQUARED, MEDIAN_SQUARED_1024
from selfsup_ray.report_html import Section, paragraph, table
from selfsup_ray.report_published import beside
from selfsup_ray.report_run import Run, StageFolder

NAMES = {
    "original": "original",
    "whitened": "whitened",
    "whitened_shuffled": "whitened, shuffled",
    "shuffled": "shuffled",
    "gaussian": "Gaussian",
}


def dimension_section(run: Run) -> Section | str:
    """Mean squared distance to the nearest of k centroids (Figure 5), and Levina and Bickel's."""
    stage = run.stage("dimension")
    if stage is None:
        return "No dimension of the patches: the stage dimension has not finished in this run."
    made = read_json(stage.path / "dimension.json")
    measured = {
        NAMES[name]: {float(k): found["mean_squared"] for k, found in by_k.items()}
        for name, by_k in made["distances"].items()
    }
    size = stage.config["patch_size"]
    known = MEAN_SQUARED if size == 5 else {}
    published = {NAMES[name]: known[name] for name in made["distances"] if name in known}
    body = paragraph(_setting(stage)) + beside(
        measured,
        published,
        xlabel="k, centroids",
        ylabel="mean squared distance",
        title=f"squared distance of {size} x {size} patches to the nearest centroid",
        digits=4,
    )
    body += "<h3>Numbers of dimensions</h3>" + paragraph(_explained(stage), note=True)
    body += _estimates(made, has_published=size == 5)
    return Section("dimension", "Dimension of the patches", body)


def _setting(stage: StageFolder) -> str:
    config, facts = stage.config, stage.facts
    seen = config["points_per_centroid"]
    size, smallest = config["patch_size"], 100 * config["smallest_share"]
    return (
        f"{facts['points']:,} patches of {size} x {size} pixels. In each set the {smallest:g} % of "
        f"smallest norm are left out and the others made unit vectors. k-means sees "
        f"{'all' if seen is None else f'{seen} points for each centroid'}; all are measured. "
        f"The distance is SQUARED, as published; distances.csv has both. Published: CIFAR-10 test "
        f"images."
    )


def _explained(stage: StageFolder) -> str:
    made = stage.config["levina_bickel"]
    return (
        f"Maximum likelihood of Levina and Bickel (2004), mean over neighbors {made['first']} to "
        f"{made['last']} of {made['queries']:,} of the unit vectors, copies of a point counted "
        f"once. A unit vector has one dimension less than the patch. The estimate is low where "
        f"there are many dimensions: so many points do not fill them."
    )


def _estimates(made: Mapping[str, Any], *, has_published: bool) -> str:
    largest = max(int(k) for by_k in made["distances"].values() for k in by_k)
    head = ["set", "dimension", "standard error", f"median squared distance, k = {largest}"]
    is_compared = has_published and largest == 1024
    rows = []
    for name, found in made["levina_bickel"].items():
        median = made["distances"][name][str(largest)]["median_squared"]
        numbers = (f"{found['dimension']:.1f}", f"{found['standard_error']:.2f}", f"{median:.4f}")
        other = (f"{MEDIAN_SQUARED_1024[name]:.4f}",) if is_compared else ()
        rows.append((NAMES[name], *numbers, *other))
    if is_compared:
        head.append("published")
    return table(head, rows, numeric=range(1, len(head)))
