"""What labels say of the encoder, in the report: linear probes, fine-tuning, maps of its layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from selfsup_ray import plots
from selfsup_ray.artifacts import Array, read_json
from selfsup_ray.report_classes import class_table
from selfsup_ray.report_classify import percent_or_nothing
from selfsup_ray.report_html import Section, figures, paragraph, table
from selfsup_ray.report_layers import layers_part
from selfsup_ray.report_run import Run, StageFolder
from selfsup_ray.stages.maps import Maps

Result = Mapping[str, Any]

PROTOCOLS = {
    "cifar": "the published CIFAR comparison's (flips only)",
    "simclr_cifar": "SimCLR's for CIFAR-10",
    "moco": "MoCo's for ImageNet",
    "byol": "BYOL's for ImageNet",
    "layers": "SeLa's layer-by-layer",
    "simclr": "SimCLR's semi-supervised",
}
ORIGINS = {"pretrained": "fine-tuned encoder", "scratch": "new network, same labels"}
TITLES = {"tsne": "t-SNE", "umap": "UMAP"}
MOST_NAMED = 20
"""Classes named on a map; of more, none is."""


def labelled_section(run: Run) -> Section | str:
    """Linear probes by a published protocol, and fine-tuning on few labels against scratch."""
    body = _linear(run) + _finetune(run)
    if not body:
        return "No linear probe or fine-tuning: neither linear nor finetune has finished."
    return Section("labelled", "Linear probe and fine-tuning", body)


def _linear(run: Run) -> str:
    stage = run.stage("linear")
    if stage is None:
        return ""
    made = read_json(stage.path / "metrics.json")
    body = paragraph(_setting("Linear probe on the frozen encoder", stage, made))
    layer = str(made["classifier"]).removeprefix("_")
    rows = [(layer if "layers" in made else "linear classifier", *_accuracies(made))]
    body += table(("", *HEAD), rows, numeric=range(1, 7))
    if made["tried"]:
        head = ("learning rate", "last, %", "max, %")
        tried = [
            (lr, percent_or_nothing(one["last_accuracy"]), percent_or_nothing(one["max_accuracy"]))
            for lr, one in made["tried"].items()
        ]
        body += "<h3>Learning rates tried</h3>" + table(head, tried, numeric=range(3))
    body += layers_part(made) if "layers" in made else ""
    body += figures([_curve("linear probe", {"test": made})])
    return "<h3>Linear probe</h3>" + body + _by_class(run, {"accuracy": made})


HEAD = ("last, %", "95 % interval", "max, %", "at epoch", "chosen, %", "train, %")


def _accuracies(one: Result) -> tuple[str, ...]:
    low, high = one["interval"]
    return (
        percent_or_nothing(one["last_accuracy"]),
        f"{100 * low:.2f} to {100 * high:.2f}",
        percent_or_nothing(one["max_accuracy"]),
        str(one["max_epoch"]),
        percent_or_nothing(one.get("chosen_accuracy")),
        percent_or_nothing(one["train_accuracy"]),
    )


def _setting(what: str, stage: StageFolder, made: Result) -> str:
    config, budget = stage.config, stage.config["labels"]
    share = {
        "all": "",
        "share": f" ({100 * budget.get('share', 0):g} % of the labels)",
        "count": " (as many of each class)",
    }[budget["name"]]
    return (
        f"{what}, {PROTOCOLS.get(config['name'], config['name'])} protocol: {config['epochs']} "
        f"epochs on {made['num_train']:,} labelled images{share} of {made['num_classes']} classes, "
        f"tested on {made['num_test']:,} others. `last` is the accuracy after the last epoch. "
        f"`max` is the largest over the epochs: the test images choose it, so it is optimistic, "
        f"yet it is what some papers report. `chosen` is the epoch that validation images choose."
    )


def _curve(title: str, results: Mapping[str, Result]) -> str:
    series = {}
    for name, one in results.items():
        key = f"test_accuracy{one['classifier']}"
        series[name] = {float(p["epoch"]): 100 * p[key] for p in one["curve"] if key in p}
    best = max(100 * one["last_accuracy"] for one in results.values())
    return plots.svg(
        partial(
            plots.plot_beside,
            series,
            {},
            xlabel="epoch",
            ylabel="test accuracy, %",
            title=f"{title}: {best:.2f} % after the last epoch",
        ),
        width=4.6,
        height=3.0,
        label=f"{title}: accuracy by epoch",
    )


def _finetune(run: Run) -> str:
    stage = run.stage("finetune")
    if stage is None:
        return ""
    made = read_json(stage.path / "metrics.json")
    results = {name: made[name] for name in ORIGINS if name in made}
    body = paragraph(_setting("Whole network fine-tuned", stage, made))
    rows = [(ORIGINS[name], *_accuracies(one)) for name, one in results.items()]
    body += table(("", *HEAD), rows, numeric=range(1, 7))
    if "scratch" in results:
        gain = results["pretrained"]["last_accuracy"] - results["scratch"]["last_accuracy"]
        body += paragraph(f"Pre-training is worth {100 * gain:+.2f} points on these labels.")
    body += figures([_curve("fine-tuning", {ORIGINS[name]: one for name, one in results.items()})])
    named = {ORIGINS[name]: one for name, one in results.items()}
    return "<h3>Fine-tuning</h3>" + body + _by_class(run, named)


def _by_class(run: Run, results: Mapping[str, Result]) -> str:
    """Return the accuracy of each class after the last epoch."""
    return class_table(run, {name: one["per_class"] for name, one in results.items()})


def maps_section(run: Run) -> Section | str:
    """t-SNE and UMAP of chosen layers of the encoder, by class, or by cluster without labels."""
    stage = run.stage("maps")
    if stage is None:
        return "No maps of layers: the stage maps has not finished in this run."
    made = Maps.open(stage.path)
    groups, names, by = _groups(run, made.ids)
    body = paragraph(
        f"{len(made.ids):,} images, the same in every picture, {by}. Near images are alike to that "
        f"layer; distances between far groups and the axes have no meaning."
    )
    rows = [
        (layer, str(one["dim"]), percent_or_nothing(one["same_class"]))
        for layer, one in made.metrics["layers"].items()
    ]
    head = ("layer", "numbers", "same class among 15 nearest, %")
    body += table(head, rows, numeric=(1, 2))
    for method in stage.config["methods"]:
        drawn = list(_pictures(made, method, groups, names))
        body += f"<h3>{TITLES[method]}</h3>" + figures(drawn) if drawn else ""
    return Section("maps", "Maps of the layers", body)


def _pictures(made: Maps, method: str, groups: Array, names: Mapping[int, str]) -> Iterator[str]:
    for layer in made.metrics["layers"]:
        xy = made.positions(layer, method)
        if xy is None:
            continue
        title = f"{layer}, {TITLES[method]}"
        draw = partial(plots.plot_map, xy, groups, names=names, title=title, hues=groups)
        yield plots.svg(draw, width=4.6, height=4.4, label=f"map of {title}")


def _groups(run: Run, ids: Array) -> tuple[Array, dict[int, str], str]:
    """Return a group of each image, the names to draw, and what the colours are."""
    if run.corpus is not None and run.corpus.has_labels:
        labels = run.corpus.labels(ids)
        present = [int(c) for c in np.unique(labels[labels >= 0])]
        named = present if len(present) <= MOST_NAMED else []
        return labels, {c: run.class_of(c) for c in named}, "coloured by class"
    if run.clustering is not None:
        return run.clustering[1].assignments.rows(ids).astype(np.int64), {}, "coloured by cluster"
    return np.full(len(ids), -1), {}, "without labels or clusters to colour them by"
