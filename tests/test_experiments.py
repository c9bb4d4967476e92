"""Every file in experiments/ loads, says on top what it is for, and holds the papers' values."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from selfsup_ray import cli
from selfsup_ray.config import flatten, load, override, to_dict
from selfsup_ray.data.published_patches import BY_K, MEAN_SQUARED
from selfsup_ray.experiment import Experiment
from selfsup_ray.report_sweep import PUBLISHED as PUBLISHED_SWEEPS
from selfsup_ray.sweeping import prepared

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "experiments").rglob("*.yaml"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


def header(path: Path) -> dict[str, str]:
    """Return the comment lines at the top by their first word; continued lines joined."""
    found: dict[str, str] = {"title": ""}
    last = "title"
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        text = line.removeprefix("# ").removeprefix("#").rstrip()
        word = text.split(":")[0]
        last = word if word in ("Command", "Cost", "Expect") else last
        found[last] = f"{found.get(last, '')} {text.removeprefix(f'{word}:')}".strip()
    return found


def is_sweep(path: Path) -> bool:
    return path.parent.name == "sweeps"


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_says_on_top_what_it_is_its_command_cost_and_result(name: str):
    found = header(ROOT / name)
    assert found["title"] and not found["title"].endswith(":")
    for part in ("Command", "Cost", "Expect"):
        assert len(found.get(part, "")) > 20, f"{name} does not say its {part}"


@pytest.mark.parametrize("name", NAMES)
def test_the_command_on_top_is_one_that_loads_this_file(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    command = next(
        line.split("Command:")[1]
        for line in (ROOT / name).read_text().splitlines()
        if "Command:" in line
    )
    program, *arguments = shlex.split(command)
    options = cli.parsed(arguments)
    assert program == "selfsup-ray"
    if is_sweep(ROOT / name):
        assert options.sweep == Path(name)
        prepared(options.sweep, dict(options.changes))
    else:
        assert options.experiment == Path(name)
        load(Experiment, options.experiment, dict(options.changes))


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_writes_below_runs_under_its_own_name(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(ROOT)
    path = Path(name)
    if is_sweep(path):
        made, _ = prepared(path, {})
        assert made.out == Path("runs/sweeps") / path.stem
    else:
        own = Path("runs", *path.with_suffix("").parts[1:])  # experiments/patches/a: runs/patches/a
        assert load(Experiment, path).out in (own, Path(str(own).removesuffix("-folder")))


def values(name: str) -> dict[str, Any]:
    return flatten(to_dict(load(Experiment, ROOT / "experiments" / f"{name}.yaml")))


# SCAN's configs (Van Gansbeke et al. 2020, public code), one row of its table of defaults each.
SIMCLR = {
    "pretext.method.name": "simclr",
    "pretext.method.temperature": 0.1,
    "pretext.method.head.dim": 128,
    "pretext.backbone.name": "resnet18",
    "pretext.epochs": 500,
    "pretext.batch_size": 512,
    "pretext.optim.name": "sgd",
    "pretext.optim.lr": 0.4,
    "pretext.optim.momentum": 0.9,
    "pretext.optim.weight_decay": 1e-4,
    "pretext.optim.nesterov": False,
    "pretext.schedule.name": "cosine",
    "pretext.schedule.final_ratio": pytest.approx(0.1**3),
    "pretext.views.name": "scan_simclr",
    "pretext.views.scale": [0.2, 1.0],
}
SMALL = {
    "graph.k": 20,
    "scan.num_clusters": 10,
    "scan.num_heads": 1,
    "scan.num_neighbors": 20,
    "scan.entropy_weight": 5.0,
    "scan.freeze_backbone": False,
    "scan.batch_size": 128,
    "scan.optim.name": "adam",
    "scan.optim.lr": 1e-4,
    "scan.optim.weight_decay": 1e-4,
    "scan.schedule.name": "constant",
    "scan.views.name": "ours",
    "selflabel.threshold": 0.99,
    "selflabel.class_balancing": True,
    "selflabel.ema": None,
    "selflabel.batch_size": 1000,
    "selflabel.optim.name": "adam",
    "selflabel.optim.lr": 1e-4,
    "selflabel.optim.weight_decay": 1e-4,
}
IMAGENET = {
    "pretext.backbone.name": "resnet50",
    "pretext.epochs": 0,
    "graph.k": 50,
    "scan.num_heads": 10,
    "scan.num_neighbors": 50,
    "scan.entropy_weight": 5.0,
    "scan.freeze_backbone": True,
    "scan.epochs": 100,
    "scan.optim.name": "sgd",
    "scan.optim.lr": 5.0,
    "scan.optim.momentum": 0.9,
    "scan.optim.weight_decay": 0,
    "scan.optim.nesterov": False,
    "scan.views.name": "scan_simclr",
    "scan.views.size": 224,
}
TEACH = {
    "selflabel.threshold": 0.99,
    "selflabel.class_balancing": False,
    "selflabel.ema": 0.999,
    "selflabel.epochs": 25,
    "selflabel.batch_size": 512,
    "selflabel.optim.name": "sgd",
    "selflabel.optim.lr": 0.03,
    "selflabel.optim.weight_decay": 0,
    "selflabel.views.cutout": 75,
}
CIFAR = {"scan.epochs": 50, "selflabel.epochs": 200, "scan.views.cutout": 16}
STL = {"scan.epochs": 100, "selflabel.epochs": 100, "scan.views.cutout": 32}
# Low-shot diffusion (Douze et al. 2018, public code).
LOW_SHOT = {
    "reduce.dim": 256,
    "lowshot.k": 30,
    "lowshot.niter": 40,
    "lowshot.shots": [1, 2, 5, 10, 20],
    "lowshot.seeds": [1, 2, 3, 4, 5],
    "lowshot.draw": "legacy",
    "lowshot.diffusion.weights": "constant",
    "lowshot.diffusion.normalize_columns": True,
    "lowshot.logistic.lr": [1e-2, 1e-3, 1e-4],
    "lowshot.logistic.weight_decay": [0, 0.01, 0.1],
    "lowshot.logistic.batch_size": [16, 64, 128],
    "lowshot.logistic.iterations": 75_000,
    "lowshot.logistic.eval_every": 500,
}
# Networks on patch dictionaries (Brutzkus et al. 2022, public code).
FIGURE_5 = {
    "dimension.patch_size": 5,
    "dimension.points": 1_048_576,
    "dimension.between": True,
    "dimension.whitening": "pca",
    "dimension.regularization": 1e-3,
    "dimension.smallest_share": 0.01,
    "dimension.points_per_centroid": 256,
    "dimension.iterations": 25,
    "dimension.levina_bickel.first": 10,
    "dimension.levina_bickel.last": 20,
}
FIGURE_8 = {
    "whiten.patches": 262_144,
    "whiten.patch_size": 5,
    "whiten.regularization": 1e-3,
    "whiten.min_norm": 0.01,
    "whiten.pixel_scale": "zero_one",
    "patches.size": 1024,
    "patches.iterations": 25,
    "classify.model.name": "phi_full",
    "classify.model.pool": 4,
    "classify.model.bottleneck": 32,
    "classify.epochs": 200,
    "classify.batch_size": 64,
    "classify.optim.lr": 0.003,
    "classify.optim.momentum": 0.9,
    "classify.optim.weight_decay": 0,
    "classify.schedule.milestones": [100, 150],
    "classify.views.padding": 4,
}
TABLE_1 = FIGURE_8 | {
    "whiten.source": "images",
    "patches.k": 256,
    "classify.model.k": 256,
    "classify.model.batch_norm": True,
}
VANILLA = {key: want for key, want in TABLE_1.items() if key.startswith("classify")}
del VANILLA["classify.model.k"]
TABLE_2 = TABLE_1 | {
    "whiten.patches": 65_536,
    "patches.size": 256,
    "patches.k": 64,
    "classify.model.k": 64,
    "classify.batch_size": 32,
}
NO_LAYERS: dict[str, Any] = {"classify.model.pool": None, "classify.model.batch_norm": False}
SIMPLE = {k: v for k, v in TABLE_2.items() if k.split(".")[-1] not in ("pool", "batch_norm")}
del SIMPLE["classify.model.bottleneck"]
CNN = {k: v for k, v in VANILLA.items() if "model" not in k}
# MoCo's linear probe (He et al. 2020, public code), SimCLR's fine-tuning (Chen et al. 2020, B.5).
EVALUATE = {
    "linear.name": "moco",
    "linear.epochs": 100,
    "linear.batch_size": 256,
    "linear.optim.lr": 30.0,
    "linear.optim.weight_decay": 0,
    "linear.schedule.milestones": [60, 80],
    "linear.schedule.rate": 0.1,
    "linear.crop": [0.08, 1.0],
    "linear.center": 0.875,
    "finetune.name": "simclr",
    "finetune.epochs": 60,
    "finetune.batch_size": 4096,
    "finetune.optim.lr": 0.05,
    "finetune.optim.linear_scaling": True,
    "finetune.optim.nesterov": True,
    "finetune.optim.weight_decay": 0,
    "finetune.labels.share": 0.01,
}
# SeLa's linear probes of AlexNet's layers (Asano et al. 2020, public code).
LAYERS = {
    "linear.name": "layers",
    "linear.epochs": 36,
    "linear.batch_size": 192,
    "linear.optim.lr": 0.01,
    "linear.optim.momentum": 0.9,
    "linear.optim.weight_decay": 1e-5,
    "linear.schedule.milestones": [10, 20, 30],
    "linear.schedule.rate": 0.1,
    "linear.crop": [0.08, 1.0],
    "linear.ten_crop": True,
    "linear.test_from": 26,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "patches/table1-phi-full": TABLE_1,
    "patches/table1-phi-hard": TABLE_1 | {"classify.model.name": "phi_hard"},
    "patches/table1-phi-full-random": TABLE_1 | {"whiten.source": "gaussian"},
    "patches/table1-phi-hard-random": TABLE_1
    | {"whiten.source": "gaussian", "classify.model.name": "phi_hard"},
    "patches/table1-vanilla": VANILLA
    | {"classify.model.name": "vanilla", "classify.model.size": 1024},
    "patches/table2-simple": SIMPLE
    | {"classify.model.name": "phi_simple", "classify.optim.lr": 1e-5},
    "patches/table2-constrained": TABLE_2
    | NO_LAYERS
    | {"classify.optim.lr": 1e-3, "classify.model.bottleneck": None},
    "patches/table3-original": TABLE_1 | NO_LAYERS | {"classify.model.bottleneck": None},
    "patches/table3-avgpool": TABLE_1 | {"classify.model.bottleneck": None},
    "patches/table3-bottleneck": TABLE_1 | NO_LAYERS,
    "patches/table3-both": TABLE_1,
    "patches/table4-phi-full": TABLE_1 | {"classify.model.pool": 2},
    "patches/table4-phi-hard": TABLE_1
    | {"classify.model.pool": 2, "classify.model.name": "phi_hard"},
    "patches/table4-cnn-layer-wise": VANILLA
    | {"classify.model.name": "vanilla", "classify.model.pool": 2},
    **{
        f"patches/table4-cnn-{depth}": CNN
        | {
            "classify.model.name": "cnn",
            "classify.model.architecture": f"VGGc1024d{depth}A",
            "classify.model.kernel_size": [5, 3, 3, 3][:depth],
            "classify.model.padding": [0],
            "classify.model.batch_norm": "first",
            "classify.model.bottleneck": 32,
            "classify.model.hidden": [],
        }
        for depth in (1, 2, 3, 4)
    },
    "patches/figure5": FIGURE_5,
    "patches/figure5-tiny-imagenet": FIGURE_5 | {"dimension.between": False},
    "patches/figure5-imagenet": FIGURE_5 | {"dimension.between": False, "ingest.image_size": 224},
    "patches/figure6-7": {k: v for k, v in FIGURE_8.items() if k.startswith(("whiten", "patches"))}
    | {"whiten.whitening": "zca"},
    "patches/figure8-k": FIGURE_8,
    "cifar10": SIMCLR | SMALL | CIFAR | {"pretext.backbone.stem": "cifar"},
    "stl10-pretext": SIMCLR | {"pretext.backbone.stem": "stl"},
    "stl10": SMALL | STL,
    "imagenet-50": IMAGENET | TEACH | {"scan.num_clusters": 50, "scan.batch_size": 512},
    "imagenet-100": IMAGENET | TEACH | {"scan.num_clusters": 100, "scan.batch_size": 1024},
    "imagenet-200": IMAGENET | TEACH | {"scan.num_clusters": 200, "scan.batch_size": 1024},
    "lowshot-imagenet-yfcc": LOW_SHOT,
    "imagenet-evaluate": EVALUATE,
    "sela/linear-layers": LAYERS,
    "imagenet": IMAGENET | {"scan.num_clusters": 1000, "scan.batch_size": 4096},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_experiment_of_the_paper_has_the_papers_values(name: str):
    has = values(name)
    wrong = {key: (has.get(key), want) for key, want in PUBLISHED[name].items() if has[key] != want}
    assert not wrong, f"{name}: (has, published) {wrong}"


@pytest.mark.parametrize("name", ["phi-full", "phi-hard", "cnn-layer-wise"])
def test_the_deep_networks_of_table_4_have_the_published_layers(name: str):
    made = load(Experiment, ROOT / f"experiments/patches/table4-{name}.yaml").classify
    assert made is not None and len(made.deeper) == 3
    for layer in made.deeper:
        assert (layer.size, layer.patch_size, layer.bottleneck) == (1024, 3, 32)
        assert layer.pool is None and not layer.batch_norm
        assert getattr(layer, "k", 128) == 128


def test_figure_8_is_swept_up_to_all_entries(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    made, _ = prepared(Path("experiments/sweeps/patches-k.yaml"), {})
    assert made.space["classify.model.k"].choice == tuple(2**i for i in range(11))


def test_figures_5_and_8_have_every_published_point():
    five = load(Experiment, ROOT / "experiments/patches/figure5.yaml")
    assert five.dimension and five.dimension.all_k == tuple(range(2, 1025))
    assert set(five.dimension.sets) == MEAN_SQUARED.keys()
    model = values("patches/figure8-k")
    assert {model["classify.model.k"], *model["classify.model.also_k"]} == {*BY_K, 1024}


def test_the_sweeps_of_figures_8_and_9_have_every_published_point(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(ROOT)
    for name, published in (("k", "patches_k"), ("dictionary-size", "patches_size")):
        made, experiment = prepared(Path(f"experiments/sweeps/patches-{name}.yaml"), {})
        assert made.published == published
        key, points = PUBLISHED_SWEEPS[published]
        assert set(made.space[key].choice or ()) >= set(points)
        largest = override(experiment, made.applied({key: max(points)}))
        assert largest.patches and largest.classify and largest.whiten
        if key == "patches.size":
            assert largest.whiten.patches == 256 * 16_384 == largest.patches.patches
            assert largest.patches.backbone_k == 4096 and largest.classify.optim.lr == 0.001
            smaller = override(experiment, made.applied({key: 8192}))
            assert smaller.classify and smaller.classify.optim.lr == 0.003


def test_the_quickstart_needs_no_data_and_no_gpu():
    has = values("quickstart")
    assert str(has["ingest.source"]).startswith("bundled:")
    assert not any(value for key, value in has.items() if key.endswith("resources.gpus"))
