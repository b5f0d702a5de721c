"""`bcmfnet predict`."""

from __future__ import annotations

from pathlib import Path

from bcmfnet.cli.options import CommonOptions, InferenceOptions


def predict(
    source: str,
    /,
    *,
    weights: Path,
    inference: InferenceOptions = InferenceOptions(),
    common: CommonOptions = CommonOptions(),
) -> int:
    """Write label ids, colours and an overlay for each image.

    Parameters
    ----------
    source
        An image file, a folder of images, or a quoted glob.
    weights
        Weights file (.safetensors), or the folder of a run, whose best weights are taken.
    """
    common.start_logging()
    from bcmfnet.engine.inference import LabelPredictor, label_table
    from bcmfnet.engine.predict import find_images, predict

    images = find_images(source)
    predictor, metadata = LabelPredictor.from_weights(weights, inference.device, inference.amp)
    table = label_table(metadata, weights)
    with inference.folder("predict") as folder:
        result = predict(predictor, table, images, folder)
    print(f"{result.done} of {len(images)} images written to {folder}")
    return 1 if result.failed else 0
