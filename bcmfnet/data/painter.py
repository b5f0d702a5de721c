"""A pinhole camera over a flat world that paints ids of materials, and turns them into labels and colours.

World coordinates are metres: x to the right, y up from the ground, z ahead. Only +, -, *, / and uniform numbers
decide geometry, so that a frame is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import cv2
import numpy as np

from bcmfnet.data.materials import GROUND, STREET

TEXTURE_SIDE = 1024
MID = 128  # a texture or shade of 128 leaves a colour as it is


GROUND_MASK = np.isin(np.arange(256), [STREET.ids[name] for name in GROUND]).astype(np.uint8)


@lru_cache
def textures(tiles: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fine and coarse texture, int16 in -64..64, and sensor noise, uint8 with three channels about 128.

    One tile of TEXTURE_SIDE pixels, repeated `tiles` times along each axis.
    """
    side, rng = TEXTURE_SIDE, np.random.Generator(np.random.PCG64(20240))
    fine = (rng.random((side, side)) * 128 - 64).astype(np.int16)
    cells = (rng.random((side // 8, side // 8)) * 255).astype(np.uint8)
    coarse = cv2.resize(np.tile(cells, (3, 3)), None, fx=8, fy=8, interpolation=cv2.INTER_LINEAR_EXACT)
    coarse = coarse[side : 2 * side, side : 2 * side].astype(np.int16) // 2 - 64
    noise = (rng.random((side, side, 3)) * 24 + rng.random((side, side, 3)) * 24 + (MID - 24)).astype(np.uint8)
    return np.tile(fine, (tiles, tiles)), np.tile(coarse, (tiles, tiles)), np.tile(noise, (tiles, tiles, 1))


class Painter:
    """A canvas of material ids, a canvas of shadows, and the camera that projects onto them."""

    def __init__(self, height: int, width: int, rng: np.random.Generator) -> None:
        self.height, self.width = height, width
        self.rng = rng
        self.textures = textures(1 + -(-max(height, width) // TEXTURE_SIDE))
        self.ids = np.zeros((height, width), np.uint8)
        self.shadow = np.zeros((height, width), np.uint8)
        self.focal = width * (0.8 + 0.3 * rng.random())
        self.cx = width * (0.38 + 0.24 * rng.random())
        self.horizon = height * (0.40 + 0.12 * rng.random())
        self.eye = 1.3 + 0.5 * rng.random()
        self.colors = STREET.colors + 28 * rng.random((256, 3)) - 12

    def x(self, x: float, z: float) -> int:
        return int(self.cx + self.focal * x / z + 0.5)

    def y(self, y: float, z: float) -> int:
        return int(self.horizon + self.focal * (self.eye - y) / z + 0.5)

    def poly(self, points: Sequence[tuple[float, float, float]], material: str) -> None:
        """A convex polygon of world points."""
        pixels = np.array([(self.x(x, z), self.y(y, z)) for x, y, z in points], np.int32)
        cv2.fillConvexPoly(self.ids, pixels, STREET.ids[material])

    def polys(self, points: np.ndarray, material: str) -> None:
        """Disjoint polygons of world points, float64 [N, P, 3]."""
        pixels = np.empty((*points.shape[:2], 2), np.int32)
        pixels[..., 0] = self.cx + self.focal * points[..., 0] / points[..., 2] + 0.5
        pixels[..., 1] = self.horizon + self.focal * (self.eye - points[..., 1]) / points[..., 2] + 0.5
        cv2.fillPoly(self.ids, list(pixels), STREET.ids[material])

    def rect(self, x0: float, y0: float, x1: float, y1: float, z: float, material: str) -> None:
        """An upright rectangle that faces the camera at depth z; at least one pixel wide and high."""
        scale, cx, ground = self.focal / z, self.cx + 0.5, self.horizon + 0.5 + self.focal * self.eye / z
        corner = int(cx + scale * x0), int(ground - scale * y1)
        opposite = int(cx + scale * x1), int(ground - scale * y0)
        cv2.rectangle(self.ids, corner, opposite, STREET.ids[material], cv2.FILLED)

    def disc(self, x: float, y: float, z: float, radius: float, material: str) -> None:
        """A disc that faces the camera at depth z."""
        scale = self.focal / z
        center = int(self.cx + scale * x + 0.5), int(self.horizon + scale * (self.eye - y) + 0.5)
        cv2.circle(self.ids, center, max(1, int(scale * radius + 0.5)), STREET.ids[material], cv2.FILLED)

    def cast(self, points: Sequence[tuple[float, float]]) -> None:
        """A shadow on the ground: a convex polygon of (x, z)."""
        pixels = np.array([(self.x(x, z), self.y(0, z)) for x, z in points], np.int32)
        cv2.fillConvexPoly(self.shadow, pixels, 1)

    def label(self) -> np.ndarray:
        """Class ids, uint8 [H, W]."""
        return cv2.LUT(self.ids, STREET.classes)

    def image(self) -> np.ndarray:
        """RGB, uint8 [H, W, 3]: colours under this frame's light, textured, shaded, slightly soft and noisy."""
        colors = np.clip(self.colors * self._light(), 0, 255).astype(np.uint8)
        image = cv2.applyColorMap(self.ids, colors[:, None])
        image = cv2.multiply(image, cv2.cvtColor(self._shade(), cv2.COLOR_GRAY2RGB), scale=1 / MID)
        image = cv2.GaussianBlur(image, (3, 3), 0.5 + 0.4 * self.rng.random())
        strength = 0.1 + 0.4 * self.rng.random()
        return cv2.addWeighted(image, 1.0, self._window(self.textures[2]), strength, -MID * strength)

    def _light(self) -> np.ndarray:
        """Gains of R, G and B: exposure times a colour temperature between warm and cool."""
        exposure, warmth = 0.8 + 0.45 * self.rng.random(), 0.2 * self.rng.random() - 0.1
        return exposure * np.array([1 + warmth, 1.0, 1 - warmth])

    def _shade(self) -> np.ndarray:
        """Multiplier of each pixel, uint8 [H, W], in units of 1 / 128."""
        fine, coarse, _ = self.textures
        amplitude = cv2.LUT(self.ids, STREET.grain) * self._window(fine)
        amplitude += cv2.LUT(self.ids, STREET.blotch) * self._window(coarse)
        shade = (amplitude >> 5) + MID
        shade[cv2.bitwise_and(self.shadow, cv2.LUT(self.ids, GROUND_MASK)) > 0] //= 2
        return np.clip(shade, 0, 255).astype(np.uint8)

    def _window(self, texture: np.ndarray) -> np.ndarray:
        """The frame's size of a texture, from anywhere in its first tile."""
        top, left = (int(TEXTURE_SIDE * self.rng.random()) for _ in range(2))
        return texture[top : top + self.height, left : left + self.width]
