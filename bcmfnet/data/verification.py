"""A look at every frame of a dataset before hours are spent on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from bcmfnet.data.datasets import build_dataset
from bcmfnet.data.labels import LabelTable
from bcmfnet.data.pairs import Dataset, shared_names
from bcmfnet.errors import DataError


@dataclass
class VerifyReport:
    """What was found: a line for each problem, and pixels of each label value (int64 [256]) and frames by split."""

    table: LabelTable | None = None
    problems: list[str] = field(default_factory=list)
    frames: dict[str, int] = field(default_factory=dict)
    pixels: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """A table of text, header first: frames, then the share of each class and of void in per cent."""
        rows = [("class", *self.frames), ("frames", *map(str, self.frames.values()))]
        for name, *shares in zip(self._names(), *map(self._shares, self.frames), strict=True):
            rows.append((name, *(f"{100 * share:.2f} %" for share in shares)))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; shares are fractions of all pixels."""
        return {
            "ok": self.ok,
            "problems": self.problems,
            "splits": {
                split: {"frames": frames, "class_shares": dict(zip(self._names(), self._shares(split), strict=True))}
                for split, frames in self.frames.items()
            },
        }

    def _names(self) -> list[str]:
        return [*self.table.classes, "void"] if self.table else []

    def _shares(self, split: str) -> list[float]:
        pixels, table = self.pixels[split], self.table
        counts = [*pixels[: table.num_classes], pixels[table.ignore_index]]
        return [float(count / max(1, pixels.sum())) for count in counts]


def verify(name: str, root: str | Path | None, splits: Iterable[str], **options) -> VerifyReport:
    """Check every frame of the splits of a dataset; see `build_dataset` for the arguments.

    Reports missing pairs, files that cannot be read, masks of another size, values outside the table, and frames
    that are in two splits. Raises ConfigError only, for arguments that cannot be used.
    """
    datasets, problems = {}, []
    for split in splits:
        try:
            datasets[split] = build_dataset(name, root, split, strict=False, **options)
        except DataError as error:
            problems.append(str(error))
    report = verify_datasets(datasets)
    report.problems[:0] = problems
    return report


def verify_datasets(datasets: Mapping[str, Dataset]) -> VerifyReport:
    """Check every frame of datasets that are open already, by the name of their split."""
    report = VerifyReport()
    for split, dataset in datasets.items():
        report.table = dataset.table
        report.problems += dataset.unpaired
        report.frames[split], report.pixels[split] = len(dataset), np.zeros(256, np.int64)
        with ThreadPoolExecutor() as pool:
            for found in pool.map(lambda i, dataset=dataset: _count(dataset, i), range(len(dataset))):
                if isinstance(found, DataError):
                    report.problems.append(str(found))
                else:
                    report.pixels[split] += found
    for (a, first), (b, second) in combinations(datasets.items(), 2):
        report.problems += [f"{name}: in {a} and in {b}" for name in shared_names(first, second)]
    return report


def _count(dataset: Dataset, i: int) -> np.ndarray | DataError:
    """Pixels of each label value of a frame, int64 [256], or what is wrong with it."""
    try:
        _, label = dataset.read(i)
    except DataError as error:
        return error
    return np.bincount(label.ravel(), minlength=256)
