"""Classes and colours of a user's own masks, from a file."""

import json
import re

import cv2
import numpy as np
import pytest
from frames import png_bytes, write_frame

from bcmfnet.data import build_dataset, make_label_table, verify, write_png
from bcmfnet.data.colors import read_colors, write_colors
from bcmfnet.errors import ConfigError, DataError

JSON = '{"road": [128, 64, 128], "sky": [[1, 2, 3], [4, 5, 6]], "Void": [0, 0, 0], "pole": [9, 9, 9]}'
CSV = "name,r,g,b\nroad, 128,64,128\nsky,1,2,3\n\nsky,4,5,6\nvoid,0,0,0\npole,9,9,9\n"
COLORS = np.array([(128, 64, 128), (1, 2, 3), (4, 5, 6), (0, 0, 0), (9, 9, 9)], np.uint8)
IDS = np.array([0, 1, 1, 255, 2], np.uint8)


def refused(path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_colors(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.json", JSON),
        ("c.JSON", "\ufeff" + JSON),
        ("c.csv", CSV),
        ("c.csv", CSV.removeprefix("name,r,g,b\n").replace("\n", "\r\n")),
        ("c.csv", CSV.replace("name", "Name").replace("sky", '"sky"')),
    ],
)
def test_both_forms(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    table, ids = read_colors(tmp_path / name)
    assert table.classes == ("road", "sky", "pole")
    assert table.colors == ((128, 64, 128), (1, 2, 3), (9, 9, 9))
    assert dict(ids) == dict(zip(map(tuple, COLORS.tolist()), IDS.tolist(), strict=True))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("c.txt", JSON, "expected a .json or .csv file, got {path}"),
        ("c.json", "{", "expected a JSON object such as .* in {path}: "),
        ("c.json", "[1]", r"expected a JSON object such as .* in {path}, got \[1\]"),
        ("c.json", "[" * 10**5, "expected a JSON object such as .* in {path}: "),
        ("c.json", '{"a": [0, 0, 256], "b": [1, 1, 1]}', r"expected a name .* in {path}, got \[0, 0, 256\] for 'a'"),
        ("c.json", '{"a": [0, 0], "b": [1, 1, 1]}', r"expected a name and three .* in {path}, got \[0, 0\] for 'a'"),
        ("c.json", '{"a": [], "b": [1, 1, 1]}', r"expected a name and three numbers .* in {path}, got \[\] for 'a'"),
        ("c.json", '{"a": {"r": 1}, "b": [1, 1, 1]}', "expected a name and three numbers .* in {path}, got .* for 'a'"),
        ("c.json", '{"a": [true, 0, 0], "b": [1, 1, 1]}', "expected a name .* got .True, 0, 0. for 'a'"),
        ("c.json", '{"": [0, 0, 0], "b": [1, 1, 1]}', r"expected a name .* in {path}, got \[0, 0, 0\] for ''"),
        ("c.json", '{"a": [1, 1, 1], "b": [1, 1, 1]}', r"expected one class for \(1, 1, 1\) .*, got 'a' and 'b'"),
        ("c.json", '{"a": [1, 1, 1], "void": [0, 0, 0]}', "expected 2 to 254 classes in {path}, got 1"),
        ("c.csv", "", "expected 2 to 254 classes in {path}, got 0"),
        ("c.csv", "a;1;2;3\n", "expected rows of name,r,g,b in {path}, got 'a;1;2;3'"),
        ("c.csv", "a,1,2,-3\n", r"expected a name and three numbers .* in {path}, got \[1, 2, '-3'\] for 'a'"),
        ("c.csv", "a,1,2,\u00b2\n", "expected a name and three numbers from 0 to 255 in {path}, got .* for 'a'"),
        ("c.csv", "".join(f"c{i},{i},0,0\nd{i},{i},1,0\n" for i in range(128)), "expected 2 to 254 .* {path}, got 256"),
    ],
)
def test_what_is_no_colour_file_is_one_line(tmp_path, name, text, expected):
    path = tmp_path / name
    path.write_text(text)
    line = refused(path)
    assert re.match(f"colors: {expected.replace('{path}', re.escape(str(path)))}", line), line


def test_no_file_and_no_text(tmp_path):
    path = tmp_path / "c.csv"
    assert refused(path) == f"colors: expected a file of names and colours at {path}: No such file or directory"
    path.write_bytes(b"\xff\xfe")
    assert refused(path).startswith(f"colors: expected UTF-8 text in {path}: ")


