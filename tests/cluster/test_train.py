"""train on real Ray Train workers: equal to one process, whoever is killed in between."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from torch import Tensor

from selfsup_ray.batches import Batches
from selfsup_ray.cluster.ahead import IMPORTS_AT_START
from selfsup_ray.cluster.train import train
from selfsup_ray.collectives import broadcast, rank, world_size
from selfsup_ray.config import Resources, to_dict
from selfsup_ray.config import build as build_config
from selfsup_ray.mlflow_store import TrackingConfig
from selfsup_ray.models.backbones import ResNetConfig, build_backbone
from selfsup_ray.models.pretext import SimCLR, SimCLRConfig
from selfsup_ray.ops.rng import uniforms
from selfsup_ray.optim import SGDConfig
from selfsup_ray.tracking import Tracker, open_run, read_records
from selfsup_ray.training import State, TrainConfig, TrainJob, load_state

CONFIG = TrainConfig(
    epochs=2,
    batch_size=16,
    optim=SGDConfig(lr=0.003),
    precision="float32",
    log_every=2,
    checkpoint_every=3,
    resources=Resources(workers=0),
)
STEPS = 10
WITH_TWO = dataclasses.replace(CONFIG, resources=Resources(workers=2, cpus=1))


class Noise:
    """80 random images; whoever reads image `fatal` in epoch 1 dies, the first time."""

    def __init__(self, fatal: int | None, mark: Path, pause_s: float) -> None:
        generator = torch.Generator().manual_seed(5)
        self.images = torch.randint(0, 256, (80, 3, 8, 8), generator=generator, dtype=torch.uint8)
        self.fatal, self.mark, self.pause_s = fatal, mark, pause_s

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, ids: np.ndarray, *, epoch: int) -> list[Tensor]:
        time.sleep(self.pause_s)
        if epoch == 1 and self.fatal in ids and not self.mark.exists():
            time.sleep(1)  # let the steps before it end
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return [self.images[torch.from_numpy(ids)]]


def two_views(images: list[Tensor], ids: Tensor, epoch: int) -> list[Tensor]:
    return [
        images[0] / 255
        - 0.5
        + 0.2 * uniforms(seed=3, epoch=epoch, ids=ids, draws=192, stream=view).view_as(images[0])
        for view in range(2)
    ]


def build(fatal: int | None, mark: Path, pause_s: float) -> tuple[SimCLR, Noise, object]:
    backbone = build_backbone(ResNetConfig(stem="cifar", width=4))
    objective = SimCLR(SimCLRConfig(temperature=0.5), backbone)
    return objective, Noise(fatal, mark, pause_s), two_views


def run(
    config: TrainConfig,
    out: Path,
    *,
    fatal: int | None = None,
    pause_s: float = 0.0,
    address: str | None = None,
    tracking: TrackingConfig | None = None,
) -> State:
    job = TrainJob(partial(build, fatal, out / "killed", pause_s), config)  # type: ignore[arg-type]
    with open_run(out, tracking, name="test", params=config) as tracker:
        return train(job, out=out, tracker=tracker, address=address)


def start_driver(out: Path, config: TrainConfig, **options: object) -> subprocess.Popen[bytes]:
    """Run this module in a process of its own, where it calls `run`."""
    task = json.dumps({"out": str(out), "config": to_dict(config), "options": options})
    return subprocess.Popen([sys.executable, __file__, task])


def killed(driver: subprocess.Popen[bytes]) -> bool:
    return driver.wait(timeout=120) == -signal.SIGKILL


def assert_bitwise_equal(one: State, other: State) -> None:
    assert one["step"] == other["step"] == STEPS
    for key, value in one["objective"].items():
        assert torch.equal(value, other["objective"][key]), key
    momenta = [state["optimizer"]["state"] for state in (one, other)]
    for i, moments in momenta[0].items():
        assert torch.equal(moments["momentum_buffer"], momenta[1][i]["momentum_buffer"])
    times = ("images_per_s", "data_wait_share")
    for a, b in zip(one["history"], other["history"], strict=True):
        assert {k: v for k, v in a.items() if k not in times} == {
            k: v for k, v in b.items() if k not in times
        }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[State, Path]:
    out = tmp_path_factory.mktemp("alone")
    return run(CONFIG, out), out


@pytest.fixture(scope="module")
def by_value(ray_session: None) -> Iterator[None]:
    """Send this module's classes to workers by value: they cannot import it."""
    module = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(module)
    yield
    ray.cloudpickle.unregister_pickle_by_value(module)


