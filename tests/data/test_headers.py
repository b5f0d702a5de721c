"""Headers of image files against what was written, and against damage."""

import io
import struct

import cv2
import numpy as np
import pytest
from frames import exif, png_bytes, with_exif

from bcmfnet.data.headers import Header, parse_header

PHOTO = np.random.default_rng(0).integers(0, 256, (70, 96, 3), np.uint8)
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".bmp": "BMP", ".tif": "TIFF", ".webp": "WebP"}


def encoded(ending: str, *options: int) -> bytes:
    return cv2.imencode(ending, PHOTO, options)[1].tobytes()


def tiff(order: str, big: bool, width: int, height: int, bits: int, orientation: int) -> bytes:
    """The header of a TIFF file; three samples a pixel, so the bits stand at an offset in the classic kind."""
    fields = ((256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, None), (274, 3, 1, orientation))
    head = {"<": b"II", ">": b"MM"}[order]
    if big:
        head += struct.pack(f"{order}HHHQQ", 43, 8, 0, 16, len(fields))
    else:
        head += struct.pack(f"{order}HIH", 42, 8, len(fields))
    end = len(head) + len(fields) * (20 if big else 12)
    room = 8 if big else 4
    for tag, kind, count, value in fields:
        samples = struct.pack(f"{order}3H", *[bits] * 3)
        inline = samples if big else struct.pack(f"{order}I", end)
        if value is not None:
            inline = struct.pack(f"{order}{'H' if kind == 3 else 'I'}", value)
        head += struct.pack(f"{order}HH{'Q' if big else 'I'}", tag, kind, count) + inline.ljust(room, b"\0")
    return head + struct.pack(f"{order}3H", *[bits] * 3)


@pytest.mark.parametrize(("ending", "name"), FORMATS.items())
def test_headers_of_what_opencv_writes(ending, name):
    assert parse_header(io.BytesIO(encoded(ending))) == Header(name, 96, 70, 8, 1)


@pytest.mark.parametrize(
    ("ending", "options"),
    [
        (".jpg", (cv2.IMWRITE_JPEG_PROGRESSIVE, 1)),  # another start-of-frame marker
        (".webp", (cv2.IMWRITE_WEBP_QUALITY, 80)),  # lossy: another chunk
    ],
)
def test_other_kinds_of_a_format(ending, options):
    assert parse_header(io.BytesIO(encoded(ending, *options)))[1:4] == (96, 70, 8)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_bits_of_a_png(bits):
    data = png_bytes(np.zeros((5, 13), np.uint16 if bits == 16 else np.uint8), bits, 0)
    assert parse_header(io.BytesIO(data)) == Header("PNG", 13, 5, bits, 1)


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("order", "<>")
def test_tiff_of_both_byte_orders_and_offset_sizes(order, big):
    data = tiff(order, big, 70000, 300, 16, 6)
    assert parse_header(io.BytesIO(data)) == Header("TIFF", 70000, 300, 16, 6)


def test_the_first_of_two_fields_counts():
    """As it does for decoders: a second, smaller size would get past a bound on pixels."""
    data = tiff("<", False, 70000, 300, 8, 1).replace(
        struct.pack("<HHII", 274, 3, 1, 1), struct.pack("<HHII", 256, 4, 1, 9)
    )
    assert parse_header(io.BytesIO(data)).width == 70000


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("ending", [".jpg", ".png"])
def test_orientation(ending, orientation):
    assert parse_header(io.BytesIO(with_exif(encoded(ending), orientation))).orientation == orientation


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("prefix", [b"", b"Exif\0\0"])  # the second is what many programs write
def test_orientation_of_webp(order, prefix):
    block = prefix + exif(8, order)
    simple = encoded(".webp")[12:]
    extended = b"VP8X" + struct.pack("<IB", 10, 8) + bytes(3) + struct.pack("<HBHB", 95, 0, 69, 0)
    chunks = extended + simple + b"EXIF" + struct.pack("<I", len(block)) + block
    data = b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks
    assert parse_header(io.BytesIO(data)) == Header("WebP", 96, 70, 8, 8)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_none(orientation):
    assert parse_header(io.BytesIO(with_exif(encoded(".jpg"), orientation))).orientation == 1


@pytest.mark.parametrize("data", [b"", b"plain text", b"P6\n96 80\n255\n", b"GIF89a", b"BM", b"II*\0", b"RIFF....WEBP"])
def test_no_header(data):
    assert parse_header(io.BytesIO(data)) is None


@pytest.mark.parametrize("ending", FORMATS)
def test_damage_is_no_header_or_another_one(ending):
    """Cut anywhere in the first bytes, or with bytes changed: never an exception, never without an end."""
    whole = with_exif(encoded(ending), 6) if ending in (".jpg", ".png") else encoded(ending)
    for size in range(200):
        header = parse_header(io.BytesIO(whole[:size]))
        assert header is None or header[1:3] == (96, 70)
    rng = np.random.default_rng(1)
    for _ in range(300):
        data = bytearray(whole)
        for at in rng.integers(0, 120, 4):
            data[at] = rng.integers(256)
        header = parse_header(io.BytesIO(data))
        assert header is None or all(isinstance(value, int) for value in header[1:])


@pytest.mark.parametrize("start", [b"\xff\xd8" + b"\xff" * 2**21, b"\x89PNG\r\n\x1a\n" + b"\0" * 2**22])
def test_a_file_of_nothing_but_fill_ends_soon(start):
    reads = 0

    class Counting(io.BytesIO):
        def read(self, size=-1):
            nonlocal reads
            reads += 1
            return super().read(size)

    parse_header(Counting(start))
    assert reads < 2**17 + 8
