"""Sprite sheets and the map of images: each thumbnail is where its CSS says."""

import base64
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selfsup_ray.artifacts import Array
from selfsup_ray.data.synthetic import corpus_of_arrays, shape_images
from selfsup_ray.plots import HUES
from selfsup_ray.report_images import PIXELS, Sheet, map_picture, place, sheet_size, thumbnails


def picture_in(text: str) -> Array:
    data = re.search(r"base64,([^)\"]+)", text)
    assert data is not None
    return np.asarray(Image.open(BytesIO(base64.b64decode(data[1]))))


def shown(sheet: Sheet, i: int) -> Array:
    """Return the pixels a browser shows: CSS percentages, turned into a box of the picture."""
    picture = picture_in(sheet.style)
    height, width = picture.shape[:2]
    scale = re.search(r"--size:([\d.]+)% ([\d.]+)%", sheet.style)
    assert scale is not None
    box_width, box_height = width / float(scale[1]) * 100, height / float(scale[2]) * 100
    x, y = (float(part.rstrip("%")) / 100 for part in sheet.position(i).split())
    left, top = round(x * (width - box_width)), round(y * (height - box_height))
    return picture[top : top + round(box_height), left : left + round(box_width)]


@pytest.mark.parametrize(("n", "columns", "side"), [(1, 1, 16), (7, 3, 28), (12, 12, 30)])
def test_every_tile_of_a_sheet_is_found_at_its_position(n: int, columns: int, side: int):
    values = np.random.default_rng(0).integers(30, 220, (n, 1, 1, 3))
    ramp = np.linspace(-20, 20, side)[None, :, None, None]  # top and bottom must not be swapped
    tiles = np.broadcast_to((values + ramp).clip(0, 255), (n, side, side, 3)).astype(np.uint8)
    sheet = Sheet.of(tiles, columns=columns)
    for i in range(n):
        got = shown(sheet, i).astype(int)
        assert got.shape == (side, side, 3)
        assert np.abs(got - tiles[i]).max() <= 12, "within what JPEG rounds, with no neighbor in it"


def test_grey_images_are_stored_in_one_channel():
    tiles = np.repeat(np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1), 3, axis=3)
    assert picture_in(Sheet.of(tiles, columns=1).style).ndim == 2


def test_thumbnails_are_the_images_or_their_smaller_copies_in_the_order_of_ids(tmp_path: Path):
    images, labels = shape_images(300, size=24)
    corpus = corpus_of_arrays(tmp_path, images, labels, shard_size=100)
    ids = np.arange(300)[::-1].copy()
    np.testing.assert_array_equal(thumbnails(corpus, ids, side=64), images[ids])
    small = thumbnails(corpus, ids[:5], side=12)
    for i, id in enumerate(ids[:5]):
        expected = np.asarray(
            Image.fromarray(images[id]).resize((12, 12), Image.Resampling.BILINEAR)
        )
        assert np.abs(small[i].astype(int) - expected).max() <= 1


@pytest.mark.parametrize("groups", [1, 10, 100, 150, 1000])
@pytest.mark.parametrize("size", [28, 64, 224])
def test_contact_sheets_stay_within_their_pixels(groups: int, size: int):
    per_row, side = sheet_size(groups, image_size=size)
    assert 2 * groups * per_row * side**2 <= PIXELS
    assert 6 <= per_row <= 12 and min(size, 24) <= side <= min(size, 64)


def test_every_square_of_the_map_shows_the_image_nearest_to_its_center():
    xy = np.random.default_rng(0).normal(size=(400, 2)) * [2, 1]
    placed = place(xy, cells=12)
    step = np.ptp(xy, axis=0).max() / 12
    best: dict[tuple[int, int], tuple[float, int]] = {}
    for i, (x, y) in enumerate((xy - xy.min(axis=0)) / step):
        cell = (min(int(x), placed.grid[0] - 1), min(int(y), placed.grid[1] - 1))
        distance = (x - cell[0] - 0.5) ** 2 + (y - cell[1] - 0.5) ** 2
        best[cell] = min(best.get(cell, (np.inf, -1)), (distance, i))
    assert placed.grid[0] == 12
    got = {tuple(cell): row for cell, row in zip(placed.cells.tolist(), placed.rows, strict=True)}
    assert got == {cell: i for cell, (_, i) in best.items()}


def test_the_map_of_images_is_transparent_where_no_image_is_and_framed_by_group():
    xy = np.array([[0.0, 0.0], [1.0, 1.0]])
    placed = place(xy, cells=2)
    tiles = np.full((2, 20, 20, 3), 200, np.uint8)
    picture = picture_in(map_picture(tiles, placed, [1, -1]))
    pitch = 25
    assert picture.shape == (2 * pitch, 2 * pitch, 4)
    assert picture[5, 5, 3] == 0 and picture[pitch + 5, pitch + 5, 3] == 0
    lower_left, upper_right = picture[pitch:, :pitch], picture[:pitch, pitch:]
    hue = np.array([int(HUES[1][i : i + 2], 16) for i in (1, 3, 5)])
    assert np.abs(lower_left[12, 12, :3].astype(int) - 200).max() < 12
    frame = lower_left[:24, 0, :3].astype(int).mean(axis=0)  # lossy: its mean, not each pixel
    assert np.abs(frame - hue).max() < 40
    assert np.ptp(upper_right[:24, 0, :3].astype(int).mean(axis=0)) < 30, "grey: no group"


def test_images_at_one_place_share_one_square():
    placed = place(np.zeros((5, 2)), cells=30)
    assert placed.rows.tolist() == [0]
