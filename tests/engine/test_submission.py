"""What is written for the Cityscapes server, and that its scores of it are ours, on frames in its layout."""

from __future__ import annotations

import fnmatch
import os

import cv2
import numpy as np
import pytest
from frames import write_frame

from bcmfnet.data import CITYSCAPES_ROWS, build_dataset, get_label_table, write_png
from bcmfnet.engine.evaluate import evaluate
from bcmfnet.engine.submission import submission_frames, write_submission
from bcmfnet.errors import ConfigError, DataError

NAMES = ("ulm_000000_000019", "ulm_000001_000019", "frankfurt_000000_000294")
TABLE = get_label_table("cityscapes19")


def predictor(images):
    """Labels in tiles, by the first pixel of each: what a network could give, and the same for evaluation."""
    tiles = images[:, 0, ::8, ::8] % 19
    return tiles.repeat_interleave(8, 1).repeat_interleave(8, 2)


def paths(root, split, name):
    city = name.split("_")[0]
    image = root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png"
    return image, root / "gtFine" / split / city / f"{name}_gtFine_labelIds.png"


@pytest.fixture
def cityscapes(tmp_path):
    """Three frames of two cities: half of the tiles as predicted, the others of any labelId, void ones too."""
    rng = np.random.default_rng(0)
    ids = np.array(sorted((row.train_id, row.id) for row in CITYSCAPES_ROWS if 0 <= row.train_id < 19))[:, 1]
    for number, name in enumerate(NAMES):
        image, label = paths(tmp_path, "val", name)
        pixels = write_frame(image, label, np.zeros((64, 96), np.uint8), seed=number)
        predicted = ids[pixels[::8, ::8, 0] % 19]
        tiles = np.where(rng.random(predicted.shape) < 0.5, predicted, rng.integers(0, 34, predicted.shape))
        write_png(label, np.kron(tiles, np.ones((8, 8))).astype(np.uint8))
    return tmp_path


@pytest.fixture
def submitted(cityscapes):
    folder = cityscapes / "out"
    folder.mkdir()
    write_submission(predictor, TABLE, submission_frames(str(cityscapes), "val"), folder)
    return folder


def scores_of_the_server(folder, truths):
    """IoU by class name from the benchmark's rules: of the labelIds as they are stored, and a false positive only
    counts where the truth is a class that is evaluated.
    """
    matrix = np.zeros((34, 34), np.int64)
    for truth in truths:
        stem = "_".join(os.path.basename(truth).split("_")[:3])
        (name,) = fnmatch.filter(os.listdir(folder), f"{stem}*.png")
        pair = [cv2.imread(str(path), cv2.IMREAD_UNCHANGED).ravel() for path in (truth, folder / name)]
        np.add.at(matrix, tuple(pair), 1)
    evaluated = [row.id for row in CITYSCAPES_ROWS if not row.ignore_in_eval]
    scores = {}
    for row in CITYSCAPES_ROWS:
        if row.id in evaluated:
            hit = matrix[row.id, row.id]
            missed = matrix[row.id].sum() - hit
            wrong = sum(matrix[other, row.id] for other in evaluated if other != row.id)
            scores[row.name] = hit / (hit + missed + wrong)
    return scores


def test_files_are_named_and_filled_as_the_server_wants_them(cityscapes, submitted):
    assert sorted(os.listdir(submitted)) == sorted(f"{name}_pred_labelIds.png" for name in NAMES)
    for name in NAMES:
        image, _ = paths(cityscapes, "val", name)
        first = cv2.imread(str(image))[::8, ::8, 2] % 19
        written = cv2.imread(str(submitted / f"{name}_pred_labelIds.png"), cv2.IMREAD_UNCHANGED)
        assert written.dtype == np.uint8 and written.shape == (64, 96)
        train_ids = {row.id: row.train_id for row in CITYSCAPES_ROWS}
        assert np.vectorize(train_ids.get)(written[::8, ::8]).tolist() == first.tolist()


def test_scores_are_those_of_the_servers_rules(cityscapes, submitted):
    ours = evaluate(predictor, build_dataset("cityscapes", cityscapes, "val"))
    theirs = scores_of_the_server(submitted, [paths(cityscapes, "val", name)[1] for name in NAMES])
    assert ours.iou_by_class() == pytest.approx(theirs, rel=1e-14)
    assert list(ours.iou_by_class()) == list(theirs) and len(theirs) == 19
    assert ours.miou == pytest.approx(np.mean(list(theirs.values())), rel=1e-14)
    assert 0.2 < ours.miou < 0.9


def test_scores_are_those_of_cityscapesscripts(cityscapes, submitted):
    script = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    args = script.args
    args.evalInstLevelScore, args.JSONOutput, args.quiet = False, False, True
    args.predictionPath, args.predictionWalk = str(submitted), None
    truths = [str(paths(cityscapes, "val", name)[1]) for name in NAMES]
    result = script.evaluateImgLists([script.getPrediction(args, truth) for truth in truths], truths, args)
    theirs = {name: score for name, score in result["classScores"].items() if not np.isnan(score)}
    ours = evaluate(predictor, build_dataset("cityscapes", cityscapes, "val"))
    assert ours.iou_by_class() == pytest.approx(theirs, rel=1e-14)
    assert ours.miou == pytest.approx(result["averageScoreClasses"], rel=1e-14)


def test_a_split_needs_no_labels(cityscapes, monkeypatch):
    image, _ = paths(cityscapes, "test", "berlin_000000_000019")
    write_frame(image, cityscapes / "unused.png", np.zeros((64, 64), np.uint8))
    monkeypatch.setenv("CITYSCAPES_DATASET", str(cityscapes))
    for root in (str(cityscapes), ""):
        assert submission_frames(root, "test") == {"berlin_000000_000019": image}


def test_what_cannot_be_submitted_is_one_line(cityscapes, monkeypatch):
    monkeypatch.delenv("CITYSCAPES_DATASET", raising=False)
    with pytest.raises(ConfigError) as caught:
        submission_frames("", "test")
    assert str(caught.value) == (
        "data.root: expected the folder of dataset cityscapes (or CITYSCAPES_DATASET), got none"
    )
    with pytest.raises(ConfigError) as caught:
        submission_frames(str(cityscapes), "test")
    assert str(caught.value) == f"{cityscapes}/leftImg8bit/test: no such folder"
    frames = submission_frames(str(cityscapes), "val")
    with pytest.raises(ConfigError) as caught:
        write_submission(predictor, get_label_table("camvid11"), frames, cityscapes)
    assert str(caught.value) == "submission: expected weights of the classes cityscapes19, got those of camvid11"


def test_a_damaged_frame_ends_a_submission(cityscapes):
    """The server refuses a set that lacks a frame."""
    image, _ = paths(cityscapes, "val", NAMES[1])
    image.write_bytes(image.read_bytes()[:-20])
    with pytest.raises(DataError, match=f"^{image}: truncated PNG$"):
        write_submission(predictor, TABLE, submission_frames(str(cityscapes), "val"), cityscapes)
