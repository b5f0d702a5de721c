"""The picture of the loss, whose maps are those of the oracle, and the report of a run."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
from types import SimpleNamespace
from urllib.parse import unquote_to_bytes

import cv2
import numpy as np
import pytest
import torch
from bcl_oracle import COEFFICIENTS, oracle
from page import parse

from bcmfnet.data.labels import LabelTable, make_label_table
from bcmfnet.engine import report
from bcmfnet.engine.config import TrainConfig, to_toml
from bcmfnet.engine.evaluate import evaluate
from bcmfnet.engine.report import draw_loss, find_frames
from bcmfnet.errors import ConfigError
from bcmfnet.nn import BoundaryCorrectedLoss, UpsampledCrossEntropy
from bcmfnet.viz import pictures

OPTIONS = {"ohem": {"threshold": -np.log(0.7)}, "paper": {"nms": 3, "ratio": 1 / 16}}


@pytest.fixture
def frame():
    """A dataset of one frame of 12x16, and a network that returns random logits at 1/2."""
    rng = np.random.default_rng(0)
    target = rng.integers(0, 4, (12, 16)).astype(np.uint8)
    target[0, :3] = 255
    logits = rng.standard_normal((1, 4, 6, 8))
    image = np.zeros((12, 16, 3), np.uint8)
    dataset = SimpleNamespace(table=make_label_table("four", 4), read=lambda index: (image, target))
    predictor = SimpleNamespace(model=torch.nn.Identity(), logits=lambda images: torch.from_numpy(logits))
    return dataset, predictor, logits, target


def test_the_maps_are_the_oracles(frame, monkeypatch, tmp_path):
    dataset, predictor, logits, target = frame
    drawn = {}
    original = pictures.loss_maps

    def loss_maps(image, labels, losses, table):
        drawn.update(losses)
        return original(image, labels, losses, table)

    monkeypatch.setattr(pictures, "loss_maps", loss_maps)
    draw_loss(tmp_path / "a.png", predictor, dataset, 0)
    assert (tmp_path / "a.png").stat().st_size > 0
    focal, overlap = (drawn.pop(name) for name in list(drawn)[:2])
    ce = oracle(logits, target[None]).terms["ce"][0]
    np.testing.assert_allclose(focal.term, (1 - np.exp(-ce)) ** 2 * ce, atol=1e-12)
    np.testing.assert_allclose(overlap.term, pictures.NATS * np.where(ce > 0, 1 - np.exp(-ce), 0), atol=1e-12)
    assert focal.selected is None and overlap.selected is None
    assert list(drawn) == list(COEFFICIENTS)
    for mode, maps in drawn.items():
        expected = oracle(logits, target[None], mode=mode, **OPTIONS.get(mode, {}))
        np.testing.assert_array_equal(maps.selected, expected.selected[0])
        np.testing.assert_array_equal(maps.score * 1024, np.floor(expected.grid[0]))
        assert maps.term[maps.selected].mean() == pytest.approx(expected.boundary)
        assert maps.threshold == expected.thresholds[0] / 1024
        assert maps.cross_entropy == pytest.approx(expected.terms["ce"][expected.selected].mean())


def test_frames_are_found_by_name():
    dataset = type("Frames", (), {"split": "val", "name": lambda self, i: "abc"[i], "__len__": lambda self: 3})()
    assert find_frames(dataset, ["c", "a"]) == [2, 0]
    assert find_frames(dataset, []) == [0]
    with pytest.raises(ConfigError, match="^frames: expected one of a, b, c, got 'd'$"):
        find_frames(dataset, ["a", "d"])


class Frames:
    """Ten frames of noise, 64x96, in three classes whose names are hard to write, one of which is nowhere.

    One row of each is ignored, and in one frame all is. Another frame has a name that is no text.
    """

    table = LabelTable(
        "three", ("<script>road</script>", "car & 'van\"", "$sky$"), ((9, 0, 0), (0, 99, 0), (0, 0, 255))
    )
    split = "val"

    def __len__(self):
        return 10

    def name(self, i):
        return os.fsdecode(b'b\xff" onload="x') if i == 8 else f"<i>{i}"

    def files(self, i):
        return (f"frame {i}",)

    def read(self, i):
        """The blue of a pixel is its class, and the red of the first one, which is ignored, the number of the frame."""
        rng = np.random.default_rng(i)
        target = rng.integers(0, 2, (64, 96)).astype(np.uint8)
        image = rng.integers(0, 256, (64, 96, 3)).astype(np.uint8)
        image[..., 2], image[0, 0, 0] = target, i
        target[: 64 if i == 3 else 1] = 255
        return image, target


class Predictor:
    """Wrong where the red of a pixel is below what WRONG has for the frame."""

    def __call__(self, images):
        red, _, truth = images.unbind(1)
        return torch.where(red < WRONG[images[0, 0, 0, 0]], 1 - truth, truth)

    def logits(self, images):
        return torch.nn.functional.one_hot(self(images).long(), 3).permute(0, 3, 1, 2).float()


WRONG = (10, 60, 20, 250, 90, 200, 30, 150, 120, 5)
WORST = [5, 7, 8, 4, 1, 6]
ROWS = [
    {"step": 10, "loss": 2.0, "ce": 1.0, "lr": 0.1, "images_per_s": 4.0},
    {"step": 20, "loss": 1.5, "ce": float("nan"), "lr": 0.05, "images_per_s": 8.0},
    {"step": 20, "epoch": 1.0, "miou": 0.25, "pixel_accuracy": 0.5, "iou": {}},
    {"step": 25, "loss": 1.0, "ce": 0.5, "lr": 0.0, "images_per_s": 8.0},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a run that was not trained: its evaluation and its report are real."""
    folder, frames = tmp_path_factory.mktemp("runs") / "a <b>run", Frames()
    folder.mkdir()
    predictor = Predictor()
    evaluation = evaluate(predictor, frames)
    (folder / "config.toml").write_text(to_toml(TrainConfig().to_dict()))
    (folder / "evaluation.json").write_text(json.dumps(evaluation.to_dict()))
    report.draw_run(folder, ROWS, evaluation, predictor, frames, BoundaryCorrectedLoss(ignore_index=255), 8)
    return folder


