import json
import os
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
from frames import with_exif, write_frame

from bcmfnet.data import build_dataset, pairs, verification, verify, verify_datasets, write_png
from bcmfnet.data.verification import check_before_training
from bcmfnet.errors import ConfigError, DataError


def test_whole_set(segnet_root):
    report = verify("camvid11-segnet", segnet_root, ("train", "val"))
    assert report.ok and report.problems == []
    assert report.frames == {"train": 3, "val": 2}
    assert report.rows[:3] == [("class", "train", "val"), ("frames", "3", "2"), ("sky", "8.33 %", "8.33 %")]
    assert report.rows[-1] == ("void", "8.33 %", "8.33 %")
    assert len(report.rows) == 2 + 11 + 1


def test_shares_are_pooled_pixels(tmp_path):
    quarter, none = np.zeros((2, 64, 64), np.uint8)
    quarter[:32, :32] = 1
    none[48:, 48:] = 255
    for name, ids in (("a", quarter), ("b", none)):
        write_frame(tmp_path / "train" / "images" / f"{name}.png", tmp_path / "train" / "masks" / f"{name}.png", ids)
    shares = verify("folder", tmp_path, ["train"], num_classes=3).to_dict()["splits"]["train"]["class_shares"]
    assert shares == {"class0": 27 / 32, "class1": 4 / 32, "class2": 0.0, "void": 1 / 32}


def test_every_problem_of_a_broken_set(segnet_root):
    train, annot = segnet_root / "train", segnet_root / "trainannot"
    ids = np.zeros((72, 96), np.uint8)
    ids[5, 5] = 99
    write_png(annot / "a.png", ids)
    write_png(annot / "b.png", np.zeros((36, 96), np.uint8))
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
        f"{annot / 'b.png'}: mask of 96x36 pixels, but its image {train / 'b.png'} has 96x72 (width x height)",
        f"{train / 'c.png'}: truncated PNG",
        "d: in train and in val",
    ]
    assert not report.ok
    assert report.frames == {"train": 4, "val": 2}
    assert report.pixels["train"].sum() == 72 * 96, "frame d alone is sound"


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


