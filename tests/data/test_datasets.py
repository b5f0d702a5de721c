import logging
import os
import re
import shutil

import cv2
import numpy as np
import pytest
from frames import with_exif, write_frame

from bcmfnet.data import build_dataset, check_split_leak, get_label_table, list_datasets, write_png
from bcmfnet.data.labels import CAMVID_VOID_COLORS
from bcmfnet.errors import ConfigError, DataError

IDS = (np.arange(12 * 16) % 11).astype(np.uint8).reshape(12, 16)


def refusal(name, root, split="train", error=DataError, **options) -> str:
    """The one line with which a dataset is refused, on opening or on reading its frames."""
    with pytest.raises(error) as caught:
        dataset = build_dataset(name, root, split, **options)
        for i in range(len(dataset)):
            dataset.read(i)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_names():
    assert list_datasets() == ["camvid11-ignore", "camvid11-segnet", "cityscapes", "folder", "prepared", "synthetic"]


@pytest.mark.parametrize("ending", [".png", ".jpg", ".JPG"])
def test_segnet_layout(tmp_path, ending):
    ids = np.where(IDS == 3, 11, IDS)
    pixels = write_frame(tmp_path / "train" / f"a{ending}", tmp_path / "trainannot" / "a.png", ids)
    dataset = build_dataset("camvid11-segnet", tmp_path, "train")
    image, label = dataset.read(0)
    assert len(dataset) == 1 and dataset.name(0) == "a" and dataset.table is get_label_table("camvid11")
    assert dataset.files(0) == (str(tmp_path / "train" / f"a{ending}"), str(tmp_path / "trainannot" / "a.png"))
    assert np.array_equal(label, np.where(IDS == 3, 255, IDS))
    assert image.shape == (12, 16, 3) and (ending != ".png" or np.array_equal(image, pixels))


def camvid_colors(void=(0, 128, 64)):
    """Rows of each class in its colour, and a last row in a colour that is none of the eleven."""
    table = get_label_table("camvid11")
    ids = np.repeat(np.arange(12, dtype=np.uint8)[:, None], 16, 1)
    return np.array([*table.colors, void], np.uint8)[ids], np.where(ids == 11, 255, ids)


def test_ignore_layout_of_the_copies_that_come_split(tmp_path):
    colors, ids = camvid_colors()
    write_frame(tmp_path / "val" / "a.png", tmp_path / "val_labels" / "a_L.png", colors)
    dataset = build_dataset("camvid11-ignore", tmp_path, "val")
    assert dataset.name(0) == "a"
    assert np.array_equal(dataset.read(0)[1], ids)


def test_ignore_layout_as_released(tmp_path):
    colors, ids = camvid_colors(void=(0, 0, 0))
    colors[0, 0] = 129, 128, 128  # one step off sky is not sky; a stray pixel is void
    ids[0, 0] = 255
    images, labels = tmp_path / "701_StillsRaw_full", tmp_path / "LabeledApproved_full"
    for name in ("a", "b", "c"):
        write_frame(images / f"{name}.png", labels / f"{name}_L.png", colors)
    (tmp_path / "train.txt").write_text("a\nimages/c.png labels/c_L.png\n\n")
    (tmp_path / "val.txt").write_text("b.png")
    train, val = (build_dataset("camvid11-ignore", tmp_path, split) for split in ("train", "val"))
    assert [train.name(i) for i in range(len(train))] == ["a", "c"] and val.name(0) == "b"
    assert np.array_equal(train.read(1)[1], ids)
    assert "test.txt: expected a list" in refusal("camvid11-ignore", tmp_path, "test")
    (tmp_path / "test.txt").write_bytes(b"a\n\xff\xfe")
    assert "test.txt: expected a list" in refusal("camvid11-ignore", tmp_path, "test")
    (tmp_path / "test.txt").write_text("z")
    assert "no image of the listed frame z" in refusal("camvid11-ignore", tmp_path, "test")


def swapped(colors, ids):
    return colors[..., ::-1]


