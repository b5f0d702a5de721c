"""Comparison of two models on the same frames: differences of their scores, and how sure these are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from bcmfnet.data import eval_loader
from bcmfnet.data.labels import LabelTable
from bcmfnet.data.pairs import check_frame_size
from bcmfnet.engine.inference import Predictor
from bcmfnet.engine.progress import progress_bar
from bcmfnet.errors import ConfigError
from bcmfnet.metrics.bootstrap import frame_sums, iou_of_sums, mean_iou_of_sums, paired_bootstrap

SCORES = {"iou": "IoU", "boundary_iou": "boundary IoU"}


@dataclass(frozen=True)
class ScoreDifference:
    """A score of both models: of each class, NaN where it has none, of all, and the interval of the difference."""

    per_class: np.ndarray
    """IoU, float64 [2, C]: of a, then of b."""
    mean: np.ndarray
    """float64 [2]."""
    interval: tuple[float, float]
    """Of mean[1] - mean[0]; see `metrics.bootstrap.paired_bootstrap`."""

    @property
    def difference(self) -> float:
        return float(self.mean[1] - self.mean[0])


@dataclass(frozen=True)
class Comparison:
    """Scores of two models on the same frames, by their keys in SCORES."""

    table: LabelTable
    frames: int
    scores: dict[str, ScoreDifference]
    samples: int
    confidence: float
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a score that does not exist is None."""
        bootstrap = {"samples": self.samples, "confidence": self.confidence, "seed": self.seed}
        return {"frames": self.frames, "bootstrap": bootstrap} | {
            key: _row(*score.mean) | {"interval": list(score.interval), "per_class": self._by_class(score)}
            for key, score in self.scores.items()
        }

    def _by_class(self, score: ScoreDifference) -> dict[str, Any]:
        return {name: _row(*pair) for name, pair in zip(self.table.classes, score.per_class.T, strict=True)}


def _row(a: float, b: float) -> dict[str, float | None]:
    return {"a": _number(a), "b": _number(b), "difference": _number(b - a)}


def check_same_frames(a: Any, b: Any) -> None:
    """Raise ConfigError where two datasets are not the same split, read from the same files in the same order."""
    if a.table != b.table or a.split != b.split or _files(a) != _files(b):
        expected = "weights whose dataset and split are those of A"
        advice = "--data.name and --data.split name one for both"
        raise ConfigError(f"B: expected {expected}, {_described(a)}, got {_described(b)}; {advice}")


def _files(dataset: Any) -> list[tuple[str, ...]]:
    return [dataset.files(i) for i in range(len(dataset))]


def _described(dataset: Any) -> str:
    return f"{len(dataset)} frames of {dataset.table.name} from {dataset.files(0)[0]} on"


def compare(
    a: Predictor,
    b: Predictor,
    dataset: Any,
    *,
    workers: int = 0,
    samples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compare two predictors on every frame of a dataset; samples, confidence and seed are `paired_bootstrap`'s."""
    table = dataset.table
    if len(dataset) < 2:
        raise ConfigError(f"data.split: expected at least two frames to draw from, got {len(dataset)}")
    frames = []
    with progress_bar("compare", len(dataset)) as progress:
        for batch in eval_loader(dataset, batch_size=1, workers=workers):
            check_frame_size(batch.files[0][0], *batch.images.shape[-2:])
            maps = [predictor(batch.images)[0].cpu() for predictor in (a, b)]
            target = batch.labels[0]
            frames.append([frame_sums(labels, target, table.num_classes, table.ignore_index) for labels in maps])
            progress.advance()
    sums = np.array(frames)  # [F, model, region or boundary, intersection or union, C]
    scores = {}
    for key, of_both in zip(SCORES, np.moveaxis(sums, 2, 0), strict=True):
        pooled = of_both.sum(0)
        interval = paired_bootstrap(of_both[:, 0], of_both[:, 1], samples=samples, confidence=confidence, seed=seed)
        scores[key] = ScoreDifference(iou_of_sums(pooled), mean_iou_of_sums(pooled), interval)
    return Comparison(table, len(frames), scores, samples, confidence, seed)


def class_table(comparison: Comparison) -> list[tuple[str, ...]]:
    """Rows of text, header first: a class a row, for each score that of A, of B and the difference; per cent."""
    header, columns = ["class"], []
    for key, score in comparison.scores.items():
        header += [f"{SCORES[key]} A", "B", "B - A"]
        columns += [map(_percent, score.per_class[0]), map(_percent, score.per_class[1])]
        columns.append(map(_signed_percent, score.per_class[1] - score.per_class[0]))
    return [tuple(header), *zip(comparison.table.classes, *columns, strict=True)]


def summary_table(comparison: Comparison) -> list[tuple[str, ...]]:
    """Rows of text, header first: a score a row, that of A, of B, the difference and its interval; per cent."""
    rows: list[tuple[str, ...]] = [("score", "A", "B", "B - A", f"{100 * comparison.confidence:g} % interval")]
    for key, score in comparison.scores.items():
        interval = " to ".join(map(_signed_percent, score.interval))
        rows.append((f"mean {SCORES[key]}", *map(_percent, score.mean), _signed_percent(score.difference), interval))
    return rows


def _percent(value: float, sign: str = "") -> str:
    return "-" if math.isnan(value) else f"{100 * value:{sign}.2f}"


def _signed_percent(value: float) -> str:
    return _percent(value, "+")


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
