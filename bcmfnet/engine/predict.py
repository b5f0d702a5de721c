"""Prediction: a file, a folder or a glob of frames to label maps and pictures."""

from __future__ import annotations

import contextlib
import functools
import glob
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bcmfnet.data.files import list_images
from bcmfnet.data.io import MAX_PIXELS, read_image, write_jpeg, write_png
from bcmfnet.data.labels import LabelTable, cityscapes_train_id_to_id
from bcmfnet.data.messages import DecoderMessages
from bcmfnet.data.pairs import check_frame_size
from bcmfnet.data.tiff import LargeTiff, open_if_large, write_label_tiff
from bcmfnet.engine.inference import Predictor
from bcmfnet.engine.pipeline import StageTimes, in_order
from bcmfnet.engine.progress import progress_bar
from bcmfnet.engine.run_folder import write_json, write_text
from bcmfnet.engine.windows import label_bands
from bcmfnet.errors import ConfigError, DataError, MissingPackageError, printable
from bcmfnet.viz import colorize, overlay, with_legend

log = logging.getLogger("bcmfnet.predict")


PICTURES = ("_labelIds.png", "_color.png", "_overlay.jpg")  # what is written for a frame, after its name
LARGE = ("_labelIds.tif",)  # and for one that is too large to be in memory
ROWS, SETTINGS = "predictions.jsonl", "settings.json"


@dataclass(frozen=True)
class Frame:
    """An image file, and the name of its predictions below the folder for them: subfolders and stem."""

    path: Path
    name: Path

    def outputs(self, folder: Path, endings: Sequence[str] = PICTURES) -> list[Path]:
        """Files that a prediction of the frame writes."""
        return [folder / self.name.parent / (self.name.name + ending) for ending in endings]


@dataclass
class PredictResult:
    """What became of the frames: files written for `done` of them, one line of reason for each that failed.

    `kept` of the done ones are of an earlier prediction; `times` are those of the others.
    """

    done: int
    failed: list[str]
    kept: int
    times: StageTimes


def find_images(sources: Sequence[str]) -> list[Frame]:
    """Frames of files, folders (their own files) and globs, each once.

    A frame keeps its folders below the source, that is below the fixed part of a glob, or below the folder that all of
    several sources are in. What an earlier prediction wrote is left out, but where it is named as a file.

    Raises ConfigError for a source without images, and for two frames that would write the same files.
    """
    roots: list[Path] = []
    found: dict[str, Path] = {}
    for source in sources:
        root, images = _images_of(source)
        if not images:
            expected = "expected an image file, a folder of images or a glob"
            raise ConfigError(printable(f"SOURCE: {expected}, found no image at {source}"))
        roots.append(root)
        found |= {os.path.abspath(image): image for image in images}
    base = os.path.commonpath([os.path.abspath(root) for root in roots])
    frames: dict[Path, Frame] = {}
    for absolute, path in found.items():
        name = Path(os.path.relpath(absolute, base)).with_suffix("")
        other = frames.setdefault(name, Frame(path, name))
        if other.path != path:
            clash = f"{other.path} and {path} would write the same files; predict them apart"
            raise ConfigError(printable(f"SOURCE: {clash}"))
    return list(frames.values())


def _images_of(source: str) -> tuple[Path, list[Path]]:
    """The folder that the images of a source are in, at whatever depth, and the images."""
    path = Path(source)
    if os.path.isdir(source):
        return path, _without_predictions(path, list_images(path))
    if os.path.lexists(source):
        return path.parent, [path]
    fixed = next((n for n, part in enumerate(path.parts) if glob.has_magic(part)), None)
    if fixed is None:
        return path.parent, []
    root = Path(*path.parts[:fixed])
    return root, _without_predictions(root, list_images(root, "/".join(path.parts[fixed:])))


def _without_predictions(root: Path, images: list[Path]) -> list[Path]:
    """The images without those that a prediction has written: they have its endings, and lie at or below its rows."""
    holds_rows = functools.cache(lambda folder: (folder / ROWS).is_file())

    def predicted(path: Path) -> bool:
        below = path.relative_to(root).parents
        return path.name.endswith(PICTURES + LARGE) and any(holds_rows(root / folder) for folder in below)

    kept = [path for path in images if not predicted(path)]
    if len(kept) < len(images):
        log.info("left out %d files of an earlier prediction in %s", len(images) - len(kept), printable(root))
    return kept


