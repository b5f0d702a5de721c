"""The pictures of a run: curves, confusion matrix, and what the network sees on a few frames."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bcmfnet.engine.evaluate import Evaluation
from bcmfnet.engine.inference import LabelPredictor

log = logging.getLogger("bcmfnet.report")

OVERLAYS = 6


def draw_run(
    folder: Path, rows: list[dict[str, Any]], evaluation: Evaluation, predictor: LabelPredictor, dataset: Any
) -> None:
    """Write results.png (the curves), and what draw_evaluation writes."""
    draw_evaluation(folder, evaluation, predictor, dataset)
    with _optional_plot():
        from bcmfnet.viz import plot_training

        plot_training(rows, folder / "results.png")


def draw_evaluation(folder: Path, evaluation: Evaluation, predictor: LabelPredictor, dataset: Any) -> None:
    """Write overlays/ and confusion_matrix.png."""
    draw_overlays(folder / "overlays", predictor, dataset)
    with _optional_plot():
        from bcmfnet.viz import plot_confusion

        plot_confusion(evaluation.confusion.matrix, evaluation.table.classes, folder / "confusion_matrix.png")


@contextmanager
def _optional_plot() -> Iterator[None]:
    """Leave a plot out, with one line of warning, where matplotlib is not installed."""
    try:
        yield
    except ImportError as error:
        log.warning("%s", error)


def draw_overlays(folder: Path, predictor: LabelPredictor, dataset: Any, count: int = OVERLAYS) -> None:
    """Write a comparison (frame, truth, prediction, errors) for frames spread evenly over the dataset."""
    from bcmfnet.data.io import write_jpeg
    from bcmfnet.viz import comparison

    predictor.model.eval()
    folder.mkdir(exist_ok=True)
    for i in range(0, len(dataset), max(1, len(dataset) // count))[:count]:
        image, target = dataset.read(i)
        prediction = predictor(torch.from_numpy(image).permute(2, 0, 1)[None])[0].cpu().numpy()
        write_jpeg(folder / f"{dataset.name(i)}.jpg", comparison(image, target, prediction, dataset.table))