def interpolated(colors, ids):
    return cv2.resize(cv2.resize(colors, (40, 30), interpolation=cv2.INTER_LINEAR), (96, 72))


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (swapped, r": 50 % of the pixels have colours outside the table camvid11, most of them \(0, 0, 128\) "),
        (interpolated, r"[\d.]+ % of the pixels have colours outside the table camvid11, most of them \("),
        (lambda colors, ids: np.repeat(ids[..., None], 3, 2), r"91\.7 % of the pixels have .* of them \(1, 1, 1\) "),
        (lambda colors, ids: ids, r"expected a label of colours, got one channel \(class ids\?\)$"),
    ],
    ids=["swapped", "interpolated", "ids as grey", "ids"],
)
def test_colors_outside_the_table(tmp_path, fault, line):
    """They would all be void, in silence: channels swapped, labels resized as images are, ids for colours."""
    ids = np.arange(12, dtype=np.uint8).repeat(6)[:, None].repeat(96, 1)
    colors = np.array([*get_label_table("camvid11").colors, (0, 0, 0)], np.uint8)[ids]
    path = tmp_path / "val_labels" / "a_L.png"
    write_frame(tmp_path / "val" / "a.png", path, np.ascontiguousarray(fault(colors, ids)))
    found = refusal("camvid11-ignore", tmp_path, "val")
    assert found.startswith(f"{path}: ") and re.search(line, found), found


def test_every_released_colour_of_camvid_is_known(tmp_path):
    """The release has 32: the eleven classes, and 21 that are void here."""
    table = get_label_table("camvid11")
    colors = np.array([*table.colors, *CAMVID_VOID_COLORS], np.uint8)
    assert len({*map(tuple, colors)}) == 32
    write_frame(tmp_path / "val" / "a.png", tmp_path / "val_labels" / "a_L.png", colors[None].repeat(3, 0))
    label = build_dataset("camvid11-ignore", tmp_path, "val").read(0)[1]
    assert np.array_equal(label, np.array([[*range(11), *[255] * 21]] * 3))


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbfa\nb.1\n",  # a byte-order mark
        b"a\r\nb.1\r\n",
        b"# a comment\na  # another\n\n   # and one\nb.1",
        b"701_StillsRaw_full\\a.png\nC:\\data\\b.1.PNG\n",
        b"/data/a.png /data/a_L.png\n./b.1.png ./b.1_L.png\n",
    ],
)
def test_lists_of_other_systems(tmp_path, text):
    colors, _ = camvid_colors()
    for name in ("a", "b.1", "c"):
        write_frame(
            tmp_path / "701_StillsRaw_full" / f"{name}.png", tmp_path / "LabeledApproved_full" / f"{name}_L.png", colors
        )
    (tmp_path / "train.txt").write_bytes(text)
    dataset = build_dataset("camvid11-ignore", tmp_path, "train")
    assert [dataset.name(i) for i in range(len(dataset))] == ["a", "b.1"]


def test_cityscapes_layout(tmp_path, monkeypatch):
    label_ids = np.array([[7, 8, 11, 33], [0, 1, 6, 255], [29, 30, 9, 18]], np.uint8)
    image = tmp_path / "leftImg8bit" / "val" / "ulm" / "ulm_000000_000019_leftImg8bit.png"
    label = tmp_path / "gtFine" / "val" / "ulm" / "ulm_000000_000019_gtFine_labelIds.png"
    write_frame(image, label, label_ids)
    write_png(label.with_name("ulm_000000_000019_gtFine_color.png"), label_ids)
    monkeypatch.setenv("CITYSCAPES_DATASET", str(tmp_path))
    for root in (tmp_path, None, ""):
        dataset = build_dataset("cityscapes", root, "val")
        assert len(dataset) == 1 and dataset.name(0) == "ulm_000000_000019" and dataset.table.num_classes == 19
        assert dataset.read(0)[1].tolist() == [[0, 1, 2, 18], [255] * 4, [255] * 4]
    write_png(label, np.full_like(label_ids, 34))
    assert "label value 34 is outside the table: expected a labelId 0..33" in refusal("cityscapes", tmp_path, "val")


FOLDER_LAYOUTS = [
    ("images/train", "masks/train"),
    ("train/images", "train/masks"),
    ("images/train", "labels/train"),
    ("img_dir/train", "ann_dir/train"),
]


@pytest.mark.parametrize(("images", "masks"), FOLDER_LAYOUTS)
def test_folder_layouts(tmp_path, images, masks):
    ids = np.where(IDS == 5, 255, IDS)
    write_frame(tmp_path / images / "a.jpeg", tmp_path / masks / "a.png", ids)
    dataset = build_dataset("folder", tmp_path, "train", num_classes=11)
    assert np.array_equal(dataset.read(0)[1], ids)
    named = build_dataset("folder", tmp_path, "train", classes=tuple("abcdefghijk"))
    assert named.table.classes[10] == "k"
    line = refusal("folder", tmp_path, num_classes=10)
    assert line == f"{tmp_path / masks / 'a.png'}: label value 10 is outside the table: expected 0..9 or 255 (void)"


