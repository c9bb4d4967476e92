"""The results of the low-shot protocol: rows for each seed, means and deviations, curves."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from selfsup_ray.artifacts import whole_file, write_json
from selfsup_ray.ops.lowshot import GROUPS, TOPS, mean_and_std
from selfsup_ray.stages.lowshot_choice import Chosen
from selfsup_ray.stages.lowshot_config import LowShotConfig
from selfsup_ray.stages.lowshot_units import Unit

NUMBERS = tuple(f"top{top}_{group}" for top in TOPS for group in GROUPS)

Rates = Mapping[str, Mapping[str, float]]
"""Method -> its hit rates by name."""


def write_results(path: Path, rates: Mapping[Unit, Rates]) -> None:
    """Write one line for each set-up, n, seed and method; rates in [0, 1], to the last digit."""
    with whole_file(path) as temporary, open(temporary, "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["setup", "n", "seed", "method", *NUMBERS])
        for unit, methods in rates.items():
            for method, found in methods.items():
                values = [repr(found[name]) for name in NUMBERS]
                lines.writerow([unit.setup, unit.n, unit.seed, method, *values])


def write_seconds(path: Path, seconds: Mapping[str, Mapping[Unit, float]]) -> None:
    """Write how long each unit took: apart from the results, which are the same in every run."""
    with whole_file(path) as temporary, open(temporary, "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["phase", "setup", "n", "seed", "seconds"])
        for phase, units in seconds.items():
            for unit, value in units.items():
                lines.writerow([phase, unit.setup, unit.n, unit.seed, value])


def table(
    config: LowShotConfig, rates: Mapping[Unit, Rates], chosen: Mapping[int, Chosen]
) -> dict[str, Any]:
    """Return means and population deviations over the seeds, and what validation chose, by n.

    {"test": {"1": {method: {"top5_novel": {"mean", "std"}, …}}}, "val": …, "chosen": {"1": …}}.
    """
    made: dict[str, Any] = {"criterion": config.criterion, "seeds": list(config.seeds)}
    for setup in ("test", "val"):
        made[setup] = {
            str(n): {
                method: mean_and_std([rates[Unit(setup, n, seed)][method] for seed in config.seeds])
                for method in config.methods
            }
            for n in config.shots
        }
    made["chosen"] = {str(n): asdict(one) for n, one in chosen.items()}
    return made


def mean_curves(
    config: LowShotConfig,
    explored: Mapping[Unit, Mapping[str, Any]],
    final: Mapping[Unit, Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the hit rates after each number of steps, means and deviations over the seeds.

    {"val" | "test": {method: {n: {"top5_novel": {"mean": [t = 0 …], "std": […]}, …}}}}.
    """
    made: dict[str, Any] = {"val": {}, "test": {}}
    for method in ("diffusion", "diffusion_background"):
        if method not in config.methods:
            continue
        for n in config.shots:
            val = [explored[Unit("val", n, seed)][method] for seed in config.seeds]
            test = [final[Unit("test", n, seed)]["curves"][method] for seed in config.seeds]
            made["val"].setdefault(method, {})[str(n)] = _over_steps(val)
            made["test"].setdefault(method, {})[str(n)] = _over_steps(test)
    return made


def _over_steps(curves: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name in NUMBERS:
        steps = zip(*(curve[name] for curve in curves), strict=True)
        values = [mean_and_std([{name: value} for value in step])[name] for step in steps]
        made[name] = {key: [value[key] for value in values] for key in ("mean", "std")}
    return made


def write_tables(out: Path, made: Mapping[str, Any], curves: Mapping[str, Any]) -> None:
    """Write table.json, curves.json and hyperparameters.json."""
    write_json(out / "hyperparameters.json", made["chosen"])
    write_json(out / "curves.json", curves)
    write_json(out / "table.json", made)
