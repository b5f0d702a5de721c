"""Figures of a run: training curves and confusion matrix.

matplotlib is imported when a figure is drawn and used without pyplot, so nothing needs a display. Files are
written under a temporary name, then renamed.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bcmfnet.errors import MissingPackageError

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

INK, FAINT, BLUE, ORANGE = "#3c3c3c", "#e4e4e4", "#2b6ca3", "#d9772b"
FEW_POINTS = 25
ANNOTATED_CLASSES = 32
STYLE: dict[RcKeyType, object] = {
    "font.size": 8,
    "text.color": INK,
    "text.parse_math": False,  # a dollar in the name of a class is a dollar
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9a9a9a",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "savefig.dpi": 160,
}


def plot_training(metrics_rows: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Draw loss, learning rate and validation mIoU by step.

    Args:
        metrics_rows: training rows {"step", "loss", "lr", ...} and evaluation rows {"step", "miou", ...},
            some with a validation "loss", in any order; there may be few, or of one kind only.
        path: image to write; its ending is the format.

    Raises:
        MissingPackageError: matplotlib is missing.
    """
    evaluated = [row for row in metrics_rows if "miou" in row]
    trained = [row for row in metrics_rows if "miou" not in row]
    with _figure("training curves", path, (10.5, 2.8)) as figure:
        loss, rate, miou = figure.subplots(1, 3)
        _draw_loss(loss, trained, evaluated)
        rate.set_title("Learning rate")
        _draw_line(rate, *_series(trained, "lr"))
        rate.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        _draw_miou(miou, *_series(evaluated, "miou"))
        for axes in (loss, rate, miou):
            axes.set_xlabel("step")
            axes.locator_params(axis="x", nbins=5, integer=True)
            axes.locator_params(axis="y", nbins=5)
            if not axes.lines:
                _say_empty(axes)


def plot_confusion(matrix: np.ndarray, class_names: Sequence[str], path: str | Path) -> None:
    """Draw a confusion matrix as percentages of each class's ground-truth pixels, and the IoU of each class.

    Args:
        matrix: pixel counts, int64 [C, C], rows are ground truth, columns prediction.
        class_names: C names. Cells carry numbers (those above 0.5 %) up to 32 classes.
        path: image to write; its ending is the format.

    Raises:
        ValueError: a matrix that does not match the names.
        MissingPackageError: matplotlib is missing.
    """
    matrix, count = np.asarray(matrix), len(class_names)
    if matrix.shape != (count, count):
        raise ValueError(f"matrix: expected [{count}, {count}] for the class names, got {list(matrix.shape)}")
    annotated = count <= ANNOTATED_CLASSES
    cell = 0.36 if annotated else 0.15
    size = (max(cell * count, 2.0) + 3.2, max(cell * count, 1.2) + 1.4)
    with _figure("the confusion matrix", path, size) as figure:
        cells, bars = figure.subplots(1, 2, sharey=True, width_ratios=(max(cell * count, 2.0), 1.2))
        _draw_cells(cells, _percent(matrix, matrix.sum(1, keepdims=True)), class_names, annotated)
        intersection = np.diagonal(matrix)
        _draw_bars(bars, _percent(intersection, matrix.sum(0) + matrix.sum(1) - intersection), annotated)


def require_matplotlib(what: str) -> None:
    """Raise MissingPackageError where `what` cannot be drawn; for the start of work that ends in a figure."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise MissingPackageError(f"matplotlib: needed to draw {what}; pip install 'bcmfnet[train]'") from None


@contextmanager
def _figure(what: str, path: str | Path, size: tuple[float, float]) -> Iterator[Any]:
    """A figure to draw on, of `size` inches, which is written to `path` at the end."""
    require_matplotlib(what)
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with rc_context(STYLE):
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(wspace=0.04))
        yield figure
        encoded = io.BytesIO()
        figure.savefig(encoded, format=Path(path).suffix[1:])
    _write_whole(Path(path), encoded.getvalue())


def _write_whole(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _series(rows: Sequence[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of a key, in the order of the steps."""
    points = np.array(sorted((row["step"], row[key]) for row in rows if row.get(key) is not None), float)
    steps, values = points.reshape(-1, 2).T
    finite = np.isfinite(values)
    return steps[finite], values[finite]


def _draw_line(axes: Any, steps: np.ndarray, values: np.ndarray, color: str = BLUE, **style: Any) -> None:
    """A line, with its points marked where they are few; nothing for an empty series."""
    if steps.size:
        marker = "o" if steps.size <= FEW_POINTS else ""
        axes.plot(steps, values, color=color, marker=marker, markersize=3, **style)


def _draw_loss(axes: Any, trained: Sequence[dict[str, Any]], evaluated: Sequence[dict[str, Any]]) -> None:
    axes.set_title("Loss")
    steps, values = _series(trained, "loss")
    if steps.size > FEW_POINTS:
        axes.plot(steps, values, color=BLUE, alpha=0.25, linewidth=0.8)
        values = _smoothed(values)
    _draw_line(axes, steps, values, label="training")
    _draw_line(axes, *_series(evaluated, "loss"), color=ORANGE, label="validation")
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend()


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Running mean over a twenty-fifth of the series, over fewer values at its ends."""
    window = np.ones(values.size // FEW_POINTS)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def _draw_miou(axes: Any, steps: np.ndarray, values: np.ndarray) -> None:
    axes.set_title("Validation mIoU (%)")
    if not steps.size:
        return
    best = values.argmax()
    _draw_line(axes, steps, 100 * values)
    axes.plot(steps[best], 100 * values[best], "o", color=ORANGE, markersize=5)
    note = f"best {100 * values[best]:.1f} at step {steps[best]:.0f}"
    axes.set_title(note, loc="right", color=ORANGE, size=8)


def _say_empty(axes: Any) -> None:
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, "none yet", color="#9a9a9a", ha="center", va="center", transform=axes.transAxes)


def _percent(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """100 * part / whole, NaN where the whole is empty."""
    with np.errstate(invalid="ignore"):
        return np.where(whole > 0, 100 * part / whole, np.nan)


def _draw_cells(axes: Any, percent: np.ndarray, class_names: Sequence[str], annotated: bool) -> None:
    axes.imshow(percent, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    axes.set_title("Confusion matrix, % of the class's pixels")
    axes.set(xlabel="prediction", ylabel="ground truth")
    ticks = range(len(class_names))
    axes.set_xticks(ticks, class_names, rotation=90)
    axes.set_yticks(ticks, class_names)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    if annotated:
        for (row, column), value in np.ndenumerate(percent):
            if value > 0.5:
                color = "white" if value > 55 else INK
                axes.text(column, row, f"{value:.0f}", color=color, ha="center", va="center", size=7)


def _draw_bars(axes: Any, iou: np.ndarray, annotated: bool) -> None:
    axes.barh(range(iou.size), np.nan_to_num(iou), height=0.62, color=BLUE, alpha=0.75)
    mean = f"{np.nanmean(iou):.1f}" if np.isfinite(iou).any() else "none"
    axes.set_title(f"IoU (%), mean {mean}")
    axes.set_xlim(0, 135)
    axes.set_xticks([])
    axes.tick_params(labelleft=False)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    if annotated:
        for row, value in enumerate(iou):
            text = "absent" if np.isnan(value) else f"{value:.1f}"
            axes.text(np.nan_to_num(value) + 3, row, text, va="center", size=7)