@pytest.fixture(scope="module")
def on_two_workers(by_value: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[State, Path]:
    out = tmp_path_factory.mktemp("two")
    return run(WITH_TWO, out), out


@pytest.mark.slow
def test_two_ray_workers_train_to_the_weights_of_one_process(on_two_workers, alone):
    (two, two_out), (one, one_out) = on_two_workers, alone
    assert two["step"] == one["step"] == STEPS
    for key, value in one["objective"].items():
        torch.testing.assert_close(two["objective"][key], value, rtol=1e-5, atol=1e-5)
    ours, theirs = read_records(one_out / "metrics.jsonl"), read_records(two_out / "metrics.jsonl")
    assert [r["step"] for r in ours] == [r["step"] for r in theirs] == [2, 3, 4, 6, 8, 9, 10]
    assert [r["loss"] for r in theirs] == pytest.approx([r["loss"] for r in ours], rel=1e-5)
    assert not (two_out / "ray_train").exists()


@pytest.mark.slow
def test_a_killed_worker_changes_no_bit_of_the_result(on_two_workers, tmp_path):
    fatal = Batches(Noise(None, tmp_path, 0), CONFIG, pin=False).ids(8, 0)[12]  # rank 1's share
    state = run(WITH_TWO, tmp_path, fatal=int(fatal))
    assert (tmp_path / "killed").exists()
    assert_bitwise_equal(state, on_two_workers[0])
    steps = [record["step"] for record in read_records(tmp_path / "metrics.jsonl")]
    assert steps == [2, 3, 4, 6, 8, 9, 10]


@pytest.mark.slow
def test_a_worker_lost_while_it_starts_ends_no_training(by_value, alone, tmp_path, monkeypatch):
    from ray.exceptions import ActorDiedError
    from ray.train import ControllerError
    from ray.train.torch import TorchTrainer

    config = dataclasses.replace(CONFIG, resources=Resources(workers=1, cpus=1))
    fit, lost = TorchTrainer.fit, list[str]()

    def fit_after_a_loss(trainer: TorchTrainer) -> object:
        """Fail once as Ray Train does when a worker dies between its start and that of its loop."""
        if not lost:
            lost.append("once")
            raise ControllerError(ActorDiedError())
        return fit(trainer)

    monkeypatch.setattr(TorchTrainer, "fit", fit_after_a_loss)
    assert_bitwise_equal(run(config, tmp_path / "patient"), alone[0])
    lost.clear()
    with pytest.raises(ControllerError):
        run(dataclasses.replace(config, max_failures=0), tmp_path / "impatient")


class Broken(Noise):
    """Images of which one, in the second epoch, cannot be read by this code."""

    def batch(self, ids: np.ndarray, *, epoch: int) -> list[Tensor]:
        if epoch == 1 and 7 in ids:
            time.sleep(1)  # let the steps before it end
            with open(self.mark, "a") as file:
                file.write("x")
            raise ValueError("a bug of the user's")
        return super().batch(ids, epoch=epoch)


def build_broken(mark: Path) -> tuple[SimCLR, Noise, object]:
    objective, _, make_views = build(None, mark, 0.0)
    return objective, Broken(None, mark, 0.0), make_views


@pytest.mark.slow
def test_a_bug_that_comes_back_ends_the_training_after_its_failures(by_value, tmp_path):
    config = dataclasses.replace(CONFIG, max_failures=1, resources=Resources(workers=1))
    job = TrainJob(partial(build_broken, tmp_path / "tries"), config)  # type: ignore[arg-type]
    with pytest.raises(Exception, match=r"2 failures without a new checkpoint.*a bug") as caught:
        train(job, out=tmp_path, tracker=Tracker(tmp_path, None))
    assert 'raise ValueError("a bug of the user' in str(caught.value)  # where it was raised
    assert (tmp_path / "tries").read_text() == "xx"
    state = load_state(tmp_path / "checkpoint.pt")
    assert state is not None and 0 < state["step"] < STEPS


@pytest.mark.slow
def test_a_driver_killed_under_ray_goes_on_to_the_same_bits(by_value, alone, tmp_path):
    config = dataclasses.replace(CONFIG, resources=Resources(workers=1, cpus=1))
    address = ray.get_runtime_context().gcs_address
    driver = start_driver(tmp_path, config, pause_s=0.3, address=address)
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    driver.kill()
    assert killed(driver)
    state = load_state(tmp_path / "checkpoint.pt")
    assert state is not None and 0 < state["step"] < STEPS
    assert_bitwise_equal(run(config, tmp_path), alone[0])
    steps = [record["step"] for record in read_records(tmp_path / "metrics.jsonl")]
    assert steps == [2, 3, 4, 6, 8, 9, 10]


def test_a_killed_process_goes_on_to_the_same_bits_and_the_same_mlflow_run(alone, tmp_path):
    from mlflow import MlflowClient

    out, tracking = tmp_path / "run", TrackingConfig()
    fatal = int(Batches(Noise(None, out, 0), CONFIG, pin=False).ids(9, 0)[0])
    assert killed(start_driver(out, CONFIG, fatal=fatal, tracking=True))
    stopped_at = load_state(out / "checkpoint.pt")
    assert stopped_at is not None and 0 < stopped_at["step"] < STEPS
    assert_bitwise_equal(run(CONFIG, out, fatal=fatal, tracking=tracking), alone[0])
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(tracking.experiment)
    assert experiment is not None
    [only] = client.search_runs([experiment.experiment_id])
    assert only.info.status == "FINISHED"
    steps = [metric.step for metric in client.get_metric_history(only.info.run_id, "loss")]
    assert steps == [record["step"] for record in read_records(out / "metrics.jsonl")]
    assert steps == [2, 3, 4, 6, 8, 9, 10]


def main(task: str) -> None:
    """Body of `start_driver`'s process."""
    values = json.loads(task)
    options = values["options"]
    if options.pop("tracking", False):
        options["tracking"] = TrackingConfig()
    run(build_config(TrainConfig, values["config"]), Path(values["out"]), **options)


if __name__ == "__main__":
    main(sys.argv[1])


PARTS = 7


def predict(folder: Path, objective: SimCLR) -> Iterator[dict[str, float]]:
    """Write PARTS files, each so-many-th on every rank; who has number 3 dies before it, once."""
    missing = torch.tensor([not (folder / str(part)).exists() for part in range(PARTS)]).int()
    parts = broadcast(missing).nonzero().flatten().tolist()
    done = PARTS - len(parts)
    yield {"done": done, "of": PARTS}
    for first in range(0, len(parts), world_size()):
        together = parts[first : first + world_size()]
        for part in together[rank() : rank() + 1]:
            if part == 3 and not (folder / "killed").exists():
                (folder / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            (folder / str(part)).write_text(f"{float(next(objective.parameters()).sum()):.9g}")
        done += len(together)
        yield {"done": done, "of": PARTS}


@pytest.mark.slow
def test_the_ranks_that_trained_predict_and_go_on_after_one_is_killed(
    on_two_workers, by_value, tmp_path, caplog
):
    caplog.set_level("INFO", logger="selfsup_ray")
    job = TrainJob(
        partial(build, None, tmp_path / "none", 0.0),  # type: ignore[arg-type]
        WITH_TWO,
        predict=partial(predict, tmp_path),  # type: ignore[arg-type]
    )
    state = train(job, out=tmp_path, tracker=Tracker(tmp_path, None), label="clusters")
    assert (tmp_path / "killed").exists()
    assert_bitwise_equal(state, on_two_workers[0])
    trained = float(next(iter(state["objective"].values())).sum())
    assert [float((tmp_path / str(part)).read_text()) for part in range(PARTS)] == pytest.approx(
        [trained] * PARTS, rel=1e-6
    )
    said = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("clusters: 160 images in ") for line in said), "of the training"
    assert any(line.startswith(f"clusters: predict: {PARTS} images in ") for line in said)


def note_process(folder: Path, objective: SimCLR) -> Iterator[dict[str, float]]:
    (folder / f"rank {rank()}").write_text(str(os.getpid()))
    yield {"done": 0, "of": 0}


@pytest.mark.slow
def test_the_processes_started_ahead_are_those_that_train(by_value, tmp_path):
    import psutil  # comes with ray, once that is imported

    def with_imports() -> set[int]:
        """Return Ray's processes that import what a training needs when they start."""
        raylet = ray._private.worker._global_node.all_processes["raylet"][0].process.pid
        found = set[int]()
        for child in psutil.Process(raylet).children():
            with suppress(psutil.Error):  # it ended just now
                if IMPORTS_AT_START.items() <= child.environ().items():
                    found.add(child.pid)
        return found

    before = with_imports()
    job = TrainJob(
        partial(build, None, tmp_path / "none", 0.0),  # type: ignore[arg-type]
        WITH_TWO,
        predict=partial(note_process, tmp_path),  # type: ignore[arg-type]
    )
    train(job, out=tmp_path, tracker=Tracker(tmp_path, None))
    ranks = {int((tmp_path / f"rank {k}").read_text()) for k in range(2)}
    assert with_imports() - ranks <= before, "nobody asked for these"
