"""How a trial runs the stages of an experiment."""

from pathlib import Path

from selfsup_ray.sweep_config import SweepConfig
from selfsup_ray.sweep_trial import in_process
from selfsup_ray.sweeping import prepared

SWEEP = Path(__file__).parent.parent / "experiments" / "sweeps" / "patches-dictionary-size.yaml"


def test_a_trial_gives_its_gpus_to_the_stages_that_can_use_them():
    made, experiment = prepared(SWEEP, {"gpus": 1, "cpus": 2})
    assert isinstance(made, SweepConfig)
    trial = in_process(experiment, made)
    assert trial.whiten is not None and trial.classify is not None
    assert trial.whiten.resources.gpus == 0 and trial.classify.resources.gpus == 1
    assert trial.whiten.resources.cpus == trial.classify.resources.cpus == 2
    assert trial.whiten.resources.workers == trial.classify.resources.workers == 0
