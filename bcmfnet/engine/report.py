"""The pictures of a run: curves, confusion matrix, and what the network sees on a few frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bcmfnet.engine.config import PAPER_LOSS
from bcmfnet.engine.evaluate import Evaluation
from bcmfnet.engine.inference import LabelPredictor
from bcmfnet.errors import ConfigError, unknown_name
from bcmfnet.nn import BoundaryCorrectedLoss, OhemCrossEntropy
from bcmfnet.ops.bcl import checked_options
from bcmfnet.reference import bcl as reference
from bcmfnet.viz import plot_confusion, plot_training

OVERLAYS = 6


def draw_run(
    folder: Path, rows: list[dict[str, Any]], evaluation: Evaluation, predictor: LabelPredictor, dataset: Any
) -> None:
    """Write results.png (the curves), and what draw_evaluation writes."""
    draw_evaluation(folder, evaluation, predictor, dataset)
    plot_training(rows, folder / "results.png")


def draw_evaluation(folder: Path, evaluation: Evaluation, predictor: LabelPredictor, dataset: Any) -> None:
    """Write overlays/ and confusion_matrix.png."""
    draw_overlays(folder / "overlays", predictor, dataset)
    plot_confusion(evaluation.confusion.matrix, evaluation.table.classes, folder / "confusion_matrix.png")


def draw_overlays(folder: Path, predictor: LabelPredictor, dataset: Any, count: int = OVERLAYS) -> None:
    """Write a comparison of prediction and ground truth for frames spread evenly over the dataset."""
    from bcmfnet.data.io import write_jpeg
    from bcmfnet.viz import comparison

    folder.mkdir(exist_ok=True)
    for i in range(0, len(dataset), max(1, len(dataset) // count))[:count]:
        image, target = dataset.read(i)
        prediction = predictor(torch.from_numpy(image).permute(2, 0, 1)[None])[0].cpu().numpy()
        write_jpeg(folder / f"{dataset.name(i)}.jpg", comparison(image, target, prediction, dataset.table))


def find_frames(dataset: Any, names: Sequence[str]) -> list[int]:
    """Indices of the frames of these names, the first frame where none is named. Raises ConfigError for another."""
    numbers = {dataset.name(i): i for i in range(len(dataset))}
    for name in names:
        if name not in numbers:
            raise ConfigError(unknown_name("frames", name, numbers))
    return [numbers[name] for name in names] or [0]


def draw_loss(path: Path, predictor: LabelPredictor, dataset: Any, index: int) -> None:
    """Write a picture of what each mode of the loss scores and selects on a frame, with its default options.

    `paper` has the paper's suppression and share; OHEM has thresh 0.7 and no min_kept, which is meant for a batch.
    """
    from bcmfnet.data.io import write_png
    from bcmfnet.viz import LossMaps, loss_maps

    image, target = dataset.read(index)
    logits = predictor.logits(torch.from_numpy(image).permute(2, 0, 1)[None]).cpu()
    ignore_index = dataset.table.ignore_index
    losses = {mode: BoundaryCorrectedLoss(mode=mode, ignore_index=ignore_index) for mode in reference.MODES}
    losses["paper"] = BoundaryCorrectedLoss(**PAPER_LOSS, ignore_index=ignore_index)
    losses["ohem"] = OhemCrossEntropy(min_kept=0, ignore_index=ignore_index)
    drawn = {}
    for mode, criterion in losses.items():
        options = checked_options(**criterion.options)
        _, stats, maps = reference.loss(logits, torch.from_numpy(target)[None], options)
        term = sum(k * ce for k, ce in zip(options.terms, (maps.ce, maps.ce_r, maps.ce_c), strict=True) if k)
        shown = (maps.q / reference.Q_SCALE, term, maps.selected)
        cross_entropy = maps.ce[maps.selected].mean().item() if maps.selected.any() else None
        threshold = stats.threshold.item() / reference.Q_SCALE
        drawn[mode] = LossMaps(*(values[0].numpy() for values in shown), threshold, cross_entropy)
    write_png(path, loss_maps(image, target, drawn, dataset.table))
