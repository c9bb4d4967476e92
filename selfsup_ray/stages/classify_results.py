"""The numbers of a labelled network: maximum and last accuracy, and the curve over epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from selfsup_ray.models.classifier import Classifier
from selfsup_ray.training import Record

Curve = list[dict[str, float]]


def layer_result(layer: int, objective: Classifier, history: Sequence[Record]) -> dict[str, Any]:
    """Return the numbers of one layer from the history of its training.

    {"layer", "parameters", "outputs": {name: accuracies}, "curve"}; an output is named by its k,
    or "-" where there is none.
    """
    curve = [_point(record) for record in history if "test_accuracy" in record]
    return {
        "layer": layer,
        "parameters": sum(p.numel() for p in objective.parameters() if p.requires_grad),
        "outputs": {
            name: accuracies(curve, head)
            for name, head in zip(objective.output_names, objective.head_names, strict=True)
        },
        "curve": curve,
    }


def _point(record: Record) -> dict[str, float]:
    """Return one epoch of the curve: its number and all losses and accuracies."""
    kept = {k: v for k, v in record.items() if k.startswith("loss") or "accuracy" in k}
    return {"epoch": round(record["epoch"]), "lr": record["lr"], **kept}


def accuracies(curve: Sequence[Mapping[str, float]], head: str) -> dict[str, float]:
    """Return one output's largest and last test accuracy, and the epoch of the largest.

    With validation images also `chosen_accuracy`, the test accuracy of the epoch that they like
    best, the first such epoch.
    """
    test = [point[f"test_accuracy{head}"] for point in curve]
    best = test.index(max(test))
    found = {
        "max_accuracy": test[best],
        "max_epoch": curve[best]["epoch"],
        "last_accuracy": test[-1],
    }
    if f"validation_accuracy{head}" in curve[-1]:
        held_out = [point[f"validation_accuracy{head}"] for point in curve]
        chosen = held_out.index(max(held_out))
        found["chosen_accuracy"] = test[chosen]
        found["chosen_epoch"] = curve[chosen]["epoch"]
    return found


def facts_of(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the stage's numbers: of the last layer's first output, of every k and every layer."""
    top = layers[-1]["outputs"]
    first = next(iter(top.values()))
    facts: dict[str, Any] = dict(first)
    facts["parameters"] = layers[-1]["parameters"]
    if len(top) > 1:
        facts |= {f"k{name}": found for name, found in top.items()}
    if len(layers) > 1:
        for one in layers:
            facts[f"layer{one['layer']}"] = next(iter(one["outputs"].values()))
    return facts
