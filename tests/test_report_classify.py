"""Labelled networks in the report: what belongs to which published number, tables and curves."""

from pathlib import Path
from typing import Any

import pytest

from selfsup_ray.artifacts import begin, finish, write_json
from selfsup_ray.config import build, load, to_dict
from selfsup_ray.data.published_patches import (
    BASELINES,
    BY_K,
    BY_SIZE,
    DEPTH,
    published_curve,
    published_depth,
)
from selfsup_ray.errors import ArtifactError
from selfsup_ray.experiment import Experiment
from selfsup_ray.report import write_report
from selfsup_ray.report_classify import classify_section
from selfsup_ray.report_html import Section
from selfsup_ray.report_results import is_collection
from selfsup_ray.report_run import Run
from selfsup_ray.stages.classify_config import ClassifyConfig
from selfsup_ray.stages.patches import PatchesConfig
from selfsup_ray.stages.whiten import WhitenConfig

PARTS = {"classify": ClassifyConfig, "patches": PatchesConfig, "whiten": WhitenConfig}


def config(stage: str, values: dict[str, Any]) -> Any:
    return build(PARTS[stage], values)


def plain(stage: str, **values: Any) -> dict[str, Any]:
    return dict(to_dict(config(stage, values)))


def found(classify: dict[str, Any], *, patches: Any = None, whiten: Any = None) -> str | None:
    made = published_curve(
        plain("classify", **classify),
        patches=plain("patches", **(patches or {})),
        whiten=plain("whiten", **(whiten or {})),
    )
    return None if made is None else made[0]


def model(name: str, **values: Any) -> dict[str, Any]:
    return {"model": {"name": name, **values}}


def test_the_defaults_are_the_published_run():
    assert found({}) == "phi_full"
    assert found(model("phi_hard")) == "phi_hard"
    assert found(model("vanilla")) == "vanilla"
    assert found({}, whiten={"source": "gaussian"}) == "phi_full, random patches"
    assert found(model("phi_full", k=0.25)) == "phi_full"
    assert found({}, whiten={"whitening": "zca"}) == "phi_full", "the codes are the same"


@pytest.mark.parametrize(
    "changed",
    [
        {"classify": model("phi_full", k=16)},
        {"classify": model("phi_full", pool=2)},
        {"classify": model("phi_full", pool_stride=2)},
        {"classify": model("phi_full", batch_norm=False)},
        {"classify": model("phi_full", bottleneck=None)},
        {"classify": model("phi_full", code="kth")},
        {"classify": model("phi_full", maps_per_entry=4)},
        {"classify": model("phi_full", residual="add")},
        {"classify": model("vanilla", size=512)},
        {"classify": model("phi_simple")},
        {"classify": model("cnn")},
        {"classify": {"deeper": [{"name": "code"}]}},
        {"patches": {"size": 512}},
        {"patches": {"unit_norm": True}},
        {"whiten": {"patch_size": 6}},
        {"whiten": {"whitening": "none"}},
        {"classify": model("phi_hard"), "whiten": {"source": "gaussian"}},
    ],
    ids=str,
)
def test_another_setting_has_no_published_run(changed: dict[str, Any]):
    assert (
        found(
            changed.get("classify", {}),
            patches=changed.get("patches"),
            whiten=changed.get("whiten"),
        )
        is None
    )


def depth(classify: dict[str, Any], *, patches: Any = None) -> tuple[str, int] | None:
    parts = {"patches": plain("patches", **(patches or {})), "whiten": plain("whiten")}
    return published_depth(plain("classify", **classify), **parts)


def test_depths_belong_to_the_networks_of_table_4():
    first = model("phi_full", pool=2)
    deeper = {"deeper": [{"name": "code"}] * 3}
    assert depth({**first, **deeper}) == ("phi_full", 4) and depth(first) == ("phi_full", 1)
    layer_wise = {**model("vanilla", pool=2), "deeper": [{"name": "conv"}]}
    assert depth(layer_wise) == ("vanilla", 2)
    assert depth(model("cnn", architecture="VGGc1024d3A", bottleneck=32)) == ("cnn", 3)
    for other in (
        {},
        model("cnn"),
        model("phi_full", pool=2, k=16),
        model("vanilla", pool=2, size=512),
        {**first, "deeper": [{"name": "code", "size": 512}]},
        {**first, "deeper": [{"name": "code", "residual": "cat"}]},
        {**first, **deeper, "sum_logits": True},
    ):
        assert depth(other) is None, other
    assert depth(first, patches={"size": 512}) is None


def test_the_published_numbers_are_those_of_the_tables():
    assert BASELINES["phi_full"].max == 0.8120 and BASELINES["vanilla"].by_epoch[101] == 0.7720
    assert [round(100 * v, 2) for v in DEPTH["phi_hard"]] == [78.33, 65.17, 56.61, 52.65]
    assert list(BY_K) == [2**i for i in range(10)] and max(BY_K, key=BY_K.__getitem__) == 256
    assert list(BY_SIZE) == [1024 * 2**i for i in range(5)]
    assert all(a < b for a, b in zip(BY_SIZE.values(), list(BY_SIZE.values())[1:], strict=False))


COUNTS = {"num_train": 50_000, "num_validation": 0, "num_test": 10_000, "num_classes": 10}


