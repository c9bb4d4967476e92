"""The matrix of Sinkhorn-Knopp on one worker: in memory or in files, by kernels or by torch."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from selfsup_ray.artifacts import Array

Precision = Literal["bfloat16", "float32", "float64"]
T = TypeVar("T")

TILE = 2048
"""Rows that are read at once from a file."""


class Rows(Protocol):
    """A worker's rows of exp(lambda l + added), each divided by its largest entry, in blocks."""

    lam: float
    log_range: float
    """Of log r, up to which products of r and the rows are safe."""

    @property
    def width(self) -> int:
        """K, once the rows are formed."""

    @property
    def spread(self) -> Array:
        """(N,) float64: log sum exp(l - max l) of each row, -log of its largest probability."""

    def form(self, added: Array | None) -> None:
        """Form the rows with (K,) added to their exponents, None: nothing; forget the last c."""

    def weighted_sums(self, weights: Array) -> Array:
        """Return (blocks, K) float64: each block's rows, times weights (N,), added up."""

    def remember(self, log_inverse: Array) -> None:
        """Set the last c, as log(1 / c), (N,) float64."""

    def sweep(self, r: Array) -> tuple[Array, Array]:
        """Return each block's A c, (blocks, K), and its sum of |c_last / c - 1|, for c = 1 / A^T r.

        r: (K,) float64.
        """


def hold(
    scores: Sequence[Array],
    *,
    lam: float,
    precision: Precision,
    threads: int,
    device: str,
    folder: Path | None,
) -> Rows:
    """Return the rows of blocks (n, K) float32 of logits, still to be formed.

    float64, and devices other than the CPU, are torch's, whose matrix stays in memory.
    """
    if device == "cpu" and precision != "float64":
        return KernelRows(scores, lam=lam, precision=precision, threads=threads, folder=folder)
    if folder is not None:
        raise ValueError("a matrix in files needs device='cpu' and 16 or 32 bits")
    return TorchRows(scores, lam=lam, dtype=getattr(torch, precision), device=device)


class KernelRows:
    """Rows in 16 or 32 bits, in numba's kernels; `threads` blocks are worked on at once."""

    log_range = 30.0

    def __init__(
        self,
        scores: Sequence[Array],
        *,
        lam: float,
        precision: Precision,
        threads: int = 1,
        folder: Path | None = None,
    ) -> None:
        self.scores, self.lam, self.threads, self.folder = scores, lam, threads, folder
        self.shift = np.uint32(16 if precision == "bfloat16" else 0)
        self.dtype = np.dtype(np.uint16 if precision == "bfloat16" else np.uint32)
        self._blocks: list[Array | None] = [None] * len(scores)
        self._spreads: list[Array] = [np.empty(0)] * len(scores)
        self._before: list[Array] = [np.empty(0, np.float32)] * len(scores)
        self._width = 0

    @property
    def width(self) -> int:
        """K, once the rows are formed."""
        return self._width

    @property
    def spread(self) -> Array:
        """(N,) float64: log sum exp(l - max l) of each row."""
        return np.concatenate(self._spreads)

    def form(self, added: Array | None) -> None:
        """Form the rows with (K,) added to their exponents; forget the last c."""
        self._over_blocks(partial(self._form, added))

    def _form(self, added: Array | None, i: int) -> None:
        from selfsup_ray.ops.sinkhorn_kernels import form

        logits = np.ascontiguousarray(self.scores[i], np.float32)
        n, self._width = logits.shape
        exponents = np.zeros(self._width, np.float32) if added is None else added.astype(np.float32)
        rows, spread = self._room(i, logits.shape), np.empty(n)
        line = np.empty(self._width, np.float32)
        bad = form(logits, np.float32(self.lam), exponents, self.shift, rows, spread, line)
        if bad >= 0:
            raise ValueError(f"row {bad} of block {i} of the scores is not finite")
        if self.folder is not None:
            rows.tofile(self._path(i))
        self._spreads[i], self._before[i] = spread, np.full(n, np.inf, np.float32)

    def _room(self, i: int, shape: tuple[int, ...]) -> Array:
        """Return where block i is formed: its place in memory, or a buffer that goes to a file."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            return np.empty(shape, self.dtype)
        if self._blocks[i] is None:
            # Pages of its own: they go back at the end, where the heap may keep them.
            size = math.prod(shape)
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            pages = mmap.mmap(-1, max(size, 1) * self.dtype.itemsize, flags=flags)
            self._blocks[i] = np.frombuffer(pages, self.dtype, size).reshape(shape)
        block = self._blocks[i]
        assert block is not None
        return block

    def _path(self, i: int) -> Path:
        assert self.folder is not None
        return self.folder / f"rows-{i:05d}.bin"

    def _tiles(self, i: int) -> Iterator[tuple[slice, Array]]:
        """Yield block i in pieces with their places; a piece from a file lasts until the next."""
        block, n = self._blocks[i], len(self._spreads[i])
        if block is not None:
            yield slice(0, n), block
            return
        buffer = np.empty((min(TILE, n), self._width), self.dtype)
        with open(self._path(i), "rb", buffering=0) as file:
            for a in range(0, n, TILE):
                piece = buffer[: min(TILE, n - a)]
                read = file.readinto(piece.data.cast("B"))
                assert read == piece.nbytes, f"{file.name} is cut off"
                yield slice(a, a + len(piece)), piece

    def weighted_sums(self, weights: Array) -> Array:
        """Return (blocks, K) float64: each block's rows, times weights (N,), added up."""
        from selfsup_ray.ops.sinkhorn_kernels import weighted_sums

        parts = self._cut(weights)

        def block(i: int) -> Array:
            sums = np.zeros(self._width)
            for at, rows in self._tiles(i):
                weighted_sums(rows, self.shift, parts[i][at], sums)
            return sums

        return np.stack(self._over_blocks(block))

    def remember(self, log_inverse: Array) -> None:
        """Set the last c, as log(1 / c), (N,) float64."""
        self._before = [
            np.exp(np.clip(part, -80, 80)).astype(np.float32) for part in self._cut(log_inverse)
        ]

    def sweep(self, r: Array) -> tuple[Array, Array]:
        """Return each block's A c, (blocks, K), and its sum of |c_last / c - 1|."""
        from selfsup_ray.ops.sinkhorn_kernels import sweep

        narrow = r.astype(np.float32)

        def block(i: int) -> tuple[Array, float]:
            sums, moved, line = np.zeros(self._width), 0.0, np.empty(self._width, np.float32)
            for at, rows in self._tiles(i):
                moved += sweep(rows, self.shift, narrow, self._before[i][at], line, sums)
            return sums, moved

        sums, moved = zip(*self._over_blocks(block), strict=True)
        return np.stack(sums), np.array(moved)

    def _cut(self, values: Array) -> list[Array]:
        ends = np.cumsum([len(spread) for spread in self._spreads])
        return np.split(values, ends[:-1])

    def _over_blocks(self, work: Callable[[int], T]) -> list[T]:
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(work, range(len(self.scores))))