def page_of(folder):
    return parse((folder / "report.html").read_text(encoding="utf-8"))


def section(page, heading):
    return next(s for s in page.all("section") if s.all("h2")[0].text == heading)


def percent(value):
    return "-" if value is None else f"{100 * value:.2f}"


def check_scores(page, scores, classes):
    """Every number of the tables is that of evaluation.json."""
    boundary = scores["boundary"]
    columns = [boundary["boundary_iou"], *boundary["boundary_f"].values()]
    table, summary = (t.rows() for t in section(page, "Classes").all("table"))
    assert table[0] == ["class", "IoU", "boundary IoU", "F 1 px", "F 3 px", "F 5 px"]
    for name, row in zip(classes, table[1:-1], strict=True):
        assert row == [name, percent(scores["iou"][name]), *(percent(c["per_class"][name]) for c in columns)]
    assert table[-1] == ["mean", percent(scores["miou"]), *(percent(c["mean"]) for c in columns)]
    assert dict(summary[1:]) == {
        "mIoU": percent(scores["miou"]),
        "pixel accuracy": percent(scores["pixel_accuracy"]),
        "boundary IoU": percent(boundary["boundary_iou"]["mean"]),
        **{f"boundary F at {r} px": percent(f["mean"]) for r, f in boundary["boundary_f"].items()},
        **{f"mIoU within {r} px of an edge": percent(v) for r, v in boundary["trimap_iou"].items()},
        "mIoU of the interior": percent(boundary["interior_miou"]),
        "frames": str(scores["frames"]),
        "frames/s": f"{scores['frames_per_s']:.1f}",
    }
    front = dict(zip(*([e.text for e in page.all(tag)] for tag in ("dt", "dd")), strict=False))
    assert front["mIoU"] == f"{percent(scores['miou'])} %"
    assert front["boundary IoU"] == f"{percent(boundary['boundary_iou']['mean'])} %"
    return front


def test_the_numbers_of_the_report_are_those_of_the_evaluation(run):
    scores = json.loads((run / "evaluation.json").read_text())
    page = page_of(run)
    front = check_scores(page, scores, Frames.table.classes)
    assert page.all("h1")[0].text == "a <b>run"
    # 10 steps of 8 images at 4 a second, then 15 at 8 a second: 20 + 15 seconds for 200 images.
    assert (front["steps"], front["time of training"], front["images/s"]) == ("25", "0.6 min", f"{200 / 35:.1f}")


