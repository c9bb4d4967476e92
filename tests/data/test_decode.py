"""Decoding: right RGB from every odd image, the right reason for every bad one."""

import random
import threading
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageOps
from torchvision.transforms import v2

from selfsup_ray.data.decode import decode, decode_square, read_square, scaled_sides
from selfsup_ray.data.images import ImageError
from selfsup_ray.data.synthetic import BAD_KINDS, ODD_KINDS, saved, shape_images

KINDS = {kind.name: kind for kind in BAD_KINDS + ODD_KINDS}


def picture(size: int = 24, *, wide: int = 0) -> Image.Image:
    pixels = shape_images(4, size=size)[0]
    return Image.fromarray(np.concatenate([pixels[0], *pixels[1 : 1 + wide]], axis=1))


def smooth(height: int, width: int) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 40), np.cos(y / 30), np.sin((x + y) / 60)]
    return Image.fromarray((127 + 120 * np.stack(waves, axis=2)).astype(np.uint8))


def error_of(data: bytes, **options: int) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decode(data, **options)
    return caught.value


@pytest.mark.parametrize("kind", BAD_KINDS, ids=lambda kind: kind.name)
def test_a_bad_file_has_its_reason(kind):
    error = error_of(kind.make(picture()))
    assert error.reason == kind.reason and error.detail


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_jpeg_pixels_are_pillows_to_the_bit(mode, subsampling):
    data = saved(picture(37).convert(mode), "JPEG", quality=80, subsampling=subsampling)
    np.testing.assert_array_equal(
        decode(data).pixels, np.asarray(Image.open(BytesIO(data)).convert("RGB"))
    )


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("upper-case suffix", 3),
        ("JPEG and more", 3),
        ("turned JPEG", 3),
        ("CMYK JPEG", 3),
        ("PNG named JPEG", 0),
        ("no suffix", 0),
        ("WebP", 0),
        ("palette", 6),
        ("animated", 4),
    ],
)
def test_an_odd_file_shows_the_same_picture(name, tolerance):
    image = smooth(24, 24)
    got = decode(KINDS[name].make(image)).pixels
    assert got.shape == (24, 24, 3) and got.dtype == np.uint8
    assert np.abs(got.astype(int) - np.asarray(image)).mean() <= tolerance


@pytest.mark.parametrize("name", ["grey JPEG", "16 bit", "float"])
def test_a_grey_file_becomes_equal_channels(name):
    image = smooth(24, 24)
    got = decode(KINDS[name].make(image)).pixels
    assert (got == got[:, :, :1]).all()
    assert np.abs(got[:, :, 0].astype(int) - np.asarray(image.convert("L"))).mean() < 2


def test_sixteen_bits_are_scaled_linearly():
    values = np.array([[0, 128, 257, 32768, 65535]], np.uint16)
    for kind in ("PNG", "TIFF"):
        got = decode(saved(Image.fromarray(values), kind)).pixels[0, :, 0]
        np.testing.assert_array_equal(got, [0, 0, 1, 128, 255])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.25, 1.0], [0, 64, 255]),
        ([0.0, 100.0, 255.0], [0, 100, 255]),
        ([0.0, 257.0, 65535.0], [0, 1, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
    ],
)
def test_float_pixels_are_scaled_from_the_smallest_range_that_holds_them(values, expected):
    decoded = decode(saved(Image.fromarray(np.array([values], np.float32)), "TIFF"))
    np.testing.assert_array_equal(decoded.pixels[0, :, 0], expected)
    assert decoded.notes == ("rescaled",)


def test_transparency_is_composited_on_white():
    pixels = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 51]]], np.uint8)
    decoded = decode(saved(Image.fromarray(pixels), "PNG"))
    opaque = np.array([200, 100, 0])
    expected = np.stack([opaque, [255] * 3, np.rint(0.2 * opaque + 0.8 * 255)])
    np.testing.assert_allclose(decoded.pixels[0], expected, atol=1)
    assert decoded.notes == ("alpha",)


def test_a_transparent_palette_color_is_white_too():
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    decoded = decode(saved(image, "PNG", transparency=bytes([0, 255])))
    np.testing.assert_array_equal(decoded.pixels[0], [[255, 255, 255], [40, 50, 60]])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_as_pillow_does(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    data = saved(picture(20, wide=1), kind, exif=exif, **options)
    decoded = decode(data)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(BytesIO(data)).convert("RGB")))
    np.testing.assert_array_equal(decoded.pixels, expected)
    assert ("rotated" in decoded.notes) == (orientation > 1)


