"""Reading and writing image and label files with OpenCV; a damaged file is one clear DataError."""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from bcmfnet.data.headers import JPEG_SIGNATURE, PNG_SIGNATURE, UPRIGHT, Header, parse_header
from bcmfnet.errors import DataError

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
MAX_PIXELS = 2**26  # 8192 x 8192
MAX_BYTES = 2**30  # of a file
GRAY, PALETTE, GRAY_ALPHA = 0, 3, 4  # PNG colour types
# In entropy-coded data a marker is 0xff and a byte that is neither stuffing (00), a restart (d0-d7) nor fill (ff).
JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
JPEG_END = 0xD9
FILE_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def image_header(path: str | Path) -> Header:
    """Header of an image of any size. Raises DataError as `read_image` does."""
    with _open(path) as file:
        return _header(file, path, None)


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of a labelled image from its header. Raises DataError as `read_image(path, turn=False)` does."""
    with _open(path) as file:
        header = _header(file, path, MAX_PIXELS)
    _check_image(header, path, turn=False)
    return header.height, header.width


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS, turn: bool = True) -> np.ndarray:
    """RGB image, uint8 [H, W, 3], turned upright where its EXIF orientation says so.

    Args:
        turn: False refuses an image that would be turned, since its label is not.

    Raises:
        DataError: a missing, empty, truncated or corrupt file, one that is not a regular file, one of more than
            max_pixels or of more than 8 bits a sample; it names the file.
    """
    data, header = _read(path, max_pixels)
    return _image(data, header, path, turn)


def decode_image(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """RGB image, uint8 [H, W, 3], of the bytes of a file, as `read_image` gives it. Raises DataError, which starts with
    the name.
    """
    return _image(data, _header(io.BytesIO(data), name, max_pixels), name, turn=True)


def read_label(path: str | Path, color: bool = False, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Label PNG: class ids uint8 [H, W], or with `color` an RGB colour-coded label uint8 [H, W, 3].

    Ids are the stored samples: the indices of a palette PNG (OpenCV alone would give its colours), and unscaled
    values of PNGs of 1, 2 and 4 bits.

    Raises:
        DataError: a file that read_image would refuse, one that is not a PNG, one that an EXIF orientation turns,
            16 bits a sample, channels where ids are expected, or one channel where colours are.
    """
    data, header = _read(path, max_pixels)
    if header.format != "PNG":
        raise DataError(f"{path}: expected a PNG label, got another format (lossy ones change class ids)")
    chunks = _png_chunks(data, path)
    if header.bits == 16:
        raise DataError(f"{path}: expected a label of 8 bits a pixel, got 16")
    if header.orientation != UPRIGHT:
        raise DataError(f"{path}: expected a label without EXIF orientation, got {header.orientation}")
    color_type = chunks[0][1][17]
    if color:
        if color_type in (GRAY, GRAY_ALPHA):
            raise DataError(f"{path}: expected a label of colours, got one channel (class ids?)")
        return _decode(_png_without_extras(data, chunks), cv2.IMREAD_COLOR_RGB, path)
    if color_type not in (GRAY, PALETTE):
        raise DataError(f"{path}: expected a label of one channel (class ids), got colours")
    label = _decode(_png_of_indices(chunks), cv2.IMREAD_GRAYSCALE, path)
    return label if header.bits == 8 else label // (255 // (2**header.bits - 1))


def is_gray_png(path: str | Path) -> bool:
    """Whether a label holds ids and no colours, by its header; False for what is no PNG. Raises DataError."""
    with _open(path) as file:
        start = file.read(26)
    return start.startswith(PNG_SIGNATURE) and start[25:] in (bytes([GRAY]), bytes([GRAY_ALPHA]))


def write_png(path: str | Path, image: np.ndarray, compression: int = 1) -> None:
    """Write ids [H, W] or RGB [H, W, 3], uint8, as PNG (zlib level `compression`, 0..9)."""
    Path(path).write_bytes(encode_png(image, compression))


def write_jpeg(path: str | Path, image: np.ndarray, quality: int = 92) -> None:
    """Write RGB uint8 [H, W, 3] as JPEG of `quality` 1..100."""
    Path(path).write_bytes(_encode(".jpg", image, (cv2.IMWRITE_JPEG_QUALITY, quality)))


def _encode(ending: str, image: np.ndarray, options: tuple[int, int]) -> bytes:
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.ndim == 3 else image
    return cv2.imencode(ending, bgr, options)[1].tobytes()


def encode_png(image: np.ndarray, compression: int = 1) -> bytes:
    """The bytes that `write_png` writes."""
    return _encode(".png", image, (cv2.IMWRITE_PNG_COMPRESSION, compression))


