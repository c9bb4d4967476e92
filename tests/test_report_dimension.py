"""The dimension of patches in the report: Figure 5 beside the published curves, the estimates."""

import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from selfsup_ray.artifacts import begin, finish, write_json
from selfsup_ray.config import override
from selfsup_ray.data.published_patches import MEAN_SQUARED, MEDIAN_SQUARED_1024
from selfsup_ray.ops.intrinsic_dimension import SETS
from selfsup_ray.plots import plot_beside, plot_values
from selfsup_ray.report_dimension import dimension_section
from selfsup_ray.report_html import Section
from selfsup_ray.report_published import beside, beside_table
from selfsup_ray.report_run import Run
from selfsup_ray.stages.dimension_config import DimensionConfig


def write_stage(run: Path, changes: dict[str, Any]) -> Section:
    config = override(DimensionConfig(), changes)
    out = run / "dimension"
    begin(out, stage="dimension", config=config, inputs={})
    numbers = {"mean_squared": 0.1234, "median_squared": 0.5678, "mean": 0.35}
    estimate = {"dimension": 17.25, "standard_error": 0.125, "points": 4096, "distinct": 9}
    table = {
        "distances": {name: {str(k): numbers for k in config.all_k} for name in config.sets},
        "levina_bickel": {name: estimate for name in config.sets},
    }
    write_json(out / "dimension.json", table)
    facts = {"points": 1_048_576}
    finish(out, stage="dimension", config=config, inputs={}, seconds=1, facts=facts)
    made = dimension_section(Run.open(run))
    assert isinstance(made, Section)
    return made


def test_measured_and_published_distances_stand_side_by_side(tmp_path: Path):
    made = write_stage(tmp_path, {})
    assert made.body.count("<svg") == 1 and "SQUARED" in made.body
    assert "1,048,576 patches of 5 x 5" in made.body and "256 points for each centroid" in made.body
    for name in SETS:
        assert f"{MEAN_SQUARED[name][1024]:.4f}" in made.body
        assert f"{MEDIAN_SQUARED_1024[name]:.4f}" in made.body
    assert made.body.count("0.1234") == 50 and made.body.count("17.2") == 5


def test_other_patch_sizes_have_no_published_numbers(tmp_path: Path):
    made = write_stage(tmp_path, {"patch_size": 7, "sets": ["original"]})
    assert "published</th>" not in made.body and "0.0306" not in made.body


def test_of_a_thousand_k_the_table_shows_the_powers_of_two_and_the_published_ones(tmp_path: Path):
    made = write_stage(tmp_path, {"between": True, "ks": [2, 1024]})
    shown = re.findall(r'<tr><td class="n">([\d,]+)</td>', made.body)
    assert shown == ["2", "4", "8", "16", "32", "64", "128", "256", "512", "1,024"]


def test_a_run_without_the_stage_says_so(tmp_path: Path):
    write_stage(tmp_path, {})
    (tmp_path / "dimension" / "done.json").unlink()
    made = dimension_section(Run.open(tmp_path))
    assert made == "No dimension of the patches: the stage dimension has not finished in this run."


def test_a_published_series_has_the_color_of_the_measured_one_and_a_dashed_line():
    ax = Figure().add_subplot()
    measured = {"a": {2.0: 1.0, 1.0: 3.0, 64.0: 2.0}, "b": {1.0: 1.0}}
    plot_beside(measured, {"b": {1: 2.0}, "c": {2: 2.0}}, ax, xlabel="k", ylabel="y", title="t")
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert list(lines) == ["a", "b", "b, published", "c, published"]
    assert lines["a"].get_xdata().tolist() == [1, 2, 64]
    assert lines["a"].get_ydata().tolist() == [3, 1, 2]
    assert lines["b"].get_color() == lines["b, published"].get_color() != lines["a"].get_color()
    assert lines["b, published"].get_linestyle() == "--"
    assert ax.get_xscale() == "linear"
    near = Figure().add_subplot()
    plot_beside({"a": {1: 1, 3: 2}}, {}, near, xlabel="", ylabel="", title="", log_x=True)
    assert near.get_xscale() == "log" and near.get_legend() is None


def test_the_table_leaves_a_cell_empty_where_there_is_no_number():
    made = beside_table({"ours": {1: 0.5, 2: 0.25}}, {"ours": {2: 0.75}}, xlabel="N", digits=1)
    cells = re.findall(r'<td class="n">(.*?)</td>', made)
    assert cells == ["1", "0.5", "", "2", "0.2", "0.8"]
    assert '<th class="n">ours, published</th>' in made
    assert beside({"x": {1: 1}}, {}, xlabel="", ylabel="", title="one").count("<svg") == 1


def test_values_are_bars_in_the_order_given():
    import numpy as np

    ax = Figure().add_subplot()
    plot_values(["pca", "none"], np.array([0.8, 0.7]), ax, xlabel="accuracy", title="t")
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([0.8, 0.7])
    assert [text.get_text() for text in ax.get_yticklabels()] == ["pca", "none"]
    assert ax.yaxis_inverted()
