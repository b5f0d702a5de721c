"""What is left of a run to look at: pictures, and report.html, the index of its folder."""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bcmfnet.data.io import write_jpeg, write_png
from bcmfnet.engine.config import PAPER_LOSS
from bcmfnet.engine.environment import describe_environment
from bcmfnet.engine.evaluate import Evaluation, scores_table, summary_table
from bcmfnet.engine.inference import LogitsPredictor, Predictor
from bcmfnet.engine.learner import Laps
from bcmfnet.engine.run_folder import write_text
from bcmfnet.errors import ConfigError, unknown_name
from bcmfnet.nn import BoundaryCorrectedLoss, OhemCrossEntropy, SegmentationLoss
from bcmfnet.reference import bcl as reference
from bcmfnet.viz import LossMaps, comparison, html, overlay, pictures, plot_confusion, plot_training
from bcmfnet.viz.curves import Panel

OVERLAYS = 6
WORST = 6
"""Frames of a report."""
PICTURE_BYTES, PICTURE_SIDE = 3_000_000 // (4 * WORST + 4), 640
"""Of a JPEG in a report: bytes and pixels at most. All together are less than 3 MB, which base64 makes 4 MB."""
FRONT = ("mIoU", "pixel accuracy", "boundary IoU")
"""Scores in front of a report."""
FILES = {
    "weights": "weights/*.safetensors",
    "scores": "evaluation.json",
    "scores of each evaluation": "results.csv",
    "steps and evaluations": "metrics.jsonl",
    "curves": "results.png",
    "confusion matrix": "confusion_matrix.png",
    "frames, spread evenly": "overlays/*.jpg",
    "configuration": "config.toml",
    "class weights": "class_weights.json",
    "environment": "env.json",
    "log": "train.log",
    "state to resume from": "checkpoints/*.pt",
}
"""What a folder may have."""
PANELS = {
    "Loss": (
        "",
        {
            "loss": "all",
            "ce": "cross-entropy",
            "selected_loss": "selected",
            "focal": "focal",
            "dice": "Dice",
            "jaccard": "Jaccard",
            "tversky": "Tversky",
            "distillation": "distillation",
        },
    ),  # fmt: skip
    "Validation": ("%", {"miou": "mIoU", "pixel_accuracy": "pixel accuracy"}),
    "Selected pixels": ("%", {"selected": "selected"}),
    "Threshold of the selection": ("nats", {"threshold": "threshold"}),
    "Learning rate": ("", {"lr": "lr"}),
    "Images per second": ("", {"images_per_s": "images/s"}),
    "Time of a step": ("s", {f"{part}_s": part for part in Laps.PARTS}),
}
"""Diagrams of metrics.jsonl: unit, and name of the line of each key."""


def draw_run(
    folder: Path,
    rows: list[dict[str, Any]],
    evaluation: Evaluation,
    predictor: LogitsPredictor,
    dataset: Any,
    criterion: SegmentationLoss | BoundaryCorrectedLoss,
    frames_per_step: int,
) -> None:
    """Write results.png (the curves), what draw_evaluation draws, and report.html into the folder of a run.

    rows are those of its metrics.jsonl; a step of training took frames_per_step frames, of all processes together.
    """
    _draw_pictures(folder, evaluation, predictor, dataset)
    plot_training(rows, folder / "results.png")
    options = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    report = _report(folder, evaluation, predictor, dataset, {"Configuration": options})
    report.lead = f"{options['model']['name']}, trained on {options['data']['name']} and {report.lead}"
    report.scores += _speed(rows, frames_per_step)
    report.panels = _panels(rows)
    if criterion.checked_options.boundary_weight:
        report.selection = _selection(predictor, dataset, worst_frames(evaluation)[0], criterion)
    _write_report(folder, report)


def draw_evaluation(
    folder: Path,
    evaluation: Evaluation,
    predictor: Predictor,
    dataset: Any,
    options: dict[str, Any],
    metadata: dict[str, Any],
) -> None:
    """Write overlays/, confusion_matrix.png and report.html; options of the evaluation, metadata of the weights."""
    _draw_pictures(folder, evaluation, predictor, dataset)
    tables = {
        "Configuration": options | {"dataset": dataset.table.name, "split": dataset.split},
        "Training of the weights": {"step": metadata.get("step")} | metadata.get("config", {}),
    }
    report = _report(folder, evaluation, predictor, dataset, tables)
    report.lead = f"{options['weights']}, {report.lead}"
    _write_report(folder, report)


