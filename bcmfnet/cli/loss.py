"""`bcmfnet loss`."""

from __future__ import annotations

from pathlib import Path

from bcmfnet.cli.options import CommonOptions, DataOptions, InferenceOptions


def loss(
    *frames: str,
    weights: Path,
    data: DataOptions = DataOptions(),
    inference: InferenceOptions = InferenceOptions(),
    common: CommonOptions = CommonOptions(),
) -> int:
    """Draw the terms of the loss on labelled frames, and what each mode scores and selects, FRAME_loss.png for each.

    The dataset is the one that the weights were trained on, and its validation split, unless a flag says otherwise.

    Parameters
    ----------
    frames
        Names of frames; the first of the split where none is named.
    weights
        Weights file, the folder of a run, whose best weights are taken, or camvid11, which comes with the package.
    """
    common.start_logging()
    from bcmfnet.engine.inference import LabelPredictor
    from bcmfnet.engine.report import draw_loss, find_frames

    predictor, metadata = LabelPredictor.from_weights(weights, inference.device, inference.amp)
    dataset = data.build(metadata, weights)
    found = find_frames(dataset, frames)
    with inference.folder("loss") as folder:
        for index in found:
            draw_loss(folder / f"{dataset.name(index)}_loss.png", predictor, dataset, index)
    print(f"{len(found)} pictures written to {folder}")
    return 0
