"""The script that shrinks a corpus's images and stores them without loss or as JPEG."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile, get_sampling

SCRIPT = Path(__file__).parents[1] / "experiments" / "patches" / "recompressed.py"
HALF_RESOLUTION = 2  # Pillow's number for 4:2:0


def test_images_shrink_to_block_means_and_jpeg_halves_their_color(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    for name, image in zip(("a", "b"), pixels, strict=True):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        table = pa.table({"image": [file.getvalue()], "label": [7], "path": [f"{name}.png"]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    sources = [str(tmp_path / f"{name}.parquet") for name in ("a", "b")]

    def stored(name: str, *more: str) -> pa.Table:
        target = str(tmp_path / name)
        command = [sys.executable, str(SCRIPT), *sources, target, "--side", "8", *more]
        subprocess.run(command, check=True, capture_output=True)
        return pq.read_table(target)

    clean, jpeg = stored("clean.parquet"), stored("jpeg.parquet", "--quality", "75")
    means = pixels.reshape(2, 8, 2, 8, 2, 3).mean((2, 4))
    for row, mean in zip(clean["image"].to_pylist(), means, strict=True):
        assert (
            np.abs(np.asarray(Image.open(io.BytesIO(row))) - mean).max() <= 1
        )  # rounded once a side
    for row in jpeg["image"].to_pylist():
        image = Image.open(io.BytesIO(row))
        assert isinstance(image, JpegImageFile)
        assert (image.size, get_sampling(image)) == ((8, 8), HALF_RESOLUTION)
    assert clean["path"].to_pylist() == jpeg["path"].to_pylist() == ["a.png", "b.png"]
