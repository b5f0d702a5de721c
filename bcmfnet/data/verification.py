"""A look at every frame of a dataset before hours are spent on it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from bcmfnet.data.datasets import build_dataset
from bcmfnet.data.labels import LabelTable
from bcmfnet.data.messages import DecoderMessages
from bcmfnet.data.pairs import Dataset, PairedFiles, check_frame_size, shared_names
from bcmfnet.data.prepared import PreparedFrames
from bcmfnet.data.synthetic import SyntheticStreets
from bcmfnet.errors import DataError, printable

log = logging.getLogger("bcmfnet.data")
QUICK_LABELS = 500  # of a split, that are read before a training
DRAWN_FRAMES = 200  # that are counted at most
Looked = tuple[tuple[int, int], np.ndarray]  # (height, width), and pixels of each label value


@dataclass
class VerifyReport:
    """What was found: printable lines of problems, and pixels of each label value (int64 [256]) and frames by split.

    `problems` make a training useless or end it; it can go on in spite of `warnings`.
    """

    table: LabelTable | None = None
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
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
            "warnings": self.warnings,
            "splits": {
                split: {"frames": frames, "class_shares": dict(zip(self._names(), self._shares(split), strict=True))}
                for split, frames in self.frames.items()
            },
        }

    def _names(self) -> list[str]:
        return [*self.table.classes, "void"] if self.table else []

    def _shares(self, split: str) -> list[float]:
        if self.table is None:
            return []
        pixels = self.pixels[split]
        counts = [*pixels[: self.table.num_classes], pixels[self.table.ignore_index]]
        return [float(count / max(1, pixels.sum())) for count in counts]


def verify(name: str, root: str | Path | None, splits: Iterable[str], **options) -> VerifyReport:
    """Check every frame of the splits of a dataset; see `build_dataset` for the arguments.

    Reports missing pairs, files that cannot be read, images below 64x64 pixels, of more than 8 bits or turned by
    their EXIF orientation, masks of another size, values and colours outside the table, splits whose labels are void
    or of one class and void, and frames that are in two splits; as warnings, classes that a split has no pixel of.
    Raises ConfigError only, for arguments that cannot be used.
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
        looked, said = _look(dataset, partial(_look_at_whole, dataset))
        report.warnings += said
        for found in looked:
            if isinstance(found, str):
                report.problems.append(found)
            else:
                report.pixels[split] += found
        problems, warnings = _judge(dataset, split, report.pixels[split])
        report.problems += problems
        report.warnings += warnings
    for (a, first), (b, second) in combinations(datasets.items(), 2):
        report.problems += [f"{name}: in {a} and in {b}" for name in shared_names(first, second)]
    report.problems, report.warnings = ([*map(printable, lines)] for lines in (report.problems, report.warnings))
    return report


def check_before_training(datasets: Iterable[Dataset]) -> None:
    """Refuse files that `verify` would call a problem, at a cost of seconds: no image is decoded.

    Looks at the header of every image and at up to 500 label maps a split, spread evenly over it; at all of them where
    these have no two classes. Logs what verify would warn of. Raises DataError with the first problem.
    """
    for dataset in datasets:
        if isinstance(dataset, PairedFiles | PreparedFrames):
            _check_one_in(-(-len(dataset) // QUICK_LABELS), dataset)


def _check_one_in(every: int, dataset: PairedFiles | PreparedFrames) -> None:
    """Check each `every`-th label map of a split, and the headers of all its images."""

    def look(i: int) -> Looked:
        return _counted(dataset.label(i)) if i % every == 0 else (dataset.frame_size(i), np.zeros(256, np.int64))

    found, said = _look(dataset, look)
    problems = [line for line in found if isinstance(line, str)]
    pixels = sum((counts for counts in found if not isinstance(counts, str)), np.zeros(256, np.int64))
    judged, warnings = _judge(dataset, dataset.split, pixels)
    if every > 1:
        if judged and not problems:
            return _check_one_in(1, dataset)
        log.info("%s: looked at one in %d label maps; `bcmfnet data verify` looks at all", dataset.split, every)
        judged = warnings = []
    problems += judged
    if problems:
        more = f" (and {len(problems) - 1} more, which `bcmfnet data verify` lists)" if problems[1:] else ""
        raise DataError(problems[0] + more)
    for line in said + warnings:
        log.warning("%s", printable(line))


def _look_at_whole(dataset: Dataset, i: int) -> Looked:
    """At the label map of frame i, of which the image was read too."""
    if isinstance(dataset, PreparedFrames):
        dataset.check(i)
    return _counted(dataset.read(i)[1])


def _counted(label: np.ndarray) -> Looked:
    return label.shape, np.bincount(label.ravel(), minlength=256)


def _look(dataset: Dataset, look: Callable[[int], Looked]) -> tuple[list[np.ndarray | str], list[str]]:
    """For each frame the pixels of each value of its labels, int64 [256], or a line of what is wrong with it.

    The second list has a line for each message of a decoder. Frames are looked at in threads, so those that were under
    way when there was one are looked at once more, one by one.
    """
    suspects: list[int] = []

    def checked(i: int) -> np.ndarray | str:
        said = messages.size
        try:
            size, pixels = look(i)
            check_frame_size(dataset.files(i)[0], *size)
        except DataError as error:
            return str(error)
        except Exception as error:  # a frame that asks for too much memory, say, does not end the check of the others
            return f"{dataset.files(i)[0]}: {type(error).__name__}: {error}"
        finally:
            if messages.size > said:
                suspects.append(i)
        return pixels

    with DecoderMessages() as messages, messages.kept():
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(checked, range(len(dataset))))
        lines = []
        messages.new()
        for i in sorted(suspects):
            checked(i)
            lines += [f"{dataset.files(i)[0]}: {line}" for line in messages.new()]
    return found, lines


def _judge(dataset: Dataset, split: str, pixels: np.ndarray) -> tuple[list[str], list[str]]:
    """Problems and warnings of a split by the pixels of each of its label values; none where no label was read."""
    table, classes = dataset.table, pixels[: dataset.table.num_classes]
    present, void = np.flatnonzero(classes), pixels[table.ignore_index]
    if not pixels.any():
        return [], []
    labels = f"{dataset.files(0)[-1]} and all other labels of {split}"
    if not present.size:
        return [f"{labels}: expected a pixel of a class, got void ({table.ignore_index}) alone"], []
    if present.size == 1 and void:
        share = f"{table.classes[present[0]]} and {100 * void / pixels.sum():.3g} % void ({table.ignore_index})"
        hint = f"; masks of 0 and {table.ignore_index} need a 1 for the foreground" if present[0] == 0 else ""
        return [f"{labels}: expected pixels of two classes, got {share}{hint}"], []
    absent = [name for name, count in zip(table.classes, classes, strict=True) if not count]
    return [], [f"{split}: no pixel of {', '.join(absent)}"] if absent else []


def count_pixels(dataset: Dataset) -> np.ndarray:
    """Pixels of each label value in each frame, int64 [frames, 256]. Raises DataError for a label that is not whole.

    Frames that are drawn are alike, and drawing takes longer than reading labels: of these every n-th is counted.
    """
    drawn = isinstance(dataset, SyntheticStreets)
    counted = range(0, len(dataset), -(-len(dataset) // DRAWN_FRAMES) if drawn else 1)

    def count(i: int) -> np.ndarray:
        label = dataset.label(i) if isinstance(dataset, PairedFiles | PreparedFrames) else dataset.read(i)[1]
        return np.bincount(label.ravel(), minlength=256)

    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(count, counted)))
