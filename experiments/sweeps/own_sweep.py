"""A sweep written in Python: its own space, and its own label-free number to compare trials by.

Command: python experiments/sweeps/own_sweep.py [--address HOST:PORT] [key=value ...]
Cost: the quickstart's encoder once, then six short clusterings: about 15 minutes on 2 CPU cores.
Expect: runs/sweeps/own_sweep/trials.csv and report.html; a killed run goes on when started again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from selfsup_ray.cli import assignment
from selfsup_ray.cluster.tune import Dimension
from selfsup_ray.experiment import Experiment
from selfsup_ray.models.clusterer import Clusterer
from selfsup_ray.sweep_config import SweepConfig
from selfsup_ray.sweeping import sweep

SWEEP = SweepConfig(
    experiment=Path(__file__).parents[1] / "quickstart.yaml",
    out=Path("runs/sweeps/own_sweep"),
    until="scan",
    metric="sure_and_even",
    mode="max",
    search="grid",
    concurrent=2,
    changes={"selflabel": None},
    space={
        "scan.num_neighbors": Dimension(choice=(5, 10, 20)),
        "scan.entropy_weight": Dimension(choice=(2.0, 5.0)),
    },
)


def sure_and_even(experiment: Experiment, folders: Mapping[str, Path]) -> dict[str, float]:
    """Return the mean confidence times the share of clusters in use: no labels are read.

    experiment: the trial's config. folders: the folder of each of its stages.
    """
    clusterer = Clusterer.open(folders["scan"])
    confidence = np.asarray(clusterer.probabilities).max(axis=1).mean()
    used = len(np.unique(np.asarray(clusterer.assignments)))
    assert experiment.scan is not None
    return {"sure_and_even": float(confidence) * used / experiment.scan.num_clusters}


def main() -> None:
    """Run the sweep; the arguments are those of `selfsup-ray sweep`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("changes", nargs="*", type=assignment, metavar="key=value")
    parser.add_argument("--address")
    options = parser.parse_args()
    changes = dict(options.changes)
    print(sweep(SWEEP, changes, address=options.address, score=sure_and_even).text())


if __name__ == "__main__":
    main()