def predict(
    predictor: Predictor,
    table: LabelTable,
    frames: Sequence[Frame],
    folder: Path,
    max_pixels: int = MAX_PIXELS,
    workers: int = 1,
    resume: bool = False,
) -> PredictResult:
    """Write NAME_labelIds.png, NAME_color.png, NAME_overlay.jpg for each frame, and a line of predictions.jsonl.

    A TIFF of more than max_pixels is read and predicted in windows (`label_bands`), and becomes NAME_labelIds.tif.
    Whatever goes wrong with a frame, such as a file that is no image, or another one of more than max_pixels, is
    reported, and the others go on. Raises ConfigError where a frame's files would replace a frame.

    Args:
        workers: threads that read, and as many that write, while the network is at work.
        resume: go on in the folder of a prediction that was interrupted; a frame that failed is tried again.
    """
    _check_no_frame_is_replaced(frames, folder)
    rows = _finished_rows(frames, folder) if resume else {}
    todo = [frame for frame in frames if str(frame.path) not in rows]
    result = PredictResult(len(rows), [], len(rows), StageTimes("decode", "network", "write"))
    write_text(folder / ROWS, "".join(map(_line, rows.values())))
    with (
        (folder / ROWS).open("a", encoding="utf-8", buffering=1) as file,
        DecoderMessages() as messages,
        progress_bar("predict", len(frames), len(rows)) as progress,
        ThreadPoolExecutor(workers) as readers,
        ThreadPoolExecutor(workers) as writers,
    ):
        reader = _Reader(messages, max_pixels, workers, result.times)
        read = in_order(readers, reader.read, todo, workers)
        label = functools.partial(_label, predictor, table, folder, result.times, progress.note)
        predicted = (label(future.result()) for future in read)
        written = threading.Lock()

        def write(work: _Work) -> tuple[dict[str, Any], list[str]]:
            row, lines = _write_pictures(work, table, folder, result.times)
            with written:  # at once: the next frame may take minutes, and a killed prediction goes on by its rows
                file.write(_line(row))
            return row, lines

        for future in in_order(writers, write, predicted, workers):
            row, lines = future.result()
            for line in lines:
                log.warning("%s", line)
            if "error" in row:
                result.failed.append(row["error"])
            result.done += "error" not in row
            rows[row["file"]] = row
            progress.advance()
        for line in reader.unexplained():
            log.warning("%s", printable(line))
    write_text(folder / ROWS, "".join(_line(rows[str(frame.path)]) for frame in frames))
    return result


def _finished_rows(frames: Sequence[Frame], folder: Path) -> dict[str, dict[str, Any]]:
    """Rows of the frames that an earlier prediction has finished, by their files."""
    try:
        lines = (folder / ROWS).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return {}
    rows = {}
    for line in lines:
        with contextlib.suppress(ValueError):  # the line that was being written
            row = json.loads(line)
            if isinstance(row, dict) and "error" not in row and "share" in row:
                rows[row.get("file")] = row

    def finished(frame: Frame) -> bool:
        written = (all(map(os.path.exists, frame.outputs(folder, endings))) for endings in (PICTURES, LARGE))
        return str(frame.path) in rows and any(written)

    return {str(frame.path): rows[str(frame.path)] for frame in frames if finished(frame)}


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def keep_settings(folder: Path, settings: dict[str, Any], resume: bool) -> None:
    """Write the settings of a prediction into its folder, or raise ConfigError where those to go on with are others."""
    path = folder / SETTINGS
    if resume and path.exists():
        try:
            earlier = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise ConfigError(printable(f"resume: expected the settings of a prediction in {path}")) from None
        now = json.loads(json.dumps(settings))
        for key in earlier | now:
            if earlier.get(key) != now.get(key):
                expected = f"{key} {earlier.get(key)}, as the images in {folder} were predicted with"
                raise ConfigError(printable(f"resume: expected {expected}, got {now.get(key)}"))
    write_json(path, settings)


def _check_no_frame_is_replaced(frames: Sequence[Frame], folder: Path) -> None:
    inputs = {os.path.realpath(frame.path): frame for frame in frames}
    for frame in frames:
        for output in frame.outputs(folder, PICTURES + LARGE):
            if (replaced := inputs.get(os.path.realpath(output))) is not None:
                what = f"expected a folder where {frame.path} would not replace {replaced.path}"
                raise ConfigError(printable(f"output_dir: {what}, got {folder}"))


def _reason(frame: Frame, error: Exception) -> str:
    """One line for what went wrong with a frame.

    What cannot be read is a DataError, so an OSError is of writing; a ConfigError is of an option that others may fit.
    """
    if isinstance(error, DataError):
        return str(error)
    if isinstance(error, (ConfigError, MissingPackageError)):
        return printable(f"{frame.path}: {error}")
    if isinstance(error, OSError):
        return printable(f"{frame.path}: its prediction cannot be written: {error.strerror}")
    return printable(f"{frame.path}: {type(error).__name__}: {' '.join(str(error).split())}")


@dataclass
class _Work:
    """A frame on its way: its image, its labels, its row, or what went wrong; and what the decoder printed."""

    frame: Frame
    image: np.ndarray | LargeTiff | None = None
    labels: np.ndarray | None = None
    row: dict[str, Any] | None = None
    error: Exception | None = None
    printed: Sequence[str] = ()


