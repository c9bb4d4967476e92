"""Shrink images and store them without loss or as JPEG: what does JPEG cost whitened patches?

    python experiments/patches/recompressed.py tiny-imagenet-101/{train,val}.parquet clean.parquet
    python experiments/patches/recompressed.py tiny-imagenet-101/{train,val}.parquet jpeg.parquet \\
        --quality 75

Each is then classified alike: `selfsup-ray run experiments/patches/table1-phi-hard.yaml
ingest.source=clean.parquet whiten.without='val/*' classify.test.pattern='val/*' classify.epochs=3`.
At half their side, photos that were JPEG have nearly no traces of it left, and color at every
pixel, so the first file stands for images that never were JPEG.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def stored(file: bytes, *, side: int, quality: int | None) -> bytes:
    """Return an image file at side x side pixels: PNG, or JPEG with color at half resolution."""
    image = Image.open(io.BytesIO(file)).convert("RGB").resize((side, side), Image.Resampling.BOX)
    out = io.BytesIO()
    if quality is None:
        image.save(out, "PNG")
    else:
        image.save(out, "JPEG", quality=quality, subsampling="4:2:0")
    return out.getvalue()


def main() -> None:
    """Write the file and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", type=Path, nargs="+", help="Parquet with a column `image`")
    parser.add_argument("target", type=Path)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--quality", type=int, help="of JPEG; PNG when left out")
    args = parser.parse_args()
    table = pa.concat_tables(map(pq.read_table, args.sources))
    images = [stored(file.as_py(), side=args.side, quality=args.quality) for file in table["image"]]
    column = table.schema.get_field_index("image")
    pq.write_table(table.set_column(column, "image", pa.array(images)), args.target)
    print(
        f"{args.target}: {len(images):,} images of {sum(map(len, images)) / len(images):.0f} bytes"
    )


if __name__ == "__main__":
    main()
