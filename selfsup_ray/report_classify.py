"""Labelled networks on patches, in the report: accuracies beside published ones, curves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from selfsup_ray import plots
from selfsup_ray.artifacts import read_json
from selfsup_ray.data.published_patches import (
    BY_K,
    DEPTH,
    Curve,
    published_curve,
    published_depth,
)
from selfsup_ray.report_html import Section, figures, paragraph, table
from selfsup_ray.report_published import Points, beside
from selfsup_ray.report_run import Run, StageFolder

Layer = Mapping[str, Any]

EPOCHS = (1, 10, 50, 100, 101)
"""Epochs whose accuracy was published."""
TITLES = {
    "phi_full": "Phi_full",
    "phi_hard": "Phi_hard",
    "phi_simple": "Phi_full, unconstrained",
    "vanilla": "convolution and ReLU",
    "cnn": "convolutional network",
}


def classify_section(run: Run) -> Section | str:
    """Accuracy on the test images at the best and the last epoch, beside what was published."""
    stage = run.stage("classify")
    if stage is None:
        return "No labelled network: the stage classify has not finished in this run."
    made = read_json(stage.path / "metrics.json")
    layers = made["layers"]
    found = _published_run(run, stage)
    body = paragraph(_setting(stage, made)) + _accuracies(result_rows(run))
    if len(layers) == 1:
        body += _by_epoch(layers[0], found)
    body += "<h3>Accuracy by epoch</h3>" + figures(_curves(layers, found))
    body += _by_k(run, stage, layers[-1]) + _by_depth(run, stage, layers)
    return Section("classify", "Labelled networks", body)


def _config(run: Run, name: str) -> dict[str, Any]:
    stage = run.stage(name)
    return {} if stage is None else stage.config


def _setting(stage: StageFolder, made: Mapping[str, Any]) -> str:
    config = stage.config
    name = config["model"]["name"]
    validated = f"{made['num_validation']:,} choose an epoch, " if made["num_validation"] else ""
    return (
        f"{TITLES.get(name, name)}, trained on {made['num_train']:,} labelled images of "
        f"{made['num_classes']} classes for {config['epochs']} epochs; {validated}"
        f"{made['num_test']:,} test. The published measure is the MAXIMUM over the epochs of the "
        f"accuracy on the test images; the accuracy after the last epoch stands beside it. "
        f"Published: CIFAR-10, 200 epochs, single runs, about 0.5 points from run to run."
    )


@dataclass(frozen=True)
class Row:
    """One output of one layer: accuracies in [0, 1], None where there is none."""

    layer: int
    k: str
    """"-" where there is no k."""
    parameters: int
    max: float
    max_epoch: int
    last: float
    chosen: float | None
    """Test accuracy of the epoch that validation images chose."""
    published_max: float | None
    published_last: float | None


def result_rows(run: Run) -> list[Row]:
    """Return a row for every layer and output of a run whose classify has finished."""
    stage = run.stage("classify")
    assert stage is not None, "classify has not finished"
    found, depths, rows = _published_run(run, stage), _published_depth(run, stage), []
    for one in read_json(stage.path / "metrics.json")["layers"]:
        for k, output in one["outputs"].items():
            rows.append(
                Row(
                    int(one["layer"]),
                    k,
                    int(one["parameters"]),
                    output["max_accuracy"],
                    int(output["max_epoch"]),
                    output["last_accuracy"],
                    output.get("chosen_accuracy"),
                    *_published(one, k, found, depths),
                )
            )
    return rows


def _published_run(run: Run, stage: StageFolder) -> tuple[str, Curve] | None:
    return published_curve(
        stage.config, patches=_config(run, "patches"), whiten=_config(run, "whiten")
    )


def _published_depth(run: Run, stage: StageFolder) -> tuple[str, int] | None:
    return published_depth(
        stage.config, patches=_config(run, "patches"), whiten=_config(run, "whiten")
    )


def _accuracies(rows: Sequence[Row]) -> str:
    chosen = any(row.chosen is not None for row in rows)
    head = ["layer", "k", "parameters", "max, %", "at epoch", "last, %"]
    head += ["chosen, %"] if chosen else []
    head += ["published max, %", "published last, %"]
    cells = []
    for row in rows:
        numbers = [percent_or_nothing(row.max), str(row.max_epoch), percent_or_nothing(row.last)]
        numbers += [percent_or_nothing(row.chosen)] if chosen else []
        numbers += map(percent_or_nothing, (row.published_max, row.published_last))
        cells.append((str(row.layer), row.k, f"{row.parameters:,}", *numbers))
    return table(head, cells, numeric=range(len(head)))


def _published(
    layer: Layer, k: str, found: tuple[str, Curve] | None, depths: tuple[str, int] | None
) -> tuple[float | None, float | None]:
    """Return the published maximum and last accuracy of one output, where there is any."""
    if depths is not None:
        # A network of D layers that is trained end to end has one entry: that of its depth.
        depth = int(layer["layer"]) if depths[0] != "cnn" else depths[1]
        return DEPTH[depths[0]][depth - 1], None
    if found is None:
        return None, None
    if k == next(iter(layer["outputs"])):
        return found[1].max, found[1].last
    return (BY_K.get(float(k)), None) if found[0] == "phi_full" else (None, None)


def _by_epoch(layer: Layer, found: tuple[str, Curve] | None) -> str:
    """Return the accuracies at the published epochs, as far as the training went."""
    ours = {int(point["epoch"]): point["test_accuracy"] for point in layer["curve"]}
    shown = [epoch for epoch in EPOCHS if epoch in ours]
    if not shown or found is None:
        return ""
    head = ("test accuracy, %", *(f"epoch {epoch}" for epoch in shown))
    rows = [
        ("here", *(percent_or_nothing(ours[epoch]) for epoch in shown)),
        ("published", *(percent_or_nothing(found[1].by_epoch.get(epoch)) for epoch in shown)),
    ]
    return table(head, rows, numeric=range(1, len(head)))


def _curves(layers: list[Layer], found: tuple[str, Curve] | None) -> Iterator[str]:
    for one in layers:
        curve = one["curve"]
        last = {
            "test": _series(curve, "test_accuracy"),
            "train": _series(curve, "train_accuracy"),
        }
        published: dict[str, Points] = {}
        if found is not None and len(layers) == 1:
            published = {"test": {float(e): 100 * v for e, v in found[1].by_epoch.items()}}
        best = max(last["test"].values())
        yield plots.svg(
            partial(
                plots.plot_beside,
                {name: points for name, points in last.items() if points},
                published,
                xlabel="epoch",
                ylabel="accuracy, %",
                title=f"layer {one['layer']}: {best:.2f} % at best",
            ),
            width=4.6,
            height=3.0,
            label=f"accuracy of layer {one['layer']} by epoch",
        )


def _series(curve: list[Mapping[str, float]], key: str) -> dict[float, float]:
    return {point["epoch"]: 100 * point[key] for point in curve if key in point}


def _by_k(run: Run, stage: StageFolder, layer: Layer) -> str:
    """Return Figure 8 of a run that trained several k at once."""
    outputs = layer["outputs"]
    if len(outputs) < 2:
        return ""
    name = stage.config["model"]["name"]
    measured = {float(k): 100 * found["max_accuracy"] for k, found in outputs.items()}
    title = TITLES.get(name, name)
    alike = {**stage.config, "model": {**stage.config["model"], "k": 256}}
    found = published_curve(alike, patches=_config(run, "patches"), whiten=_config(run, "whiten"))
    is_published = found is not None and found[0] == "phi_full"
    return "<h3>Accuracy by k</h3>" + beside(
        {title: measured},
        {title: {k: 100 * value for k, value in BY_K.items()}} if is_published else {},
        xlabel="k, entries that are set",
        ylabel="test accuracy, maximum, %",
        title="accuracy by the number of nearest entries",
    )


def _by_depth(run: Run, stage: StageFolder, layers: list[Layer]) -> str:
    """Return the accuracy by depth of a layer-wise network (Table 4)."""
    if len(layers) < 2:
        return ""
    name = stage.config["model"]["name"]
    measured = {
        float(one["layer"]): 100 * next(iter(one["outputs"].values()))["max_accuracy"]
        for one in layers
    }
    title = TITLES.get(name, name)
    depths = _published_depth(run, stage)
    published: dict[str, Points] = {}
    if depths is not None:
        values = enumerate(DEPTH[depths[0]], start=1)
        published = {title: {float(depth): 100 * value for depth, value in values}}
    return "<h3>Accuracy by depth</h3>" + beside(
        {title: measured},
        published,
        xlabel="depth",
        ylabel="test accuracy, maximum, %",
        title="accuracy by the number of layers",
    )


def percent_or_nothing(value: float | None) -> str:
    """Return an accuracy in percent with two digits; "" for None."""
    return "" if value is None else f"{100 * value:.2f}"
