"""Prediction: a file, a folder or a glob of frames to label maps and pictures."""

from __future__ import annotations

import glob
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bcmfnet.data.io import IMAGE_ENDINGS, read_image, write_jpeg, write_png
from bcmfnet.data.labels import LabelTable, cityscapes_train_id_to_id
from bcmfnet.engine.inference import LabelPredictor
from bcmfnet.engine.progress import progress_bar
from bcmfnet.errors import ConfigError, DataError
from bcmfnet.viz import colorize, overlay

log = logging.getLogger("bcmfnet.predict")


@dataclass
class PredictResult:
    """What became of the frames: files written for `done` of them, one line of reason for each that failed."""

    done: int
    failed: list[str]


def find_images(source: str) -> list[Path]:
    """Images of a file, a folder (its own files, sorted by name) or a glob. Raises ConfigError when there are none."""
    path = Path(source)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_ENDINGS)
    elif path.exists():
        found = [path]
    else:
        found = sorted(p for p in map(Path, glob.glob(source, recursive=True)) if p.suffix.lower() in IMAGE_ENDINGS)
    if not found:
        raise ConfigError(f"SOURCE: expected an image file, a folder of images or a glob, found no image at {source}")
    stems: dict[str, Path] = {}
    for image in found:
        if stems.setdefault(image.stem, image) != image:
            raise ConfigError(f"SOURCE: {stems[image.stem]} and {image} would write the same files; predict them apart")
    return found


def predict(predictor: LabelPredictor, table: LabelTable, images: list[Path], folder: Path) -> PredictResult:
    """Write STEM_labelIds.png, STEM_color.png, STEM_overlay.jpg for each image, and a line of predictions.jsonl.

    An image that cannot be read or is too small is reported, and the others go on.
    """
    result = PredictResult(0, [])
    with (folder / "predictions.jsonl").open("w") as rows, progress_bar("predict", len(images)) as progress:
        for path in images:
            try:
                row = _predict_one(predictor, table, path, folder)
            except DataError as error:
                log.warning("%s", error)
                result.failed.append(str(error))
                row = {"file": str(path), "error": str(error)}
            else:
                result.done += 1
            rows.write(json.dumps(row) + "\n")
            progress.advance()
    return result


def _predict_one(predictor: LabelPredictor, table: LabelTable, path: Path, folder: Path) -> dict[str, object]:
    image = read_image(path)
    height, width = image.shape[:2]
    if min(height, width) < 64:
        raise DataError(f"{path}: expected an image of at least 64x64 pixels, got {width}x{height}")
    start = time.perf_counter()
    labels = predictor(torch.from_numpy(image).permute(2, 0, 1)[None])[0].cpu().numpy()
    seconds = time.perf_counter() - start
    write_png(folder / f"{path.stem}_labelIds.png", label_ids(labels, table))
    write_png(folder / f"{path.stem}_color.png", colorize(labels, table))
    write_jpeg(folder / f"{path.stem}_overlay.jpg", overlay(image, labels, table))
    shares = np.bincount(labels.ravel(), minlength=table.num_classes) / labels.size
    named = zip(table.classes, shares.tolist(), strict=True)
    return {
        "file": str(path),
        "width": width,
        "height": height,
        "seconds": round(seconds, 4),
        "share": {name: round(share, 5) for name, share in named if share > 0},
    }


def label_ids(labels: np.ndarray, table: LabelTable) -> np.ndarray:
    """Ids as the dataset's own files have them: the Cityscapes server wants labelIds, the others count from 0."""
    return cityscapes_train_id_to_id()[labels] if table.name == "cityscapes19" else labels
