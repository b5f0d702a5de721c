"""Small image and label files on disk to read back, and PNGs that OpenCV cannot write."""

import struct
import zlib
from pathlib import Path

import numpy as np

from bcmfnet.data import write_jpeg, write_png


def png_bytes(samples: np.ndarray, bits: int, color_type: int, palette: bytes = b"") -> bytes:
    """A PNG from the definition: samples [H, W] of `bits` bits (or [H, W, C]), unfiltered."""
    height, width = samples.shape[:2]
    if bits < 8:
        shifts = np.arange(bits - 1, -1, -1)
        rows = np.packbits(((samples[..., None] >> shifts) & 1).reshape(height, -1), axis=1)
    else:
        rows = np.frombuffer(samples.astype(f">u{bits // 8}").tobytes(), np.uint8).reshape(height, -1)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0))]
    chunks += [(b"PLTE", palette)] if palette else []
    chunks += [(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def write_frame(image: Path, label: Path, ids: np.ndarray, seed: int = 0) -> np.ndarray:
    """Write a random image of the ids' size and its label PNG; the image."""
    for path in (image, label):
        path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*ids.shape[:2], 3), dtype=np.uint8)
    (write_png if image.suffix == ".png" else write_jpeg)(image, pixels)
    write_png(label, ids)
    return pixels


def png_chunk(kind: bytes, payload: bytes) -> bytes:
    """A chunk of a PNG, checksum included."""
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))


def exif(orientation: int, order: str = ">") -> bytes:
    """An EXIF block that says an orientation and nothing else: a TIFF file of one field."""
    head = b"MM" if order == ">" else b"II"
    field = struct.pack(f"{order}HHIHH", 274, 3, 1, orientation, 0)
    return head + struct.pack(f"{order}HIH", 42, 8, 1) + field + bytes(4)


def with_exif(data: bytes, orientation: int) -> bytes:
    """A JPEG or PNG with an EXIF orientation."""
    block = exif(orientation)
    if data.startswith(b"\x89PNG"):
        return data[:33] + png_chunk(b"eXIf", block) + data[33:]
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 8) + b"Exif\0\0" + block + data[2:]