def _draw_pictures(folder: Path, evaluation: Evaluation, predictor: Predictor, dataset: Any) -> None:
    draw_overlays(folder / "overlays", predictor, dataset)
    plot_confusion(evaluation.confusion.matrix, evaluation.table.classes, folder / "confusion_matrix.png")


def _report(
    folder: Path, evaluation: Evaluation, predictor: Predictor, dataset: Any, options: dict[str, Any]
) -> html.Report:
    """What every report has."""
    summary = summary_table(evaluation)
    front = [(name, f"{value} %") for name, value in summary[1:] if name in FRONT]
    frames = f"the {evaluation.frames} frames of {dataset.split}, at {evaluation.frames_per_s:.1f} frames/s"
    return html.Report(
        title=folder.resolve().name,
        lead=f"evaluated on {frames}",
        scores=front,
        classes=scores_table(evaluation),
        colors=evaluation.table.colors,
        summary=summary,
        matrix=evaluation.confusion.matrix.tolist(),
        worst=[_frame(predictor, dataset, i, evaluation.by_frame[i]) for i in worst_frames(evaluation)],
        tables=options | {"Environment": _environment()},
    )


def worst_frames(evaluation: Evaluation, count: int = WORST) -> list[int]:
    """Indices of the frames of the lowest mIoU, the worst first; without those that have none."""
    order = np.argsort(evaluation.by_frame, kind="stable")[:count]
    return [int(i) for i in order if not np.isnan(evaluation.by_frame[i])]


def _write_report(folder: Path, report: html.Report) -> None:
    """Write report.html, with the files that the folder has by now."""
    report.files = {
        what: [_file(folder, path) for path in sorted(folder.glob(pattern))] for what, pattern in FILES.items()
    }
    write_text(folder / "report.html", html.render(report))


def _file(folder: Path, path: Path) -> html.File:
    return html.File(os.fsencode(path.relative_to(folder).as_posix()), path.stat().st_size)


def _environment() -> dict[str, Any]:
    described = describe_environment()
    rows = described.pop("backends")
    return described | {
        "backends": {f"{row['op']} on {row['device']}": f"{row['backend']} ({row['reason']})" for row in rows}
    }


def _panels(rows: list[dict[str, Any]]) -> list[Panel]:
    """The diagrams of the rows of metrics.jsonl, shares in per cent."""

    def points(key: str, factor: int) -> list[tuple[float, float]]:
        found = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        return [(step, factor * value) for step, value in found if math.isfinite(value)]

    return [
        Panel(title, {name: points(key, 100 if unit == "%" else 1) for key, name in lines.items()}, unit)
        for title, (unit, lines) in PANELS.items()
    ]


def _speed(rows: list[dict[str, Any]], frames_per_step: int) -> list[tuple[str, str]]:
    """Steps, their time, and images per second in it; evaluations and pauses between two starts are outside it."""
    trained = [row for row in rows if row.get("images_per_s")]
    if not trained:
        return []
    ends = [row["step"] for row in trained]
    images = [frames_per_step * (end - start) for start, end in zip([0, *ends], ends, strict=False)]
    seconds = sum(number / row["images_per_s"] for number, row in zip(images, trained, strict=True))
    time = f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
    return [("steps", f"{ends[-1]:,}"), ("time of training", time), ("images/s", f"{sum(images) / seconds:.1f}")]


def _frame(predictor: Predictor, dataset: Any, index: int, miou: float) -> html.Frame:
    image, target = dataset.read(index)
    prediction = _predict(predictor, image)
    table = dataset.table
    shown = {
        "Image": image,
        html.OVER: overlay(image, target, table),
        html.WIPED: overlay(image, prediction, table),
        "Errors": pictures.errors(image, target, prediction, table.ignore_index),
    }
    accuracy = (prediction == target)[target != table.ignore_index].mean()
    note = f"mIoU {100 * miou:.2f} %, pixel accuracy {100 * accuracy:.2f} %"
    return html.Frame(dataset.name(index), note, _pictures(shown))


def _pictures(shown: dict[str, np.ndarray]) -> list[html.Picture]:
    encoded = {title: pictures.jpeg(picture, PICTURE_BYTES, PICTURE_SIDE) for title, picture in shown.items()}
    return [html.Picture(title, *picture) for title, picture in encoded.items()]


