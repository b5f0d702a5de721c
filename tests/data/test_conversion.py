"""COCO's and labelme's polygons become a dataset `folder`; what cannot be used is one line that names it."""

import copy
import json
import logging
import shutil

import cv2
import numpy as np
import pytest
from frames import with_exif

from bcmfnet.data import build_dataset, convert, verify, write_png
from bcmfnet.data.colors import read_colors
from bcmfnet.errors import ConfigError, DataError, MissingDataError


def rectangle(left, top, right, bottom):
    return [left, top, right, top, right, bottom, left, bottom]


def expected_mask(*parts):
    """Ids by rows and columns, the last part on top; 0 elsewhere."""
    ids = np.zeros((64, 96), np.uint8)
    for value, left, top, right, bottom in parts:
        ids[top:bottom, left:right] = value
    return ids


COCO = {
    "images": [{"id": 5, "file_name": "sub/a.png", "height": 64, "width": 96},
               {"id": "b", "file_name": "sub\\b.png", "height": 64, "width": 96}],
    "categories": [{"id": 30, "name": "car"}, {"id": 2, "name": "road"}, {"id": 40, "name": "void"}],
    "annotations": [
        {"id": 1, "image_id": 5, "category_id": 30, "segmentation": [rectangle(10, 20, 30, 40)], "area": 7},
        {"id": 2, "image_id": 5, "category_id": 2,
         "segmentation": [rectangle(0, 30, 48, 64), rectangle(48, 30, 96, 64)], "area": 1, "iscrowd": 0},
        {"id": 3, "image_id": "b", "category_id": 40, "iscrowd": 1,
         "segmentation": {"size": [64, 96], "counts": [64 * 3 + 1, 2, 62, 1, 6144 - 64 * 3 - 66]}},
    ],
}  # fmt: skip
LABELME = {
    "version": "5.5.0", "imagePath": "..\\frames\\a.png", "imageData": None, "imageHeight": 64, "imageWidth": 96,
    "shapes": [
        {"label": "road", "points": [[0, 30], [96, 30], [96, 64], [0, 64]], "shape_type": "polygon", "group_id": None},
        {"label": "car", "points": [[30, 40], [10, 20]], "shape_type": "rectangle"},
        {"label": "sun", "points": [[80, 10], [80, 15]], "shape_type": "circle"},
    ],
}  # fmt: skip


@pytest.fixture
def coco(tmp_path):
    return Case(tmp_path, COCO, "instances.json", ("sub/a.png", "sub/b.png"))


@pytest.fixture
def labelme(tmp_path):
    return Case(tmp_path, LABELME, "labels/a.json", ("frames/a.png",))


class Case:
    """Images and an annotation file, which can be changed and converted."""

    def __init__(self, root, content, name, images):
        self.root, self.content, self.out = root, copy.deepcopy(content), root / "out"
        self.source = root / name
        self.source.parent.mkdir(exist_ok=True)
        self.out.mkdir()
        for number, image in enumerate(images):
            (root / image).parent.mkdir(exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 256, (64, 96, 3), dtype=np.uint8)
            write_png(root / image, pixels)

    def convert(self, split="train", **options):
        self.source.write_text(json.dumps(self.content))
        return convert(self.source, self.out, split, **options)

    def refusal(self, error=DataError, **options):
        with pytest.raises(error) as caught:
            self.convert(**options)
        assert "\n" not in str(caught.value)
        assert not list(self.out.rglob("*.png")) and not list(self.out.glob(".*"))
        return str(caught.value)

    def read(self, split="train"):
        dataset = build_dataset("folder", self.out, split, colors=self.out / "colors.json")
        return dataset, [dataset.read(i)[1] for i in range(len(dataset))]