def test_damaged_exif_does_not_make_a_bad_image():
    data = saved(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode(data).pixels.shape == (24, 24, 3)


def test_notes_say_what_was_interpreted():
    notes = {
        name: decode(kind.make(picture())).notes for name, kind in KINDS.items() if not kind.reason
    }
    assert notes["CMYK JPEG"] == ("cmyk",)
    assert notes["animated"][0] == "animated"
    assert notes["16 bit"] == ("deep",)
    assert notes["palette"] == ("palette",)
    assert notes["upper-case suffix"] == ()
    png = KINDS["no suffix"].make(picture())
    assert decode(png, name="a/b.jpeg").notes == ("mislabelled",)
    assert decode(png, name="a/b.png").notes == decode(png, name="b").notes == ()


def test_harmless_bytes_inside_a_jpeg_are_noted_and_the_picture_kept():
    data = saved(picture(), "JPEG", quality=90)
    decoded = decode(data[:-2] + bytes(5) + data[-2:])
    assert decoded.notes == ("damaged",)
    np.testing.assert_array_equal(decoded.pixels, decode(data).pixels)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_the_pixel_limit_is_checked_before_decoding(kind):
    data = saved(picture(24), kind)
    assert decode(data, max_pixels=24 * 24).pixels.shape == (24, 24, 3)
    error = error_of(data, max_pixels=24 * 24 - 1)
    assert error.reason == "too_large" and "24 x 24" in error.detail


def test_pillows_own_limit_is_neither_used_nor_changed(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode(saved(picture(24), "PNG")).pixels.shape == (24, 24, 3)
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize(("height", "width"), [(200, 300), (301, 150), (64, 64), (40, 50)])
def test_crop_is_torchvisions_resize_and_center_crop(height, width):
    image = smooth(height, width)
    got = decode_square(saved(image, "PNG"), size=48, fit="crop").pixels
    expected = v2.functional.center_crop(v2.functional.resize(image, 48, antialias=True), [48, 48])
    assert np.abs(got.astype(int) - np.asarray(expected)).mean() < 1.5


def test_squash_is_torchvisions_resize_to_both_sides():
    image = smooth(90, 150)
    got = decode_square(saved(image, "PNG"), size=32, fit="squash").pixels
    expected = v2.functional.resize(image, [32, 32], antialias=True)
    np.testing.assert_array_equal(got, np.asarray(expected))


def test_pad_keeps_the_whole_image_between_black_bars():
    image = smooth(60, 120)
    got = decode_square(saved(image, "PNG"), size=40, fit="pad").pixels
    np.testing.assert_array_equal(got[:10], 0)
    np.testing.assert_array_equal(got[30:], 0)
    inner = np.asarray(image.resize((40, 20), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(got[10:30], inner)


def test_an_image_of_the_right_size_is_not_touched():
    image = picture(32)
    for fit in ("crop", "pad", "squash"):
        got = decode_square(saved(image, "PNG"), size=32, fit=fit).pixels
        np.testing.assert_array_equal(got, np.asarray(image))


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_a_large_jpeg_shrunk_while_decoding_looks_the_same(fit):
    image = smooth(700, 1100)
    shrunk = decode_square(saved(image, "JPEG", quality=95), size=64, fit=fit).pixels
    whole = decode_square(saved(image, "PNG"), size=64, fit=fit).pixels
    assert np.abs(shrunk.astype(int) - whole).mean() < 1


def test_a_very_long_image_has_at_least_one_row():
    assert scaled_sides(1, 5000, size=32, fit="pad") == (1, 32)
    for fit in ("crop", "pad", "squash"):
        assert decode_square(saved(smooth(1, 900), "PNG"), size=32, fit=fit).pixels.shape[0] == 32


def test_errors_name_the_file(tmp_path):
    with pytest.raises(ImageError, match=r"none\.jpg is missing"):
        read_square(tmp_path / "none.jpg", size=8, fit="crop")
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(ImageError, match=r"text\.jpg is not_an_image: begins with b'hello'"):
        read_square(tmp_path / "text.jpg", size=8, fit="crop")


def test_hostile_bytes_give_an_image_or_a_reason_and_nothing_else():
    chance = random.Random(0)
    sources = [kind.make(picture()) for kind in BAD_KINDS + ODD_KINDS if kind.suffix != ".svg"]
    for _ in range(1500):
        data = bytearray(chance.choice(sources))
        for _ in range(min(len(data), chance.randint(1, 8))):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            pixels = decode(bytes(data), max_pixels=100_000).pixels
        except ImageError as error:
            assert error.reason
        else:
            assert pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8


def test_threads_decode_as_one_does():
    files = [kind.make(picture()) for kind in ODD_KINDS] * 4
    expected, found = [decode(data).pixels for data in files], {}

    def run(start: int) -> None:
        for i in range(start, len(files), 4):
            found[i] = decode(files[i]).pixels

    threads = [threading.Thread(target=run, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, pixels in enumerate(expected):
        np.testing.assert_array_equal(found[i], pixels)
