"""SeLa: cross-entropy with labels that balanced assignments of all images renew now and then."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsup_ray import collectives
from selfsup_ray.artifacts import Array
from selfsup_ray.errors import TrainingError
from selfsup_ray.models.alexnet import DropoutKey, set_dropout_key
from selfsup_ray.models.backbones import Backbone, seeded
from selfsup_ray.models.labels import Labels, Route, Source
from selfsup_ray.models.norm import SyncNorm, set_batch_norm
from selfsup_ray.models.objective import Metrics, Objective, at_least_float32, full_precision
from selfsup_ray.models.relabeling import Block, HeadScores, Relabeled, collected, relabeled
from selfsup_ray.models.rotation import TURNS, RotationHead, turned
from selfsup_ray.models.sela_config import AugmentedPass, EstimatedPrior, SeLaMethod, marginals
from selfsup_ray.ops.metrics import (
    adjusted_rand_index,
    contingency,
    normalized_mutual_information,
    purity,
)
from selfsup_ray.ops.rng import permuted

if TYPE_CHECKING:
    from selfsup_ray.data.datasets import Dataset

log = logging.getLogger(__name__)

HEAD_MEMORY = 0.99  # share of a head's running loss that stays, each step: about 100 steps
LABEL_STREAM = 1_004  # its own permutations, one a head
MEASURED = (
    *("samples_seen", "iterations", "change", "converged", "cost", "changed_share"),
    *("smallest", "largest", "nmi", "ari", "purity"),
)
"""What is noted of each event and head; the last three need true labels, which decide nothing."""

PassViews = Callable[[list[Tensor], Tensor, int], list[Tensor]]
"""Makes the views of the labelling pass, as training's `MakeViews`."""
Truth = Callable[[Array], Array]
"""ids -> classes, -1 unknown; they are only compared with."""