def _image(data: bytes, header: Header, path: str | Path, turn: bool) -> np.ndarray:
    _check_image(header, path, turn)
    if header.format == "PNG":
        data = _png_without_extras(data, _png_chunks(data, path), keep_exif=header.orientation != UPRIGHT)
    elif header.format == "JPEG":
        _check_jpeg_is_whole(data, path)
    return _decode(data, cv2.IMREAD_COLOR_RGB, path)


def _check_image(header: Header, path: str | Path, turn: bool) -> None:
    if header.bits > 8:
        raise DataError(f"{path}: expected an image of 8 bits a sample, got {header.bits}")
    if not turn and header.orientation != UPRIGHT:
        raise DataError(
            f"{path}: EXIF orientation {header.orientation} turns the image and not its label; save it upright, "
            "without the tag"
        )


def _read(path: str | Path, max_pixels: int) -> tuple[bytes, Header]:
    """Bytes and header of an image file that is not too large to decode."""
    with _open(path) as file:
        header = _header(file, path, max_pixels)
        size = os.fstat(file.fileno()).st_size
        if size > MAX_BYTES:
            raise DataError(f"{path}: expected a file of at most {MAX_BYTES} bytes, got {size}")
        file.seek(0)
        try:
            return file.read(), header
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _open(path: str | Path) -> io.BufferedReader:
    """A regular file. A FIFO would wait for a writer for ever, and a device may have no end."""
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
        if kind == stat.S_IFREG:
            return open(path, "rb")
        reason = f"expected a regular file, got {FILE_KINDS.get(kind, 'something else')}"
    except OSError as error:
        reason = str(error.strerror)
    raise DataError(f"{path}: cannot be read: {reason}")


def _header(file: io.BufferedReader | io.BytesIO, path: str | Path, max_pixels: int | None) -> Header:
    """Header of a file that may be decoded, or with None of one of any size."""
    try:
        start = file.read(len(PNG_SIGNATURE))
        header = parse_header(file)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if header is None:
        raise DataError(f"{path}: {_what_is_wrong(start)}")
    if max_pixels is not None and not 0 < header.width * header.height <= max_pixels:
        raise DataError(f"{path}: expected an image of 1 to {max_pixels} pixels, got {header.width}x{header.height}")
    return header


def _what_is_wrong(start: bytes) -> str:
    """Of a file without a header, by how it starts."""
    if not start:
        return "the file is empty"
    for signature, name in ((PNG_SIGNATURE, "PNG"), (JPEG_SIGNATURE, "JPEG")):
        if start.startswith(signature):
            return f"truncated {name}"
    return "not an image that can be decoded (corrupt, or not PNG, JPEG, BMP, TIFF or WebP)"


def _decode(data: bytes, flags: int, path: str | Path) -> np.ndarray:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise DataError(f"{path}: cannot be decoded: {' '.join(error.err.split())}") from None
    except MemoryError:
        raise DataError(f"{path}: cannot be decoded: not enough memory") from None
    if image is None:
        raise DataError(f"{path}: not an image that can be decoded (corrupt)")
    return image


Chunk = tuple[bytes, memoryview]


def _png_chunks(data: bytes, path: str | Path) -> list[Chunk]:
    """Kind and bytes of the chunks of a PNG, after checking each CRC and that the last one is IEND."""
    chunks = list(_walk_png(memoryview(data), path))
    if not chunks or chunks[-1][0] != b"IEND":
        raise DataError(f"{path}: truncated PNG")
    if chunks[0][0] != b"IHDR" or len(chunks[0][1]) != 25:
        raise DataError(f"{path}: corrupt PNG (no header)")
    return chunks


def _walk_png(data: memoryview, path: str | Path) -> Iterator[Chunk]:
    at = len(PNG_SIGNATURE)
    while at + 12 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + size
        if end > len(data):
            return
        if struct.unpack_from(">I", data, end - 4)[0] != zlib.crc32(data[at + 4 : end - 4]):
            raise DataError(f"{path}: corrupt PNG (checksum of {kind.decode('latin-1')!r} at byte {at})")
        yield kind, data[at:end]
        if kind == b"IEND":
            return
        at = end


def _png_without_extras(data: bytes, chunks: list[Chunk], keep_exif: bool = False) -> bytes:
    """The PNG without profiles and texts, of which libpng would print warnings that name no file."""
    kept = {b"IHDR", b"PLTE", b"IDAT", b"IEND"} | ({b"eXIf"} if keep_exif else set())
    if all(kind in kept for kind, _ in chunks):
        return data
    return PNG_SIGNATURE + b"".join(chunk for kind, chunk in chunks if kind in kept)


def _png_of_indices(chunks: list[Chunk]) -> bytes:
    """The PNG declared gray and without its palette, so that a decoder returns indices."""
    header = bytearray(chunks[0][1])
    header[17] = GRAY
    struct.pack_into(">I", header, 21, zlib.crc32(header[4:21]))
    return PNG_SIGNATURE + bytes(header) + b"".join(chunk for kind, chunk in chunks if kind in (b"IDAT", b"IEND"))


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