def test_coco(coco):
    assert coco.convert()[0] == 2
    dataset, (a, b) = coco.read()
    assert dataset.table.classes == ("background", "road", "car"), "in the order of the categories' ids"
    assert np.array_equal(a, expected_mask((1, 0, 30, 96, 64), (2, 10, 20, 30, 40))), "the smaller one on top"
    assert np.array_equal(b, expected_mask((255, 3, 1, 4, 3), (255, 4, 1, 5, 2)))
    assert np.array_equal(dataset.read(0)[0], cv2.imread(str(coco.root / "sub/a.png"), cv2.IMREAD_COLOR_RGB))
    assert verify("folder", coco.out, ["train"], colors=coco.out / "colors.json").ok


def test_labelme(labelme):
    """In the order of the file, where the car would be under the road if it came first."""
    assert labelme.convert()[0] == 1
    dataset, (a,) = labelme.read()
    assert dataset.table.classes == ("background", "car", "road", "sun")
    y, x = np.mgrid[:64, :96] + 0.5
    circle = np.hypot(x - 80, y - 10) < 5
    assert np.array_equal(a, np.where(circle, 3, expected_mask((2, 0, 30, 96, 64), (1, 10, 20, 30, 40))))
    labelme.content["shapes"].reverse()
    labelme.convert("val")
    assert np.array_equal(labelme.read("val")[1][0][30:], np.full((34, 96), 2))


def test_a_folder_of_labelme_files_and_another_one_of_images(labelme):
    shutil.copy(labelme.root / "frames/a.png", labelme.root / "frames/b.png")
    other = LABELME | {
        "imagePath": "C:\\elsewhere\\b.png",
        "shapes": [{"label": "tree", "points": [[0, 0], [9, 0], [9, 9]]}],
    }
    (labelme.source.parent / "b.json").write_text(json.dumps(other))
    labelme.source.write_text(json.dumps(labelme.content))
    frames, table = convert(labelme.source.parent, labelme.out, images=labelme.root / "frames")
    assert (frames, table.classes) == (2, ("background", "car", "road", "sun", "tree"))
    assert labelme.read()[1][1][0, 8] == 4


def test_background_and_labels_that_are_void(coco, caplog):
    coco.content["categories"].append({"id": 50, "name": "sky"})
    with caplog.at_level(logging.WARNING, "bcmfnet.data"):
        _, table = coco.convert(background="void", void=("car", "cat"))
    assert caplog.messages == [f"{coco.source}: no label 'cat', which void names"]
    _, (a, b) = coco.read()
    assert table.classes == ("road", "sky") and (b == 255).all()
    assert np.array_equal(a == 0, expected_mask((1, 0, 30, 96, 64), (0, 10, 20, 30, 40))) and set(a.flat) == {0, 255}


def test_later_splits_have_the_classes_of_the_first(coco):
    coco.convert()
    before = (coco.out / "colors.json").read_bytes()
    coco.content["categories"] = [{"id": 2, "name": "road"}, {"id": 30, "name": "car"}, {"id": 40, "name": "bus"}]
    coco.content["annotations"][2]["category_id"] = 30
    for image in coco.content["images"]:
        image["file_name"] = image["file_name"].replace("sub", "val")
    shutil.copytree(coco.root / "sub", coco.root / "val")
    coco.convert("val")
    assert (coco.out / "colors.json").read_bytes() == before
    assert coco.read("val")[1][1].max() == 2
    coco.content["annotations"][2]["category_id"] = 40
    with pytest.raises(DataError) as caught:
        coco.convert("test")
    line = f"{coco.source}: val\\b.png: label: expected one of background, road, car, got 'bus'"
    assert str(caught.value) == line and not (coco.out / "images/test").exists()
    coco.convert("test", void=("bus",))
    assert set(coco.read("test")[1][1].flat) == {0, 255}


def test_classes_of_a_colour_file(coco):
    colors = coco.root / "mine.csv"
    colors.write_text("car,1,2,3\nsky,0,0,9\nroad,4,5,6\n")
    line = coco.refusal(ConfigError, colors=colors)
    assert line == "background: expected one of car, sky, road, void, got 'background'"
    _, table = coco.convert(colors=colors, background="sky")
    assert table == read_colors(colors)[0] == read_colors(coco.out / "colors.json")[0]
    assert np.array_equal(coco.read()[1][0], expected_mask((1, 0, 0, 96, 64), (2, 0, 30, 96, 64), (0, 10, 20, 30, 40)))
    colors.write_text("car,1,2,3\nroad,4,5,6\n")
    with pytest.raises(ConfigError) as caught:
        coco.convert("val", colors=colors)
    assert str(caught.value) == f"colors: expected the classes of {coco.out / 'colors.json'}, got those of {colors}"


