"""Frames as the bytes of files, for tests of the server."""

from __future__ import annotations

import numpy as np

from bcmfnet.data import get_label_table
from bcmfnet.data.io import encode_png

TABLE = get_label_table("cityscapes19")


def frame(seed: int, height: int = 72, width: int = 104) -> np.ndarray:
    """An image of coloured blocks, RGB uint8."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return np.kron(small, np.ones((8, 8, 1), np.uint8))


def png(seed: int, height: int = 72, width: int = 104) -> bytes:
    """The same as a PNG."""
    return encode_png(frame(seed, height, width))
