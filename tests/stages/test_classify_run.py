"""classify inside an experiment: from images to the report's section, planned, with and without."""

from pathlib import Path
from typing import Any

import pytest

from selfsup_ray.config import build, override
from selfsup_ray.costs_classify import NetworkCost, classify_cost
from selfsup_ray.data.synthetic import write_shapes
from selfsup_ray.errors import ConfigError
from selfsup_ray.experiment import Experiment
from selfsup_ray.pipeline import run_experiment
from selfsup_ray.planning import plan_experiment
from selfsup_ray.stages.classify import Classified
from selfsup_ray.stages.classify_config import ClassifyConfig
from selfsup_ray.steps import open_artifact

HERE = {"workers": 0}


def shapes(folder: Path, photos: str = "photos") -> dict[str, Any]:
    return {
        "out": str(folder / "runs" / photos),
        "ingest": {"source": str(folder / photos), "image_size": 12, "resources": HERE},
        "whiten": {
            "patches": 512,
            "patch_size": 3,
            "without": "*[05].png",
            "resources": HERE,
        },
        "patches": {"size": 16, "patches_per_entry": 32, "k": 4, "resources": HERE},
        "classify": {
            "model": {"name": "phi_full", "k": 4, "bottleneck": 6},
            "test": {"name": "source", "pattern": "*[05].png"},
            "epochs": 3,
            "batch_size": 16,
            "optim": {"name": "sgd", "lr": 0.01, "weight_decay": 0},
            "resources": HERE,
        },
    }


def test_an_experiment_trains_reports_and_is_current_afterwards(tmp_path: Path):
    write_shapes(tmp_path / "photos", 160, size=12)
    made = build(Experiment, shapes(tmp_path))
    planned = {step.stage: step for step in plan_experiment(made).steps}
    assert planned["classify"].state == "run"
    assert planned["classify"].cost.seconds and planned["classify"].cost.disk_bytes
    result = run_experiment(made)
    found = open_artifact(made.folder("classify"))
    assert isinstance(found, Classified)
    assert len(found.split.test) == 32 and found.max_accuracy > 0.4
    assert plan_experiment(made).to_run == ()
    assert "Labelled networks" in result.report.read_text()
    assert "test_accuracy" in (made.folder("classify") / "metrics.jsonl").read_text()


def test_images_without_labels_leave_classify_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write_shapes(tmp_path / "classes", 160, size=12)
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (tmp_path / "classes").rglob("*.png"):
        path.rename(flat / path.name)
    made = build(Experiment, shapes(tmp_path, "flat"))
    run_experiment(made)
    assert "classify: left out, since no image has a label" in caplog.text
    assert not (made.folder("classify") / "done.json").exists()


def test_a_network_on_codes_needs_a_dictionary_and_a_convolution_none(tmp_path: Path):
    values = {k: v for k, v in shapes(tmp_path).items() if k not in ("whiten", "patches")}
    with pytest.raises(ConfigError, match=r"classify.model.name=phi_full needs patches"):
        build(Experiment, values)
    values["classify"] = {**values["classify"], "model": {"name": "vanilla"}}
    assert build(Experiment, values).inputs("classify") == ("ingest",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"whiten.source": "gaussian"}, r"whiten.source=gaussian is .*classify.deeper.0.source=m"),
        ({"patches.select": "sample"}, r"patches.select=sample is .*deeper.0.select=kmeans"),
        ({"patches.unit_norm": True}, r"say unit_norm=True there too"),
        ({"whiten.whitening": "none"}, r"whiten.whitening=none is for one layer"),
    ],
)
def test_layers_whose_dictionaries_differ_without_a_word_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
):
    deep = override(build(Experiment, shapes(tmp_path)), {"classify.deeper": [{"name": "code"}]})
    with pytest.raises(ConfigError, match=message):
        override(deep, changes)
    key = next(iter(changes)).split(".")[1]
    if key != "whitening":
        layer = {"name": "code", key: next(iter(changes.values()))}
        assert override(deep, {**changes, "classify.deeper": [layer]})


def test_the_seed_of_the_experiment_reaches_the_network(tmp_path: Path):
    from selfsup_ray.experiment import seeded

    made = seeded(override(build(Experiment, shapes(tmp_path)), {"seed": 3}))
    assert made.classify is not None and made.classify.seed == 3


def cost(**values: Any) -> NetworkCost:
    config = build(ClassifyConfig, values)
    return classify_cost(config, n=60_000, side=32, entries=1024, patch_size=5)


def test_estimates_grow_with_the_work():
    full, hard = cost(), cost(model={"name": "phi_hard"})
    assert cost(epochs=400).seconds == pytest.approx(2 * full.seconds)
    assert hard.seconds < full.seconds
    cached = cost(cache_codes=True)
    assert cached.seconds < full.seconds
    # 36 x 36 positions of an image and of its mirror image, 128 bytes each.
    assert cached.disk_bytes - full.disk_bytes == 60_000 * 2 * 36 * 36 * 128
    deep = cost(model={"name": "phi_full", "pool": 2}, deeper=[{"name": "code"}] * 3)
    assert deep.seconds > 4 * full.seconds / 2 and "4 layers" in deep.assumes
    assert cost(label_budget=5000).seconds < full.seconds / 5
    several = cost(model={"name": "phi_full", "also_k": [1, 2, 4]})
    assert full.seconds < several.seconds < 4 * full.seconds
    networks = [cost(model={"name": "cnn", "architecture": f"VGGc64d{d}"}) for d in (1, 3)]
    assert networks[0].seconds < networks[1].seconds
    assert cost(model={"name": "phi_simple", "k": 64}).memory_bytes > 10 * full.memory_bytes


def test_the_estimate_for_the_papers_network_counts_its_products():
    """Code, map, and as much for the map's gradient: 3 x 2 x 784 x 1024 x 75 an image."""
    made = cost(epochs=1, resources={"workers": 1})
    products = 50_000 * 2.0 * 784 * 1024 * 75 * (3 + 0.2 * 2)
    assert made.seconds == pytest.approx(products / 130e9, rel=0.05)