def layer(number: int, accuracies: dict[str, float], *, epochs: int = 10) -> dict[str, Any]:
    first = next(iter(accuracies.values()))
    curve = [
        {"epoch": e, "lr": 0.003, "train_accuracy": 0.5, "test_accuracy": first - 0.01 * abs(9 - e)}
        for e in range(1, epochs + 1)
    ]
    outputs = {
        k: {"max_accuracy": value, "max_epoch": 9, "last_accuracy": value - 0.01}
        for k, value in accuracies.items()
    }
    return {"layer": number, "parameters": 128_362, "outputs": outputs, "curve": curve}


def section(run: Path, classify: dict[str, Any], layers: list[dict[str, Any]]) -> str:
    for stage, values in (("classify", classify), ("patches", {}), ("whiten", {})):
        made = config(stage, values)
        begin(run / stage, stage=stage, config=made, inputs={})
        finish(run / stage, stage=stage, config=made, inputs={}, seconds=1, facts=COUNTS)
    write_json(run / "classify" / "metrics.json", {**COUNTS, "layers": layers})
    shown = classify_section(Run.open(run))
    assert isinstance(shown, Section)
    return shown.body


def test_accuracies_stand_beside_the_published_ones(tmp_path: Path):
    body = section(tmp_path, {}, [layer(1, {"256": 0.7654})])
    assert "50,000 labelled images of 10 classes" in body and "MAXIMUM" in body
    for number in ("76.54", "75.54", "81.20", "80.89", "65.75", "73.96", "128,362"):
        assert number in body, number
    assert body.count("<svg") == 1 and "epoch 50" not in body


def test_several_k_make_figure_8(tmp_path: Path):
    values = {"also_k": [1, 16]}
    outputs = {"256": 0.8, "1": 0.7, "16": 0.75}
    body = section(tmp_path, model("phi_full", **values), [layer(1, outputs)])
    assert "Accuracy by k" in body and body.count("<svg") == 2
    assert "74.77" in body and "79.88" in body and "k, entries that are set" in body
    other = section(tmp_path / "kth", model("phi_full", code="kth", **values), [layer(1, outputs)])
    assert "Accuracy by k" in other and "74.77" not in other


def test_layers_make_the_row_of_table_4(tmp_path: Path):
    layers = [layer(i, {"256" if i == 1 else "128": 0.8 + 0.01 * i}) for i in (1, 2)]
    classify = {**model("phi_full", pool=2), "deeper": [{"name": "code"}]}
    body = section(tmp_path, classify, layers)
    assert "Accuracy by depth" in body and body.count("<svg") == 3
    assert "81.47" in body and "82.62" in body


def test_a_setting_that_was_not_published_stands_alone(tmp_path: Path):
    body = section(tmp_path, model("phi_full", k=16), [layer(1, {"16": 0.7})])
    assert "81.20" not in body and "70.00" in body


def test_a_run_without_networks_says_so(tmp_path: Path):
    section(tmp_path, {}, [layer(1, {"256": 0.7})])
    (tmp_path / "classify" / "done.json").unlink()
    made = classify_section(Run.open(tmp_path))
    assert made == "No labelled network: the stage classify has not finished in this run."


def test_the_runs_of_a_folder_stand_in_one_table(tmp_path: Path):
    section(tmp_path / "table1-phi-full", {"seed": 3}, [layer(1, {"256": 0.7654})])
    deeper = {**model("phi_hard", pool=2), "deeper": [{"name": "code"}]}
    section(tmp_path / "table4", deeper, [layer(1, {"256": 0.8}), layer(2, {"128": 0.6})])
    section(tmp_path / "unfinished", {}, [layer(1, {"256": 0.7})])
    (tmp_path / "unfinished" / "classify" / "done.json").unlink()
    path = write_report(tmp_path)
    text = path.read_text()
    assert path == tmp_path / "report.html" and "2 runs with labelled networks, of 3" in text
    rows = [line.split(",") for line in (tmp_path / "results.csv").read_text().splitlines()]
    assert [row[0] for row in rows[1:]] == ["table1-phi-full", "table4", "table4"]
    for number in ("76.54", "81.20", "80.89", "78.33", "65.17"):
        assert number in text, number
    assert is_collection(tmp_path) and not is_collection(tmp_path / "table4")


def test_a_folder_of_runs_without_networks_is_refused(tmp_path: Path):
    section(tmp_path / "run", {}, [layer(1, {"256": 0.7})])
    (tmp_path / "run" / "classify" / "done.json").unlink()
    wanted = "1 runs, but the stages classify and linear have finished in none"
    with pytest.raises(ArtifactError, match=wanted):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("table1-vanilla", "vanilla"),
        ("table1-phi-full", "phi_full"),
        ("table1-phi-hard", "phi_hard"),
        ("table1-phi-full-random", "phi_full, random patches"),
        ("table1-phi-hard-random", None),
        ("figure8-k", "phi_full"),
        ("thiry", None),
        ("table4-phi-full", ("phi_full", 4)),
        ("table4-phi-hard", ("phi_hard", 4)),
        ("table4-cnn-layer-wise", ("vanilla", 4)),
        ("table4-cnn-1", ("cnn", 1)),
        ("table4-cnn-4", ("cnn", 4)),
    ],
)
def test_every_experiment_of_the_study_finds_its_published_numbers(name: str, wanted: object):
    folder = Path(__file__).parent.parent / "experiments" / "patches"
    made = load(Experiment, folder / f"{name}.yaml")
    parts = {s: to_dict(c) if (c := getattr(made, s)) else {} for s in ("patches", "whiten")}
    curve, depths = (f(to_dict(made.classify), **parts) for f in (published_curve, published_depth))
    assert (curve and curve[0]) == (None if isinstance(wanted, tuple) else wanted)
    assert depths == (wanted if isinstance(wanted, tuple) else None)
