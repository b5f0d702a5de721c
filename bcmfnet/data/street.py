"""The layout of one street and what stands on it, painted from far to near."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import cv2
import numpy as np

from bcmfnet.data.materials import CARS, CLOTHES, CLOUDS, FENCES, LEAVES, SIGNS, SKINS, SKY_BANDS, STREET, WALLS
from bcmfnet.data.painter import Painter

NEAR, FAR = 1.6, 90.0  # metres ahead of the camera
Thing = tuple[float, Callable[[], None]]  # depth, and what draws it


class Street:
    """One street: its layout and what stands on it, drawn by numbers from `rng`."""

    def __init__(self, painter: Painter, rng: np.random.Generator) -> None:
        self.paint = painter
        self.rng = rng
        self.half = self.uniform(3.6, 5.6)  # of the road's width
        self.center = -self.half * self.uniform(0.2, 0.6)  # the camera drives in the right lane
        self.walk = self.uniform(1.8, 3.4)  # width of the pavement
        self.sun = -1 if self.chance(0.5) else 1  # the side that the light comes from

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.rng.random()

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def pick(self, count: int) -> int:
        return int(count * self.rng.random())

    def depth(self, low: float, high: float) -> float:
        """A distance ahead, more often a short one."""
        fraction = self.rng.random()
        return low + (high - low) * fraction * fraction

    def kerb(self, side: int) -> float:
        """x of the road's edge on a side, -1 left or 1 right."""
        return self.center + side * self.half

    def draw(self) -> None:
        self.sky()
        self.skyline()
        self.ground()
        for side in (-1, 1):
            self.row_of_houses(side)
        things = [*self.trees(), *self.poles(), *self.cars(), *self.people()]
        for _, draw in sorted(things, key=lambda thing: -thing[0]):
            draw()

    def sky(self) -> None:
        paint, cloudy = self.paint, self.rng.random()
        top = np.array([70, 124, 196]) * (1 - cloudy) + np.array([150, 158, 168]) * cloudy
        low = np.array([196, 216, 234]) * (1 - cloudy) + np.array([206, 208, 210]) * cloudy
        bottom = int(paint.horizon) + 1
        for k in range(SKY_BANDS):
            material = STREET.ids[f"sky{k}"]
            paint.colors[material] = top + (low - top) * k / (SKY_BANDS - 1)
            paint.ids[bottom * k // SKY_BANDS : bottom * (k + 1) // SKY_BANDS] = material
        for _ in range(self.pick(5)):
            self.cloud(STREET.ids[f"cloud{self.pick(CLOUDS)}"])

    def cloud(self, material: int) -> None:
        paint = self.paint
        paint.colors[material] = self.uniform(205, 250)
        x, y = self.uniform(0, paint.width), self.uniform(0, 0.8) * paint.horizon
        for _ in range(4):
            dx, dy = self.uniform(-0.08, 0.08) * paint.width, self.uniform(-0.02, 0.02) * paint.height
            axes = int(self.uniform(0.04, 0.1) * paint.width), int(self.uniform(0.015, 0.035) * paint.height)
            cv2.ellipse(paint.ids, (int(x + dx), int(y + dy)), axes, 0, 0, 360, material, cv2.FILLED)

    def skyline(self) -> None:
        """Distant houses and trees along the horizon."""
        z, x = FAR + 10, -80.0
        while x < 80:
            width = self.uniform(4, 12)
            if self.chance(0.55):
                self.paint.rect(x, 0, x + width, self.uniform(4, 15), z, f"far_wall{self.pick(2)}")
            else:
                self.paint.disc(x, 1, z, width / 2, f"leaf{self.pick(len(LEAVES))}_dark")
            x += 0.8 * width

    def ground(self) -> None:
        """Pavement to both sides, the road with its kerbs, lane marks and now and then a zebra crossing."""
        left, right = self.kerb(-1), self.kerb(1)
        self.strip(-80, 80, "pavement")
        for side in (-1, 1):
            self.strip(self.kerb(side) - 0.25, self.kerb(side) + 0.25, "kerb")
        self.strip(left, right, "road")
        for side in (-1, 1):
            edge = self.kerb(side) - side * 0.35
            self.strip(edge - 0.06, edge + 0.06, "mark")
        self.dashes()
        if self.chance(0.3):
            self.zebra(self.uniform(6, 16))
        reach = self.uniform(0, 1.6 * self.half)
        edge = self.kerb(self.sun) + self.sun * self.walk
        self.paint.cast([(edge, NEAR), (edge, FAR), (edge - self.sun * reach, FAR), (edge - self.sun * reach, NEAR)])

    def strip(self, x0: float, x1: float, material: str) -> None:
        self.paint.poly([(x0, 0, NEAR), (x0, 0, 4 * FAR), (x1, 0, 4 * FAR), (x1, 0, NEAR)], material)

    def dashes(self) -> None:
        z = np.arange(self.uniform(2, 8), FAR, 7.5)
        self.paint.polys(_ground_quads(self.center - 0.08, self.center + 0.08, z, z + 3), "mark")

    def zebra(self, z: float) -> None:
        x = np.arange(self.kerb(-1) + 0.6, self.kerb(1) - 0.9, 1.0)
        self.paint.polys(_ground_quads(x, x + 0.5, z, z + 3), "mark")

    def row_of_houses(self, side: int) -> None:
        """Houses, and gaps with trees or a fence, from far to near along one side."""
        x = self.kerb(side) + side * self.walk
        ends = [NEAR]
        while ends[-1] < FAR:
            ends.append(ends[-1] + self.uniform(7, 15))
        for near, far in reversed(list(zip(ends, ends[1:], strict=False))):
            if self.chance(0.66):
                self.house(side, x + side * self.uniform(0, 0.8), near, far)
            else:
                self.garden(side, x, near, far)

    def house(self, side: int, x: float, near: float, far: float) -> None:
        paint, height, wall = self.paint, self.uniform(4.5, 15), f"wall{self.pick(len(WALLS))}"
        front, flank = ("dim", "lit") if side == self.sun else ("lit", "dim")
        outside = x + side * 40
        paint.rect(min(x, outside), 0, max(x, outside), height, near, f"{wall}_{flank}")
        self.facade(x, near, far, 0, height, f"{wall}_{front}")
        self.facade(x, near, far, height - 0.5, height, f"{wall}_trim")
        self.windows(x, near, far, height, "glass_bright" if self.chance(0.3) else "glass")
        self.facade(x, near + 0.72 * (far - near), near + 0.84 * (far - near), 0, 2.3, "door")

    def windows(self, x: float, near: float, far: float, height: float, glass: str) -> None:
        """A shop window on the ground floor, a row of windows on each floor above."""
        self.facade(x, near + 0.12 * (far - near), near + 0.62 * (far - near), 0.5, 2.6, glass)
        floors = np.arange(3.6, height - 2, 3.0)
        if len(floors):
            count = max(2, int((far - near) / 2.6))
            spacing = (far - near) / count
            z, y = (grid.ravel() for grid in np.meshgrid(near + spacing * (np.arange(count) + 0.25), floors))
            self.paint.polys(_wall_quads(x, y, y + 1.6, z, z + 0.5 * spacing), glass)

    def facade(self, x: float, near: float, far: float, low: float, high: float, material: str) -> None:
        self.paint.poly([(x, low, near), (x, high, near), (x, high, far), (x, low, far)], material)

    def garden(self, side: int, x: float, near: float, far: float) -> None:
        """Trees behind a fence."""
        for k in range(3):
            self.crown(x + side * self.uniform(2.5, 5), self.uniform(1.5, 3.5), far - k * (far - near) / 3, 2.2)
        if self.chance(0.8):
            height, kind = self.uniform(0.9, 1.7), self.pick(FENCES)
            self.facade(x, near, far, 0, height, f"fence{kind}")
            posts = np.arange(near, far - 0.2, 0.9)
            self.paint.polys(_wall_quads(x, 0, height, posts, posts + 0.14), f"fence_rail{kind}")
            self.facade(x, near, far, 0.8 * height, 0.9 * height, f"fence_rail{kind}")

    def crown(self, x: float, y: float, z: float, radius: float) -> None:
        """Foliage: dark clumps, lighter ones on them towards the sun."""
        kind = self.pick(len(LEAVES))
        for shade, lift, size in (("dark", -0.15, 0.74), ("mid", 0.1, 0.52), ("light", 0.35, 0.32)):
            for _ in range(3):
                dx = self.uniform(-0.6, 0.6) + self.sun * lift
                dy = self.uniform(-0.5, 0.5) + lift
                self.paint.disc(x + dx * radius, y + dy * radius, z, size * radius, f"leaf{kind}_{shade}")

    def trees(self) -> Iterator[Thing]:
        for side in (-1, 1):
            if self.chance(0.55):
                spacing = self.uniform(8, 16)
                for k in range(4):
                    z = self.uniform(7, 9) + k * spacing
                    yield z, partial(self.tree, self.kerb(side) + side * self.uniform(0.7, 1.1), z)

    def tree(self, x: float, z: float) -> None:
        trunk, radius = self.uniform(1.6, 2.6), self.uniform(1.0, 1.9)
        self.paint.cast([(x - radius, z), (x - self.sun * 3, z - 1), (x + radius, z), (x - self.sun * 3, z + 1)])
        self.paint.rect(x - 0.14, 0, x + 0.14, trunk + 0.5, z, "trunk")
        self.crown(x, trunk + 0.8 * radius, z, radius)

    def poles(self) -> Iterator[Thing]:
        for side in (-1, 1):
            spacing, first = self.uniform(11, 18), self.uniform(5, 12)
            for k in range(4):
                yield first + k * spacing, partial(self.street_lamp, side, first + k * spacing)
            for _ in range(self.pick(4)):
                z = self.depth(4, 30)
                draw = self.traffic_light if self.chance(0.4) else self.sign
                yield z, partial(draw, self.kerb(side) + side * self.uniform(0.35, 0.9), z)

    def street_lamp(self, side: int, z: float) -> None:
        x, height = self.kerb(side) + side * 0.45, 6.2
        self.post(x, z, height, 0.09)
        self.paint.rect(min(x, x - side * 1.8), height - 0.12, max(x, x - side * 1.8), height, z, "pole")
        self.paint.rect(x - side * 1.8 - 0.25, height - 0.24, x - side * 1.8 + 0.25, height - 0.1, z, "lamp")

    def post(self, x: float, z: float, height: float, radius: float, material: str = "pole") -> None:
        self.paint.cast([(x - 0.1, z), (x + 0.1, z), (x - self.sun * 2, z + 0.3), (x - self.sun * 2, z + 0.1)])
        self.paint.rect(x - radius, 0, x + radius, height, z, material)

    def sign(self, x: float, z: float) -> None:
        height, kind, shape = self.uniform(2.0, 2.6), f"sign{self.pick(len(SIGNS))}", self.pick(3)
        self.post(x, z, height, 0.05)
        if shape == 0:
            self.paint.disc(x, height, z, 0.42, kind)
            self.paint.disc(x, height, z, 0.27, "sign_white")
        elif shape == 1:
            self.paint.rect(x - 0.4, height - 0.4, x + 0.4, height + 0.4, z, kind)
            self.paint.rect(x - 0.2, height - 0.12, x + 0.2, height + 0.12, z, "sign_white")
        else:
            for size, material in ((0.5, kind), (0.25, "sign_white")):
                top, low = height + 0.9 * size, height - 0.7 * size
                self.paint.poly([(x, top, z), (x + size, low, z), (x - size, low, z)], material)

    def traffic_light(self, x: float, z: float) -> None:
        self.post(x, z, 3.4, 0.07, "pole_dark")
        self.paint.rect(x - 0.24, 2.5, x + 0.24, 3.6, z, "light_box")
        lit = self.pick(3)
        self.paint.disc(x, 3.4 - 0.35 * lit, z, 0.14, f"light{lit}")

    def cars(self) -> Iterator[Thing]:
        """Parked along both kerbs, and driving ahead and towards the camera."""
        for side in (-1, 1):
            z = self.uniform(4, 14)
            while z < 60 and self.chance(0.75):
                yield z, partial(self.car, self.kerb(side) - side * 1.1, z, away=side > 0)
                z += self.uniform(5.2, 14)
        for side in (-1, 1):
            if self.chance(0.6):
                z = self.uniform(9, 45)
                yield z, partial(self.car, self.center + side * 0.36 * self.half, z, away=side > 0)

    def car(self, x: float, z: float, away: bool) -> None:
        """A body and a cabin, seen from behind (`away`) or in front, with the flank that faces the camera."""
        paint, color = self.paint, f"car{self.pick(len(CARS))}"
        tall = 1.45 + 0.7 * self.chance(0.2)
        waist, half, end = 0.55 * tall + 0.15, 0.88, z + 4.2
        inward = -1 if x > 0 else 1
        flank, roof = x + inward * half, x + inward * 0.68
        paint.cast([(x - 1.1, z - 0.2), (x + 1.1, z - 0.2), (x + 1.1, end), (x - 1.1, end)])
        for near in (z + 0.5, end - 1.1):
            self.facade(flank, near, near + 0.65, 0, 0.6, "tyre")
        for side in (-1, 1):
            paint.rect(x + side * 0.68 - 0.12, 0, x + side * 0.68 + 0.12, 0.4, z, "tyre")
        self.facade(flank, z, end, 0.28, waist, f"{color}_dim")
        window = [(flank, waist, z), (roof, tall, z + 0.5), (roof, tall, end - 1.2), (flank, waist, end - 0.5)]
        paint.poly(window, "car_glass")
        self.cabin(x, z, waist, tall, (half, 0.68), f"{color}_lit")
        self.cabin(x, z, waist, tall - 0.1, (0.74, 0.6), "car_glass")
        paint.rect(x - half, 0.28, x + half, waist, z, f"{color}_lit")
        for side in (-1, 1):
            light = x + side * 0.7
            paint.rect(light - 0.14, waist - 0.3, light + 0.14, waist - 0.12, z, "tail_light" if away else "head_light")
        paint.rect(x - 0.25, 0.42, x + 0.25, 0.54, z, "plate")

    def cabin(self, x: float, z: float, low: float, high: float, half: tuple[float, float], material: str) -> None:
        """The leaning end of a cabin, of half widths `half` at its foot and at its top."""
        foot, top, lean = half[0], half[1], z + 0.3
        self.paint.poly(
            [(x - foot, low, z), (x - top, high, lean), (x + top, high, lean), (x + foot, low, z)], material
        )

    def people(self) -> Iterator[Thing]:
        """On both pavements, now and then in the road."""
        for side in (-1, 1):
            for _ in range(1 + self.pick(6)):
                z = self.depth(4, 28)
                yield z, partial(self.person, self.kerb(side) + side * self.uniform(0.5, self.walk - 0.2), z)
        if self.chance(0.3):
            z = self.uniform(7, 20)
            yield z, partial(self.person, self.center + self.uniform(-0.8, 0.8) * self.half, z)

    def person(self, x: float, z: float) -> None:
        paint, tall, stride = self.paint, self.uniform(1.5, 1.9), self.uniform(0.04, 0.24)
        coat, trousers = f"cloth{self.pick(len(CLOTHES))}", f"cloth{self.pick(len(CLOTHES))}"
        skin, hair = f"skin{self.pick(len(SKINS))}", f"hair{self.pick(2)}"
        hip, neck = 0.48 * tall, 0.84 * tall
        paint.cast([(x - 0.2, z), (x + 0.2, z), (x - self.sun * 1.2, z + 0.4), (x - self.sun * 1.4, z + 0.1)])
        for side in (-1, 1):
            foot = x + side * stride
            paint.poly([(x - 0.1, hip, z), (x + 0.1, hip, z), (foot + 0.08, 0, z), (foot - 0.08, 0, z)], trousers)
            hand = x + side * (0.22 + stride)
            paint.poly([(x + side * 0.16, neck, z), (x + side * 0.26, neck, z), (hand, hip, z)], coat)
        paint.poly([(x - 0.23, neck, z), (x + 0.23, neck, z), (x + 0.17, hip - 0.1, z), (x - 0.17, hip - 0.1, z)], coat)
        paint.disc(x, 0.93 * tall, z, 0.13, hair)
        paint.disc(x, 0.91 * tall, z, 0.1, skin)


def _quads(*corners: tuple[float | np.ndarray, ...]) -> np.ndarray:
    """Quadrilaterals, float64 [N, 4, 3], from the (x, y, z) of their corners: numbers, or arrays of N."""
    count = max(np.size(value) for corner in corners for value in corner)
    points = np.empty((count, 4, 3))
    for k, corner in enumerate(corners):
        for axis, value in enumerate(corner):
            points[:, k, axis] = value
    return points


def _ground_quads(x0, x1, z0, z1) -> np.ndarray:
    """Rectangles on the ground."""
    return _quads((x0, 0, z0), (x0, 0, z1), (x1, 0, z1), (x1, 0, z0))


def _wall_quads(x, y0, y1, z0, z1) -> np.ndarray:
    """Rectangles on a wall along the street."""
    return _quads((x, y0, z0), (x, y1, z0), (x, y1, z1), (x, y0, z1))