def changed(content, *keys, value):
    *path, last = keys
    for key in path:
        content = content[key]
    if value is KeyError:
        del content[last]
    else:
        content[last] = value


POLYGON = ("annotations", 0, "segmentation")
RUNS = ("annotations", 2, "segmentation", "counts")
TRIANGLE = "annotation 1: segmentation: expected 3 points or more, each of two numbers, got "
COCO_FAULTS = [
    (("images",), 3, "{s}: images: expected a list, got 3"),
    (("images", 1), 3, "{s}: image 1: expected an object, got 3"),
    (("images", 1, "file_name"), KeyError, "{s}: image 1: file_name: expected the name of a file, got nothing"),
    (("images", 1, "width"), "96", "{s}: image 1: width: expected a number of pixels, got '96'"),
    (("images", 1, "id"), 5, "{s}: image 1: id: expected an id of its own, got 5"),
    (("images", 1, "id"), [], "{s}: image 1: id: expected an id of its own, got []"),
    (("categories",), KeyError, "{s}: categories: expected a list, got nothing"),
    (("categories", 1, "id"), 30, "{s}: category 1: id: expected an id of its own, got 30"),
    (("categories", 1, "name"), "", "{s}: category 1: name: expected text, got ''"),
    (("annotations",), {}, "{s}: annotations: expected a list, got {{}}"),
    (("annotations", 1), [], "{s}: annotation 1: expected an object, got []"),
    (("annotations", 0, "image_id"), 6, "{s}: annotation 1: image_id: expected the id of an image, got 6"),
    (("annotations", 0, "category_id"), 1, "{s}: annotation 1: category_id: expected the id of a category, got 1"),
    (POLYGON, KeyError, "{s}: annotation 1: segmentation: expected polygons or an RLE, got nothing"),
    (POLYGON, [], "{s}: annotation 1: segmentation: expected polygons or an RLE, got []"),
    (POLYGON, "x", "{s}: annotation 1: segmentation: expected polygons or an RLE, got 'x'"),
    (POLYGON, [[1, 2, 3, 4]], "{s}: " + TRIANGLE + "[[1, 2], [3, 4]]"),
    (POLYGON, [[1, 2, 3, 4, 5]], "{s}: " + TRIANGLE + "[[1, 2], [3, 4], [5]]"),
    (POLYGON, [[1, 2, 3, 4, 5, "6"]], "{s}: " + TRIANGLE + "[[1, 2], [3, 4], [5, '6']]"),
    (POLYGON, [[1, 2, 3, 4, 5, float("nan")]], "{s}: " + TRIANGLE + "[[1, 2], [3, 4], [5, nan]]"),
    (POLYGON, [[1, 2, 3, 4, 5, 1e300]], "{s}: " + TRIANGLE + "[[1, 2], [3, 4], [5, 1e+300]]"),
    (POLYGON, [7], "{s}: " + TRIANGLE + "7"),
    (RUNS, "PP1", "{s}: annotation 3: segmentation: expected polygons or an uncompressed RLE, got a compressed one"),
    (RUNS, [6143], "{s}: annotation 3: segmentation: counts: expected lengths of runs, 6144 in all, got [6143]"),
    (RUNS, [-1, 6145],
     "{s}: annotation 3: segmentation: counts: expected lengths of runs, 6144 in all, got [-1, 6145]"),
    (("annotations", 2, "segmentation", "size"), [96, 64],
     "{s}: annotation 3: segmentation: size: expected [64, 96], of its image, got [96, 64]"),
    (("images", 0, "height"), 65, "{d}/sub/a.png: expected 96x65 pixels, as {s}: sub/a.png has it, got 96x64"),
    (("images", 0, "file_name"), "c.png", "{s}: c.png: expected its image at {d}/c.png, found no file"),
    (("images", 1, "file_name"), "sub/../sub/a.png",
     "{s}: sub/../sub/a.png: expected images of different names, got {d}/sub/a.png and {d}/sub/../sub/a.png"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "value", "line"), COCO_FAULTS)
