"""fit: the only epoch loop in the project, with exact resume, on any number of ranks."""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypedDict, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from selfsup_ray.artifacts import whole_file
from selfsup_ray.batches import Batch, Batches
from selfsup_ray.collectives import all_sum, rank, world_size
from selfsup_ray.config import NonNegative, Positive, config
from selfsup_ray.errors import TrainingError
from selfsup_ray.memory import kept
from selfsup_ray.models.collapse import mark_collapse
from selfsup_ray.models.norm import group_size
from selfsup_ray.models.weights import load_plain
from selfsup_ray.optim import (
    CosineSchedule,
    OptimConfig,
    ScheduleConfig,
    SGDConfig,
    build_optimizer,
    lr_ratio,
    peak_lr,
    set_lr,
)
from selfsup_ray.resources import AnyResources, TrainResources

if TYPE_CHECKING:
    from selfsup_ray.data.datasets import Dataset
    from selfsup_ray.models.objective import Objective

log = logging.getLogger(__name__)

MakeViews = Callable[[list[Tensor], Tensor, int], list[Tensor]]
"""(uint8 image batches (B, 3, S, S), ids (B,), epoch) -> normalised float views, same device."""

CUT = "_extra_state"
"""How the names of states end that lie on the ranks by image id: memory banks and labels."""

Record = dict[str, float]
"""One line of the history: step, epoch, loss, lr, images_per_s, data_wait_share, metrics."""


class State(TypedDict):
    """All a training is: saved with torch.save, loaded with weights_only=True."""

    objective: dict[str, Any]
    optimizer: dict[str, Any]
    step: int
    """Optimizer steps finished."""
    history: list[Record]


@config
class TrainConfig:
    """How an objective is trained; stage configs inherit it."""

    NOT_HERE: ClassVar = {
        "feed": "this stage looks images up by their ids, in memory-mapped shards; a stream serves "
        "only pretext.method simclr, moco and byol (pretext.feed)"
    }

    epochs: Positive
    batch_size: Positive = 256
    """Images per optimizer step over all workers; what is left of an epoch is dropped."""
    accumulate: Positive = 1
    """Parts a batch is cut into, one forward and backward each: less memory, same batch_size.
    Equal to one part only for losses that are means over images (no batch norm, no negatives)."""
    optim: OptimConfig = SGDConfig()
    schedule: ScheduleConfig = CosineSchedule()
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """bfloat16 is autocast: weights, losses and optimizer stay float32. It never changes by itself
    with the hardware: on a CPU without bfloat16 instructions it is slow, and a warning says so."""
    channels_last: bool = True
    """Memory order of images and convolutions; never slower on the CPUs and GPUs measured."""
    compile: bool = False
    """torch.compile the objective: a minute or more to start, then faster steps."""
    log_every: Positive = 20
    """Steps between two records; each record holds the means since the last."""
    checkpoint_every: Positive = 200
    """Steps between two checkpoints."""
    max_failures: NonNegative = 3
    """Failures in a row, without a checkpoint between them, to recover from: of workers, of nodes,
    of the code. One more, and the training is given up."""
    seed: NonNegative = 0
    resources: AnyResources = TrainResources()