def test_a_table_that_is_written_is_read_again(tmp_path):
    table = make_label_table("folder", 3, ("a", 'b "c"', "\u00e4"))
    write_colors(tmp_path / "colors.json", table)
    assert read_colors(tmp_path / "colors.json") == (table, tuple(zip(table.colors, range(3), strict=True)))


@pytest.fixture
def colored(tmp_path):
    """A folder of one frame, whose mask has a band of each colour, and its colour file."""
    (tmp_path / "colors.json").write_text(JSON)
    mask = COLORS[:, None].repeat(16, 0).repeat(96, 1)
    write_frame(tmp_path / "images/train/a.png", tmp_path / "masks/train/a.png", mask)
    return tmp_path, tmp_path / "masks/train/a.png", mask


def test_masks_of_colours(colored):
    root, path, mask = colored
    dataset = build_dataset("folder", root, colors=root / "colors.json")
    expected = IDS[:, None].repeat(16, 0).repeat(96, 1)
    assert np.array_equal(dataset.read(0)[1], expected)
    assert dataset.table.classes == ("road", "sky", "pole") and dataset.table.colors[1] == (1, 2, 3)
    index = {tuple(color): i for i, color in enumerate(COLORS.tolist())}
    samples = np.array([[index[tuple(color)] for color in row] for row in mask.tolist()])
    path.write_bytes(png_bytes(samples, 8, 3, COLORS.tobytes()))
    assert np.array_equal(dataset.read(0)[1], expected), "a palette PNG is read by its colours"


def test_masks_of_ids_are_those_of_the_file(colored):
    root, path, _ = colored
    ids = np.array([0, 1, 2, 255], np.uint8)[:, None].repeat(20, 0).repeat(96, 1)
    write_png(path, ids)
    dataset = build_dataset("folder", root, colors=root / "colors.json")
    assert np.array_equal(dataset.read(0)[1], ids) and dataset.table.classes[2] == "pole"
    write_png(path, np.where(ids == 2, 3, ids))
    report = verify("folder", root, ["train"], colors=root / "colors.json")
    assert report.problems == [f"{path}: label value 3 is outside the table: expected 0..2 or 255 (void)"]


def test_one_unknown_pixel_is_a_problem_with_its_place(colored):
    """Strays are void in CamVid alone, whose release is known to have them."""
    root, path, mask = colored
    mask[7, 5:7] = 200, 100, 50
    mask[3, 9] = 1, 1, 1
    write_png(path, mask)
    report = verify("folder", root, ["train"], colors=root / "colors.json")
    assert report.problems == [
        f"{path}: 0.0391 % of the pixels have colours outside {root / 'colors.json'}, most of them (200, 100, 50) "
        "(red, green, blue), 2 pixels, the first in row 7, column 5"
    ]


def test_colours_and_ids_are_not_mixed(colored):
    root, path, mask = colored
    write_frame(root / "images/train/b.png", root / "masks/train/b.png", np.zeros((80, 96), np.uint8))
    dataset = build_dataset("folder", root, colors=root / "colors.json")
    with pytest.raises(DataError, match=r"b\.png: expected a label of colours, got one channel"):
        dataset.read(1)


def test_options_beside_a_colour_file(colored):
    root, *_ = colored
    colors = root / "colors.json"
    assert build_dataset("folder", root, colors=colors, num_classes=3).table.num_classes == 3
    with pytest.raises(ConfigError, match=f"^num_classes: expected 3, as {re.escape(str(colors))} has, got 4$"):
        build_dataset("folder", root, colors=colors, num_classes=4)
    with pytest.raises(ConfigError, match=r"^classes: expected none beside .*, got \('a', 'b', 'c'\)$"):
        build_dataset("folder", root, colors=colors, classes=("a", "b", "c"))
    with pytest.raises(ConfigError, match="^colors: dataset camvid11-segnet has no such option"):
        build_dataset("camvid11-segnet", root, colors=colors)


def test_masks_of_another_format_than_png(colored):
    root, path, mask = colored
    path.unlink()
    cv2.imwrite(str(path.with_suffix(".bmp")), mask)
    dataset = build_dataset("folder", root, colors=root / "colors.json")
    with pytest.raises(DataError, match="expected a PNG label"):
        dataset.read(0)


def test_json_of_the_documentation_is_json():
    text = next(line for line in read_colors.__doc__.splitlines() if ".json" in line)
    assert json.loads(text[text.index("{") : text.rindex("}") + 1]) == {"road": [128, 64, 128], "void": [0, 0, 0]}
