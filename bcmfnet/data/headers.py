"""What an image file says of itself before anything is decoded: format, size, sample depth, EXIF orientation.

Only the formats that are read here (PNG, JPEG, BMP, TIFF, WebP) are known, by their content and not by their name.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

UPRIGHT = 1
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8"
JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # start of frame; the three are tables
JPEG_EXIF, JPEG_SCAN, JPEG_END, JPEG_FILL = 0xE1, 0xDA, 0xD9, 0xFF
TIFF_WIDTH, TIFF_HEIGHT, TIFF_BITS, TIFF_ORIENTATION = 256, 257, 258, 274
MOST_PARTS = 2**16  # chunks, markers or fields that are looked at: a file of nothing else would take minutes
TIFF_TYPES = {1: "B", 3: "H", 4: "I", 16: "Q"}  # BYTE, SHORT, LONG, LONG8

_NO_SUCH_FILE = (struct.error, ValueError, KeyError, OverflowError)  # what reading past the bytes that there are raises


class Header(NamedTuple):
    """Size as stored, bits of a sample, and EXIF orientation 1..8, which is 1 (upright) where the file says none."""

    format: str
    width: int
    height: int
    bits: int
    orientation: int = UPRIGHT


def parse_header(file: BinaryIO) -> Header | None:
    """Header of an image file that can seek; None where it is of no known format or ends within the header."""
    start = _at(file, 0, 12)
    for fits, parse in _PARSERS:
        if fits(start):
            try:
                return parse(file)
            except _NO_SUCH_FILE:
                return None
    return None


def _at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _unpack(file: BinaryIO, offset: int, layout: str) -> tuple:
    return struct.unpack(layout, _at(file, offset, struct.calcsize(layout)))


def _png(file: BinaryIO) -> Header | None:
    kind, width, height, bits = _unpack(file, 12, ">4sIIB")
    if kind != b"IHDR":
        return None
    at, orientation = len(PNG_SIGNATURE), UPRIGHT
    for _ in range(MOST_PARTS):
        head = _at(file, at, 8)
        if len(head) < 8 or head[4:] == b"IEND":
            break
        if head[4:] == b"eXIf":
            orientation = _exif_orientation(file, at + 8)
        at += 12 + int.from_bytes(head[:4], "big")
    return Header("PNG", width, height, bits, orientation)


def _jpeg(file: BinaryIO) -> Header | None:
    at, orientation = len(JPEG_SIGNATURE), UPRIGHT
    for _ in range(MOST_PARTS):
        lead, marker = _unpack(file, at, "2B")
        if lead != JPEG_FILL or marker in (JPEG_SCAN, JPEG_END):
            return None
        if marker == JPEG_FILL:
            at += 1
            continue
        if marker in JPEG_FRAMES:
            bits, height, width = _unpack(file, at + 4, ">BHH")
            return Header("JPEG", width, height, bits, orientation)
        if marker == JPEG_EXIF and _at(file, at + 4, 6) == b"Exif\0\0":
            orientation = _exif_orientation(file, at + 10)
        at += 2 + _unpack(file, at + 2, ">H")[0]
    return None


def _bmp(file: BinaryIO) -> Header:
    old = _unpack(file, 14, "<I")[0] == 12
    width, height = _unpack(file, 18, "<HH" if old else "<ii")
    return Header("BMP", abs(width), abs(height), 8)


def _tiff(file: BinaryIO) -> Header:
    fields = _tiff_fields(file, 0)
    return Header("TIFF", fields[TIFF_WIDTH], fields[TIFF_HEIGHT], fields.get(TIFF_BITS, 1), _orientation(fields))


def _webp(file: BinaryIO) -> Header | None:
    size, orientation = None, UPRIGHT
    for kind, at in _riff_chunks(file):
        if kind == b"VP8X":
            size = size or tuple(1 + int.from_bytes(_at(file, at + offset, 3), "little") for offset in (4, 7))
        elif kind == b"VP8 ":
            size = size or tuple(side & 0x3FFF for side in _unpack(file, at + 6, "<HH"))
        elif kind == b"VP8L":
            packed = _unpack(file, at + 1, "<I")[0]
            size = size or (1 + (packed & 0x3FFF), 1 + (packed >> 14 & 0x3FFF))
        elif kind == b"EXIF":
            orientation = _exif_orientation(file, at + 6 * (_at(file, at, 6) == b"Exif\0\0"))
    return Header("WebP", size[0], size[1], 8, orientation) if size else None


def _riff_chunks(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Kind of each chunk, and where its payload starts."""
    at = 12
    for _ in range(MOST_PARTS):
        head = _at(file, at, 8)
        if len(head) < 8:
            break
        yield head[:4], at + 8
        size = int.from_bytes(head[4:], "little")
        at += 8 + size + size % 2


def _exif_orientation(file: BinaryIO, start: int) -> int:
    """Orientation of an EXIF block, which is a TIFF file of its own; upright where it cannot be read."""
    try:
        return _orientation(_tiff_fields(file, start))
    except _NO_SUCH_FILE:
        return UPRIGHT


def _orientation(fields: dict[int, int]) -> int:
    value = fields.get(TIFF_ORIENTATION, UPRIGHT)
    return value if 1 <= value <= 8 else UPRIGHT


def _tiff_fields(file: BinaryIO, start: int) -> dict[int, int]:
    """Integer fields of the first directory, of each its first value. Raises where the bytes are no such file."""
    order = {b"II": "<", b"MM": ">"}[_at(file, start, 2)]
    version = _unpack(file, start + 2, f"{order}H")[0]
    big = version == 43  # BigTIFF: counts and offsets of 64 bits
    offset, count, entry = ("Q", "Q", "HHQ") if big else ("I", "H", "HHI")
    at = start + _unpack(file, start + (8 if big else 4), order + offset)[0]
    entries = _unpack(file, at, order + count)[0]
    at += struct.calcsize(order + count)
    fields: dict[int, int] = {}
    for _ in range(min(entries, MOST_PARTS)):
        tag, kind, values = _unpack(file, at, order + entry)
        inline = at + struct.calcsize(order + entry)
        if kind in TIFF_TYPES and values:
            room = struct.calcsize(order + offset)
            fits = values * struct.calcsize(order + TIFF_TYPES[kind]) <= room
            where = inline if fits else start + _unpack(file, inline, order + offset)[0]
            fields.setdefault(tag, _unpack(file, where, order + TIFF_TYPES[kind])[0])  # decoders pass over a second one
        at = inline + struct.calcsize(order + offset)
    return fields


_PARSERS: tuple[tuple[Callable[[bytes], bool], Callable[[BinaryIO], Header | None]], ...] = (
    (lambda start: start.startswith(PNG_SIGNATURE), _png),
    (lambda start: start.startswith(JPEG_SIGNATURE), _jpeg),
    (lambda start: start.startswith(b"BM"), _bmp),
    (lambda start: start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), _tiff),
    (lambda start: start[:4] == b"RIFF" and start[8:] == b"WEBP", _webp),
)
