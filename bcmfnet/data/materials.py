"""What the drawn streets are made of: class, colour and roughness of each material, as 256-entry tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bcmfnet.data.labels import RGB, get_label_table

SKY_BANDS = 24
CLOUDS = 2
WALLS: tuple[RGB, ...] = (
    (176, 96, 78),
    (198, 170, 134),
    (160, 160, 164),
    (208, 196, 176),
    (140, 112, 96),
    (186, 138, 92),
    (128, 140, 152),
    (196, 180, 190),
)
CARS: tuple[RGB, ...] = (
    (180, 30, 34),
    (32, 66, 140),
    (210, 212, 214),
    (46, 48, 52),
    (120, 126, 132),
    (216, 176, 46),
    (30, 104, 84),
)
CLOTHES: tuple[RGB, ...] = (
    (196, 60, 52),
    (44, 84, 150),
    (232, 226, 214),
    (40, 42, 50),
    (226, 160, 44),
    (76, 130, 86),
    (126, 80, 140),
    (96, 110, 128),
)
SKINS: tuple[RGB, ...] = ((236, 196, 166), (176, 124, 92), (104, 72, 54))
LEAVES: tuple[RGB, ...] = ((72, 116, 44), (104, 132, 52), (52, 100, 62), (140, 132, 56))
FENCE_COLORS: tuple[RGB, ...] = ((124, 96, 66), (196, 196, 190), (62, 88, 74))
FENCES = len(FENCE_COLORS)
SIGNS: tuple[RGB, ...] = ((206, 30, 38), (28, 84, 176), (238, 192, 40))
GROUND = ("road", "mark", "pavement", "kerb")


class Materials:
    """Material ids by name, and the tables `classes` uint8 [256], `colors` float64 [256, 3], `grain` and
    `blotch` int16 [256]: amplitudes of the fine and the coarse texture."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}
        self.classes = np.zeros(256, np.uint8)
        self.colors = np.zeros((256, 3))
        self.grain = np.zeros(256, np.int16)
        self.blotch = np.zeros(256, np.int16)

    def add(self, name: str, label: str, color: Sequence[float], grain: int = 4, blotch: int = 4) -> None:
        i = len(self.ids)
        self.ids[name] = i
        self.classes[i] = get_label_table("street10").classes.index(label)
        self.colors[i] = color
        self.grain[i], self.blotch[i] = grain, blotch

    def add_shades(self, name: str, label: str, colors: tuple[RGB, ...], shades: dict[str, float], **texture) -> None:
        """`name0_shade`, `name1_shade`, ...: each colour multiplied by each shade."""
        for k, color in enumerate(colors):
            for shade, gain in shades.items():
                self.add(f"{name}{k}_{shade}", label, tuple(min(255, gain * c) for c in color), **texture)


def street_materials() -> Materials:
    table = Materials()
    for k in range(SKY_BANDS):
        table.add(f"sky{k}", "sky", (0, 0, 0), grain=1, blotch=2)
    for k in range(CLOUDS):
        table.add(f"cloud{k}", "sky", (0, 0, 0), grain=1, blotch=3)
    table.add("road", "road", (88, 88, 92), grain=12, blotch=8)
    table.add("mark", "road", (214, 214, 206), grain=14, blotch=12)
    table.add("pavement", "pavement", (150, 144, 138), grain=8, blotch=8)
    table.add("kerb", "pavement", (184, 182, 176), grain=8, blotch=6)
    table.add_shades("wall", "building", WALLS, {"lit": 1.0, "dim": 0.66, "trim": 0.5}, grain=8, blotch=8)
    table.add("glass", "building", (70, 86, 104), grain=3, blotch=12)
    table.add("glass_bright", "building", (186, 206, 216), grain=3, blotch=12)
    table.add("door", "building", (78, 54, 44))
    table.add("far_wall0", "building", (136, 142, 152), blotch=8)
    table.add("far_wall1", "building", (158, 160, 168), blotch=8)
    table.add_shades("leaf", "tree", LEAVES, {"dark": 0.62, "mid": 0.9, "light": 1.2}, grain=26, blotch=24)
    table.add("trunk", "tree", (92, 72, 56), grain=16, blotch=8)
    table.add("pole", "pole", (112, 116, 118))
    table.add("pole_dark", "pole", (56, 60, 62))
    table.add("lamp", "pole", (230, 228, 204))
    for k, color in enumerate(SIGNS):
        table.add(f"sign{k}", "sign", color, grain=2, blotch=3)
    table.add("sign_white", "sign", (240, 240, 240), grain=2, blotch=3)
    table.add("light_box", "sign", (34, 38, 36), grain=2, blotch=3)
    table.add("light0", "sign", (240, 52, 40), grain=1)
    table.add("light1", "sign", (240, 180, 40), grain=1)
    table.add("light2", "sign", (56, 220, 110), grain=1)
    for k, color in enumerate(FENCE_COLORS):
        table.add(f"fence{k}", "fence", color, grain=10)
        table.add(f"fence_rail{k}", "fence", tuple(round(0.7 * c) for c in color), grain=10)
    table.add_shades("car", "car", CARS, {"lit": 1.0, "dim": 0.7}, grain=2, blotch=6)
    table.add("car_glass", "car", (52, 64, 76), grain=2, blotch=14)
    table.add("tyre", "car", (26, 26, 28))
    table.add("tail_light", "car", (226, 26, 30), grain=1)
    table.add("head_light", "car", (250, 246, 216), grain=1)
    table.add("plate", "car", (236, 232, 206), grain=1)
    for k, color in enumerate(CLOTHES):
        table.add(f"cloth{k}", "person", color, grain=6, blotch=8)
    for k, color in enumerate(SKINS):
        table.add(f"skin{k}", "person", color, grain=2)
    for k, color in enumerate(((52, 38, 30), (150, 112, 62))):
        table.add(f"hair{k}", "person", color)
    return table


STREET = street_materials()
