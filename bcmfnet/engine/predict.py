"""Prediction: a file, a folder or a glob of frames to label maps and pictures."""

from __future__ import annotations

import functools
import glob
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bcmfnet.data.files import list_images
from bcmfnet.data.io import MAX_PIXELS, read_image, write_jpeg, write_png
from bcmfnet.data.labels import LabelTable, cityscapes_train_id_to_id
from bcmfnet.data.messages import DecoderMessages
from bcmfnet.data.pairs import check_frame_size
from bcmfnet.engine.inference import Predictor
from bcmfnet.engine.progress import progress_bar
from bcmfnet.errors import ConfigError, DataError, printable
from bcmfnet.viz import colorize, overlay, with_legend

log = logging.getLogger("bcmfnet.predict")


PICTURES = ("_labelIds.png", "_color.png", "_overlay.jpg")  # what is written for a frame, after its name
ROWS = "predictions.jsonl"


@dataclass(frozen=True)
class Frame:
    """An image file, and the name of its predictions below the folder for them: subfolders and stem."""

    path: Path
    name: Path

    def outputs(self, folder: Path) -> list[Path]:
        """Files that a prediction of the frame writes."""
        return [folder / self.name.parent / (self.name.name + ending) for ending in PICTURES]


@dataclass
class PredictResult:
    """What became of the frames: files written for `done` of them, one line of reason for each that failed."""

    done: int
    failed: list[str]


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
        return path.name.endswith(PICTURES) and any(holds_rows(root / folder) for folder in below)

    kept = [path for path in images if not predicted(path)]
    if len(kept) < len(images):
        log.info("left out %d files of an earlier prediction in %s", len(images) - len(kept), printable(root))
    return kept


def predict(
    predictor: Predictor, table: LabelTable, frames: Sequence[Frame], folder: Path, max_pixels: int = MAX_PIXELS
) -> PredictResult:
    """Write NAME_labelIds.png, NAME_color.png, NAME_overlay.jpg for each frame, and a line of predictions.jsonl.

    Whatever goes wrong with a frame, such as a file that is no image or has more than max_pixels, is reported, and the
    others go on. Raises ConfigError where a frame's files would replace a frame.
    """
    _check_no_frame_is_replaced(frames, folder)
    result = PredictResult(0, [])
    with (
        (folder / ROWS).open("w", encoding="utf-8") as rows,
        DecoderMessages() as messages,
        progress_bar("predict", len(frames)) as progress,
    ):
        for frame in frames:
            try:
                row = _predict_one(predictor, table, frame, folder, max_pixels, messages)
            except Exception as error:
                line = _reason(frame, error)
                log.warning("%s", line)
                result.failed.append(line)
                row = {"file": str(frame.path), "error": line}
            else:
                result.done += 1
            for line in messages.new():
                log.warning("%s", printable(f"{frame.path}: {line}"))
            rows.write(json.dumps(row) + "\n")
            progress.advance()
    return result


def _check_no_frame_is_replaced(frames: Sequence[Frame], folder: Path) -> None:
    inputs = {os.path.realpath(frame.path): frame for frame in frames}
    for frame in frames:
        for output in frame.outputs(folder):
            if (replaced := inputs.get(os.path.realpath(output))) is not None:
                what = f"expected a folder where {frame.path} would not replace {replaced.path}"
                raise ConfigError(printable(f"output_dir: {what}, got {folder}"))


def _reason(frame: Frame, error: Exception) -> str:
    """One line for what went wrong with a frame.

    What cannot be read is a DataError, so an OSError is of writing; a ConfigError is of an option that others may fit.
    """
    if isinstance(error, DataError):
        return str(error)
    if isinstance(error, ConfigError):
        return printable(f"{frame.path}: {error}")
    if isinstance(error, OSError):
        return printable(f"{frame.path}: its prediction cannot be written: {error.strerror}")
    return printable(f"{frame.path}: {type(error).__name__}: {' '.join(str(error).split())}")


def _predict_one(
    predictor: Predictor, table: LabelTable, frame: Frame, folder: Path, max_pixels: int, messages: DecoderMessages
) -> dict[str, object]:
    with messages.kept():
        image = read_image(frame.path, max_pixels)
    height, width = image.shape[:2]
    check_frame_size(frame.path, height, width)
    start = time.perf_counter()
    labels = predictor(torch.from_numpy(image).permute(2, 0, 1)[None])[0].cpu().numpy()
    seconds = time.perf_counter() - start
    ids, color, shown = frame.outputs(folder)
    ids.parent.mkdir(parents=True, exist_ok=True)
    write_png(ids, label_ids(labels, table))
    write_png(color, colorize(labels, table))
    write_jpeg(shown, with_legend(overlay(image, labels, table), labels, table))
    shares = np.bincount(labels.ravel(), minlength=table.num_classes) / labels.size
    named = zip(table.classes, shares.tolist(), strict=True)
    return {
        "file": str(frame.path),
        "width": width,
        "height": height,
        "seconds": round(seconds, 4),
        "share": {name: round(share, 5) for name, share in named if share > 0},
    }


def label_ids(labels: np.ndarray, table: LabelTable) -> np.ndarray:
    """Ids as the dataset's own files have them: the Cityscapes server wants labelIds, the others count from 0."""
    return cityscapes_train_id_to_id()[labels] if table.name == "cityscapes19" else labels
