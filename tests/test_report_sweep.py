"""The page of a sweep: lines over numbers, bars over names, means over seeds, published values."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from selfsup_ray.cluster.tune import Trial
from selfsup_ray.report_sweep import (
    PUBLISHED,
    PUBLISHED_ROWS,
    Published,
    StageCost,
    write_sweep_report,
)
from selfsup_ray.report_sweep_space import Axis, axis, column, is_seed, text
from selfsup_ray.sweeping import prepared

METRIC = "classify.max_accuracy"
ROOT = Path(__file__).parent.parent


def trial(value: float, error: str | None = None, **changes: Any) -> Trial:
    named = {key.replace("__", "."): item for key, item in changes.items()}
    return Trial(named, {} if error else {METRIC: value}, error, 12.5)


def written(out: Path, trials: list[Trial], published: Published | None = None) -> str:
    out.mkdir(exist_ok=True)
    path = write_sweep_report(out, trials, metric=METRIC, published=published)
    assert path == out / "report.html"
    return path.read_text()


def test_the_published_curve_stands_beside_the_key_it_was_measured_over(tmp_path: Path):
    trials = [trial(0.8, classify__model__k=256), trial(0.7, classify__model__k=1)]
    text = written(tmp_path / "k", trials, "patches_k")
    assert "here, published" in text and "0.7477" in text and "0.8080" in text
    other = written(
        tmp_path / "other", [trial(0.8, patches__size=9), trial(0.7, patches__size=8)], "patches_k"
    )
    assert "published" not in other
    assert (
        written(
            tmp_path / "size",
            [trial(0.8, patches__size=1024), trial(0.7, patches__size=2048)],
            "patches_size",
        ).count("0.8392")
        == 1
    )


def test_every_published_series_is_named_and_drawn_by_one_sweep(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    found: dict[Published, list[Path]] = {}
    for path in sorted(Path("experiments/sweeps").glob("*.yaml")):
        made, _ = prepared(path, {})
        if made.published is not None:
            found.setdefault(made.published, []).append(path)
            keys, values = PUBLISHED_ROWS.get(made.published, ((), {}))
            if made.published in PUBLISHED:
                key, points = PUBLISHED[made.published]
                keys, values = (key,), {(text(value),): point for value, point in points.items()}
            assert tuple(key for key in made.space if not is_seed(key)) == keys
            choices = [[text(value) for value in made.space[key].choice or ()] for key in keys]
            assert {*itertools.product(*choices)} >= {
                tuple(str(value) for value in row) for row in values
            }
    assert found.keys() == PUBLISHED.keys() | PUBLISHED_ROWS.keys()


def test_the_published_table_of_batch_norms_has_the_means_of_the_trials(tmp_path: Path):
    keys, known = PUBLISHED_ROWS["byol_bn"]
    trials = [
        Trial(dict(zip(keys, values, strict=True)), {METRIC: number}, None, 1.0)
        for values, number in (
            (("hidden", "hidden", "hidden"), 0.4),
            ((None, "hidden", None), 0.3),
            ((None, None, None), 0.0125),
        )
    ]
    page = written(tmp_path / "bn", trials, "byol_bn")
    rows = re.findall(r"<tr>(.*?)</tr>", page, flags=re.S)
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, flags=re.S) for row in rows]
    assert [*keys, METRIC, f"{METRIC}, published"] in cells
    assert ["hidden", "hidden", "hidden", "0.4000", "0.6274"] in cells
    assert ["none", "hidden", "none", "0.3000", "0.5067"] in cells
    assert ["none", "none", "none", "0.0125", "0.0156"] in cells
    assert ["hidden", "none", "hidden", "", "0.6266"] in cells  # no trial yet
    assert sum(len(row) == 5 for row in cells) == 1 + len(known)


def test_published_runs_of_one_setting_are_beside_the_mean_over_seeds(tmp_path: Path):
    runs = [trial(0.80 + i / 100, classify__seed=i) for i in range(3)]
    page = written(tmp_path / "seeds", runs, "patches_seeds")
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>.*?</tr>", page)]
    assert ["0.8100", "0.8112"] in cells
    kinds = [trial(0.6, whiten__source="gaussian"), trial(0.7, whiten__source="uniform")]
    page = written(tmp_path / "noise", kinds, "patches_noise")
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>.*?</tr>", page)]
    assert ["gaussian", "0.6000", "0.7636"] in cells and ["images", "", "0.8120"] in cells


def test_names_make_bars_and_two_keys_make_a_line_each(tmp_path: Path):
    kinds = [trial(0.8, whiten__whitening="pca"), trial(0.7, whiten__whitening="none")]
    text = written(tmp_path / "kinds", kinds)
    assert "whitening pca" in text and text.count("<svg") == 1
    grid = [
        trial(0.5 + k / 100 + (name == "zca"), classify__model__k=k, whiten__whitening=name)
        for k in (1, 2, 4)
        for name in ("pca", "zca")
    ]
    text = written(tmp_path / "grid", grid)
    assert '<th class="n">whitening pca</th><th class="n">whitening zca</th>' in text


def test_trials_that_differ_in_the_seed_are_one_point_with_its_deviation(tmp_path: Path):
    trials = [trial(0.8 + s / 100, classify__seed=s, patches__size=64) for s in (0, 2)]
    text = written(tmp_path, trials)
    assert '<td class="n">0.8100</td><td class="n">0.0100</td><td class="n">0.8200</td>' in text
    assert "seeds" in text


def test_failed_trials_and_nested_values_are_in_the_table(tmp_path: Path):
    trials = [
        trial(0.8, diffuse__operator={"tau": 2.0}),
        trial(0, "out of memory", diffuse__operator={}),
    ]
    text = written(tmp_path, trials)
    assert "out of memory" in text and "1 failed" in text and "tau" in text
    only = written(tmp_path / "none", [trial(0, "all failed", a__b=1)])
    assert "all failed" in only


@pytest.mark.parametrize("value", [None, True, "x"])
def test_a_value_that_is_no_number_has_no_place_on_an_axis(tmp_path: Path, value: Any):
    trials = [
        trial(0.8, classify__model__bottleneck=32),
        trial(0.7, classify__model__bottleneck=value),
    ]
    assert "bottleneck 32" in written(tmp_path, trials)


def test_a_list_of_layers_is_a_value_like_any_other(tmp_path: Path):
    layers = ([{"name": "code"}], [{"name": "code", "residual": "add"}])
    trials = [trial(0.8 - i / 10, classify__deeper=one) for i, one in enumerate(layers)]
    assert "residual" in written(tmp_path, trials)


def test_a_sweep_over_two_keys_has_parallel_coordinates_and_a_response_to_each(tmp_path: Path):
    trials = [
        trial(0.5 + k / 100, patches__size=size, scan__k=k, whiten__whitening="pca")
        for k in (1, 2, 16)
        for size in (64, 128)
    ]
    early = Trial({**trials[0].changes, "scan.k": 3}, {}, None, 2.0, stopped=1.5)
    text = written(tmp_path, [*trials, early])
    assert f"{METRIC}: parallel coordinates" in text
    assert f'aria-label="{METRIC} by size"' in text and f'aria-label="{METRIC} by k"' in text
    assert "by whitening" not in text, "the same in all trials"
    assert "7 trials, 1 ended early, 0 failed" in text and "stopped at epoch 1.5" in text


def test_axes_of_parallel_coordinates_go_from_0_to_1_by_logarithm_or_by_name():
    sizes = column(axis("patches.size", [1, 4, 16, 4]), "size")
    assert sizes.heights.tolist() == [0, 0.5, 1, 0.5]
    assert [label for _, label in sizes.ticks] == ["1", "4", "16"]
    assert column(axis("a.b", [2.0, 3.0, 4.0]), "b").heights.tolist() == [0, 0.5, 1]
    names = column(axis("w.kind", ["zca", None, "zca"]), "kind")
    assert names.heights.tolist() == [0, 1, 0] and names.ticks == [(0, "zca"), (1, "none")]
    many: Axis = axis("a.b", list(range(20)))
    assert [label for _, label in column(many, "b").ticks] == ["0", "19"]


def test_the_page_says_what_sharing_saved(tmp_path: Path):
    costs = [StageCost("patches", 3, 4, 60.0, 540.0), StageCost("scan", 27, 27, 270.0, 270.0)]
    path = write_sweep_report(tmp_path, [trial(0.8, a__b=1)], metric=METRIC, costs=costs)
    text = path.read_text()
    assert "time without sharing" in text
    cells = [cell.split("<")[0] for cell in text.split('<td class="n">')]
    assert cells[-12:-8] == ["3", "4", "60 s", "540 s"] or "9 min" in text