def test_the_worst_frames_come_first_and_one_without_a_pixel_never(run):
    frames, predictor = Frames(), Predictor()
    articles = section(page_of(run), "Worst frames").all("article")
    assert len(articles) == len(WORST)
    for i, article in zip(WORST, articles, strict=True):
        image, target = frames.read(i)
        prediction = predictor(torch.from_numpy(image).permute(2, 0, 1)[None])[0].numpy()
        valid = target != 255
        iou = [
            ((prediction == c) & (target == c))[valid].sum() / ((prediction == c) | (target == c))[valid].sum()
            for c in range(2)
        ]
        accuracy = (prediction == target)[valid].mean()
        note = f"mIoU {100 * np.mean(iou):.2f} %, pixel accuracy {100 * accuracy:.2f} %"
        assert article.all("h3")[0].text == f"{frames.name(i)} {note}".replace("\udcff", "\ufffd")
        maps = (pictures.overlay(image, labels, frames.table) for labels in (target, prediction))
        expected = (image, *maps, pictures.errors(image, target, prediction, 255))
        shown = [image.attributes["src"].partition(",")[2] for image in article.all("img")]
        assert [base64.b64decode(encoded) for encoded in shown] == [
            pictures.jpeg(picture, report.PICTURE_BYTES, report.PICTURE_SIDE)[0] for picture in expected
        ]


def test_the_curves_are_the_rows_that_are_numbers(run):
    drawn = {}
    for curve in section(page_of(run), "Curves").all("figure"):
        lines = [(p.attributes["data-steps"], p.attributes["data-values"]) for p in curve.all("polyline")]
        drawn[curve.all("strong")[0].text] = lines
    assert drawn == {
        "Loss": [("10 20 25", "2 1.5 1"), ("10 25", "1 0.5")],
        "Validation": [("20", "25"), ("20", "50")],
        "Learning rate": [("10 20 25", "0.1 0.05 0")],
        "Images per second": [("10 20 25", "4 8 8")],
    }


def test_the_report_links_to_what_is_beside_it(run):
    links = section(page_of(run), "Files").all("a")
    linked = {unquote_to_bytes(link.attributes["href"]) for link in links}
    there = {os.fsencode(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    assert linked == there - {b"report.html"} and len(linked) == 10


@pytest.mark.parametrize(("criterion", "title"), [
    (BoundaryCorrectedLoss(mode="ohem", ignore_index=255), "ohem: score"), (UpsampledCrossEntropy(255), None)
], ids=["ohem", "plain"])  # fmt: skip
def test_the_report_has_the_loss_of_the_run_where_it_selects(run, tmp_path, monkeypatch, criterion, title):
    monkeypatch.setattr(report, "_draw_pictures", lambda *arguments: None)
    monkeypatch.setattr(report, "plot_training", lambda *arguments: None)
    shutil.copy(run / "config.toml", tmp_path)
    frames, predictor = Frames(), Predictor()
    report.draw_run(tmp_path, [], evaluate(predictor, frames), predictor, frames, criterion, 8)
    page = page_of(tmp_path)
    titles = [f.text for s in page.all("section", id="loss") for f in s.all("figcaption")]
    assert titles[2:3] == [title] * (title is not None)
    assert not page.all("section", id="curves") and "steps" not in [e.text for e in page.all("dt")]


def test_all_pictures_of_a_report_are_within_the_bound():
    """Noise is what JPEG makes the most of."""
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3)).astype(np.uint8)
    encoded, width, height = pictures.jpeg(noise, report.PICTURE_BYTES, report.PICTURE_SIDE)
    assert report.PICTURE_BYTES * (4 * report.WORST + 4) <= 3_000_000
    assert len(encoded) <= report.PICTURE_BYTES and (width, height) == (320, 240)
    assert cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR).shape == (240, 320, 3)
    colors = np.full((64, 96, 3), (200, 100, 50), np.uint8)
    encoded, *size = pictures.jpeg(colors, 10**6, 640)
    assert size == [96, 64]
    np.testing.assert_allclose(cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB), colors, atol=2)
    assert pictures.jpeg(noise[:, :120], 10**6, 240)[1:] == (60, 240)
    assert pictures.jpeg(noise[:64, :96], 1, 640)[1:] == (1, 1)


@pytest.mark.exhaustive
def test_a_browser_runs_the_script_and_loads_nothing(run, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium or google-chrome on PATH")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
    command = [browser, *options, f"--user-data-dir={tmp_path}", "--dump-dom", (run / "report.html").as_uri()]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert printed.count('class="over"') == printed.count('aria-valuetext="0 % ground truth"') == len(WORST)
    assert printed.count("<button>") == 6 and "hidden=" not in re.sub(r'visibility="hidden"', "", printed)