class _Reader:
    """Reads frames in several threads. A frame whose decoder prints is read again alone, so that it is known whose."""

    def __init__(self, messages: DecoderMessages, max_pixels: int, workers: int, times: StageTimes) -> None:
        self.messages, self.max_pixels, self.workers, self.times = messages, max_pixels, workers, times
        self._slots, self._alone = threading.Semaphore(workers), threading.Lock()
        self._heard: dict[str, None] = {}
        self._explained: set[str] = set()

    def read(self, frame: Frame) -> _Work:
        with self.times.measure("decode"):
            with self._slots:
                before = self.messages.size
                work = self._decode(frame)
                silent = self.messages.size == before
            return work if silent else self._read_alone(frame)

    def _read_alone(self, frame: Frame) -> _Work:
        with self._alone:
            for _ in range(self.workers):
                self._slots.acquire()
            self._heard |= dict.fromkeys(self.messages.new())
            work = self._decode(frame)
            work.printed = self.messages.new()
            self._explained |= set(work.printed)
            self._slots.release(self.workers)
        return work

    def _decode(self, frame: Frame) -> _Work:
        try:
            with self.messages.kept():
                image = open_if_large(frame.path, self.max_pixels) or read_image(frame.path, self.max_pixels)
            check_frame_size(frame.path, *image.shape[:2])
            return _Work(frame, image)
        except Exception as error:
            return _Work(frame, error=error)

    def unexplained(self) -> list[str]:
        """Lines that were printed meanwhile, and not by the decoder of a frame."""
        return [line for line in [*self._heard, *self.messages.new()] if line not in self._explained]


def _label(
    predictor: Predictor, table: LabelTable, folder: Path, times: StageTimes, note: Callable[[str], None], work: _Work
) -> _Work:
    try:
        if isinstance(work.image, LargeTiff):
            with work.image:
                work.row = _row_of_large(work.frame, work.image, predictor, table, folder, note)
        elif work.image is not None:
            with times.measure("network"):
                work.labels = predictor(torch.from_numpy(work.image).permute(2, 0, 1)[None])[0].cpu().numpy()
    except Exception as error:
        work.error = error
    return work


def _write_pictures(
    work: _Work, table: LabelTable, folder: Path, times: StageTimes
) -> tuple[dict[str, Any], list[str]]:
    """The row of a frame whose pictures are written now, and the warnings about it."""
    path = work.frame.path
    row: dict[str, Any] = {"file": str(path)}
    lines = [printable(f"{path}: {line}") for line in work.printed]
    try:
        if work.error is not None:
            raise work.error
        if isinstance(work.image, np.ndarray) and work.labels is not None:
            with times.measure("write"):
                work.row = _row_of_pictures(work.frame, work.image, work.labels, table, folder)
        row |= work.row or {}
    except Exception as error:
        row["error"] = _reason(work.frame, error)
        lines.insert(0, row["error"])
    return row, lines


def _row_of_pictures(
    frame: Frame, image: np.ndarray, labels: np.ndarray, table: LabelTable, folder: Path
) -> dict[str, Any]:
    ids, color, shown = frame.outputs(folder)
    ids.parent.mkdir(parents=True, exist_ok=True)
    with _whole(ids, folder) as path:
        write_png(path, label_ids(labels, table))
    with _whole(color, folder) as path:
        write_png(path, colorize(labels, table))
    with _whole(shown, folder) as path:
        write_jpeg(path, with_legend(overlay(image, labels, table), labels, table))
    return _row(image.shape, np.bincount(labels.ravel(), minlength=table.num_classes), table)


def _row_of_large(
    frame: Frame, image: LargeTiff, predictor: Predictor, table: LabelTable, folder: Path, note: Callable[[str], None]
) -> dict[str, Any]:
    (ids,) = frame.outputs(folder, LARGE)
    ids.parent.mkdir(parents=True, exist_ok=True)
    known = np.arange(table.num_classes, dtype=np.uint8)
    colors = np.zeros((256, 3), np.uint8)
    colors[label_ids(known, table)] = table.colors
    counts = torch.zeros(table.num_classes, dtype=torch.int64)

    def bands() -> Iterator[np.ndarray]:
        for labels in label_bands(predictor, image):
            counts.add_(torch.bincount(labels.flatten(), minlength=table.num_classes).cpu())
            yield label_ids(labels.cpu().numpy(), table)
            note(f"{counts.sum() / (image.height * image.width):.0%} of {printable(frame.path.name)}")

    with _whole(ids, folder) as path:
        write_label_tiff(path, bands(), image.height, image.width, colors)
    return _row(image.shape, counts.numpy(), table)


def _row(shape: Sequence[int], pixels: np.ndarray, table: LabelTable) -> dict[str, Any]:
    """Of an image of such a height and width with so many pixels of each class."""
    named = zip(table.classes, (pixels / pixels.sum()).tolist(), strict=True)
    return {
        "width": shape[1],
        "height": shape[0],
        "share": {name: round(share, 5) for name, share in named if share > 0},
    }


@contextlib.contextmanager
def _whole(path: Path, folder: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` when it is written: of a killed process `owned` sweeps it."""
    temporary = folder / f".{threading.get_ident()}.{os.getpid()}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def label_ids(labels: np.ndarray, table: LabelTable) -> np.ndarray:
    """Ids as the dataset's own files have them: the Cityscapes server wants labelIds, the others count from 0."""
    return cityscapes_train_id_to_id()[labels] if table.name == "cityscapes19" else labels
