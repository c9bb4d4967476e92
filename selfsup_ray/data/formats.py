"""Image formats: which are read, by which suffixes and first bytes they are known."""

from __future__ import annotations

# No EPS (it would start Ghostscript) and no TGA (it has no signature: any bytes might be one).
FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "PSD"),
    *("QOI", "SGI", "TIFF", "WEBP"),
)
SUFFIX_FORMATS = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), ("JPEG", "MPO")),
    **dict.fromkeys((".tif", ".tiff"), ("TIFF",)),
    **dict.fromkeys((".jp2", ".j2k", ".jpx"), ("JPEG2000",)),
    **dict.fromkeys((".ppm", ".pgm", ".pbm", ".pnm"), ("PPM",)),
    ".avif": ("AVIF",),
    ".bmp": ("BMP", "DIB"),
    ".gif": ("GIF",),
    ".ico": ("ICO",),
    ".pcx": ("PCX",),
    ".png": ("PNG",),
    ".psd": ("PSD",),
    ".qoi": ("QOI",),
    ".sgi": ("SGI",),
    ".webp": ("WEBP",),
}
# First bytes; the value says whether the format is read.
_SIGNATURES = {
    **dict.fromkeys((b"\xff\xd8", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*"), True),
    **dict.fromkeys((b"qoif", b"8BPS", b"\0\0\x01\0", b"\0\0\0\x0cjP"), True),
    **dict.fromkeys((b"%PDF", b"%!PS", b"\xff\x0a", b"\0\0\0\x0cJXL", b"SIMPLE  ="), False),
}
_CONTAINERS = {b"WEBP": True, b"avif": True, b"heic": False, b"heix": False, b"mif1": False}


def signature(head: bytes) -> bool | None:
    """Return whether the format that a file's first 16 bytes show is read; None: none known."""
    for start, is_read in _SIGNATURES.items():
        if head.startswith(start):
            return is_read
    return _CONTAINERS.get(head[8:12]) if head[:4] == b"RIFF" or head[4:8] == b"ftyp" else None


def is_mislabelled(name: str, kind: str) -> bool:
    """Return whether a file's suffix says another format than its content is of."""
    dot = name.rfind(".")
    wanted = SUFFIX_FORMATS.get(name[dot:].lower()) if dot >= 0 else None
    return wanted is not None and kind not in wanted
