"""Export: from weights to a file for other runtimes, checked at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import cv2
import torch

from bcmfnet.data import build_dataset, normalize
from bcmfnet.data.io import read_image
from bcmfnet.engine.inference import LabelPredictor
from bcmfnet.engine.predict import find_images
from bcmfnet.engine.run_folder import write_json
from bcmfnet.export import FORMATS, DeployedGraph, export, least_side, read_exported
from bcmfnet.export.check import Check, check_exported, peak_memory
from bcmfnet.models import model_from_weights

IMAGES = 8
"""That labels are compared on at most."""
CALIBRATION_IMAGES = 64
"""That int8 takes the ranges of its maps from at most."""


def export_checked(
    weights: Path, folder: Path, format: str, size: tuple[int, int], *, dynamic: bool, output: str, dtype: str,
    uint8: bool, frames: str | None, calibration: str | None,
) -> tuple[Path, Check]:  # fmt: skip
    """Write the network of a weights file as a file in a folder, with check.json beside it; its path and the check.

    Raises CheckpointError for weights that cannot be used or a file that cannot be written, MissingPackageError where
    the format needs a package that is not installed, ConfigError or DataError for the frames.
    """
    predictor, metadata = LabelPredictor.from_weights(weights, "cpu", "off")
    model, _ = model_from_weights(weights)
    mean, std = tuple(metadata["mean"]), tuple(metadata["std"])
    own = {"mean": mean, "std": std} if uint8 else {}
    graph = DeployedGraph(model, torch.float16 if dtype == "float16" else torch.float32, output, **own)
    images = _images(
        frames or calibration, tuple(max(side, least_side(graph, format)) for side in size) if dynamic else size, IMAGES
    )
    given = None
    if calibration is not None:
        given = _images(calibration, size, CALIBRATION_IMAGES)
        given = given if uint8 else [normalize(image, mean, std) for image in given]
    of_dtype, kind = "" if dtype == "float32" else f"-{dtype}", "-logits" if output == "logits" else ""
    path = folder / f"{metadata['model']}-{'dynamic' if dynamic else 'x'.join(map(str, size))}{of_dtype}{kind}"
    path = path.with_name(path.name + FORMATS[format].ending)
    export(graph, path, format=format, size=size, dynamic=dynamic, metadata=metadata, calibration=given)
    file = read_exported(path)
    check = check_exported(file, predictor.network, images, [normalize(i, mean, std) for i in images])
    check.peak_bytes = peak_memory(file, images[0].shape[-2:])
    write_json(folder / "check.json", asdict(check))
    return path, check


def _images(frames: str | None, size: Sequence[int], most: int) -> list[torch.Tensor]:
    """uint8 [1, 3, H, W]: some of the frames, brought to the size, or drawn ones."""
    if frames is None:
        streets = build_dataset("synthetic", "", "val", length=8 * most)
        read = (streets.read(i)[0] for i in range(most))
    else:
        found = find_images([frames])
        read = (read_image(frame.path) for frame in found[:: max(1, len(found) // most)][:most])
    resized = (cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR) for image in read)
    return [torch.from_numpy(image).permute(2, 0, 1)[None].contiguous() for image in resized]
