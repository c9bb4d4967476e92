"""The second opinion on patch networks: its code and its training, beside the package's."""

from __future__ import annotations

import io
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from selfsup_ray.ops.patch_codes import patch_bits, unpack_bits
from selfsup_ray.ops.whitening import code_kernel, whitening_matrix

SCRIPT = Path(__file__).parents[1] / "experiments" / "patches" / "published_form.py"


def test_its_whitening_kernel_and_masks_are_those_of_the_package():
    plain = runpy.run_path(str(SCRIPT))
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (6, 3, 12, 12), dtype=np.uint8))
    matrix = plain["whitening"](images)
    patches = plain["patches_of"](images).double().numpy()
    ours = whitening_matrix(np.cov(patches.T, bias=True))
    np.testing.assert_allclose(
        matrix @ matrix.T, ours @ ours.T, rtol=1e-4, atol=1e-5
    )  # up to signs
    centroids = rng.standard_normal((32, 75)).astype(np.float32)
    network = plain["Network"](centroids, matrix, k=8, side=12, full=False)
    kernel, bias = code_kernel(centroids, matrix)
    views = plain["scaled"](images)
    table = torch.from_numpy(kernel), torch.from_numpy(bias)
    [bits] = patch_bits(views, *table, patch_size=5, ks=[8], precision="float32")
    same = network.mask(views).permute(0, 2, 3, 1).bool() == unpack_bits(bits, 32)
    assert same.float().mean() > 0.999  # but for ties within rounding


def test_it_learns_from_one_file_and_measures_on_the_other(tmp_path):
    rng = np.random.default_rng(0)
    for name, n in (("train", 640), ("test", 64)):
        files, labels = [], []
        for i in range(n):  # stripes, upright in class 0, lying in class 1
            file = io.BytesIO()
            pixels = np.full((12, 12, 3), rng.integers(0, 100))
            pixels[:, rng.integers(2) :: 2] += rng.integers(50, 150)
            pixels = pixels.swapaxes(0, 1) if i % 2 else pixels
            Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
            files.append(file.getvalue())
            labels.append(i % 2)
        pq.write_table(pa.table({"image": files, "label": labels}), tmp_path / f"{name}.parquet")
    paths = [str(tmp_path / f"{name}.parquet") for name in ("train", "test")]
    small = ["--size", "16", "--k", "4", "--per-entry", "40", "--epochs", "4"]
    for model in ("phi_hard", "phi_full"):
        command = [sys.executable, str(SCRIPT), *paths, *small, "--model", model]
        made = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        result = json.loads(made)
        assert len(result["accuracy"]) == 4
        assert result["accuracy"][-1] > 0.9
