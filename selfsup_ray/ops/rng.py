"""Random numbers as a pure function of (seed, epoch, image id, stream): no state, any device.

The generator is SplitMix64 (Steele, Lea, Flood 2014): every (seed, epoch, stream, id) is hashed to
its own 64-bit start, and draw j is the mixed start + (j + 1) * golden gamma. So a number does not
depend on the batch an image is in, on the device, or on how many numbers others have drawn.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_UNIFORM, _NORMAL, _PERMUTATION = 1, 2, 3  # domains: the three functions never share numbers
_ROUNDS = 8  # Luby and Rackoff prove 4 enough for a random round function; ours is a fast hash


def uniforms(*, seed: int, epoch: int, ids: Tensor, draws: int, stream: int = 0) -> Tensor:
    """Return (B, draws) float32 uniforms in [0, 1), row i depending on ids[i] alone.

    ids: (B,) int64, on the device where the numbers are wanted; bits are equal on every device.
    stream separates uses of one image in one epoch: view 0, view 1, the neighbor draw, ...
    The first columns do not change when more draws are asked for.
    """
    return _uniforms(ids, draws, _key(_UNIFORM, seed, epoch, stream))


def normals(*, seed: int, epoch: int, ids: Tensor, draws: int, stream: int = 0) -> Tensor:
    """Return (B, draws) float32 standard normals (Box and Muller 1958); arguments as `uniforms`.

    24-bit uniforms bound the values by 5.8 standard deviations.
    """
    pairs = (draws + 1) // 2
    u = _uniforms(ids, 2 * pairs, _key(_NORMAL, seed, epoch, stream)).view(len(ids), pairs, 2)
    radius = (-2 * (1 - u[..., 0]).log()).sqrt()  # 1 - u is in (0, 1]: the log is finite
    angle = 2 * math.pi * u[..., 1]
    values = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=2)
    return values.view(len(ids), 2 * pairs)[:, :draws]


def permuted(
    positions: np.ndarray | Tensor, *, n: int, seed: int, epoch: int, stream: int = 0
) -> np.ndarray:
    """Return a pseudo-random permutation of 0..n-1 evaluated at positions, int64, same shape.

    positions: integers in [0, n); stream separates the permutations of one epoch. Memory and time
    are O(len(positions)), so no process ever holds n numbers. A Feistel network on a grid rows x
    columns >= n (Black and Rogaway 2002): each round adds a hash of one coordinate to the other,
    modulo its side; results >= n go round again.
    """
    values = np.asarray(positions).astype(np.uint64)
    assert n > 0, f"a permutation needs n > 0, got {n}"
    assert values.size == 0 or int(values.max()) < n, f"positions must be in [0, {n})"
    rounds = range(stream * _ROUNDS, (stream + 1) * _ROUNDS)
    keys = [_key(_PERMUTATION, seed, epoch, i) for i in rounds]
    # The grid has at most 2 sqrt(n) cells too many, so a second walk is rare; each walk stays on
    # one cycle of a permutation of the grid and therefore ends at a value below n.
    values = _feistel(values, n, keys)
    while (outside := values >= n).any():
        values[outside] = _feistel(values[outside], n, keys)
    return values.astype(np.int64)


def _key(*parts: int) -> int:
    """Hash integers of any size and sign into one 64-bit key."""
    key = 0
    for part in parts:
        z = (key + _GAMMA + (part & _MASK)) & _MASK
        z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
        z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
        key = z ^ (z >> 31)
    return key


def _signed(value: int) -> int:
    """Return the int64 with the bits of an unsigned 64-bit value."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _uniforms(ids: Tensor, draws: int, key: int) -> Tensor:
    start = _mix(ids.long() * _signed(_GAMMA) + _signed(key))
    steps = torch.arange(1, draws + 1, device=ids.device) * _signed(_GAMMA)
    bits = _mix(start[:, None] + steps) >> 40 & 0xFFFFFF  # the high 24 bits: a float32's mantissa
    return bits.to(torch.float32) * 2.0**-24


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser; int64 products wrap, and the masks make the shifts logical."""
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * _signed(_MIX_1)
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * _signed(_MIX_2)
    return z ^ (z >> 31 & (1 << 33) - 1)


def _feistel(values: np.ndarray, n: int, keys: list[int]) -> np.ndarray:
    """Permute the grid cells row * columns + column; values: uint64 below rows * columns."""
    rows = math.isqrt(n - 1) + 1
    columns = -(-n // rows)
    row, column = np.divmod(values, np.uint64(columns))
    for i, key in enumerate(keys):
        if i % 2 == 0:
            row = (row + _below(column, rows, key)) % np.uint64(rows)
        else:
            column = (column + _below(row, columns, key)) % np.uint64(columns)
    return np.asarray(row * np.uint64(columns) + column)


def _below(values: np.ndarray, bound: int, key: int) -> np.ndarray:
    """Hash uint64 values to uint64 in [0, bound), bound < 2^32 (Lemire's product instead of %)."""
    z = values * np.uint64(_GAMMA) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX_2)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(32)) * np.uint64(bound) >> np.uint64(32)
