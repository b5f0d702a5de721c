"""Reading and writing image and label files with OpenCV; a damaged file is one clear DataError."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from bcmfnet.errors import DataError

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8"
GRAY, PALETTE = 0, 3  # PNG colour types
# In entropy-coded data a marker is 0xff and a byte that is neither stuffing (00), a restart (d0-d7) nor fill (ff).
JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
JPEG_END = 0xD9


def read_image(path: str | Path) -> np.ndarray:
    """RGB image, uint8 [H, W, 3].

    Raises:
        DataError: missing, empty, truncated or corrupt file, naming it.
    """
    data = _read_bytes(path)
    if data.startswith(PNG_SIGNATURE):
        _png_chunks(data, path)
    elif data.startswith(JPEG_SIGNATURE):
        _check_jpeg_is_whole(data, path)
    return _decode(data, cv2.IMREAD_COLOR_RGB, path)


def read_label(path: str | Path, color: bool = False) -> np.ndarray:
    """Label PNG: class ids uint8 [H, W], or with `color` an RGB colour-coded label uint8 [H, W, 3].

    Ids are the stored samples: the indices of a palette PNG (OpenCV alone would give its colours), and unscaled
    values of PNGs of 1, 2 and 4 bits.

    Raises:
        DataError: a damaged file, one that is not a PNG, 16 bits a sample, or channels where ids are expected.
    """
    data = _read_bytes(path)
    if not data.startswith(PNG_SIGNATURE):
        raise DataError(f"{path}: expected a PNG label, got another format (lossy ones change class ids)")
    chunks = _png_chunks(data, path)
    bits, color_type = chunks[0][1][8:10]
    if bits == 16:
        raise DataError(f"{path}: expected a label of 8 bits a pixel, got 16")
    if color:
        return _decode(data, cv2.IMREAD_COLOR_RGB, path)
    if color_type == PALETTE:
        data = _palette_as_gray(chunks)
    elif color_type != GRAY:
        raise DataError(f"{path}: expected a label of one channel (class ids), got colours")
    label = _decode(data, cv2.IMREAD_GRAYSCALE, path)
    return label if bits == 8 else label // (255 // (2**bits - 1))


def write_png(path: str | Path, image: np.ndarray, compression: int = 1) -> None:
    """Write ids [H, W] or RGB [H, W, 3], uint8, as PNG (zlib level `compression`, 0..9)."""
    _write(path, ".png", image, (cv2.IMWRITE_PNG_COMPRESSION, compression))


def write_jpeg(path: str | Path, image: np.ndarray, quality: int = 92) -> None:
    """Write RGB uint8 [H, W, 3] as JPEG of `quality` 1..100."""
    _write(path, ".jpg", image, (cv2.IMWRITE_JPEG_QUALITY, quality))


def _write(path: str | Path, ending: str, image: np.ndarray, options: tuple[int, int]) -> None:
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.ndim == 3 else image
    Path(path).write_bytes(cv2.imencode(ending, bgr, options)[1])


def _read_bytes(path: str | Path) -> bytes:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if not data:
        raise DataError(f"{path}: the file is empty")
    return data


def _decode(data: bytes, flags: int, path: str | Path) -> np.ndarray:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        image = None
    if image is None:
        raise DataError(f"{path}: not an image that can be decoded (corrupt, or an unknown format)")
    return image


def _png_chunks(data: bytes, path: str | Path) -> list[tuple[bytes, bytes]]:
    """Chunks (type, payload) of a PNG, after checking each CRC and that the last one is IEND."""
    chunks = list(_walk_png(data, path))
    if not chunks or chunks[-1][0] != b"IEND":
        raise DataError(f"{path}: truncated PNG")
    if chunks[0][0] != b"IHDR" or len(chunks[0][1]) != 13:
        raise DataError(f"{path}: corrupt PNG (no header)")
    return chunks


def _walk_png(data: bytes, path: str | Path) -> Iterator[tuple[bytes, bytes]]:
    at = len(PNG_SIGNATURE)
    while at + 12 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        if at + 12 + size > len(data):
            return
        payload = data[at + 8 : at + 8 + size]
        if struct.unpack_from(">I", data, at + 8 + size)[0] != zlib.crc32(payload, zlib.crc32(kind)):
            raise DataError(f"{path}: corrupt PNG (checksum of {kind.decode('latin-1')!r} at byte {at})")
        yield kind, payload
        if kind == b"IEND":
            return
        at += 12 + size


def _palette_as_gray(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """The same PNG declared gray and without its palette, so that a decoder returns indices."""
    kept = [(kind, payload) for kind, payload in chunks if kind in (b"IHDR", b"IDAT", b"IEND")]
    header = bytearray(kept[0][1])
    header[9] = GRAY
    kept[0] = (b"IHDR", bytes(header))
    return PNG_SIGNATURE + b"".join(
        struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(payload, zlib.crc32(kind)))
        for kind, payload in kept
    )


def _check_jpeg_is_whole(data: bytes, path: str | Path) -> None:
    """Follow the markers to the end-of-image: a decoder fills what is missing with grey and only warns."""
    at = len(JPEG_SIGNATURE)
    while marker := JPEG_MARKER.search(data, at):
        at = marker.end()
        if data[at - 1] == JPEG_END:
            return
        if at + 2 > len(data):
            break
        at += struct.unpack_from(">H", data, at)[0]
    raise DataError(f"{path}: truncated JPEG")
