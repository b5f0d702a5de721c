"""The comparison of two predictors is of the same frames, and its scores are those that evaluate gives each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from frames import write_frame

from bcmfnet.data import build_dataset
from bcmfnet.engine.compare import check_same_frames, class_table, compare, summary_table
from bcmfnet.engine.evaluate import evaluate
from bcmfnet.errors import ConfigError

CLASSES = 4


def bright(images):
    """Labels by the red channel; the frames are noise, so that some are right."""
    return images[:, 0] // 100


def dark(images):
    return images[:, 1] // 128


@pytest.fixture
def dataset(tmp_path):
    """Five frames of three classes, each of another size."""
    rng = np.random.default_rng(0)
    for i in range(5):
        ids = np.kron(rng.integers(0, 3, (4, 5)), np.ones((16 + i, 16), int)).astype(np.uint8)
        write_frame(tmp_path / "val/images" / f"{i}.png", tmp_path / "val/masks" / f"{i}.png", ids, seed=i)
    return build_dataset("folder", tmp_path, "val", num_classes=CLASSES)


def test_scores_are_those_of_evaluate(dataset):
    result = compare(bright, dark, dataset, samples=300, confidence=0.9, seed=3)
    values = result.to_dict()
    for model, predictor in (("a", bright), ("b", dark)):
        alone = evaluate(predictor, dataset).to_dict()
        boundary = alone["boundary"]["boundary_iou"]
        assert values["iou"][model] == pytest.approx(alone["miou"], rel=1e-14)
        assert values["boundary_iou"][model] == pytest.approx(boundary["mean"], rel=1e-14)
        for name in dataset.table.classes:
            assert values["iou"]["per_class"][name][model] == alone["iou"][name]
            assert values["boundary_iou"]["per_class"][name][model] == boundary["per_class"][name]
    for score in (values["iou"], values["boundary_iou"]):
        assert score["difference"] == score["b"] - score["a"]
        low, high = score["interval"]
        assert low < score["difference"] < high and low < high
    assert values["iou"]["per_class"]["class3"] == {"a": None, "b": None, "difference": None}
    assert (values["frames"], values["bootstrap"]) == (5, {"samples": 300, "confidence": 0.9, "seed": 3})


def test_tables_hold_the_scores_in_per_cent(dataset):
    result = compare(bright, dark, dataset, samples=300)
    values = result.to_dict()
    header, *rows = class_table(result)
    assert header == ("class", "IoU A", "B", "B - A", "boundary IoU A", "B", "B - A")
    assert rows[3] == ("class3", *6 * ["-"])
    first = values["iou"]["per_class"]["class0"]
    assert rows[0][:4] == (
        "class0", f"{100 * first['a']:.2f}", f"{100 * first['b']:.2f}", f"{100 * first['difference']:+.2f}",
    )  # fmt: skip
    header, iou, boundary = summary_table(result)
    assert header == ("score", "A", "B", "B - A", "95 % interval")
    low, high = values["boundary_iou"]["interval"]
    assert boundary[0] == "mean boundary IoU" and boundary[4] == f"{100 * low:+.2f} to {100 * high:+.2f}"
    assert iou[:2] == ("mean IoU", f"{100 * values['iou']['a']:.2f}")


def test_a_model_beside_itself_differs_by_nothing(dataset):
    score = compare(dark, dark, dataset, samples=100).scores["iou"]
    assert (score.difference, score.interval) == (0, (0, 0))


def test_each_frame_is_read_once_and_both_see_it(dataset):
    seen = {"a": [], "b": []}

    def watched(key):
        return lambda images: seen[key].append(images) or torch.zeros_like(images[:, 0])

    compare(watched("a"), watched("b"), dataset, samples=100)
    assert [a is b for a, b in zip(seen["a"], seen["b"], strict=True)] == 5 * [True]


def test_other_frames_are_refused(dataset, tmp_path):
    other = tmp_path / "other"
    for i in range(2):
        write_frame(other / "val/images" / f"{i}.png", other / "val/masks" / f"{i}.png", np.zeros((64, 64), np.uint8))
    check_same_frames(dataset, build_dataset("folder", tmp_path, "val", num_classes=CLASSES))
    for options, got in (
        ({"root": other, "num_classes": CLASSES}, f"2 frames of folder from {other}/val/images/0.png on"),
        ({"root": tmp_path, "num_classes": 5}, f"5 frames of folder from {tmp_path}/val/images/0.png on"),
    ):
        with pytest.raises(ConfigError) as caught:
            check_same_frames(dataset, build_dataset("folder", split="val", **options))
        assert str(caught.value) == (
            "B: expected weights whose dataset and split are those of A, 5 frames of folder from "
            f"{tmp_path}/val/images/0.png on, got {got}; --data.name and --data.split name one for both"
        )


def test_one_frame_is_refused(tmp_path):
    write_frame(tmp_path / "val/images/0.png", tmp_path / "val/masks/0.png", np.zeros((64, 64), np.uint8))
    with pytest.raises(ConfigError, match="^data.split: expected at least two frames to draw from, got 1$"):
        compare(dark, dark, build_dataset("folder", tmp_path, "val", num_classes=CLASSES))