class SeLa(Objective):
    """SeLa (Asano, Rupprecht, Vedaldi 2020); views: one tensor of the images.

    Labels lie on the ranks by image id, 4 bytes a head and image. Batch normalisation is over all
    ranks, as over the one GPU that held the published networks, and the masks of `Dropout` are
    functions of step and image id: results do not depend on the number of ranks but for rounding.
    """

    num_views = 1
    passed: Tensor
    log_r: Tensor
    estimates: Tensor
    events: Tensor
    running_losses: Tensor

    def __init__(
        self,
        method: SeLaMethod,
        backbone: Backbone,
        *,
        num_images: int,
        pass_views: PassViews,
        labels: Source | None = None,
        truth: Truth | None = None,
    ) -> None:
        """pass_views: of the labelling pass; labels: to start from, by default balanced ones."""
        super().__init__()
        self.method, self.backbone, self.pass_views, self.truth = (
            method,
            backbone,
            pass_views,
            truth,
        )
        heads, k = method.num_heads, method.num_clusters
        with seeded(method.seed):
            self.heads = nn.ModuleList(_head(backbone.dim, k) for _ in range(heads))
            self.rotation_head = RotationHead(backbone.dim) if method.rotation else None
        set_batch_norm(self, SyncNorm())
        self.per_epoch = num_images // method.batch_size * method.batch_size
        self.times = method.events.epochs(method.epochs) * self.per_epoch
        start = labels or first_labels(num_images, heads, k, seed=method.seed)
        nothing = torch.full((len(self.times), heads, len(MEASURED)), math.nan, dtype=torch.float64)
        self.labels = Labels(num_images, heads, start)
        self.register_buffer("passed", torch.zeros((), dtype=torch.int64))
        self.register_buffer("log_r", torch.full((heads, k), math.nan, dtype=torch.float64))
        self.register_buffer("estimates", torch.full((heads, k), 1 / k, dtype=torch.float64))
        self.register_buffer("events", nothing)
        self.register_buffer("running_losses", torch.zeros(heads))
        self._passed: int | None = None
        self._step = 0
        self._losses: list[Tensor] = []

    def forward(self, views: list[Tensor], ids: Tensor) -> tuple[Tensor, Metrics]:
        """Return the mean over heads of the cross-entropy with each head's labels of these ids.

        With `rotation`, plus the cross-entropy of the rotations, over four copies of each image,
        of which the labels concern the unturned one.
        """
        n, features = len(ids), self._features_to_learn(views[0], ids)
        with full_precision(features):
            labels = self.labels.of(ids, self.shares_of(n)).long().unbind(dim=1)
            rows = at_least_float32(features)
            logits = [head(rows[:n]) for head in self.heads]
            losses = torch.stack(
                [F.cross_entropy(one, y) for one, y in zip(logits, labels, strict=True)]
            )
            tops = torch.stack([one.argmax(dim=1) for one in logits])
            metrics = {"label_accuracy": (tops == torch.stack(labels)).float().mean()}
            loss = losses.mean()
            if self.rotation_head is not None:
                rotation, accuracy = self.rotation_head.loss(rows)
                metrics |= {"rotation_loss": rotation.detach(), "rotation_accuracy": accuracy}
                loss = loss + rotation
        if self.training:
            self._losses.append(losses.detach())
        return loss, {"loss": loss.detach(), **metrics}

    def _features_to_learn(self, images: Tensor, ids: Tensor) -> Tensor:
        """Return the features (n, dim) of a step's images; with `rotation` (4 n, dim), turned."""
        if self.rotation_head is None:
            return self.features(images, ids, step=self._step)
        # Every copy has masks of its own, as if it were another image.
        copies = [ids + len(self.labels) * turns for turns in range(TURNS)]
        return self.features(turned(images), torch.cat(copies), step=self._step)

    def features(self, images: Tensor, ids: Tensor, *, step: int) -> Tensor:
        """Return the features (n, dim) of views; `step` chooses the masks of dropout."""
        set_dropout_key(self.backbone, DropoutKey(self.method.seed, step, ids))
        features: Tensor = self.backbone(images)
        set_dropout_key(self.backbone, None)
        return features

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Follow each head's loss over all ranks."""
        super().after_step(progress)
        if not self._losses:
            return
        own = torch.stack(self._losses).mean(dim=0)
        shares = self.shares or collectives.equal_shares(1)
        mean = collectives.all_sum(own * (shares.mine / shares.total))
        self.running_losses.lerp_(mean, 1 - HEAD_MEMORY)
        self._losses = []

    def before_step(self, samples_seen: int, dataset: Dataset) -> None:
        """Renew the labels when an event is due; several that are due at once are one."""
        self._step = samples_seen // self.method.batch_size
        if self._passed is None:
            self._passed = int(self.passed)
        due = int(np.searchsorted(self.times, samples_seen, side="right"))
        if due > self._passed:
            self._relabel(due - 1, samples_seen, dataset)
            self._passed = due
            self.passed.fill_(due)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """Take a checkpoint's weights, labels and events."""
        self._passed = None
        return super().load_state_dict(state_dict, *args, **options)

    def due_heads(self, samples_seen: int) -> Sequence[int]:
        """Return the heads whose labels are renewed: all, or the epoch's (CIFAR's code)."""
        if self.method.heads_per_event == "all":
            return range(self.method.num_heads)
        return [samples_seen // self.per_epoch % self.method.num_heads]

    @torch.no_grad()
    def _relabel(self, event: int, samples_seen: int, dataset: Dataset) -> None:
        heads = self.due_heads(samples_seen)
        keeps_logits = len(heads) * self.method.num_clusters < self.backbone.dim
        blocks = self._pass(event, dataset, heads if keeps_logits else None)
        self._require_finite(blocks, event)
        k, device = self.method.num_clusters, self.log_r.device
        ids = np.concatenate([np.empty(0, np.int64), *(block.ids for block in blocks)])
        route, classes = Route(ids, self.labels.shares, device), self._classes()
        for place, head in enumerate(heads):
            of = _Columns(place * k, k) if keeps_logits else self.heads[head]
            found = self._solved(event, head, HeadScores(blocks, of, device), samples_seen)
            labels, before = route(found.labels), self.labels.mine()[:, head].clone()
            self.labels.mine()[:, head] = labels
            numbers = self._measured(found, labels, before, classes)
            numbers["samples_seen"] = float(samples_seen)
            row = [numbers.get(name, math.nan) for name in MEASURED]
            self.events[event, head] = torch.tensor(row, dtype=torch.float64, device=device)
            _say(event, head, found, numbers, self.method.sinkhorn.max_iterations)

    def _pass(self, event: int, dataset: Dataset, heads: Sequence[int] | None) -> list[Block]:
        """Return features of all images of this rank, or the logits of some heads side by side."""
        method, device, training = self.method, self.log_r.device, self.training
        augmented = isinstance(method.label_pass, AugmentedPass)
        order = torch.channels_last if method.channels_last else torch.contiguous_format
        self.train(augmented)

        def network(images: list[Tensor], ids: Tensor) -> Tensor:
            # Negative numbers: no epoch and no step of the training draws the same.
            view = self.pass_views(images, ids, -1 - event)[0].contiguous(memory_format=order)
            with torch.autocast(device.type, torch.bfloat16, method.precision == "bfloat16"):
                features = self.features(view, ids, step=-1 - event)
            if heads is None:
                return features
            rows = at_least_float32(features)
            return torch.cat([self.heads[head](rows) for head in heads], dim=1)

        blocks = collected(
            network,
            dataset,
            batch_size=method.batch_size,
            seed=method.seed,
            epoch=-1 - event,
            shuffled=augmented,
            device=device,
        )
        self.train(training)
        return blocks

    def _require_finite(self, blocks: list[Block], event: int) -> None:
        """Raise TrainingError on every rank when a feature of any is not finite."""
        bad = sum(int((~block.rows.isfinite()).any(dim=1).sum()) for block in blocks)
        total = int(collectives.all_sum(torch.tensor(bad, device=self.log_r.device)))
        if total:
            raise TrainingError(
                f"Features of {total} images are not finite at event {event}. Lower optim.lr, or "
                f"set precision=float32; the last checkpoint is from before this event."
            )

    def _solved(self, event: int, head: int, scores: HeadScores, samples_seen: int) -> Relabeled:
        """Solve the assignment of one head."""
        method, device = self.method, self.log_r.device
        progress = samples_seen / max(self.per_epoch * method.epochs, 1)
        if isinstance(method.prior, EstimatedPrior) and progress > 0:
            counts = scores.soft_counts(
                method.prior.sharpness, lambda x: collectives.all_sum(x.to(device)).cpu()
            )
            kept = method.prior.keep
            self.estimates[head].mul_(kept).add_(torch.from_numpy(counts).to(device) * (1 - kept))
        start = self.log_r[head].cpu().numpy()
        found = relabeled(
            scores,
            method.sinkhorn,
            shares=marginals(method.prior, self.estimates[head].cpu().numpy(), progress=progress),
            start=start if method.sinkhorn.warm_start and np.isfinite(start).all() else None,
            place=f"head {head} at event {event}",
        )
        self.log_r[head] = torch.from_numpy(found.solved.log_r).to(device)
        return found

    def _classes(self) -> tuple[Array, int] | None:
        """Return the classes of this rank's images, and how many there are on all ranks."""
        if self.truth is None:
            return None
        own = self.truth(self.labels.ids)
        largest = torch.tensor([int(own.max(initial=0))], device=self.log_r.device)
        return own, int(collectives.gather(largest).max()) + 1

    def _measured(
        self, found: Relabeled, labels: Tensor, before: Tensor, classes: tuple[Array, int] | None
    ) -> dict[str, float]:
        """Return what is noted of an event; only counts by cluster and class are added up.

        labels, before: (n,) of this rank's images by id; classes: of `_classes`.
        """
        k, solved, changed = self.method.num_clusters, found.solved, (labels != before).sum()
        sizes = torch.cat([torch.bincount(labels.long(), minlength=k), changed[None]])
        *counts, changes = collectives.all_sum(sizes).tolist()
        numbers = {
            "iterations": float(solved.iterations),
            "change": solved.change,
            "converged": float(solved.converged),
            "cost": found.cost,
            "changed_share": changes / len(self.labels),
            "smallest": float(min(counts)),
            "largest": float(max(counts)),
        }
        if classes is None:
            return numbers
        own, num_classes = classes
        table = contingency(labels.cpu().numpy(), own, num_clusters=k, num_classes=num_classes)
        return numbers | agreement(
            collectives.all_sum(torch.from_numpy(table).to(labels.device)).cpu().numpy()
        )

    def after_epoch(self, epoch: int) -> dict[str, float]:
        """Return the mean over heads of what was noted of each head's last event."""
        table = self.events[: self._passed or 0].cpu()
        if not len(table):
            return {}
        known = ~table[..., 0].isnan()  # (events, T)
        last = [
            table[known[:, h].nonzero()[-1, 0], h]
            for h in range(table.shape[1])
            if known[:, h].any()
        ]
        means = dict(zip(MEASURED, torch.stack(last).mean(dim=0).tolist(), strict=True))
        shown = {
            name: x for name, x in means.items() if math.isfinite(x) and name != "samples_seen"
        }
        return {"events": float(self._passed or 0), **shown}

    def best_head(self) -> int:
        """Return the head with the lowest training loss over about the last 100 steps."""
        return int(self.running_losses.argmin())

    def encoder(self) -> Backbone:
        """Return the backbone under the heads."""
        return self.backbone


class _Columns(nn.Module):
    """Takes one head's logits out of those of several side by side."""

    def __init__(self, first: int, width: int) -> None:
        super().__init__()
        self.first, self.width = first, width

    def forward(self, rows: Tensor) -> Tensor:
        return rows[:, self.first : self.first + self.width]


def _head(dim: int, num_clusters: int) -> nn.Linear:
    head = nn.Linear(dim, num_clusters)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return head


def first_labels(num_images: int, num_heads: int, num_clusters: int, *, seed: int) -> Source:
    """Return the labels from before the first event: i mod K, permuted for each head."""

    def between(first: int, stop: int) -> Array:
        places = np.arange(first, stop)
        permutations = (
            permuted(places, n=num_images, seed=seed, epoch=0, stream=LABEL_STREAM + head)
            for head in range(num_heads)
        )
        return np.stack([one % num_clusters for one in permutations], axis=1).astype(np.int32)

    return between


def agreement(counts: Array) -> dict[str, float]:
    """Return NMI, ARI and purity of labels against classes from their counts (K, C)."""
    return {
        "nmi": normalized_mutual_information(counts),
        "ari": adjusted_rand_index(counts),
        "purity": purity(counts),
    }


def _say(event: int, head: int, found: Relabeled, numbers: Mapping[str, float], bound: int) -> None:
    text = f"event {event}, head {head}: {found.solved.iterations} iterations"
    text += f", {numbers['changed_share']:.1%} of the labels changed"
    log.info("sela: %s", text)
    if not found.solved.converged:
        log.warning(
            "sela: event %d, head %d: the change per image is still %.2g after "
            "sinkhorn.max_iterations=%d; clusters are less equal than asked for",
            *(event, head, found.solved.change, bound),
        )
