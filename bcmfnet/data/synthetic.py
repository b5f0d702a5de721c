"""Street scenes drawn in perspective with exact labels, a pure function of (seed, index).

A frame is drawn once, as ids of materials without antialiasing. Labels and colours are two lookups of that one
canvas, so they cannot disagree; texture, shadows and softness then change colours only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bcmfnet.data.labels import get_label_table
from bcmfnet.data.painter import Painter
from bcmfnet.data.street import Street
from bcmfnet.errors import ConfigError

SPLITS = {"train": 0, "val": 1, "test": 2}
MIN_SIDE = 64
MAX_SIDE = 2048  # beyond this OpenCV's 16-bit polygon coordinates overflow close to the camera


@dataclass(frozen=True)
class SyntheticStreets:
    """`length` drawn frames of `size` (height, width) pixels in the classes of the table `street10`.

    Each split draws from its own random stream, so no frame is in two of them.
    """

    length: int
    size: tuple[int, int] = (256, 512)
    seed: int = 0
    split: str = "train"

    table = get_label_table("street10")
    unpaired: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ConfigError(f"split: expected one of {', '.join(SPLITS)}, got {self.split!r}")
        if self.length < 1:
            raise ConfigError(f"length: expected at least 1 frame, got {self.length}")
        if self.seed < 0:
            raise ConfigError(f"seed: expected a number >= 0, got {self.seed}")
        if not all(MIN_SIDE <= side <= MAX_SIDE for side in self.size):
            raise ConfigError(f"size: expected (height, width) in {MIN_SIDE}..{MAX_SIDE}, got {self.size}")

    def __len__(self) -> int:
        return self.length

    def name(self, i: int) -> str:
        return f"street_{self.split}_{self.seed}_{i:06d}"

    def files(self, i: int) -> tuple[str, ...]:
        return (f"synthetic:{self.split}:{self.seed}/{i}",)

    def frame_size(self, i: int) -> tuple[int, int]:
        return self.size

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Frame i as RGB uint8 [H, W, 3] and ids uint8 [H, W]. Raises IndexError outside 0..length - 1."""
        if not 0 <= i < self.length:
            raise IndexError(f"index: expected 0..{self.length - 1}, got {i}")
        sequence = np.random.SeedSequence(self.seed, spawn_key=(SPLITS[self.split], i))
        rng = np.random.Generator(np.random.PCG64(sequence))
        painter = Painter(*self.size, rng)
        Street(painter, rng).draw()
        return painter.image(), painter.label()
