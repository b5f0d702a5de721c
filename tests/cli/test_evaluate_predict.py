"""`bcmfnet evaluate`, `predict`, `loss`, `data verify` and `env` on files that the tests write."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from frames import write_frame
from page import parse

from bcmfnet.cli.predict import predict
from bcmfnet.data import IMAGENET_MEAN, IMAGENET_STD, get_label_table, read_image
from bcmfnet.data.io import MAX_PIXELS
from bcmfnet.data.labels import cityscapes_train_id_to_id
from bcmfnet.data.pairs import MIN_SIDE
from bcmfnet.engine.config import TTAConfig
from bcmfnet.engine.inference import LabelPredictor
from bcmfnet.engine.tta import TTAPredictor
from bcmfnet.models import create_model, save_weights
from bcmfnet.models.ddrnet import MIN_SIZE


@pytest.fixture
def weights(trained):
    return trained / "weights" / "best.safetensors"


@pytest.fixture
def frames(tmp_path):
    """A folder with two frames of odd sizes, and a text file that is none."""
    folder = tmp_path / "frames"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (65, 97)), ("b.jpg", (80, 64))):
        cv2.imwrite(str(folder / name), rng.integers(0, 256, (*size, 3), np.uint8))
    (folder / "notes.txt").write_text("not a frame")
    return folder


def test_evaluate_prints_tables_and_leaves_a_folder(bcmfnet, weights, tmp_path):
    result = bcmfnet("evaluate", "--weights", weights, "--output-dir", tmp_path / "out", "--amp", "off")
    assert result.code == 0, result.err
    for row in ("road", "mean", "mIoU", "boundary IoU", "boundary F at 3 px", "mIoU within 1 px of an edge"):
        assert row in result.out
    scores = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert f"{100 * scores['miou']:.2f}" in result.out
    assert cv2.imread(str(tmp_path / "out" / "confusion_matrix.png")) is not None
    page = parse((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert page.all("dd")[0].text == f"{100 * scores['miou']:.2f} %"
    settings = dict(row for table in page.all("section", id="configuration")[0].all("table") for row in table.rows())
    assert settings == {"weights": str(weights), "dataset": "street10", "split": "val"}
    trained = page.all("section", id="training-of-the-weights")[0].all("table")
    assert trained[0].rows()[:2] == [["step", "2"], ["seed", "0"]]
    assert [link.text for link in page.all("section", id="files")[0].all("a")][:2] == [
        "evaluation.json", "confusion_matrix.png"
    ]  # fmt: skip
    assert len(list((tmp_path / "out" / "overlays").iterdir())) == 1


def test_evaluate_gate(bcmfnet, weights, tmp_path):
    for gate, code in ((0, 0), (100, 3)):
        argv = ("--weights", weights, "--output-dir", tmp_path / str(gate), "--min-miou", gate, "--json")
        result = bcmfnet("evaluate", *argv)
        assert result.code == code
        assert json.loads(result.out)["frames"] > 0


def test_evaluate_with_views_says_so_in_its_scores(bcmfnet, local_network, weights, tmp_path):
    """Of a network that windows change nothing for: the scores are the same, those of views others."""
    options = {"plain": (), "window": ("--tta.window", 64, 64), "views": ("--tta.flip", "--tta.scales", 0.5, 1, 1.5)}
    scores = {}
    for name, flags in options.items():
        result = bcmfnet("evaluate", "--weights", weights, *flags, "--output-dir", tmp_path / name, "--json")
        assert result.code == 0, result.err
        scores[name] = json.loads(result.out)
        assert json.loads((tmp_path / name / "evaluation.json").read_text()) == scores[name]
    assert "tta" not in scores["plain"]
    assert scores["window"].pop("tta") == {"scales": [1], "flip": False, "window": [64, 64]}
    assert scores["views"].pop("tta") == {"scales": [0.5, 1, 1.5], "flip": True}
    assert scores["window"]["iou"] == scores["plain"]["iou"] != scores["views"]["iou"]


def test_predict_with_views_is_the_predictor_of_the_library(bcmfnet, local_network, weights, frames, tmp_path):
    flags = ("--tta.scales", 1, 2, "--tta.flip", "--device", "cpu", "--amp", "off")
    result = bcmfnet("predict", frames, "--weights", weights, *flags, "--output-dir", tmp_path / "out")
    assert (result.code, result.err) == (0, "")
    predictor, _ = LabelPredictor.from_weights(weights, "cpu", "off")
    image = torch.from_numpy(read_image(frames / "a.png")).permute(2, 0, 1)[None]
    expected = TTAPredictor(predictor, TTAConfig(scales=(1, 2), flip=True))(image)[0].numpy()
    ids = cv2.imread(str(tmp_path / "out" / "a_labelIds.png"), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(ids, expected) and not np.array_equal(ids, predictor(image)[0].numpy())


def test_predict_with_views_of_a_large_tiff(bcmfnet, local_network, weights, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    image = np.random.default_rng(0).integers(0, 256, (144, 200, 3), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", image, tile=(64, 64), photometric="rgb")
    flags = ("--weights", weights, "--tta.window", 64, 96, "--tta.flip", "--device", "cpu", "--amp", "off")
    large = ("--max-pixels", 100 * 100, "--output-dir", tmp_path / "large")
    result = bcmfnet("predict", tmp_path / "a.tif", *flags, *large)
    assert (result.code, result.err) == (0, "")
    assert result.out == f"1 of 1 images written to {tmp_path / 'large'}\n"
    assert bcmfnet("predict", tmp_path / "a.tif", *flags, "--output-dir", tmp_path / "whole").code == 0
    ids = cv2.imread(str(tmp_path / "whole" / "a_labelIds.png"), cv2.IMREAD_UNCHANGED)
    assert (tifffile.imread(tmp_path / "large" / "a_labelIds.tif") == ids).mean() > 0.9999
    result = bcmfnet("predict", tmp_path / "a.tif", *flags, *large, "--exist-ok", "--tta.scales", 1, 2)
    line = "tta.scales: expected 1 alone for an image of 200x144, which is read in windows, got (1.0, 2.0)"
    assert (result.code, result.err) == (1, f"{tmp_path / 'a.tif'}: {line}\n")


def test_a_window_that_is_larger_than_a_frame_is_one_line(bcmfnet, local_network, weights, frames, tmp_path):
    """evaluate ends with it, predict goes on with the other frames: a.png has 97x65 pixels, b.jpg 64x80."""
    out = ("--weights", weights, "--output-dir", tmp_path / "out")
    result = bcmfnet("evaluate", *out, "--tta.window", 512, 256)
    line = "tta.window: expected at most {}, height and width of a frame at scale 1, got {}"
    assert (result.code, result.err) == (2, f"bcmfnet: --{line.format((256, 512), (512, 256))}\n")
    assert not (tmp_path / "out").exists()
    result = bcmfnet("predict", frames, *out, "--tta.window", 64, 96)
    assert (result.code, result.out.splitlines()[0]) == (1, f"1 of 2 images written to {tmp_path / 'out'}")
    assert result.err == f"{frames / 'b.jpg'}: {line.format((80, 64), (64, 96))}\n"


def test_a_submission_of_a_split_without_labels(bcmfnet, local_network, tmp_path):
    table = dataclasses.asdict(get_label_table("cityscapes19"))
    metadata = {"label_table": table, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    save_weights(tmp_path / "w", create_model("bcmfnet", num_classes=19), metadata)
    image = tmp_path / "leftImg8bit" / "test" / "bonn" / "bonn_000000_000019_leftImg8bit.png"
    pixels = write_frame(image, tmp_path / "unused.png", np.zeros((72, 96), np.uint8))
    data = ("--data.root", tmp_path, "--data.split", "test", "--device", "cpu", "--amp", "off")
    for folder, more in (("out", ()), ("json", ("--json",))):
        out = ("--output-dir", tmp_path / folder)
        result = bcmfnet("evaluate", "--weights", tmp_path / "w", *data, *out, "--submission", *more)
        assert result.code == 0, result.err
    assert json.loads(result.out) == {"frames": 1, "folder": str(tmp_path / "json")}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["bonn_000000_000019_pred_labelIds.png"]
    predictor, _ = LabelPredictor.from_weights(tmp_path / "w", "cpu", "off")
    labels = predictor(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0].numpy()
    written = cv2.imread(str(tmp_path / "out" / "bonn_000000_000019_pred_labelIds.png"), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(written, cityscapes_train_id_to_id()[labels]) and len(np.unique(written)) > 1


def test_a_submission_needs_weights_of_the_benchmark(bcmfnet, local_network, weights, tmp_path):
    image = tmp_path / "leftImg8bit" / "val" / "bonn" / "bonn_000000_000019_leftImg8bit.png"
    write_frame(image, tmp_path / "unused.png", np.zeros((72, 96), np.uint8))
    out = ("--data.root", tmp_path, "--output-dir", tmp_path / "out", "--submission")
    result = bcmfnet("evaluate", "--weights", weights, *out)
    line = "--submission: expected weights of the classes cityscapes19, got those of street10"
    assert (result.code, result.err) == (2, f"bcmfnet: {line}\n")
    assert not (tmp_path / "out").exists()


def test_predict_writes_three_files_an_image(bcmfnet, weights, frames, tmp_path):
    result = bcmfnet("predict", frames, "--weights", weights, "--output-dir", tmp_path / "out")
    assert (result.code, result.out.splitlines()[0]) == (0, f"2 of 2 images written to {tmp_path / 'out'}")
    for stem, size in (("a", (65, 97)), ("b", (80, 64))):
        ids = cv2.imread(str(tmp_path / "out" / f"{stem}_labelIds.png"), cv2.IMREAD_UNCHANGED)
        assert ids.shape == size and ids.dtype == np.uint8 and ids.max() < 10
        assert cv2.imread(str(tmp_path / "out" / f"{stem}_color.png")).shape[:2] == size
        height, width = cv2.imread(str(tmp_path / "out" / f"{stem}_overlay.jpg")).shape[:2]
        assert height > size[0] and width >= size[1], "no legend"
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == [str(frames / "a.png"), str(frames / "b.jpg")]
    assert sum(rows[0]["share"].values()) == pytest.approx(1, abs=1e-3)


def test_predict_takes_a_file_and_a_glob(bcmfnet, weights, frames, tmp_path):
    assert bcmfnet("predict", frames / "a.png", "--weights", weights, "--output-dir", tmp_path / "1").code == 0
    assert bcmfnet("predict", frames / "*.jpg", "--weights", weights, "--output-dir", tmp_path / "2").code == 0
    written = sorted(path.name for path in (tmp_path / "2").glob("b_*"))
    assert written == ["b_color.png", "b_labelIds.png", "b_overlay.jpg"]


def test_predict_takes_several_files_and_a_bound_on_pixels(bcmfnet, weights, frames, tmp_path):
    """Several files are what a shell makes of a glob; b.jpg has 80x64 pixels, a.png more."""
    sources = (frames / "a.png", frames / "b.jpg")
    options = ("--weights", weights, "--max-pixels", 80 * 64, "--output-dir", tmp_path / "1")
    result = bcmfnet("predict", sources[0], *options, sources[1])
    assert (result.code, result.out.splitlines()[0]) == (1, f"1 of 2 images written to {tmp_path / '1'}")
    line = "expected an image of 1 to 5120 pixels, got 97x65; larger ones are read from TIFF, in tiles"
    assert result.err == f"{frames / 'a.png'}: {line}\n"
    result = bcmfnet("predict", *sources, "--weights", weights, "--max-pixels", 0)
    assert (result.code, result.err) == (2, "bcmfnet: --max-pixels: expected an integer from 1 to 2147483647, got 0\n")
    assert inspect.signature(predict).parameters["max_pixels"].default == MAX_PIXELS


def test_predict_goes_on_past_an_unreadable_file(bcmfnet, weights, frames, tmp_path):
    (frames / "aa.jpg").write_bytes((frames / "b.jpg").read_bytes()[:600])
    cv2.imwrite(str(frames / "small.png"), np.zeros((63, 64, 3), np.uint8))
    result = bcmfnet("predict", frames, "--weights", weights, "--output-dir", tmp_path / "out")
    assert result.code == 1
    assert result.out.startswith("2 of 4 images written")
    assert f"{frames / 'aa.jpg'}: truncated JPEG" in result.err
    assert f"{frames / 'small.png'}: expected an image of at least 64x64 pixels, got 64x63" in result.err
    assert (tmp_path / "out" / "b_overlay.jpg").exists()


def test_predict_goes_on_with_the_same_settings_only(bcmfnet, local_network, weights, frames, tmp_path):
    (frames / "c.png").write_bytes(b"")
    argv = ("predict", frames, "--weights", weights, "--output-dir", tmp_path / "out")
    assert bcmfnet(*argv).code == 1
    (tmp_path / "out" / "a_color.png").unlink()
    shutil.copy(frames / "a.png", frames / "c.png")
    assert bcmfnet(*argv).err.endswith("is not empty; choose another or give --exist-ok\n")
    result = bcmfnet(*argv, "--resume", "--tta.flip")
    expected = f"expected tta None, as the images in {tmp_path / 'out'} were predicted with"
    got = "{'scales': [1.0], 'flip': True}"
    assert (result.code, result.err) == (2, f"bcmfnet: --resume: {expected}, got {got}\n")
    result = bcmfnet(*argv, "--resume")
    line = f"3 of 3 images written to {tmp_path / 'out'}, 1 of them before"
    assert (result.code, result.out.splitlines()[0]) == (0, line)
    times = (
        r"decode [\d.]+ ms, network [\d.]+ ms, write [\d.]+ ms a frame; [\d.]+ frames/s, [\d.]+ were the network alone"
    )
    assert re.fullmatch(times, result.out.splitlines()[1])
    assert bcmfnet(*argv, "--resume").out == f"3 of 3 images written to {tmp_path / 'out'}, 3 of them before\n"
    result = bcmfnet("predict", frames, "--weights", weights, "--resume")
    line = "--resume: expected --output-dir or --name, the folder to go on in, got none"
    assert (result.code, result.err) == (2, f"bcmfnet: {line}\n")


def test_predict_refuses_what_would_overwrite_itself(bcmfnet, weights, frames, tmp_path):
    shutil.copy(frames / "a.png", frames / "b.png")
    result = bcmfnet("predict", frames, "--weights", weights, "--output-dir", tmp_path / "out")
    assert result.code == 2 and "would write the same files" in result.err


@pytest.mark.parametrize("source", ["empty", "missing.png", "*.gif"])
def test_predict_refuses_a_source_without_images(bcmfnet, weights, tmp_path, source):
    (tmp_path / "empty").mkdir()
    result = bcmfnet("predict", tmp_path / source, "--weights", weights)
    assert result.code == 2
    assert result.err == (
        "bcmfnet: SOURCE: expected an image file, a folder of images or a glob, "
        f"found no image at {tmp_path / source}\n"
    )


@pytest.mark.parametrize("content", [None, b"", b"x" * 1000, "half"])
def test_unusable_weights_are_one_line(bcmfnet, weights, frames, tmp_path, content):
    path = tmp_path / "w.safetensors"
    if content is not None:
        path.write_bytes(weights.read_bytes()[:100_000] if content == "half" else content)
    result = bcmfnet("predict", frames, "--weights", path, "--output-dir", tmp_path / "out")
    assert result.code == (2 if content is None else 1)
    assert result.err.startswith(f"bcmfnet: {path}: ") and result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_loss_draws_every_mode_of_a_frame(bcmfnet, weights, tmp_path):
    result = bcmfnet("loss", "--weights", weights, "--output-dir", tmp_path / "out")
    assert (result.code, result.out) == (0, f"1 pictures written to {tmp_path / 'out'}\n"), result.err
    (picture,) = (tmp_path / "out").iterdir()
    name = picture.stem.removesuffix("_loss")
    again = bcmfnet("loss", name, "--weights", weights, "--output-dir", tmp_path / "again")
    assert again.code == 0
    assert (tmp_path / "again" / picture.name).read_bytes() == picture.read_bytes()
    height, width = cv2.imread(str(picture)).shape[:2]
    assert width > 4 * 256 and height > 3 * 128  # image, labels, and two tiles for each of five modes


def test_loss_of_a_frame_that_is_not_there(bcmfnet, weights, tmp_path):
    result = bcmfnet("loss", "nowhere", "--weights", weights, "--output-dir", tmp_path / "out")
    assert result.code == 2
    assert result.err == "bcmfnet: FRAMES: expected one of street_val_0_000000, got 'nowhere'\n"
    assert not (tmp_path / "out").exists()


def write_camvid(root, split, names, value=3):
    for folder in (root / split, root / f"{split}annot"):
        folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        cv2.imwrite(str(root / split / f"{name}.png"), np.full((72, 96, 3), 90, np.uint8))
        cv2.imwrite(str(root / f"{split}annot" / f"{name}.png"), np.full((72, 96), value, np.uint8))


def test_data_verify_names_every_problem(bcmfnet, tmp_path):
    write_camvid(tmp_path, "train", ["a", "b", "c"])
    write_camvid(tmp_path, "val", ["d"])
    argv = ("data", "verify", "--data.name", "camvid11-segnet", "--data.root", tmp_path)
    good = bcmfnet(*argv)
    assert good.code == 0 and good.out.endswith("no problem found\n")
    absent = "sky, building, pole, pavement, tree, sign, fence, car, pedestrian, bicyclist"
    assert [line for line in good.out.splitlines() if line.startswith("warning: ")] == [
        f"warning: train: no pixel of {absent}", f"warning: val: no pixel of {absent}"]  # fmt: skip
    cv2.imwrite(str(tmp_path / "trainannot" / "a.png"), np.full((72, 96), 77, np.uint8))
    cv2.imwrite(str(tmp_path / "trainannot" / "b.png"), np.full((72, 95), 3, np.uint8))
    (tmp_path / "trainannot" / "c.png").unlink()
    write_camvid(tmp_path, "val", ["a"])
    bad = bcmfnet(*argv)
    assert bad.code == 1
    for words in ("value 77", "95", "c.png", "a: in train and in val"):
        assert any(words in line for line in bad.out.splitlines()), words


def test_data_verify_in_an_ascii_locale(tmp_path):
    """Names of files that are not ASCII are found by a list in UTF-8, and shown in escapes."""
    for name in ("Straße", "Brücke"):
        color = np.full((72, 96, 3), 128, np.uint8)
        write_frame(
            tmp_path / "701_StillsRaw_full" / f"{name}.png", tmp_path / "LabeledApproved_full" / f"{name}_L.png", color
        )
    (tmp_path / "LabeledApproved_full" / "Brücke_L.png").write_bytes(b"")
    (tmp_path / "train.txt").write_text("Straße\n", encoding="utf-8-sig")
    (tmp_path / "val.txt").write_text("Brücke", encoding="utf-8")
    argv = ("data", "verify", "--data.name", "camvid11-ignore", "--data.root", str(tmp_path))
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = subprocess.run(
        [sys.executable, "-m", "bcmfnet", *argv], capture_output=True, text=True, env=os.environ | locale
    )
    path = f"{tmp_path}/LabeledApproved_full/Br\\udcc3\\udcbccke_L.png"
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stdout.splitlines()[-2:] == [f"{path}: the file is empty", "1 problems"]


def test_train_on_a_wrong_label_names_the_file(bcmfnet, tmp_path):
    write_camvid(tmp_path / "data", "train", ["a", "b", "c"], value=13)
    write_camvid(tmp_path / "data", "val", ["d"])
    flags = {"--data.crop": ("64", "64"), "--data.batch-size": (2,), "--data.workers": (1,), "--optim.steps": (1,),
             "--data.name": ("camvid11-segnet",), "--data.root": (tmp_path / "data",)}  # fmt: skip
    argv = [word for flag, values in flags.items() for word in (flag, *values)]
    result = bcmfnet("train", *argv, "--output-dir", tmp_path / "run")
    assert result.code == 1
    line = result.err.splitlines()[-1]
    assert "13" in line and ".png" in line and "Traceback" not in result.err


def test_train_on_what_verify_refuses_ends_before_its_first_step(bcmfnet, tmp_path):
    """Masks of 0 and 255: the foreground would be void, and the network would learn one class."""
    for split in ("train", "val"):
        for name in ("a", "b"):
            mask = np.zeros((72, 96), np.uint8)
            mask[:36] = 255
            path = tmp_path / "data" / split / "masks" / f"{split}_{name}.png"
            write_frame(path.parents[1] / "images" / path.name, path, mask)
    data = ("--data.name", "folder", "--data.root", tmp_path / "data", "--data.num-classes", 2)
    line = (
        "{} and all other labels of {}: expected pixels of two classes, got class0 and 50 % void (255); masks of 0 and "
    )
    line += "255 need a 1 for the foreground"
    first = tmp_path / "data" / "train" / "masks" / "train_a.png"
    flags = ("--data.crop", 64, 64, "--data.batch-size", 2, "--data.workers", 0, "--optim.steps", 1)
    result = bcmfnet("train", *data, *flags, "--output-dir", tmp_path / "run")
    assert (result.code, result.err) == (1, f"bcmfnet: {line.format(first, 'train')}\n")
    assert not (tmp_path / "run").exists()
    verified = bcmfnet("data", "verify", *data)
    second = tmp_path / "data" / "val" / "masks" / "val_a.png"
    assert verified.code == 1
    assert verified.out.splitlines()[-3:] == [line.format(first, "train"), line.format(second, "val"), "2 problems"]


def test_evaluate_on_a_split_without_a_valid_pixel_is_an_error(bcmfnet, weights, tmp_path):
    mask = np.full((72, 96), 255, np.uint8)
    write_frame(tmp_path / "val" / "images" / "a.png", tmp_path / "val" / "masks" / "a.png", mask)
    data = ("--data.name", "folder", "--data.root", tmp_path, "--data.workers", 0)
    result = bcmfnet("evaluate", "--weights", weights, *data, "--output-dir", tmp_path / "out")
    expected = "mIoU: expected a pixel of a class in the set, got ignored ones (255) alone"
    assert (result.code, result.out, result.err) == (1, "", f"bcmfnet: {expected}\n")
    assert not (tmp_path / "out").exists()


def test_evaluate_names_a_frame_that_is_too_small(bcmfnet, weights, tmp_path):
    path = tmp_path / "val" / "images" / "a.png"
    write_frame(path, tmp_path / "val" / "masks" / "a.png", np.zeros((48, 96), np.uint8))
    data = ("--data.name", "folder", "--data.root", tmp_path, "--data.workers", 0)
    result = bcmfnet("evaluate", "--weights", weights, *data, "--output-dir", tmp_path / "out")
    expected = f"{path}: expected an image of at least 64x64 pixels, got 96x48"
    assert (result.code, result.err) == (1, f"bcmfnet: {expected}\n")
    assert MIN_SIDE == MIN_SIZE


def test_env_as_text_and_json(bcmfnet):
    facts = json.loads(bcmfnet("env", "--json").out)
    assert facts["packages"]["torch"].startswith("2.")
    assert {row["op"] for row in facts["backends"]} >= {"bcl"}
    text = bcmfnet("env").out
    assert "native library:" in text
    for row in facts["backends"]:
        assert f"{row['op']} on {row['device']}: {row['backend']} (" in text