@dataclass(frozen=True)
class TrainJob:
    """What a worker needs to train: it travels by pickle, so functions are partials."""

    build: Callable[[], tuple[Objective, Dataset, MakeViews]]
    config: TrainConfig
    device: Literal["cpu", "cuda"] = "cpu"
    predict: Callable[[Objective], Iterator[Record]] | None = None
    """By the same ranks, at the end: yields {"done": …, "of": …}, images, equally often on all."""

    def built(self) -> tuple[Objective, Dataset, MakeViews]:
        """Return objective, dataset and views with weights drawn from config.seed.

        Every rank and every restart gets the same weights; torch's generator is left as it was.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            return self.build()


def ignore(_: Any) -> None:
    """Do nothing with what is reported."""


def never() -> bool:
    """Return False: nothing asks for a checkpoint."""
    return False


def fit(
    objective: Objective,
    dataset: Dataset,
    make_views: MakeViews,
    config: TrainConfig,
    *,
    device: str | torch.device,
    state: State | None = None,
    on_checkpoint: Callable[[State], None] = ignore,
    on_log: Callable[[Record], None] = ignore,
    is_asked: Callable[[], bool] = never,
) -> State:
    """Train an objective to its last epoch, from `state` if there is one, and return the state.

    Every rank of the process group calls it alike. The result depends on seed and config, on the
    number of ranks only by rounding, and not on where a run was stopped: the order of the images
    is a function of (seed, epoch), the views of (seed, epoch, id), the rest is in the state.
    on_checkpoint and on_log are called on every rank; a state is live, so save it at once.
    is_asked: whether this rank wants a checkpoint at the record just made, between the regular
    ones; one rank is enough.
    Raises ConfigError for a batch that cannot be cut, TrainingError when the loss is not finite.
    """
    device = torch.device(device)
    together, pin = group_size(objective), device.type == "cuda"
    batches = Batches(dataset, config, pin=pin, together=together)
    objective.shares = batches.shares
    objective.to(device, memory_format=memory_format(config)).train()  # type: ignore[call-overload]
    optimizer = build_optimizer(config.optim, objective.trainable())
    step, history = restore(objective, optimizer, state)
    require_same_step(step, device)
    model = on_all_ranks(objective, config, device)
    meter = Meter(config, step, history, weight=batches.weight)
    say_path(config, device)

    def now() -> State:
        weights, moments = objective.state_dict(), optimizer.state_dict()
        return {"objective": weights, "optimizer": moments, "step": step, "history": history}

    with closing(batches.read_ahead(step)) as feed, own_generator(device), kept(device):
        while step < batches.total_steps:
            epoch, progress = step // batches.steps_per_epoch, step / batches.total_steps
            if step % batches.steps_per_epoch == 0:
                objective.before_epoch(epoch, dataset)
            objective.before_step(step * config.batch_size, dataset)  # SeLa relabels here
            lr = lr_at(config, progress)
            set_lr(optimizer, lr)
            seed_step(config.seed, step)
            optimizer.zero_grad(set_to_none=True)
            for part in range(config.accumulate):
                with meter.waiting():
                    images, ids = on_device(next(feed), device)  # uint8 (n, 3, S, S), int64 (n,)
                views = in_order(make_views(images, ids, epoch), config)  # float32 (n, 3, s, s)
                with gradients_stay(model, part + 1 < config.accumulate):
                    with autocast(config, device):
                        loss, metrics = model(views, ids)
                    (loss * (batches.weight / config.accumulate)).backward()
                meter.add(loss, metrics)
            if objective.should_step():  # self-labelling skips a batch without confident images
                optimizer.step()
            objective.after_step(progress)  # EMA, queue, memory bank
            step += 1
            checkpoint = step % config.checkpoint_every == 0 or step == batches.total_steps
            ends = step % batches.steps_per_epoch == 0
            numbers = objective.after_epoch(epoch) if ends else {}  # accuracy on test images
            # A checkpoint closes the record: a state then never holds half a mean, nor a NaN.
            if checkpoint or numbers or step % config.log_every == 0:
                record = meter.record(step, lr, batches) | objective.at_record() | numbers
                history.append(record)
                mark_collapse(history)
                on_log(history[-1])
                checkpoint = on_any_rank(checkpoint or is_asked(), device)
            if checkpoint:
                on_checkpoint(now())
    return now()


def lr_at(config: TrainConfig, progress: float) -> float:
    """Return the learning rate at `progress` in [0, 1]."""
    ratio = lr_ratio(config.schedule, progress=progress, epochs=config.epochs)
    return ratio * peak_lr(config.optim, batch_size=config.batch_size)


class Meter:
    """Losses and metrics since the last record, kept on the device until it is made.

    weight: of this rank's numbers in the mean over ranks.
    """

    def __init__(
        self, config: TrainConfig, step: int, history: Sequence[Record], *, weight: float = 1.0
    ) -> None:
        self.config, self.weight = config, weight
        self.last_finite = history[-1]["loss"] if history else None
        self.names: list[str] = []
        self._restart(step)

    def _restart(self, step: int) -> None:
        self.first_step, self.rows = step, list[Tensor]()
        self.waited, self.began = 0.0, time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the block as waiting for data."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def add(self, loss: Tensor, metrics: dict[str, Tensor]) -> None:
        """Note loss and metrics (one number each) of one part of a step."""
        self.names = ["loss", *sorted(metrics.keys() - {"loss"})]
        values = [loss, *(metrics[name] for name in self.names[1:])]
        self.rows.append(torch.stack([value.detach().float() for value in values]) * self.weight)

    def record(self, step: int, lr: float, batches: Batches) -> Record:
        """Return the means over steps and ranks since the last record, and start anew.

        Every rank must call it. Raises TrainingError at the first loss that is not finite.
        """
        table = all_sum(torch.stack(self.rows)) / world_size()  # (steps * parts, 1 + metrics)
        table = table.double().cpu().view(step - self.first_step, self.config.accumulate, -1)
        self._require_finite(table[:, :, 0].mean(dim=1), lr)
        seconds = time.perf_counter() - self.began
        images = (step - self.first_step) * self.config.batch_size
        record = {
            "step": step,
            "epoch": step / batches.steps_per_epoch,
            "lr": lr,
            "images_per_s": images / seconds,
            "data_wait_share": self.waited / seconds,
            **dict(zip(self.names, table.mean(dim=(0, 1)).tolist(), strict=True)),
        }
        self._restart(step)
        return record

    def _require_finite(self, losses: Tensor, lr: float) -> None:
        for i, loss in enumerate(losses.tolist()):
            if not np.isfinite(loss):
                before = "none" if self.last_finite is None else f"{self.last_finite:.6g}"
                raise TrainingError(
                    f"The loss became {loss} at step {self.first_step + i + 1} with lr {lr:.4g}; "
                    f"the last finite loss was {before}. Lower optim.lr, lengthen the warm-up, or "
                    f"set precision=float32; the last checkpoint is from before this step."
                )
            self.last_finite = loss


def save_state(path: Path, state: State) -> None:
    """Write a state whole or not at all."""
    with whole_file(path) as temporary:
        torch.save(state, temporary)


def load_state(path: Path) -> State | None:
    """Return the state in a file, on the CPU; None when there is no file.

    What objectives cut over the ranks is only mapped: a rank reads its part of it. Raises
    ArtifactError when the file holds anything but tensors and plain values.
    """
    if not path.exists():
        return None
    do = "Delete it: the stage then starts from its beginning."
    state = load_plain(path, do=do, mapped=True)
    cut = {key: x for key, x in state["objective"].items() if key.endswith(CUT)}
    whole = {key: x for key, x in state["objective"].items() if key not in cut}
    # Copied, since optimizers would go on with tensors in a file that the next checkpoint replaces.
    copied = copy.deepcopy({**state, "objective": whole})
    copied["objective"] |= cut
    return cast(State, copied)


def restore(
    objective: nn.Module, optimizer: torch.optim.Optimizer, state: State | None
) -> tuple[int, list[Record]]:
    """Load a state into objective and optimizer; return the steps done and the history so far."""
    if state is None:
        return 0, []
    objective.load_state_dict(state["objective"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], list(state["history"])


def require_same_step(step: int, device: torch.device) -> None:
    """Raise RuntimeError unless every rank goes on from the same step.

    A worker that was being ended may have replaced the checkpoint while the ranks read it; started
    anew, they read the same.
    """
    mean = float(all_sum(torch.tensor(step, dtype=torch.float64, device=device))) / world_size()
    if mean != step:
        raise RuntimeError(f"this rank goes on from step {step}, the mean over ranks is {mean}")


def on_any_rank(wanted: bool, device: torch.device) -> bool:
    """Return whether any rank wants it; every rank must call it."""
    return float(all_sum(torch.tensor(float(wanted), device=device))) > 0


def on_all_ranks(objective: nn.Module, config: TrainConfig, device: torch.device) -> nn.Module:
    """Return the objective as it is called: compiled if asked, its gradients averaged over ranks.

    Buffers are not broadcast: queues and banks are equal on all ranks by construction.
    """
    if config.compile:
        objective.compile()
    if world_size() == 1:
        return objective
    ids = None if device.type == "cpu" else [device]
    with warnings.catch_warnings():
        # Renamed in torch 2.14, but the new name does not exist in 2.11 and would broadcast once.
        warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
        return DistributedDataParallel(
            objective, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )


def gradients_stay(model: nn.Module, more: bool) -> AbstractContextManager[None]:
    """Return a block in which gradients are not yet averaged, if `more` parts are to come."""
    if more and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return nullcontext()


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """Return the block in which matrix products and convolutions run in config.precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16")