def _selection(
    predictor: LogitsPredictor, dataset: Any, index: int, criterion: SegmentationLoss | BoundaryCorrectedLoss
) -> html.Selection:
    """What the loss of a run selects on a frame."""
    image, target = dataset.read(index)
    maps = _maps(_logits(predictor, image), target, criterion)
    tiles = pictures.loss_tiles(image, target, {criterion.options["mode"]: maps}, dataset.table, PICTURE_SIDE)
    colors = [tuple(color.tolist()) for color in pictures.heat(np.linspace(0, pictures.NATS, 9)[None])[0]]
    return html.Selection(html.Frame(dataset.name(index), "", _pictures(tiles)), colors, pictures.NATS)


def _predict(predictor: Predictor, image: np.ndarray) -> np.ndarray:
    return predictor(_batch(image))[0].cpu().numpy()


def _logits(predictor: LogitsPredictor, image: np.ndarray) -> Tensor:
    return predictor.logits(_batch(image)).cpu()


def _batch(image: np.ndarray) -> Tensor:
    """A batch of one image, uint8 [1, 3, H, W]."""
    return torch.from_numpy(image).permute(2, 0, 1)[None]


def draw_overlays(folder: Path, predictor: Predictor, dataset: Any, count: int = OVERLAYS) -> None:
    """Write a comparison of prediction and ground truth for frames spread evenly over the dataset."""
    folder.mkdir(exist_ok=True)
    for i in range(0, len(dataset), max(1, len(dataset) // count))[:count]:
        image, target = dataset.read(i)
        picture = comparison(image, target, _predict(predictor, image), dataset.table)
        write_jpeg(folder / f"{dataset.name(i)}.jpg", picture)


def find_frames(dataset: Any, names: Sequence[str]) -> list[int]:
    """Indices of the frames of these names, the first frame where none is named. Raises ConfigError for another."""
    numbers = {dataset.name(i): i for i in range(len(dataset))}
    for name in names:
        if name not in numbers:
            raise ConfigError(unknown_name("frames", name, numbers))
    return [numbers[name] for name in names] or [0]


def draw_loss(path: Path, predictor: LogitsPredictor, dataset: Any, index: int) -> None:
    """Write a picture of the terms of the loss on a frame, and of what each mode scores and selects, with its default
    options.

    `paper` has the paper's suppression and share; OHEM has thresh 0.7 and no min_kept, which is meant for a batch.
    """
    image, target = dataset.read(index)
    ignore_index = dataset.table.ignore_index
    losses = {mode: BoundaryCorrectedLoss(mode=mode, ignore_index=ignore_index) for mode in reference.MODES}
    losses["paper"] = BoundaryCorrectedLoss(**PAPER_LOSS, ignore_index=ignore_index)
    losses["ohem"] = OhemCrossEntropy(min_kept=0, ignore_index=ignore_index)
    logits = _logits(predictor, image)
    drawn = _term_maps(logits, target, ignore_index)
    drawn |= {mode: _maps(logits, target, criterion) for mode, criterion in losses.items()}
    write_png(path, pictures.loss_maps(image, target, drawn, dataset.table))


def _term_maps(logits: Tensor, target: np.ndarray, ignore_index: int) -> dict[str, LossMaps]:
    """The focal loss, and what a pixel has of overlap; the cross-entropy is what `ohem` scores."""
    maps = SegmentationLoss(ignore_index=ignore_index).maps(logits, torch.from_numpy(target)[None])
    terms = {"Focal loss, gamma 2": maps.focal, "Overlap, 1 - p of the label; full scale 1": pictures.NATS * maps.miss}
    return {name: LossMaps(values[0].numpy(), values[0].numpy(), None) for name, values in terms.items()}


def _maps(logits: Tensor, target: np.ndarray, criterion: SegmentationLoss | BoundaryCorrectedLoss) -> LossMaps:
    """What a loss makes of a frame's logits [1, C, h, w] and labels [H, W]."""
    options = criterion.checked_options
    _, stats, maps = reference.loss(logits, torch.from_numpy(target)[None], options)
    terms = (k * ce for k, ce in zip(options.terms, (maps.ce, maps.ce_r, maps.ce_c), strict=True) if k)
    term = sum(terms, torch.zeros_like(maps.ce))
    score = maps.q / reference.Q_SCALE
    cross_entropy = maps.ce[maps.selected].mean().item() if maps.selected.any() else None
    threshold = stats.threshold.item() / reference.Q_SCALE
    return LossMaps(score[0].numpy(), term[0].numpy(), maps.selected[0].numpy(), threshold, cross_entropy)
