"""fit against a slow loop, and against itself: stopped, cut into parts, on two ranks."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from selfsup_ray.batches import Batches
from selfsup_ray.collectives import rank
from selfsup_ray.config import override
from selfsup_ray.errors import ConfigError, TrainingError
from selfsup_ray.models.objective import Objective
from selfsup_ray.ops.rng import permuted, uniforms
from selfsup_ray.optim import AdamConfig, CosineSchedule, LARSConfig, SGDConfig
from selfsup_ray.training import (
    State,
    TrainConfig,
    TrainJob,
    fit,
    load_state,
    save_state,
)

SIDE, NUM_IMAGES = 6, 26


class Noise:
    """NUM_IMAGES small random images; image i is the same whenever it is read."""

    def __init__(self, broken: int | None = None) -> None:
        generator = torch.Generator().manual_seed(5)
        shape = (NUM_IMAGES, 3, SIDE, SIDE)
        self.images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        self.broken = broken

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, ids: np.ndarray, *, epoch: int) -> list[Tensor]:
        if self.broken is not None and self.broken in ids:
            raise OSError(f"image {self.broken} cannot be read")
        return [self.images[torch.from_numpy(ids)]]


def noisy_views(images: list[Tensor], ids: Tensor, epoch: int) -> list[Tensor]:
    noise = uniforms(seed=3, epoch=epoch, ids=ids, draws=images[0][0].numel())
    return [images[0] / 255 - 0.5 + 0.1 * noise.view_as(images[0])]


class Regression(Objective):
    """Predicts numbers that are a function of the id; a buffer follows the weights."""

    def __init__(self, dropout: float = 0.0, bad_id: int | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(80, 2)
        )
        self.bad_id = bad_id
        self.register_buffer("average", torch.zeros(2))
        self.register_buffer("epochs_begun", torch.zeros((), dtype=torch.int64))

    def forward(self, views: list[Tensor], ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        out = self.net(views[0])
        self.dtype, self.order = out.dtype, views[0].stride()
        target = torch.stack([ids.sin(), ids.cos()], dim=1)
        loss = (out.float() - target).square().mean()
        if self.bad_id is not None and (ids == self.bad_id).any():
            loss = loss * float("nan")
        return loss, {"spread": out.detach().float().square().mean()}

    def after_step(self, progress: float) -> None:
        self.average.lerp_(self.net[4].bias.detach(), 0.1 + 0.1 * progress)

    def before_epoch(self, epoch: int, dataset: object) -> None:
        assert epoch == int(self.epochs_begun)
        self.epochs_begun += 1


CONFIG = TrainConfig(
    epochs=3,
    batch_size=8,
    optim=SGDConfig(lr=0.1, weight_decay=0.01),
    precision="float32",
    channels_last=False,
    log_every=2,
    checkpoint_every=4,
)
STEPS = 3 * (NUM_IMAGES // 8)


def regression(**options: float) -> Regression:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Regression(**options)  # type: ignore[arg-type]


def trained(config: TrainConfig = CONFIG, **options: object) -> State:
    return copy.deepcopy(fit(regression(), Noise(), noisy_views, config, device="cpu", **options))


def without_times(history: list[dict[str, float]]) -> list[dict[str, float]]:
    times = {"images_per_s", "data_wait_share"}
    return [{k: v for k, v in record.items() if k not in times} for record in history]


def assert_equal_states(one: State, other: State) -> None:
    assert one["step"] == other["step"]
    assert without_times(one["history"]) == without_times(other["history"])
    for key, value in one["objective"].items():
        assert torch.equal(value, other["objective"][key]), key
    moments, others = one["optimizer"]["state"], other["optimizer"]["state"]
    assert moments.keys() == others.keys()
    for i, state in moments.items():
        for key, value in state.items():
            assert torch.equal(value, others[i][key]) if torch.is_tensor(value) else True, key


def test_fit_is_the_loop_that_the_paper_would_write():
    objective, data = regression(), Noise()
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    steps_per_epoch, losses = NUM_IMAGES // 8, []
    for epoch in range(3):
        order = permuted(np.arange(NUM_IMAGES), n=NUM_IMAGES, seed=0, epoch=epoch)
        for i in range(steps_per_epoch):
            progress = (epoch * steps_per_epoch + i) / STEPS
            optimizer.param_groups[0]["lr"] = 0.1 * (1 + np.cos(np.pi * progress)) / 2
            ids = torch.from_numpy(order[i * 8 : (i + 1) * 8])
            loss, _ = objective(noisy_views([data.images[ids]], ids, epoch), ids)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            objective.after_step(progress)
            losses.append(loss.item())
    state = trained()
    for key, value in objective.state_dict().items():
        if key != "epochs_begun":
            torch.testing.assert_close(state["objective"][key], value, rtol=1e-6, atol=1e-7)
    assert [record["step"] for record in state["history"]] == [2, 4, 6, 8, 9]
    first = [np.mean(losses[a:b]) for a, b in pairwise([0, 2, 4, 6, 8, 9])]
    assert [record["loss"] for record in state["history"]] == pytest.approx(first, rel=1e-5)
    assert state["history"][-1]["epoch"] == 3


class Killed(BaseException):
    """Ends a training where a kill -9 would."""


@pytest.mark.parametrize("optim", [SGDConfig(lr=0.1), AdamConfig(lr=0.01), LARSConfig(lr=0.5)])
@pytest.mark.parametrize("kill_at", [1, 3, 6, 9])
def test_a_training_stopped_anywhere_goes_on_to_the_same_weights(tmp_path, optim, kill_at):
    config = dataclasses.replace(CONFIG, optim=optim, checkpoint_every=kill_at)
    whole = trained(config)

    def save_and_die(state: State) -> None:
        save_state(tmp_path / "state.pt", state)
        raise Killed

    with pytest.raises(Killed):
        trained(config, on_checkpoint=save_and_die)
    state = load_state(tmp_path / "state.pt")
    assert state is not None and state["step"] == kill_at
    assert_equal_states(trained(config, state=state), whole)


def test_dropout_goes_on_with_the_numbers_it_would_have_had():
    states: list[State] = []
    make = partial(fit, dataset=Noise(), make_views=noisy_views, config=CONFIG, device="cpu")
    whole = make(regression(dropout=0.5), on_checkpoint=lambda s: states.append(copy.deepcopy(s)))
    torch.rand(17)  # another process's generator is elsewhere
    assert states[0]["step"] == 4
    assert_equal_states(make(regression(dropout=0.5), state=states[0]), whole)


def test_fit_leaves_torchs_generator_as_it_was():
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    trained()
    assert torch.equal(torch.rand(3), expected)


def test_a_finished_training_is_not_trained_again():
    whole = trained()
    assert_equal_states(trained(state=copy.deepcopy(whole)), whole)


def test_parts_of_a_batch_add_up_to_the_batch():
    whole, parts = trained(), trained(dataclasses.replace(CONFIG, accumulate=4))
    for key, value in whole["objective"].items():
        torch.testing.assert_close(parts["objective"][key], value, rtol=1e-5, atol=1e-6)
    for one, other in zip(whole["history"], parts["history"], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["spread"] == pytest.approx(one["spread"], rel=1e-4)


@pytest.mark.parametrize(("size", "accumulate"), [(2, 1), (2, 2), (3, 1), (3, 2)])
def test_ranks_train_to_the_weights_and_losses_of_one(on_ranks, size, accumulate):
    config = dataclasses.replace(CONFIG, accumulate=accumulate)
    alone = trained(config)
    for state in on_ranks(trained, config, size=size):  # parts of 8 or 4 images on 3 ranks
        for key, value in alone["objective"].items():
            torch.testing.assert_close(state["objective"][key], value, rtol=1e-5, atol=1e-6)
        for one, other in zip(alone["history"], state["history"], strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)


def read_ids(config: TrainConfig) -> Tensor:
    batches = Batches(Noise(), config, pin=False)
    return torch.stack([ids for _, ids in batches.read_ahead(0)])


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_epoch_reads_its_order_once_on_any_number_of_ranks_and_parts(on_ranks, size):
    config = dataclasses.replace(CONFIG, accumulate=2)
    ranks = on_ranks(read_ids, config, size=size)  # each (steps * 2 parts, 1 to 4 images)
    together = torch.cat(ranks, dim=1).view(3, -1)  # part by part, rank by rank
    for epoch in range(3):
        order = permuted(np.arange(24), n=NUM_IMAGES, seed=0, epoch=epoch)
        assert together[epoch].tolist() == order.tolist()
        assert len(set(order)) == 24


def steps_written() -> Tensor:
    """Return the steps at which this rank writes when rank 1 alone asks for it, at step 6."""
    written, records = list[int](), list[dict[str, float]]()
    trained(
        on_log=records.append,
        is_asked=lambda: rank() == 1 and records[-1]["step"] == 6,
        on_checkpoint=lambda state: written.append(state["step"]),
    )
    return torch.tensor(written)


def test_every_rank_writes_a_checkpoint_at_the_record_at_which_any_of_them_asks(on_ranks):
    for written in on_ranks(steps_written, size=2):
        assert written.tolist() == [4, 6, 8, STEPS]
    assert steps_written().tolist() == [4, 8, STEPS], "rank 0 alone does not ask"


def test_a_loss_that_is_not_finite_names_step_lr_and_the_last_finite_loss():
    losses = []
    batches = Batches(Noise(), CONFIG, pin=False)
    step = next(s for s in range(STEPS) if 7 in batches.ids(s, 0) and s > 0)
    objective = regression(bad_id=7)
    with pytest.raises(TrainingError) as caught:
        fit(objective, Noise(), noisy_views, CONFIG, device="cpu", on_log=losses.append)
    every_step = dataclasses.replace(CONFIG, log_every=1)
    last = trained(every_step)["history"][step - 1]["loss"]
    progress = (step // 2 * 2 + 1) / STEPS  # the record that holds the step ends at an even one
    lr = 0.05 * (1 + np.cos(np.pi * progress))
    assert f"became nan at step {step + 1} with lr {lr:.4g}" in str(caught.value)
    assert f"last finite loss was {last:.6g}" in str(caught.value)
    assert [record["step"] for record in losses] == list(range(2, step + 1, 2))


def test_no_checkpoint_holds_a_loss_that_is_not_finite():
    states: list[State] = []
    config = dataclasses.replace(CONFIG, log_every=100, checkpoint_every=1)
    with pytest.raises(TrainingError, match="last finite loss was none"):
        objective = regression(bad_id=int(Batches(Noise(), config, pin=False).ids(0, 0)[0]))
        fit(objective, Noise(), noisy_views, config, device="cpu", on_checkpoint=states.append)
    assert states == []


def test_an_error_while_reading_ahead_reaches_the_caller():
    with pytest.raises(OSError, match="image 4 cannot be read"):
        fit(regression(), Noise(broken=4), noisy_views, CONFIG, device="cpu")


class Undecided(Regression):
    """Has nothing to learn from in its second step."""

    def should_step(self) -> bool:
        self.calls = getattr(self, "calls", 0) + 1
        return self.calls != 2


def test_a_step_without_anything_to_learn_from_changes_no_weight():
    weights: list[Tensor] = []
    objective = Undecided()
    config = dataclasses.replace(CONFIG, checkpoint_every=1)
    fit(
        objective,
        Noise(),
        noisy_views,
        config,
        device="cpu",
        on_checkpoint=lambda s: weights.append(s["objective"]["net.0.weight"].clone()),
    )
    changed = [not torch.equal(a, b) for a, b in pairwise(weights)]
    assert changed == [False] + [True] * (STEPS - 2)


def test_precision_and_memory_order_are_those_of_the_config():
    objective = regression()
    config = dataclasses.replace(CONFIG, precision="bfloat16", channels_last=True, epochs=1)
    state = fit(objective, Noise(), noisy_views, config, device="cpu")
    assert objective.dtype == torch.bfloat16
    assert objective.order[1] == 1  # neighbours in memory are the channels of one pixel
    assert state["objective"]["net.0.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 8, "accumulate": 3}, r"batch_size=8.*accumulate=3.*multiple of 3"),
        ({"batch_size": 27}, r"batch_size=27 is more than the 26 images"),
    ],
)
def test_a_batch_that_cannot_be_made_is_refused_with_both_numbers(changes, message):
    with pytest.raises(ConfigError, match=message):
        trained(override(CONFIG, changes))


def test_a_batch_with_nothing_for_some_worker_is_refused(on_ranks):
    def refused() -> bool:
        with pytest.raises(ConfigError, match=r"batch_size=8 has nothing.* 3 workers.* feeds 2"):
            Batches(Noise(), CONFIG, pin=False, together=4)
        return True

    assert all(on_ranks(refused, size=3))


def test_ranks_that_read_different_checkpoints_do_not_train_on(on_ranks):
    states: list[State] = []
    trained(
        dataclasses.replace(CONFIG, checkpoint_every=1),
        on_checkpoint=lambda s: states.append(copy.deepcopy(s)),
    )

    def refused() -> bool:
        with pytest.raises(RuntimeError, match=r"goes on from step [25], the mean .* is 3.5"):
            trained(state=states[1 if rank() else 4])
        return True

    assert all(on_ranks(refused, size=2))


def build_job() -> tuple[Objective, Noise, object]:
    return Regression(), Noise(), noisy_views


def test_a_job_draws_the_same_weights_wherever_it_is_built():
    job = TrainJob(build_job, CONFIG)  # type: ignore[arg-type]
    torch.manual_seed(1)
    first, _, _ = job.built()
    torch.manual_seed(2)
    second, _, _ = job.built()
    other, _, _ = dataclasses.replace(job, config=dataclasses.replace(CONFIG, seed=1)).built()
    assert torch.equal(first.net[0].weight, second.net[0].weight)
    assert not torch.equal(first.net[0].weight, other.net[0].weight)


def test_the_cosine_of_a_default_config_reaches_zero():
    state = trained(dataclasses.replace(CONFIG, schedule=CosineSchedule(), log_every=1))
    assert state["history"][-1]["lr"] == pytest.approx(
        0.05 * (1 + np.cos(np.pi * (STEPS - 1) / STEPS))
    )


class Measured(Regression):
    """Measures the weights after the first and the third epoch."""

    def after_epoch(self, epoch: int) -> dict[str, float]:
        assert int(self.epochs_begun) == epoch + 1
        return {} if epoch == 1 else {"bias": float(self.net[4].bias.detach().sum())}


def measured(**options: object) -> State:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        objective = Measured()
    return copy.deepcopy(fit(objective, Noise(), noisy_views, CONFIG, device="cpu", **options))


@pytest.mark.parametrize("kill_at", [1, 3, 4, 9])
def test_numbers_of_an_epoch_close_a_record_wherever_the_training_was_stopped(kill_at: int):
    whole, plain, kept = measured(), trained(), list[State]()
    assert [r["step"] for r in whole["history"]] == [2, 3, 4, 6, 8, 9]
    assert [r["step"] for r in whole["history"] if "bias" in r] == [3, 9]
    assert torch.equal(whole["objective"]["average"], plain["objective"]["average"])

    def keep(state: State) -> None:
        kept.append(copy.deepcopy(state))

    config = dataclasses.replace(CONFIG, checkpoint_every=kill_at)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        objective = Measured()
    fit(objective, Noise(), noisy_views, config, device="cpu", on_checkpoint=keep)
    again = [r for r in measured(state=kept[0])["history"] if "bias" in r]
    assert [r["bias"] for r in again] == [r["bias"] for r in whole["history"] if "bias" in r]
