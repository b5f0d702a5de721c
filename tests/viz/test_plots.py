"""Figures of a run: what is drawn, that the files are whole, and what a missing matplotlib says."""

from __future__ import annotations

import os
import subprocess
import sys

import cv2
import numpy as np
import pytest

from bcmfnet.data.labels import get_label_table
from bcmfnet.viz import plot_confusion, plot_training


@pytest.fixture
def figures(monkeypatch):
    """The matplotlib figures that are saved during a test."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    saved, savefig = [], figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda self, *a, **k: (saved.append(self), savefig(self, *a, **k)))
    return saved


def training_rows(count):
    other = {"epoch": 0.5, "images_per_s": 5.0}
    return [{"step": step, "loss": 1 / step, "lr": 0.01 / step} | other for step in range(1, count + 1)]


def evaluation_rows(*mious):
    return [{"step": 10 * (i + 1), "miou": miou, "loss": 0.5} for i, miou in enumerate(mious)]


def drawn(axes):
    return [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines]


def test_training_curves(tmp_path, figures):
    plot_training(training_rows(50) + evaluation_rows(0.25, 0.75, 0.5), tmp_path / "results.png")
    assert cv2.imread(str(tmp_path / "results.png")).shape == (448, 1680, 3)
    assert os.listdir(tmp_path) == ["results.png"]
    loss, rate, miou = figures[0].axes
    raw, smooth, validation = drawn(loss)
    assert raw == (list(range(1, 51)), [1 / s for s in range(1, 51)])
    # 50 points are smoothed over 2.
    assert smooth[1][10] == pytest.approx((1 / 10 + 1 / 11) / 2)
    assert validation == ([10, 20, 30], [0.5, 0.5, 0.5])
    assert drawn(rate) == [(list(range(1, 51)), [0.01 / s for s in range(1, 51)])]
    assert drawn(miou) == [([10, 20, 30], [25, 75, 50]), ([20], [75])]
    assert miou.get_title("right") == "best 75.0 at step 20"


def test_few_points_are_drawn_as_they_are_and_marked(tmp_path, figures):
    plot_training(training_rows(3) + evaluation_rows(0.5), tmp_path / "results.png")
    (line,) = figures[0].axes[0].lines[:1]
    assert line.get_ydata().tolist() == [1, 1 / 2, 1 / 3] and line.get_marker() == "o"


@pytest.mark.parametrize(
    ("rows", "empty"),
    [
        ([], [True, True, True]),
        (training_rows(2), [False, False, True]),
        ([{"step": 1, "miou": 0.5}], [True, True, False]),
        ([{"step": 1, "loss": float("nan"), "lr": 0.1}, {"step": 2, "miou": None}], [True, False, True]),
    ],
    ids=["nothing", "no evaluation", "no training", "not a number"],
)
def test_panels_with_nothing_to_show_say_so(tmp_path, figures, rows, empty):
    plot_training(rows, tmp_path / "results.png")
    assert [["none yet"] == [text.get_text() for text in axes.texts] for axes in figures[0].axes] == empty


def test_confusion_matrix(tmp_path, figures):
    matrix = np.array([[75, 25, 0], [0, 199, 1], [0, 0, 0]])
    plot_confusion(matrix, ("road", "car", "sky"), tmp_path / "confusion.png")
    assert cv2.imread(str(tmp_path / "confusion.png")) is not None
    cells, bars = figures[0].axes
    np.testing.assert_array_equal(cells.images[0].get_array()[:2], [[75, 25, 0], [0, 99.5, 0.5]])
    assert np.ma.getmaskarray(cells.images[0].get_array())[2].all()
    texts = {text.get_position(): text.get_text() for text in cells.texts}
    assert texts == {(0, 0): "75", (1, 0): "25", (1, 1): "100"}
    assert [text.get_text() for text in bars.texts] == ["75.0", "88.4", "0.0"]
    assert bars.get_title("left") == "IoU (%), mean 54.5"
    assert [label.get_text() for label in cells.get_yticklabels()] == ["road", "car", "sky"]


def test_class_that_is_nowhere_is_absent_from_the_mean(tmp_path, figures):
    plot_confusion(np.diag([5, 0]), ("road", "car"), tmp_path / "confusion.png")
    _, bars = figures[0].axes
    assert [text.get_text() for text in bars.texts] == ["100.0", "absent"]
    assert bars.get_title("left") == "IoU (%), mean 100.0"


@pytest.mark.parametrize("name", ["camvid11", "cityscapes19"])
def test_no_text_of_the_confusion_matrix_overlaps(tmp_path, figures, name):
    table = get_label_table(name)
    plot_confusion(np.full((table.num_classes,) * 2, 7), table.classes, tmp_path / "confusion.png")
    cells, bars = figures[0].axes
    texts = [*cells.texts, *bars.texts, *cells.get_xticklabels(), *cells.get_yticklabels()]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]


def test_a_name_with_dollars_is_no_formula(tmp_path, figures):
    plot_confusion(np.eye(2, dtype=int), (r"$\frac$", "b"), tmp_path / "confusion.png")
    assert [label.get_text() for label in figures[0].axes[0].get_yticklabels()] == [r"$\frac$", "b"]


def test_confusion_matrix_of_other_classes_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"matrix: expected \[2, 2\] for the class names, got \[3, 3\]$"):
        plot_confusion(np.zeros((3, 3), np.int64), ("road", "car"), tmp_path / "confusion.png")


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "sheet.png"
    path.write_bytes(b"old")

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", disk_full)
    with pytest.raises(OSError, match="No space left"):
        plot_training([], path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["sheet.png"]


@pytest.mark.parametrize(
    ("draw", "what"),
    [
        (lambda path: plot_training([], path), "training curves"),
        (lambda path: plot_confusion(np.eye(2, dtype=int), ("a", "b"), path), "the confusion matrix"),
    ],
)
def test_missing_matplotlib_says_what_to_install(tmp_path, monkeypatch, draw, what):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError) as error:
        draw(tmp_path / "figure.png")
    assert str(error.value) == f"matplotlib: needed to draw {what}; pip install 'bcmfnet[train]'"
    assert not os.listdir(tmp_path)


def test_importing_the_plots_loads_neither_matplotlib_nor_torch():
    code = "import sys, bcmfnet.viz.plots; print([m for m in ('matplotlib', 'torch') if m in sys.modules])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    printed = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert printed.strip() == "[]"
