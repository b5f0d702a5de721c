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
    body = b"".join(
        struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))
        for kind, payload in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def write_frame(image: Path, label: Path, ids: np.ndarray, seed: int = 0) -> np.ndarray:
    """Write a random image of the ids' size and its label PNG; the image."""
    for path in (image, label):
        path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*ids.shape[:2], 3), dtype=np.uint8)
    (write_png if image.suffix == ".png" else write_jpeg)(image, pixels)
    write_png(label, ids)
    return pixels