@pytest.mark.parametrize("first", FOLDER_LAYOUTS)
@pytest.mark.parametrize("second", FOLDER_LAYOUTS)
def test_masks_in_two_layouts_are_refused_and_empty_folders_are_none(tmp_path, first, second):
    """Polygons of ultralytics, text files in labels/, may lie beside the masks."""
    if first == second:
        return
    write_frame(tmp_path / first[0] / "a.png", tmp_path / first[1] / "a.png", IDS)
    for folder in second:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / second[1] / "a.txt").write_text("0 0.1 0.1 0.9 0.1 0.5 0.9\n")
    assert build_dataset("folder", tmp_path, num_classes=11).files(0)[1] == str(tmp_path / first[1] / "a.png")
    write_frame(tmp_path / second[0] / "a.png", tmp_path / second[1] / "a.png", IDS)
    in_order = sorted((first, second), key=FOLDER_LAYOUTS.index)
    found = " and ".join(f"{images} with {masks}" for images, masks in in_order)
    line = refusal("folder", tmp_path, num_classes=11)
    assert line == f"{tmp_path}: expected one layout of train, found {found}"


@pytest.mark.parametrize(("images", "masks"), FOLDER_LAYOUTS)
def test_images_without_a_folder_of_masks(tmp_path, images, masks):
    (tmp_path / images).mkdir(parents=True)
    write_png(tmp_path / images / "a.png", IDS)
    first = next(layout for layout in FOLDER_LAYOUTS if layout[0] == images)[1]
    assert refusal("folder", tmp_path, num_classes=11) == f"{tmp_path / first}: no such folder"


def test_folder_needs_classes_and_a_layout(tmp_path):
    assert "number of classes" in refusal("folder", tmp_path, error=ConfigError)
    assert "expected 2..254, got 0" in refusal("folder", tmp_path, error=ConfigError, num_classes=0)
    known = ", or ".join(f"{images} and {masks}" for images, masks in FOLDER_LAYOUTS)
    assert refusal("folder", tmp_path, num_classes=3) == f"{tmp_path}: expected {known}"


def test_unknown_name_and_option(tmp_path):
    line = refusal("camvid11-segne", tmp_path, error=ConfigError)
    assert line == (
        "dataset: expected one of camvid11-ignore, camvid11-segnet, cityscapes, folder, prepared, synthetic, "
        "got 'camvid11-segne'; did you mean 'camvid11-segnet'?"
    )
    line = refusal("synthetic", None, error=ConfigError, lenght=3)
    assert line == "lenght: dataset synthetic has no such option; its options: length, size, seed"
    line = refusal("camvid11-segnet", tmp_path, error=ConfigError, num_classes=3)
    assert line == "num_classes: dataset camvid11-segnet has no such option; its options: none"


def test_root_missing(tmp_path, monkeypatch):
    monkeypatch.delenv("CITYSCAPES_DATASET", raising=False)
    absent = tmp_path / "none"
    assert f"root: expected a folder, found none at {absent}" == refusal(
        "folder", absent, error=ConfigError, num_classes=2
    )
    assert "CITYSCAPES_DATASET" in refusal("cityscapes", None, error=ConfigError)
    assert "root: expected the folder of dataset camvid11-segnet, got none" == refusal(
        "camvid11-segnet", "", error=ConfigError
    )


def test_split_missing_and_empty(segnet_root):
    assert f"{segnet_root / 'test'}: no such folder" in refusal("camvid11-segnet", segnet_root, "test")
    (segnet_root / "test").mkdir()
    assert "no file that ends in .png, .jpg" in refusal("camvid11-segnet", segnet_root, "test")


def test_image_without_mask(segnet_root):
    (segnet_root / "trainannot" / "b.png").unlink()
    (segnet_root / "trainannot" / "c.png").unlink()
    line = refusal("camvid11-segnet", segnet_root)
    assert line == f"{segnet_root / 'train' / 'b.png'}: image without mask (and 1 more)"
    loose = build_dataset("camvid11-segnet", segnet_root, "train", strict=False)
    assert len(loose) == 1 and len(loose.unpaired) == 2


def test_mask_without_image_is_left_out(segnet_root):
    (segnet_root / "train" / "b.png").unlink()
    dataset = build_dataset("camvid11-segnet", segnet_root, "train")
    assert [dataset.name(i) for i in range(len(dataset))] == ["a", "c"]
    assert dataset.unpaired == (f"{segnet_root / 'trainannot' / 'b.png'}: mask without image",)


