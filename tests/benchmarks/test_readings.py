"""The fit of free logits: its figures are those of the definition, and every reading has a row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bcl_oracle import oracle

from bcmfnet.benchmarks import readings
from bcmfnet.data.labels import LabelTable

TABLE = LabelTable("two", ("road", "pole"), ((0, 0, 0), (9, 9, 9)))


class Streets:
    """Frames of 24x32 with a pole at column 8 + their number."""

    table = TABLE

    def __len__(self):
        return 5

    def read(self, number):
        target = np.zeros((24, 32), np.uint8)
        target[:, 8 + number : 11 + number] = 1
        target[0, :4] = 255
        return np.zeros((24, 32, 3), np.uint8), target


def test_sets_are_spread_and_wrap_around():
    target = readings.load_frames(Streets(), 2, 3).target
    assert [int(frame[1].nonzero()[0]) for frame in target] == [8 + 3, 8 + 0]  # 3, and 3 + 5 // 2 = 5 of 5 frames


def test_every_reading_has_a_row_for_each_number_of_steps():
    rows = list(readings.measure(Streets(), 2, [0], [5, 40], "pole"))
    names = ["cross-entropy", "ohem", "detect, nms 1, ratio 0", "detect, nms 3, ratio 0", "detect, nms 1, ratio 0.0625",
             "detect, nms 3, ratio 0.0625", "paper"]  # fmt: skip
    assert [(row["reading"], row["steps"]) for row in rows] == [(name, steps) for name in names for steps in (5, 40)]
    first, last = rows[:2]
    assert last["ce"] < first["ce"] < np.log(2) and last["miou"] > first["miou"]
    assert "selected" not in first and all("selected" in row for row in rows[2:])


def test_figures_are_the_oracles():
    frames = readings.load_frames(Streets(), 2, 0)
    logits = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    criterion = readings.readings(frames)["detect, nms 3, ratio 0.0625"]
    found = readings.figures(criterion, frames, logits, "pole")
    expected = oracle(logits.double().numpy(), frames.target.numpy(), nms=3, ratio=1 / 16)
    valid = frames.target.numpy() != 255
    assert found["selected"] == pytest.approx(100 * expected.selected.sum() / valid.sum(), abs=1e-3)
    assert found["threshold"] == pytest.approx(expected.thresholds[0] / 1024, abs=1e-4)
    assert found["ce"] == pytest.approx(expected.ce_mean, abs=1e-4)
    assert found["selected_ce"] == pytest.approx(expected.terms["ce"][expected.selected].mean(), abs=1e-4)
    labels = torch.nn.functional.interpolate(logits, (24, 32), mode="bilinear").argmax(1).numpy()
    both = [((labels == c) & (frames.target.numpy() == c))[valid].sum() for c in (0, 1)]
    either = [((labels == c) | (frames.target.numpy() == c))[valid].sum() for c in (0, 1)]
    assert found["iou_pole"] == pytest.approx(100 * both[1] / either[1], abs=1e-4)
    assert found["miou"] == pytest.approx(50 * (both[0] / either[0] + both[1] / either[1]), abs=1e-4)


def test_a_class_that_is_not_there_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["readings", str(tmp_path / "out.csv"), "--commit", "x", "--thin", "lamp"])
    with pytest.raises(SystemExit):
        readings.main()
    assert "--thin: expected one of sky, building" in capsys.readouterr().err
