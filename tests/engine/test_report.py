"""The picture of the loss: its maps are those of the oracle, for every mode."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bcl_oracle import COEFFICIENTS, oracle

from bcmfnet.data.labels import make_label_table
from bcmfnet.engine.report import draw_loss, find_frames
from bcmfnet.errors import ConfigError
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