FAULTS = {
    "masks of 0 and 255": (
        lambda image, mask, ids: write_png(mask, 255 * (ids > 5).astype(np.uint8)),
        "{mask} and all other labels of train: expected pixels of two classes, got class0 and 50 % void (255); "
        "masks of 0 and 255 need a 1 for the foreground",
    ),
    "one class and void": (
        lambda image, mask, ids: write_png(mask, np.where(ids > 2, 3, 255).astype(np.uint8)),
        "{mask} and all other labels of train: expected pixels of two classes, got class3 and 25 % void (255)",
    ),
    "void alone": (
        lambda image, mask, ids: write_png(mask, np.full_like(ids, 255)),
        "{mask} and all other labels of train: expected a pixel of a class, got void (255) alone",
    ),
    "small": (
        lambda image, mask, ids: write_frame(image, mask, ids[:63]),
        "{image}: expected an image of at least 64x64 pixels, got 96x63",
    ),
    "16 bits": (
        lambda image, mask, ids: cv2.imwrite(str(image), ids.astype(np.uint16)),
        "{image}: expected an image of 8 bits a sample, got 16",
    ),
    "turned": (
        lambda image, mask, ids: image.write_bytes(with_exif(image.read_bytes(), 3)),
        "{image}: EXIF orientation 3 turns the image and not its label; save it upright, without the tag",
    ),
    "value": (
        lambda image, mask, ids: write_png(mask, ids + 1),
        "{mask}: label value 12 is outside the table: expected 0..11 or 255 (void)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_no_training_can_use_is_a_problem_and_refused_before_training(tmp_path, fault):
    """One line with file and value, the same from a look at every frame and from the quick look at the start."""
    ids = np.arange(12, dtype=np.uint8).repeat(6)[:, None].repeat(96, 1)
    image, mask = (tmp_path / "train" / folder / "a.png" for folder in ("images", "masks"))
    write_frame(image, mask, ids)
    spoil, line = FAULTS[fault]
    spoil(image, mask, ids)
    line = line.format(image=image, mask=mask)
    assert verify("folder", tmp_path, ["train"], num_classes=12).problems == [line]
    with pytest.raises(DataError) as caught:
        check_before_training([build_dataset("folder", tmp_path, "train", num_classes=12)])
    assert str(caught.value) == line


def test_absent_classes_are_a_warning(segnet_root, caplog):
    write_png(segnet_root / "valannot" / "d.png", np.full((72, 96), 3, np.uint8))
    write_png(segnet_root / "valannot" / "e.png", np.full((72, 96), 5, np.uint8))
    report = verify("camvid11-segnet", segnet_root, ("train", "val"))
    line = "val: no pixel of sky, building, pole, pavement, sign, fence, car, pedestrian, bicyclist"
    assert report.ok and report.warnings == [line] == report.to_dict()["warnings"]
    check_before_training([build_dataset("camvid11-segnet", segnet_root, "val")])
    assert caplog.messages[-1] == line


def test_the_quick_look_reads_a_part_of_the_labels_and_every_header(segnet_root, monkeypatch):
    """Of five frames and two labels at most, those of the first and the fourth."""
    for name in ("d", "e"):
        for folder in ("", "annot"):
            shutil.move(segnet_root / f"val{folder}" / f"{name}.png", segnet_root / f"train{folder}" / f"{name}.png")
    monkeypatch.setattr(verification, "QUICK_LABELS", 2)
    monkeypatch.setattr("bcmfnet.data.pairs.read_image", None)
    dataset = build_dataset("camvid11-segnet", segnet_root, "train")
    read = []
    decode = dataset.decode
    monkeypatch.setattr(dataset, "decode", lambda path: read.append(path.name) or decode(path))
    check_before_training([dataset])
    assert sorted(read) == ["a.png", "d.png"]
    for name in ("b", "c"):
        (segnet_root / "train" / f"{name}.png").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        check_before_training([dataset])
    path = segnet_root / "train" / "b.png"
    assert str(caught.value) == f"{path}: the file is empty (and 1 more, which `bcmfnet data verify` lists)"


@pytest.mark.parametrize("everywhere", [True, False])
def test_where_the_quick_look_sees_one_class_all_labels_are_read(segnet_root, monkeypatch, everywhere):
    """A rare foreground may be in the labels between: here in b, where a and c have one class and void."""
    monkeypatch.setattr(verification, "QUICK_LABELS", 2)
    one = np.full((72, 96), 255, np.uint8)
    one[:18] = 0
    for name in "abc" if everywhere else "ac":
        write_png(segnet_root / "trainannot" / f"{name}.png", one)
    dataset = build_dataset("camvid11-segnet", segnet_root, "train")
    if not everywhere:
        return check_before_training([dataset])
    with pytest.raises(DataError, match="expected pixels of two classes, got sky and 75 % void"):
        check_before_training([dataset])


def test_drawn_frames_are_not_looked_at(monkeypatch):
    monkeypatch.setattr("bcmfnet.data.SyntheticStreets.read", None)
    check_before_training([build_dataset("synthetic", length=4)])


def test_an_error_of_one_frame_is_that_frames(segnet_root, monkeypatch):
    def read_image(path, **options):
        if path.name == "b.png":
            raise MemoryError("a lot")
        return original(path, **options)

    original = pairs.read_image
    monkeypatch.setattr(pairs, "read_image", read_image)
    report = verify("camvid11-segnet", segnet_root, ["train"])
    assert report.problems == [f"{segnet_root / 'train' / 'b.png'}: MemoryError: a lot"]
    assert report.pixels["train"].sum() == 2 * 72 * 96


def test_messages_of_decoders_name_their_file(segnet_root, capfd):
    """libjpeg prints what it fills with grey, and the name of no file."""
    whole = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 256, (72, 96, 3), np.uint8))[1].tobytes()
    for name in "abc":
        (segnet_root / "train" / f"{name}.png").unlink()
        (segnet_root / "train" / f"{name}.jpg").write_bytes(whole)
    path = segnet_root / "train" / "b.jpg"
    path.write_bytes(whole[: len(whole) // 2] + b"\xff\xd9")
    report = verify("camvid11-segnet", segnet_root, ["train"])
    assert report.warnings == [f"{path}: Corrupt JPEG data: premature end of data segment"]
    assert report.ok and capfd.readouterr().err == ""


def test_names_are_shown_printable(segnet_root):
    os.rename(segnet_root / "train" / "b.png", segnet_root / "train" / "b\x1b[31m\n.png")
    problems = verify("camvid11-segnet", segnet_root, ["train"]).problems
    assert problems[0] == f"{segnet_root}/train/b\\x1b[31m\\n.png: image without mask"


def test_kept_messages_and_pythons_own():
    """In a process of its own, whose sys.stderr writes to descriptor 2, as decoders do."""
    program = """
import os, sys
from bcmfnet.data.messages import DecoderMessages
with DecoderMessages() as messages:
    os.write(2, b"before\\n")
    with messages.kept():
        os.write(2, b"kept\\nkept\\n")
        print("of Python", file=sys.stderr)
    print(messages.new(), messages.new())
    os.write(2, b"after\\n")
print("at the end", file=sys.stderr)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "['kept'] []\n"
    assert result.stderr == "before\nof Python\nafter\nat the end\n"


def test_messages_where_standard_error_is_closed():
    program = """
from bcmfnet.data.messages import DecoderMessages
with DecoderMessages() as messages, messages.kept():
    print(messages.size, messages.new())
"""
    result = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, program], stdout=subprocess.PIPE, text=True
    )
    assert (result.returncode, result.stdout) == (0, "0 []\n")
