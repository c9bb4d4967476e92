"""What a trained stage may ask for, and what is refused before anything starts."""

from __future__ import annotations

import pytest

from selfsup_ray.batches import require_cut
from selfsup_ray.config import Resources, override
from selfsup_ray.config import build as build_config
from selfsup_ray.errors import ConfigError
from selfsup_ray.models.norm import ShuffleNorm, images_together
from selfsup_ray.resources import TrainResources
from selfsup_ray.stages.pretext import PretextConfig
from selfsup_ray.training import TrainConfig


@pytest.mark.parametrize(
    ("asked", "transport"),
    [
        ({}, "gloo"),
        ({"gpus": 1}, "nccl"),
        ({"gpus": 2}, "nccl"),
        ({"gpus": 0.5}, "gloo"),  # NCCL refuses two workers on one GPU
        ({"gpus": 1, "backend": "gloo"}, "gloo"),
    ],
)
def test_the_backend_follows_the_device_unless_it_is_named(asked, transport):
    assert TrainResources(**asked).transport == transport


@pytest.mark.parametrize("asked", [{}, {"gpus": 0.5}])
def test_nccl_without_a_gpu_for_each_worker_is_refused(asked):
    with pytest.raises(ConfigError, match=r"`resources`: backend=nccl needs a GPU for each worker"):
        build_config(TrainConfig, {"epochs": 1, "resources": {"backend": "nccl", **asked}})


def test_fewest_workers_are_those_of_an_elastic_stage():
    fixed, elastic = TrainResources(workers=4), TrainResources(workers=4, min_workers=2)
    assert (fixed.fewest, fixed.is_elastic) == (4, False)
    assert (elastic.fewest, elastic.is_elastic) == (2, True)
    with pytest.raises(ConfigError, match=r"min_workers=5 is more than workers=4"):
        TrainResources(workers=4, min_workers=5)


def test_a_trained_stage_takes_plain_resources_too():
    config = TrainConfig(epochs=1, resources=Resources(workers=3, cpus=2))
    assert config.resources == TrainResources(workers=3, cpus=2)


def test_workers_that_may_change_need_a_batch_norm_that_does_not_care():
    config = PretextConfig(resources=TrainResources(workers=2, min_workers=1))
    with pytest.raises(ConfigError, match=r"min_workers=1 .* method\.batch_norm\.name=local"):
        override(config, {"method.batch_norm.name": "local"})
    override(config, {"method.batch_norm.name": "local", "resources.min_workers": None})


def test_more_workers_than_there_are_groups_in_a_batch_are_refused():
    together = images_together(ShuffleNorm(group_size=32))
    config = TrainConfig(epochs=1, batch_size=256, accumulate=2)
    require_cut(config, together=together, workers=4)
    with pytest.raises(ConfigError, match=r"batch_size=256 has nothing for some of 5 workers.* 4"):
        require_cut(config, together=together, workers=5)
