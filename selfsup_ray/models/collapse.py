"""Collapse: embeddings that become one point or one line, seen in the records of a training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

MOST = 512
"""Rows that the effective rank is taken of when rows are longer than this."""
LEAST = {"embedding_std": 0.1, "effective_rank": 1.5}
"""What a record's number is below when embeddings become one point, and when they become a line."""
IN_A_ROW = 3
"""Records that must be so, the last no better than the first: a training may begin this low."""


@torch.no_grad()
def effective_rank(z: Tensor) -> float:
    """Return exp of the entropy of the eigenvalues of the covariance of rows z (n, d).

    Between 1, all on a line, and min(n - 1, d), spread alike over all directions (Roy and Vetterli
    2007, on the spectrum of the covariance). Rows longer than 512 are judged by the first 512 rows.
    """
    x = (z if z.shape[1] <= MOST else z[:MOST]).double()
    x = x - x.mean(dim=0)
    products = x.T @ x if x.shape[1] <= len(x) else x @ x.T  # the same eigenvalues but for zeros
    values = torch.linalg.eigvalsh(products.cpu()).clamp_min(0)
    p = values / values.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return float(torch.special.entr(p).sum().exp())


def mark_collapse(history: Sequence[dict[str, float]]) -> None:
    """Set `collapsed` to 1 in the newest record, if it confirms the first collapse of a history."""
    if not any("collapsed" in record for record in history) and _confirmed(history[-IN_A_ROW:]):
        history[-1]["collapsed"] = 1.0


def _confirmed(records: Sequence[Mapping[str, float]]) -> bool:
    return len(records) == IN_A_ROW and any(_stays_low(records, name) for name in LEAST)


def _stays_low(records: Sequence[Mapping[str, float]], name: str) -> bool:
    values = [record.get(name, math.inf) for record in records]
    return max(values) < LEAST[name] and values[-1] <= values[0]


def collapse_warning(record: Mapping[str, float]) -> str:
    """Return what a user is told of a collapse: where, the numbers, what to do."""
    return (
        f"The embeddings have collapsed by step {record['step']:.0f}: their deviation is "
        f"{record['embedding_std']:.3g} (1: even over the sphere, 0: one point), their effective "
        f"rank {record['effective_rank']:.3g}. What follows learns next to nothing. Stop it and "
        f"lower optim.lr or lengthen schedule.warmup_epochs; byol also needs a batch_norm in "
        f"method.head or method.predictor, and one in method.target_head."
    )
