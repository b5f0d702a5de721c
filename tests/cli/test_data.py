"""`bcmfnet data`, and what the other verbs do with what it writes."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from frames import write_frame
from tiny import FRAMES

from bcmfnet.cli.options import DataOptions
from bcmfnet.data import get_label_table, normalize
from bcmfnet.data.colors import read_colors, write_colors
from bcmfnet.engine import inference
from bcmfnet.engine.config import DataConfig, TrainConfig
from bcmfnet.models import read_weights
from bcmfnet.ops import upsample_argmax

TABLE = get_label_table("street10")


@pytest.fixture
def colored(tmp_path):
    """A dataset `folder` in mmseg's layout whose masks are colours: four frames to train on, one to validate on."""
    root = tmp_path / "mine"
    for split, count in (("train", 4), ("val", 1)):
        for i in range(count):
            ids = np.random.default_rng(i).integers(0, 10, (8, 12)).repeat(8, 0).repeat(8, 1)
            paths = (root / folder / split / f"{split}{i}.png" for folder in ("img_dir", "ann_dir"))
            write_frame(*paths, np.array(TABLE.colors, np.uint8)[ids], seed=i)
    write_colors(tmp_path / "colors.json", TABLE)
    return root, tmp_path / "colors.json"


def as_trained(network, mean, std, **_):
    """For `for_inference`, whose folding takes seconds."""
    network.eval()
    return lambda images: upsample_argmax(network(normalize(images, mean, std)).logits, images.shape[-2:])


def of_source(root, colors):
    return ("--data.name", "folder", "--data.root", root, "--data.colors", colors)


def of_cache(cache):
    return ("--data.name", "prepared", "--data.root", cache)


def test_what_is_prepared_of_masks_of_colours_is_verified_and_evaluated_as_they_are(
    bcmfnet, trained, colored, tmp_path, monkeypatch
):
    monkeypatch.setattr(inference, "for_inference", as_trained)
    source, cache = of_source(*colored), tmp_path / "cache"
    made = bcmfnet("data", "prepare", *source, "--output-dir", cache)
    assert (made.code, made.err) == (0, f"{cache}: 5 frames, 0.1 MB\n")
    assert made.out == f"{cache}: 4 frames of train, 1 frames of val; use --data.name prepared --data.root {cache}\n"
    verified = [bcmfnet("data", "verify", *data) for data in (source, of_cache(cache))]
    assert verified[0] == verified[1] and verified[0].code == 0 and "pavement" in verified[0].out
    scores = []
    for name, data in (("a", source), ("b", of_cache(cache))):
        options = ("--data.workers", 0, "--data.split", "val", "--output-dir", tmp_path / name, "-q")
        result = bcmfnet("evaluate", "--weights", trained, *data, *options)
        assert (result.code, result.err) == (0, "")
        scores.append(json.loads((tmp_path / name / "evaluation.json").read_text()) | {"frames_per_s": None})
    assert scores[0] == scores[1] and scores[0]["frames"] == 1 and 0 < scores[0]["miou"] < 1


@pytest.mark.exhaustive
def test_a_run_on_what_is_prepared_ends_with_the_weights_of_one_on_the_source(bcmfnet, colored, tmp_path):
    cache, runs = tmp_path / "cache", (tmp_path / "a", tmp_path / "b")
    assert bcmfnet("data", "prepare", *of_source(*colored), "--output-dir", cache).code == 0
    for data, run in zip((of_source(*colored), of_cache(cache)), runs, strict=True):
        options = (*FRAMES[:5], "--data.workers", 1, "--device", "cpu", "--amp", "off", "--optim.steps", 3)
        assert bcmfnet("train", *data, *options, "--output-dir", run, "-q").code == 0
    (ours, about), (theirs, _) = (read_weights(run) for run in runs)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert about["label_table"] == json.loads(json.dumps(dataclasses.asdict(read_colors(colored[1])[0])))
    assert about["config"]["data"]["num_classes"] == 10 and "colors" not in about["config"]["data"]


def metadata(**data):
    config = TrainConfig(data=DataConfig("folder", **data))
    return json.loads(json.dumps({"num_classes": 10, "config": config.to_dict()}))


def test_weights_are_evaluated_with_the_colours_that_a_flag_names(colored):
    root, colors = colored
    dataset = DataOptions(root=str(root), colors=str(colors)).build(metadata(num_classes=10), "w")
    assert dataset.table.colors == TABLE.colors and np.array_equal(np.unique(dataset.read(0)[1]), range(10))


def test_relative_colours_are_found_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(data=DataConfig("folder", colors="a/colors.csv"))
    assert config.with_absolute_paths().data.colors == f"{tmp_path}/a/colors.csv"
    assert TrainConfig().with_absolute_paths().data.colors is None


def test_convert_says_how_to_train(bcmfnet, tmp_path):
    write_frame(tmp_path / "a.png", tmp_path / "b.png", np.zeros((64, 96), np.uint8))
    shape = {"label": "car", "points": [[1, 1], [50, 1], [50, 60]]}
    (tmp_path / "a.json").write_text(json.dumps({"imagePath": "a.png", "shapes": [shape]}))
    out = tmp_path / "out"
    for split in ("train", "val"):
        result = bcmfnet("data", "convert", tmp_path / "a.json", "--output-dir", out, "--split", split)
        data = f"--data.name folder --data.root {out} --data.colors {out}/colors.json"
        expected = f"{out}: 1 frames of {split}, classes background, car; use {data}\n"
        assert (result.code, result.out, result.err) == (0, expected, "")
    result = bcmfnet("data", "verify", *data.split())
    assert result.out.splitlines()[-2:] == ["a: in train and in val", "1 problems"]
    result = bcmfnet("data", "convert", tmp_path / "a.json", "--output-dir", out)
    assert (result.code, result.err) == (2, f"bcmfnet: --split: expected one that is not in {out} yet, got 'train'\n")


def test_a_preparation_that_was_killed_is_begun_again(bcmfnet, colored, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / ".train.frames.123.tmp").write_bytes(b"half")
    source = of_source(*colored)
    refused = bcmfnet("data", "prepare", *source, "--output-dir", cache)
    assert refused.code == 2 and refused.err.endswith("exists and is not empty; choose another or give --exist-ok\n")
    assert bcmfnet("data", "prepare", *source, "--output-dir", cache, "--exist-ok").code == 0
    assert sorted(path.name for path in cache.iterdir()) == ["index.json", "train.frames", "val.frames"]
