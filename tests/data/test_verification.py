import json
import shutil

import numpy as np
import pytest
from frames import write_frame

from bcmfnet.data import build_dataset, verify, verify_datasets, write_png
from bcmfnet.errors import ConfigError


def test_whole_set(segnet_root):
    report = verify("camvid11-segnet", segnet_root, ("train", "val"))
    assert report.ok and report.problems == []
    assert report.frames == {"train": 3, "val": 2}
    assert report.rows[:3] == [("class", "train", "val"), ("frames", "3", "2"), ("sky", "8.33 %", "8.33 %")]
    assert report.rows[-1] == ("void", "8.33 %", "8.33 %")
    assert len(report.rows) == 2 + 11 + 1


def test_shares_are_pooled_pixels(tmp_path):
    quarter, none = np.zeros((2, 4, 4), np.uint8)
    quarter[:2, :2] = 1
    none[3, 3] = 255
    for name, ids in (("a", quarter), ("b", none)):
        write_frame(tmp_path / "train" / "images" / f"{name}.png", tmp_path / "train" / "masks" / f"{name}.png", ids)
    shares = verify("folder", tmp_path, ["train"], num_classes=3).to_dict()["splits"]["train"]["class_shares"]
    assert shares == {"class0": 27 / 32, "class1": 4 / 32, "class2": 0.0, "void": 1 / 32}


def test_every_problem_of_a_broken_set(segnet_root):
    train, annot = segnet_root / "train", segnet_root / "trainannot"
    ids = np.zeros((12, 16), np.uint8)
    ids[5, 5] = 99
    write_png(annot / "a.png", ids)
    write_png(annot / "b.png", np.zeros((6, 16), np.uint8))
    (train / "c.png").write_bytes((train / "c.png").read_bytes()[:100])
    write_frame(train / "bare.png", annot / "lone.png", ids)
    for folder in ("", "annot"):
        shutil.copy(segnet_root / f"val{folder}" / "d.png", segnet_root / f"train{folder}" / "d.png")
    report = verify("camvid11-segnet", segnet_root, ("train", "val", "test"))
    assert report.problems == [
        f"{segnet_root / 'test'}: no such folder",
        f"{train / 'bare.png'}: image without mask",
        f"{annot / 'lone.png'}: mask without image",
        f"{annot / 'a.png'}: label value 99 is outside the table: expected 0..10 or 11 (void), 255 (void)",
        f"{annot / 'b.png'}: mask of 16x6 pixels, but its image {train / 'b.png'} has 16x12 (width x height)",
        f"{train / 'c.png'}: truncated PNG",
        "d: in train and in val",
    ]
    assert not report.ok
    assert report.frames == {"train": 4, "val": 2}
    assert report.pixels["train"].sum() == 12 * 16, "frame d alone is sound"


def test_report_is_plain(segnet_root):
    shutil.rmtree(segnet_root / "val")
    report = verify("camvid11-segnet", segnet_root, ("train", "val"))
    again = json.loads(json.dumps(report.to_dict()))
    assert again["ok"] is False and len(again["problems"]) == 1
    assert again["splits"]["train"]["frames"] == 3


def test_nothing_at_all(tmp_path):
    report = verify("camvid11-segnet", tmp_path, ("train",))
    assert not report.ok and report.rows == [("class",), ("frames",)]


def test_arguments_that_cannot_be_used_are_raised(tmp_path):
    with pytest.raises(ConfigError):
        verify("camvid11-segnet", tmp_path / "none", ("train",))


def test_open_datasets():
    report = verify_datasets({"train": build_dataset("synthetic", length=4, size=(64, 64))})
    assert report.ok and report.pixels["train"].sum() == 4 * 64 * 64