class TorchRows:
    """Rows in torch: float64 on a CPU, the reference; any type on a GPU."""

    def __init__(
        self, scores: Sequence[Array], *, lam: float, dtype: torch.dtype, device: str
    ) -> None:
        self.scores, self.lam, self.dtype, self.device = scores, lam, dtype, device
        self.log_range = 300.0 if dtype == torch.float64 else 30.0
        self._sums = torch.float64 if dtype == torch.float64 else torch.float32
        self._blocks: list[Tensor] = []
        self._spreads: list[Tensor] = []
        self._before: list[Tensor] = []

    @property
    def width(self) -> int:
        """K, once the rows are formed."""
        return int(self._blocks[0].shape[1])

    @property
    def spread(self) -> Array:
        """(N,) float64: log sum exp(l - max l) of each row."""
        return np.asarray(torch.cat(self._spreads).cpu().numpy())

    def form(self, added: Array | None) -> None:
        """Form the rows with (K,) added to their exponents; forget the last c."""
        self._blocks, self._spreads, self._before = [], [], []
        for i in range(len(self.scores)):
            logits = torch.from_numpy(np.asarray(self.scores[i])).to(self.device, self._sums)
            if not bool(logits.isfinite().all()):
                row = int((~logits.isfinite()).any(dim=1).to(torch.uint8).argmax())
                raise ValueError(f"row {row} of block {i} of the scores is not finite")
            logits = logits - logits.amax(dim=1, keepdim=True)
            self._spreads.append(logits.logsumexp(dim=1).double())
            exponents = logits * self.lam
            if added is not None:
                exponents = exponents + torch.from_numpy(added).to(self.device, self._sums)
            top = exponents.amax(dim=1, keepdim=True)
            self._blocks.append((exponents - top).exp().to(self.dtype))
            self._before.append(torch.full_like(logits[:, 0], torch.inf))

    def weighted_sums(self, weights: Array) -> Array:
        """Return (blocks, K) float64: each block's rows, times weights (N,), added up."""
        parts = self._cut(weights)
        return np.stack(
            [
                torch.mv(rows.double().T, part).cpu().numpy()
                for rows, part in zip(self._blocks, parts, strict=True)
            ]
        )

    def remember(self, log_inverse: Array) -> None:
        """Set the last c, as log(1 / c), (N,) float64."""
        bound = 80.0 if self._sums == torch.float32 else 700.0
        self._before = [
            part.clamp(-bound, bound).exp().to(self._sums) for part in self._cut(log_inverse)
        ]

    def sweep(self, r: Array) -> tuple[Array, Array]:
        """Return each block's A c, (blocks, K), and its sum of |c_last / c - 1|."""
        wide, sums, moved = torch.from_numpy(r).to(self.device, self._sums), [], []
        for i, block in enumerate(self._blocks):
            inverse, total = torch.empty_like(self._before[i]), torch.zeros_like(wide)
            for a in range(0, len(block), TILE):
                rows = block[a : a + TILE].to(self._sums)
                inverse[a : a + TILE] = torch.mv(rows, wide)
                total += torch.mv(rows.T, 1 / inverse[a : a + TILE])
            moved.append((inverse / self._before[i] - 1).abs().sum().double())
            self._before[i] = inverse
            sums.append(total.double())
        return torch.stack(sums).cpu().numpy(), torch.stack(moved).cpu().numpy()

    def _cut(self, values: Array) -> list[Tensor]:
        sizes = [len(block) for block in self._blocks]
        return list(torch.split(torch.from_numpy(values).to(self.device), sizes))
