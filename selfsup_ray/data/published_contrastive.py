"""Published results of instance discrimination, SimCLR and BYOL on CIFAR, to compare with.

The tables of a public comparison: linear top-1 accuracy on the test images, in [0, 1], at the best
of 100 epochs, single runs; ResNet-18. Seven runs of BYOL had a deviation of 0.0028.
"""

from __future__ import annotations

TEMPERATURES = (0.05, 0.07, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_C100 = (49.80, 51.82, 52.46, 56.05, 56.44, 55.47, 54.17, 53.05, 50.99, 50.08, 50.21, 48.33)
_C10 = (76.10, 79.75, 81.82, 83.78, 83.27, 83.22, 82.54, 82.97, 82.69, 82.67, 81.97, 82.21)


def _shares(percent: tuple[float, ...]) -> dict[float, float]:
    return {t: round(value / 100, 4) for t, value in zip(TEMPERATURES, percent, strict=True)}


TEMPERATURE_C100: dict[float, float] = _shares(_C100)
"""Instance discrimination on CIFAR-100 by temperature, linear head, batch 128."""
TEMPERATURE_C10: dict[float, float] = _shares(_C10)
"""The same on CIFAR-10; which of the last two belongs to 0.9 is inferred."""

METHODS: dict[tuple[str, ...], float] = {
    ("insdis",): 0.5644,
    ("simclr",): 0.6078,
    ("byol",): 0.6274,
}
"""CIFAR-100, each method at its best setting; SimCLR and BYOL with aug+."""

KNN_C10: dict[tuple[str, ...], float] = {
    ("insdis",): 0.808,
    ("simclr",): 0.848,
    ("moco",): 0.847,
    ("byol",): 0.868,
}
"""CIFAR-10, ResNet-18, accuracy of nearest neighbors on the test images: a public benchmark's runs
of 200 epochs; for instance discrimination the figure its authors' later code is said to reach."""

BATCH: dict[float, float] = {128: 0.6023, 512: 0.6274, 1024: 0.5914}
"""BYOL with aug+ on CIFAR-100 by batch size; a quarter of it on each of four GPUs."""

BATCH_NORMS: dict[tuple[str, ...], float] = {
    tuple("hidden" if bit == "1" else "none" for bit in bits): value
    for bits, value in {
        "111": 0.6274,
        "101": 0.6266,
        "011": 0.5818,
        "110": 0.5637,
        "010": 0.5067,
        "100": 0.0270,
        "001": 0.5372,
        "000": 0.0156,
    }.items()
}
"""BYOL with aug+ on CIFAR-100: batch norm in the online projector, the predictor, and the target's
projector. 100 and 000 collapsed."""

LINEAR_RUNS: dict[str, float] = {
    "insdis-r18-c100": 0.5644,
    "insdis-r18-c10": 0.8378,
    "insdis-mlp-r18-c100": 0.5648,
    "insdis-r50-c100": 0.6274,
    "simclr-r18-c100": 0.6078,
    "byol-r18-c100": 0.5996,
    "byol-r50-c100": 0.6464,
    "byol-augplus-r18-c100": 0.6274,
    "byol-augplus-r50-c100": 0.6551,
    "byol-augplus-r18-c10": 0.8906,
    "byol-batch-128": 0.6023,
    "byol-batch-1024": 0.5914,
    "byol-bn-101": 0.6266,
    "byol-bn-011": 0.5818,
    "byol-bn-110": 0.5637,
    "byol-bn-010": 0.5067,
    "byol-bn-100": 0.0270,
    "byol-bn-001": 0.5372,
    "byol-bn-000": 0.0156,
}
"""The published number of each experiment in experiments/contrastive/ that has one."""
