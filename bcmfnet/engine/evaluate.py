"""Evaluation: the predictor over a labelled set, its confusion matrix and boundary metrics, pooled over the set."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bcmfnet.data import eval_loader
from bcmfnet.data.labels import LabelTable
from bcmfnet.data.pairs import check_frame_size
from bcmfnet.engine.distributed import ALONE, Processes
from bcmfnet.engine.inference import Predictor
from bcmfnet.engine.progress import progress_bar
from bcmfnet.metrics import BoundaryMetrics, BoundaryScores, ConfusionMatrix
from bcmfnet.metrics.confusion import frame_miou


@dataclass
class Evaluation:
    """Scores of a model on a set.

    frames_per_s counts a frame's way from uint8 tensor to label map; reading files and scoring are outside it.
    by_frame is the mIoU of each frame, in the order of the set (`frame_miou`).
    """

    table: LabelTable
    confusion: ConfusionMatrix
    boundary: BoundaryScores | None
    frames: int
    frames_per_s: float
    by_frame: np.ndarray

    @property
    def miou(self) -> float:
        return self.confusion.miou()

    def iou_by_class(self) -> dict[str, float | None]:
        """IoU of each class, None where neither prediction nor truth has the class."""
        return {name: _number(value) for name, value in zip(self.table.classes, self.confusion.iou(), strict=True)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a score that does not exist is None."""
        return {
            "frames": self.frames,
            "frames_per_s": self.frames_per_s,
            "miou": _number(self.miou),
            "pixel_accuracy": _number(self.confusion.pixel_accuracy()),
            "iou": self.iou_by_class(),
            "boundary": self.boundary.to_dict(self.table.classes) if self.boundary else None,
        }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def evaluate(
    predictor: Predictor,
    dataset: Any,
    *,
    workers: int = 0,
    boundary: bool = True,
    should_stop: object = False,
    processes: Processes = ALONE,
) -> Evaluation | None:
    """Evaluate on every frame of a dataset; None when should_stop (asked for its truth) became true on the way.

    Several processes, with the same weights, share the frames, and each has the scores of all of them.
    """
    table = dataset.table
    confusion = ConfusionMatrix(table.num_classes, table.ignore_index)
    edges = BoundaryMetrics(table.num_classes, table.ignore_index) if boundary else None
    seconds, frames, by_frame = 0.0, 0, np.zeros(len(dataset))
    share = {"rank": processes.rank, "world_size": processes.count}
    with progress_bar("evaluate", len(dataset)) as progress:
        for batch in eval_loader(dataset, batch_size=1, workers=workers, should_stop=should_stop, **share):
            if should_stop:
                break
            check_frame_size(batch.files[0][0], *batch.images.shape[-2:])
            start = time.perf_counter()
            labels = predictor(batch.images).cpu()
            seconds += time.perf_counter() - start
            by_frame[processes.rank + frames * processes.count] = frame_miou(confusion.update(labels, batch.labels))
            frames += len(labels)
            if edges is not None:
                for prediction, target in zip(labels.numpy(), batch.labels.numpy(), strict=True):
                    edges.update(prediction, target)
            progress.advance()
    counted = np.array([frames, seconds])
    processes.add_up([counted, by_frame, confusion.matrix, *(edges.state.values() if edges is not None else ())])
    if counted[0] < len(dataset):
        return None
    scores = edges.compute() if edges is not None else None
    rate = processes.count * counted[0] / counted[1] if counted[1] else math.nan
    return Evaluation(table, confusion, scores, len(dataset), rate, by_frame)


def scores_table(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """Rows of text, header first: a class a row with its IoU and boundary scores, the mean last; per cent."""
    confusion, boundary = evaluation.confusion, evaluation.boundary
    header = ["class", "IoU"]
    columns = [[*confusion.iou(), confusion.miou()]]
    if boundary is not None:
        header += ["boundary IoU", *(f"F {radius} px" for radius in boundary.boundary_f)]
        columns.append([*boundary.boundary_iou, boundary.mean_boundary_iou])
        columns += [[*score.per_class, score.mean] for score in boundary.boundary_f.values()]
    names = [*evaluation.table.classes, "mean"]
    return [tuple(header)] + [
        (name, *(_percent(float(column[i])) for column in columns)) for i, name in enumerate(names)
    ]


def summary_table(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """Rows of text, header first: the scores of the whole set; per cent, speed in frames a second."""
    rows = [("mIoU", _percent(evaluation.miou)), ("pixel accuracy", _percent(evaluation.confusion.pixel_accuracy()))]
    if boundary := evaluation.boundary:
        rows.append(("boundary IoU", _percent(boundary.mean_boundary_iou)))
        rows += [(f"boundary F at {radius} px", _percent(score.mean)) for radius, score in boundary.boundary_f.items()]
        rows += [(f"mIoU within {radius} px of an edge", _percent(v)) for radius, v in boundary.trimap_iou.items()]
        rows.append(("mIoU of the interior", _percent(boundary.interior_miou)))
    rows.append(("frames", str(evaluation.frames)))
    rows.append(("frames/s", f"{evaluation.frames_per_s:.1f}"))
    return [("score", "value"), *rows]


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.2f}"


def amp_name(dtype: torch.dtype | None) -> str:
    """Name of a mixed precision in reports."""
    return {None: "float32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
