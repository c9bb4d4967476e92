"""The low-shot protocol in the report: the numbers of the table, the curves, the choices."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from selfsup_ray.artifacts import begin, finish, write_json
from selfsup_ray.plots import plot_steps
from selfsup_ray.report_html import Section
from selfsup_ray.report_lowshot import lowshot_section
from selfsup_ray.report_run import Run
from selfsup_ray.stages.embed import EmbedConfig

NUMBERS = [f"top{top}_{group}" for top in (1, 5) for group in ("all", "novel", "base")]


def cell(mean: float) -> dict[str, dict[str, float]]:
    return {name: {"mean": mean, "std": 0.0123} for name in NUMBERS}


def write_stage(run: Path) -> None:
    out = run / "lowshot"
    begin(out, stage="lowshot", config=EmbedConfig(), inputs={})
    table = {
        "criterion": "top5_all",
        "seeds": [1, 2, 3],
        "test": {"1": {"diffusion": cell(0.612), "logistic": cell(0.5)}},
        "val": {"1": {"diffusion": cell(0.7), "logistic": cell(0.6)}},
        "chosen": {
            "1": {
                "niter": {"diffusion": 2},
                "linear": {"lr": 0.01, "weight_decay": 0.1, "batch_size": 16, "iterations": 50},
                "vote": None,
                "fusion": {},
                "validation": {"diffusion": 0.7, "logistic": 0.6},
            }
        },
    }
    curve = {name: {"mean": [0.1, 0.4, 0.612, 0.5], "std": [0, 0, 0, 0]} for name in NUMBERS}
    write_json(out / "table.json", table)
    write_json(out / "curves.json", {s: {"diffusion": {"1": curve}} for s in ("val", "test")})
    facts = {"num_classes": 51, "num_novel": 11, "base_images": 20000, "test_images": 2550}
    finish(out, stage="lowshot", config=EmbedConfig(), inputs={}, seconds=1, facts=facts)


def test_the_section_shows_the_table_with_the_best_in_bold_and_what_was_chosen(tmp_path: Path):
    write_stage(tmp_path)
    made = lowshot_section(Run.open(tmp_path))
    assert isinstance(made, Section)
    assert made.body.count("<b>61.20 ± 1.23</b>") == 4
    assert "50.00 ± 1.23" in made.body and "<b>50.00" not in made.body
    assert "40 base classes have all their labels, 11 novel classes n of them" in made.body
    assert "2 steps" in made.body
    assert "lr 0.01, weight decay 0.1, batch size 16, iterations 50" in made.body
    assert made.body.count("<svg") == 1
    assert json.loads((tmp_path / "lowshot" / "table.json").read_text())["seeds"] == [1, 2, 3]


def test_a_run_without_the_protocol_says_so(tmp_path: Path):
    write_stage(tmp_path)
    (tmp_path / "lowshot" / "done.json").unlink()
    made = lowshot_section(Run.open(tmp_path))
    assert made == "No low-shot protocol: the stage lowshot has not finished in this run."


def test_curves_over_steps_have_a_dot_where_the_number_was_chosen():
    ax = Figure().add_subplot()
    series = {"n = 1": np.array([1.0, 5, 3]), "n = 20": np.array([2.0, 6, 7])}
    plot_steps(series, {"n = 1": 1, "n = 20": 2}, ax, ylabel="top-5, %", title="diffusion")
    lines = ax.get_lines()
    assert [line.get_label() for line in lines[::2]] == ["n = 1", "n = 20"]
    dots = [tuple(np.concatenate(line.get_data())) for line in lines[1::2]]
    assert dots == [(1, 5), (2, 7)]
    assert ax.get_title(loc="left") == "diffusion" or ax.get_title() == "diffusion"
    with pytest.raises(KeyError):
        plot_steps(series, {}, ax, ylabel="", title="")