def test_faults_of_coco_are_one_line(coco, keys, value, line):
    changed(coco.content, *keys, value=value)
    assert coco.refusal() == line.format(s=coco.source, d=coco.root)


SHAPE = ("shapes", 1)
LABELME_FAULTS = [
    (("shapes",), None, "{s}: shapes: expected a list, got None"),
    (SHAPE, 1, "{s}: shape 1: expected an object, got 1"),
    ((*SHAPE, "label"), None, "{s}: shape 1: label: expected text, got None"),
    ((*SHAPE, "shape_type"), "linestrip",
     "{s}: shape 1 (car): expected a polygon, a rectangle or a circle, got 'linestrip'"),
    ((*SHAPE, "points"), [[1, 2]], "{s}: shape 1 (car): expected 2 points or more, each of two numbers, got [[1, 2]]"),
    ((*SHAPE, "points"), KeyError, "{s}: shape 1 (car): expected 2 points or more, each of two numbers, got None"),
    (("imagePath",), "", "{s}: imagePath: expected the name of a file, got ''"),
    (("imagePath",), "x.png", "{s}: expected its image at {d}/labels/x.png, found no file"),
    (("imagePath",), "../labels/a.json",
     "{d}/labels/../labels/a.json: expected a name that ends in .png, .jpg, .jpeg, .bmp, .tif, .tiff, .webp"),
    (("imageWidth",), 97, "{d}/labels/../frames/a.png: expected 97x64 pixels, as {s} has it, got 96x64"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "value", "line"), LABELME_FAULTS)
def test_faults_of_labelme_are_one_line(labelme, keys, value, line):
    changed(labelme.content, *keys, value=value)
    assert labelme.refusal() == line.format(s=labelme.source, d=labelme.root)


def test_labelme_without_a_size_and_an_image_that_is_turned(labelme):
    del labelme.content["imageHeight"]
    path = labelme.root / "frames/a.png"
    whole = path.read_bytes()
    path.write_bytes(with_exif(whole, 6))
    assert "EXIF orientation 6 turns the image and not its label" in labelme.refusal()
    path.write_bytes(whole)
    labelme.convert()


def test_what_is_no_annotation_file(tmp_path):
    path, out = tmp_path / "a.json", tmp_path / "out"
    expected = f"{path}: expected the annotations of COCO or of labelme, a JSON object"
    for text, got in (("[1]", ", got [1]"), ("{", ": Expecting"), ("[" * 10**5, ": maximum recursion depth")):
        path.write_text(text)
        with pytest.raises(DataError) as caught:
            convert(path, out)
        assert str(caught.value).startswith(expected + got)
    path.unlink()
    with pytest.raises(MissingDataError, match="found no file$"):
        convert(path, out)
    with pytest.raises(DataError, match=r"no file that ends in \.json$"):
        convert(tmp_path, out)


def test_too_few_classes_and_a_split_that_is_there(coco):
    assert coco.refusal(void=("road", "car")) == f"{coco.source}: expected 2 to 254 classes, got 1: background"
    assert coco.refusal(ConfigError, split="a/b") == "split: expected the name of a folder, got 'a/b'"
    coco.convert()
    with pytest.raises(ConfigError) as caught:
        coco.convert()
    assert str(caught.value) == f"split: expected one that is not in {coco.out} yet, got 'train'"


def test_a_disk_that_fills_up_leaves_no_half_a_split(coco, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bcmfnet.data.conversion.shutil.copyfile", full)
    assert coco.refusal() == f"{coco.out}: cannot be written: No space left on device"
    assert not (coco.out / "colors.json").exists()