def memory_format(config: TrainConfig) -> torch.memory_format:
    """Return the memory order of images and weights."""
    return torch.channels_last if config.channels_last else torch.contiguous_format


def in_order(views: list[Tensor], config: TrainConfig) -> list[Tensor]:
    """Return image batches in the configured memory order; other tensors as they are."""
    order = memory_format(config)
    return [view.contiguous(memory_format=order) if view.ndim == 4 else view for view in views]


def on_device(batch: Batch, device: torch.device) -> Batch:
    """Return images and ids on a device; the copy of pinned memory goes on behind the compute."""
    images, ids = batch
    return [x.to(device, non_blocking=True) for x in images], ids.to(device, non_blocking=True)


def own_generator(device: torch.device) -> AbstractContextManager[None]:
    """Return a block after which torch's generators are as they were before it."""
    devices = [device] if device.type == "cuda" else []
    return torch.random.fork_rng(devices=devices)


def seed_step(seed: int, step: int) -> None:
    """Make dropout, and all else that draws from torch's generator, a function of the step."""
    torch.manual_seed((seed << 40) ^ (step << 12) ^ rank())


def say_path(config: TrainConfig, device: torch.device) -> None:
    """Log what this training runs on, and warn when bfloat16 has no instructions here."""
    order = "channels_last" if config.channels_last else "channels_first"
    place = f"{device}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
    log.info("training on %s, %d ranks, %s, %s", place, world_size(), config.precision, order)
    if config.precision == "bfloat16" and device.type == "cpu" and not has_bfloat16():
        log.warning(
            "This CPU has no bfloat16 instructions: training is correct but slow. "
            "precision=float32 is faster here and gives slightly different numbers."
        )


def has_bfloat16() -> bool:
    """Return whether this CPU multiplies bfloat16 in hardware (AVX-512 BF16 or AMX; ARM BF16)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