def test_two_images_for_one_frame(segnet_root):
    shutil.copy(segnet_root / "train" / "a.png", segnet_root / "train" / "a.jpg")
    assert "a second file for the frame of" in refusal("camvid11-segnet", segnet_root)


def test_hidden_and_other_files_are_passed_over(segnet_root):
    for name in ("._a.png", "notes.txt", "Thumbs.db"):
        (segnet_root / "train" / name).write_bytes(b"x")
    (segnet_root / "train" / "dir.png").mkdir()
    assert len(build_dataset("camvid11-segnet", segnet_root, "train")) == 3


def test_a_link_to_nowhere_is_a_frame_that_cannot_be_read(segnet_root):
    for folder in ("train", "trainannot"):
        os.replace(segnet_root / folder / "b.png", segnet_root / f"{folder}.moved")
        (segnet_root / folder / "b.png").symlink_to("gone.png")
    line = refusal("camvid11-segnet", segnet_root)
    assert line == f"{segnet_root / 'train' / 'b.png'}: cannot be read: No such file or directory"


def test_mask_of_another_size(segnet_root):
    write_png(segnet_root / "trainannot" / "a.png", IDS)
    line = refusal("camvid11-segnet", segnet_root)
    assert str(segnet_root / "trainannot" / "a.png") in line and "16x12" in line
    assert str(segnet_root / "train" / "a.png") in line and "96x72" in line


def test_image_that_its_orientation_turns(segnet_root):
    """A turn by 180 degrees keeps the size, so that nothing else would tell that the label is not turned."""
    path = segnet_root / "train" / "b.png"
    path.write_bytes(with_exif(path.read_bytes(), 3))
    dataset = build_dataset("camvid11-segnet", segnet_root, "train")
    line = f"{path}: EXIF orientation 3 turns the image and not its label; save it upright, without the tag"
    for look in (dataset.read, dataset.label, dataset.frame_size):
        look(0)
        with pytest.raises(DataError, match=f"^{re.escape(line)}$"):
            look(1)


def test_label_and_size_without_decoding_the_image(segnet_root, monkeypatch):
    dataset = build_dataset("camvid11-segnet", segnet_root, "train")
    expected = dataset.read(0)[1]
    monkeypatch.setattr("bcmfnet.data.pairs.read_image", None)
    assert dataset.frame_size(0) == (72, 96) and np.array_equal(dataset.label(0), expected)


def test_values_outside_the_table(segnet_root):
    ids = np.zeros((72, 96), np.uint8)
    ids[0, :3] = 12, 200, 254
    path = segnet_root / "trainannot" / "a.png"
    write_png(path, ids)
    line = refusal("camvid11-segnet", segnet_root)
    assert line == (f"{path}: label value 12, 200, 254 is outside the table: expected 0..10 or 11 (void), 255 (void)")


def test_counts_of_camvid_are_told_once(segnet_root, caplog):
    with caplog.at_level(logging.WARNING, "bcmfnet.data"):
        build_dataset("camvid11-segnet", segnet_root, "train")
    assert [r.getMessage() for r in caplog.records] == ["CamVid train: 3 frames, but the published split has 367"]


def test_split_leak(segnet_root):
    train, val = (build_dataset("camvid11-segnet", segnet_root, split) for split in ("train", "val"))
    check_split_leak(train, val)
    for folder in ("", "annot"):
        shutil.copy(segnet_root / f"train{folder}" / "b.png", segnet_root / f"val{folder}" / "b.png")
    with pytest.raises(DataError, match="train and val share 1 frames, the first is b"):
        check_split_leak(train, build_dataset("camvid11-segnet", segnet_root, "val"))


def test_synthetic_splits_share_nothing():
    train, val = (build_dataset("synthetic", None, split, length=50) for split in ("train", "val"))
    check_split_leak(train, val)
    assert not np.array_equal(train.read(0)[1], val.read(0)[1])


def test_real_camvid(camvid, caplog):
    with caplog.at_level(logging.WARNING, "bcmfnet.data"):
        train, val = (build_dataset("camvid11-segnet", camvid, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (367, 101) and not caplog.records
    check_split_leak(train, val)
    image, label = train.read(0)
    assert image.shape == (360, 480, 3) and label.shape == (360, 480)
    assert image[label == 0].mean() > image[label == 3].mean(), "the sky is brighter than the road"
