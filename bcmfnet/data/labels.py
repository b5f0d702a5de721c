"""Label tables: what the ids of a protocol mean and how they are coloured. numpy only."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bcmfnet.errors import ConfigError, unknown_name

RGB = tuple[int, int, int]
MAX_CLASSES = 254  # 255 is void and 254 marks a value that no table knows


@dataclass(frozen=True)
class LabelTable:
    """Classes of one protocol, in the order of their ids, with the colours that show them."""

    name: str
    classes: tuple[str, ...]
    colors: tuple[RGB, ...]
    ignore_index: int = 255

    def __post_init__(self) -> None:
        if not 1 <= len(self.classes) <= MAX_CLASSES:
            raise ConfigError(f"label table {self.name}: expected 1..{MAX_CLASSES} classes, got {len(self.classes)}")
        if len(self.colors) != len(self.classes):
            raise ConfigError(
                f"label table {self.name}: expected a colour for each of {len(self.classes)} classes, "
                f"got {len(self.colors)}"
            )

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def color_array(self) -> np.ndarray:
        """RGB of every uint8 label, uint8 [256, 3]; black for void and for ids outside the table."""
        colors = np.zeros((256, 3), np.uint8)
        colors[: self.num_classes] = self.colors
        return colors


class CityscapesRow(NamedTuple):
    """One row of the official table; `train_id` is 255 (or -1 for the plate) where the class is not trained."""

    name: str
    id: int
    train_id: int
    category: str
    category_id: int
    has_instances: bool
    ignore_in_eval: bool
    color: RGB


CITYSCAPES_ROWS = tuple(
    CityscapesRow(*row)
    for row in (
        ("unlabeled", 0, 255, "void", 0, False, True, (0, 0, 0)),
        ("ego vehicle", 1, 255, "void", 0, False, True, (0, 0, 0)),
        ("rectification border", 2, 255, "void", 0, False, True, (0, 0, 0)),
        ("out of roi", 3, 255, "void", 0, False, True, (0, 0, 0)),
        ("static", 4, 255, "void", 0, False, True, (0, 0, 0)),
        ("dynamic", 5, 255, "void", 0, False, True, (111, 74, 0)),
        ("ground", 6, 255, "void", 0, False, True, (81, 0, 81)),
        ("road", 7, 0, "flat", 1, False, False, (128, 64, 128)),
        ("sidewalk", 8, 1, "flat", 1, False, False, (244, 35, 232)),
        ("parking", 9, 255, "flat", 1, False, True, (250, 170, 160)),
        ("rail track", 10, 255, "flat", 1, False, True, (230, 150, 140)),
        ("building", 11, 2, "construction", 2, False, False, (70, 70, 70)),
        ("wall", 12, 3, "construction", 2, False, False, (102, 102, 156)),
        ("fence", 13, 4, "construction", 2, False, False, (190, 153, 153)),
        ("guard rail", 14, 255, "construction", 2, False, True, (180, 165, 180)),
        ("bridge", 15, 255, "construction", 2, False, True, (150, 100, 100)),
        ("tunnel", 16, 255, "construction", 2, False, True, (150, 120, 90)),
        ("pole", 17, 5, "object", 3, False, False, (153, 153, 153)),
        ("polegroup", 18, 255, "object", 3, False, True, (153, 153, 153)),
        ("traffic light", 19, 6, "object", 3, False, False, (250, 170, 30)),
        ("traffic sign", 20, 7, "object", 3, False, False, (220, 220, 0)),
        ("vegetation", 21, 8, "nature", 4, False, False, (107, 142, 35)),
        ("terrain", 22, 9, "nature", 4, False, False, (152, 251, 152)),
        ("sky", 23, 10, "sky", 5, False, False, (70, 130, 180)),
        ("person", 24, 11, "human", 6, True, False, (220, 20, 60)),
        ("rider", 25, 12, "human", 6, True, False, (255, 0, 0)),
        ("car", 26, 13, "vehicle", 7, True, False, (0, 0, 142)),
        ("truck", 27, 14, "vehicle", 7, True, False, (0, 0, 70)),
        ("bus", 28, 15, "vehicle", 7, True, False, (0, 60, 100)),
        ("caravan", 29, 255, "vehicle", 7, True, True, (0, 0, 90)),
        ("trailer", 30, 255, "vehicle", 7, True, True, (0, 0, 110)),
        ("train", 31, 16, "vehicle", 7, True, False, (0, 80, 100)),
        ("motorcycle", 32, 17, "vehicle", 7, True, False, (0, 0, 230)),
        ("bicycle", 33, 18, "vehicle", 7, True, False, (119, 11, 32)),
        ("license plate", -1, -1, "vehicle", 7, False, True, (0, 0, 142)),
    )
)

_TRAINED = sorted((row for row in CITYSCAPES_ROWS if 0 <= row.train_id < 255), key=lambda row: row.train_id)


def cityscapes_id_to_train_id() -> np.ndarray:
    """trainId of every uint8 labelId, uint8 [256]; 255 for void, also at 255, which is how -1 is stored."""
    lut = np.full(256, 255, np.uint8)
    for row in _TRAINED:
        lut[row.id] = row.train_id
    return lut


def cityscapes_train_id_to_id() -> np.ndarray:
    """labelId of every uint8 trainId, uint8 [256], as the benchmark server wants it; 0 (unlabeled) elsewhere."""
    lut = np.zeros(256, np.uint8)
    for row in _TRAINED:
        lut[row.train_id] = row.id
    return lut


def make_label_table(name: str, num_classes: int, classes: tuple[str, ...] = ()) -> LabelTable:
    """A table for a user's own classes: hues by the golden ratio, so that neighbours in id differ in colour.

    Raises:
        ConfigError: a count outside 2..254, or names that do not match it.
    """
    if not 2 <= num_classes <= MAX_CLASSES:
        raise ConfigError(f"num_classes: expected 2..{MAX_CLASSES}, got {num_classes}")
    if classes and len(classes) != num_classes:
        raise ConfigError(f"classes: expected {num_classes} names (num_classes), got {len(classes)}")
    names = tuple(classes) or tuple(f"class{i}" for i in range(num_classes))
    return LabelTable(name, names, tuple(_hue_color(i) for i in range(num_classes)))


def _hue_color(i: int) -> RGB:
    red, green, blue = colorsys.hsv_to_rgb(i * 0.618034 % 1.0, 0.75 - 0.25 * (i % 3 == 1), 0.9 - 0.3 * (i % 3 == 2))
    return round(255 * red), round(255 * green), round(255 * blue)


CAMVID_VOID_COLORS: tuple[RGB, ...] = (
    (64, 128, 64),  # animal
    (192, 0, 128),  # archway
    (0, 128, 64),  # bridge
    (64, 0, 192),  # cart, luggage, pram
    (192, 128, 64),  # child
    (128, 0, 192),  # lane marking, driving
    (192, 0, 64),  # lane marking, not driving
    (128, 128, 64),  # text
    (192, 0, 192),  # motorcycle, scooter
    (128, 64, 64),  # other moving
    (64, 192, 128),  # parking block
    (128, 128, 192),  # road shoulder
    (64, 128, 192),  # SUV, pickup truck
    (0, 0, 64),  # traffic cone
    (0, 64, 64),  # traffic light
    (192, 64, 128),  # train
    (192, 128, 192),  # truck, bus
    (64, 0, 64),  # tunnel
    (192, 192, 0),  # other vegetation
    (64, 192, 0),  # wall
    (0, 0, 0),  # void
)
"""Colours of the released CamVid labels that are none of the eleven classes."""

_TABLES = {
    table.name: table
    for table in (
        LabelTable(
            "camvid11",
            ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"),
            (
                (128, 128, 128),
                (128, 0, 0),
                (192, 192, 128),
                (128, 64, 128),
                (0, 0, 192),
                (128, 128, 0),
                (192, 128, 128),
                (64, 64, 128),
                (64, 0, 128),
                (64, 64, 0),
                (0, 128, 192),
            ),
        ),
        LabelTable("cityscapes19", tuple(row.name for row in _TRAINED), tuple(row.color for row in _TRAINED)),
        LabelTable(
            "street10",
            ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "person"),
            (
                (70, 130, 180),
                (70, 70, 70),
                (153, 153, 153),
                (128, 64, 128),
                (244, 35, 232),
                (107, 142, 35),
                (220, 220, 0),
                (190, 153, 153),
                (0, 0, 142),
                (220, 20, 60),
            ),
        ),
    )
}


def list_label_tables() -> list[str]:
    """Names that `get_label_table` knows."""
    return sorted(_TABLES)


def get_label_table(name: str) -> LabelTable:
    """The table called `name`. Raises ConfigError, with the nearest name, when there is none."""
    if name not in _TABLES:
        raise ConfigError(unknown_name("label table", name, list_label_tables()))
    return _TABLES[name]
