import subprocess
import sys

import numpy as np
import pytest

from bcmfnet.data.labels import (
    CITYSCAPES_ROWS,
    LabelTable,
    cityscapes_id_to_train_id,
    cityscapes_train_id_to_id,
    get_label_table,
    list_label_tables,
    make_label_table,
)
from bcmfnet.errors import ConfigError


def test_cityscapes_table_counts():
    assert len(CITYSCAPES_ROWS) == 35
    assert [row.id for row in CITYSCAPES_ROWS] == [*range(34), -1]
    assert sorted(row.train_id for row in CITYSCAPES_ROWS if 0 <= row.train_id < 255) == list(range(19))
    assert all(row.ignore_in_eval == (row.train_id in (255, -1)) for row in CITYSCAPES_ROWS)
    assert get_label_table("cityscapes19").num_classes == 19


@pytest.mark.parametrize(
    ("name", "label_id", "train_id"), [("road", 7, 0), ("pole", 17, 5), ("sky", 23, 10), ("bicycle", 33, 18)]
)
def test_cityscapes_ids(name, label_id, train_id):
    assert cityscapes_id_to_train_id()[label_id] == train_id
    assert cityscapes_train_id_to_id()[train_id] == label_id
    assert get_label_table("cityscapes19").classes[train_id] == name


def test_cityscapes_maps_are_inverse_and_void_elsewhere():
    to_train, to_id = cityscapes_id_to_train_id(), cityscapes_train_id_to_id()
    assert to_train[to_id[:19]].tolist() == list(range(19))
    assert np.count_nonzero(to_train != 255) == 19
    assert to_train[255] == 255, "the plate's -1 is stored as 255"
    assert to_id[255] == 0


def test_camvid_order_and_colors():
    table = get_label_table("camvid11")
    order = "sky building pole road pavement tree sign fence car pedestrian bicyclist"
    assert " ".join(table.classes) == order
    assert table.colors[table.classes.index("bicyclist")] == (0, 128, 192)
    assert table.colors[table.classes.index("pavement")] == (0, 0, 192)


@pytest.mark.parametrize("name", list_label_tables())
def test_colors_are_unique_and_void_is_black(name):
    table = get_label_table(name)
    colors = table.color_array()
    assert colors.shape == (256, 3) and colors.dtype == np.uint8
    assert len({tuple(c) for c in colors[: table.num_classes].tolist()}) == table.num_classes
    assert not colors[table.num_classes :].any()


def test_unknown_table_suggests_the_nearest():
    with pytest.raises(
        ConfigError, match="^label table: expected one of .*, got 'cityscape19'; did you mean 'cityscapes19'"
    ):
        get_label_table("cityscape19")


def test_made_table():
    table = make_label_table("mine", 40)
    assert table.classes[39] == "class39"
    assert len(set(table.colors)) == 40
    assert make_label_table("mine", 2, ("left", "right")).classes == ("left", "right")


@pytest.mark.parametrize(
    ("count", "classes", "line"),
    [
        (1, (), "num_classes: expected 2..254, got 1"),
        (255, (), "num_classes: expected 2..254, got 255"),
        (3, ("a", "b"), "classes: expected 3 names"),
    ],
)
def test_made_table_refuses(count, classes, line):
    with pytest.raises(ConfigError, match=line):
        make_label_table("mine", count, classes)


def test_table_needs_a_color_for_each_class():
    with pytest.raises(ConfigError, match="a colour for each of 2 classes, got 1"):
        LabelTable("broken", ("a", "b"), ((0, 0, 0),))


def test_label_tables_load_neither_torch_nor_opencv():
    code = "import sys, bcmfnet.data.labels; print({'torch', 'cv2'} & set(sys.modules) or 'none')"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "none"
