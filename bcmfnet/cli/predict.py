"""`bcmfnet predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from bcmfnet.cli.options import CommonOptions


def predict(
    source: str,
    /,
    *,
    weights: Path,
    output_dir: str | None = None,
    name: str = "predict",
    exist_ok: Annotated[bool, Parameter(negative=())] = False,
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto",
    device: str = "auto",
    common: CommonOptions = CommonOptions(),
) -> int:
    """Write label ids, colours and an overlay for each image.

    Parameters
    ----------
    source
        An image file, a folder of images, or a quoted glob.
    weights
        Weights file of a run (.safetensors).
    output_dir
        Folder for the results; without it runs/predict/NAME[-N].
    name
        Name of the folder under runs/predict.
    exist_ok
        Write into an output folder that has something in it.
    amp
        Mixed precision; auto is bf16 where the device computes in it, else off.
    device
        cpu, cuda or cuda:N; auto is the GPU where there is one.
    """
    common.start_logging()
    from bcmfnet.engine.inference import LabelPredictor, label_table
    from bcmfnet.engine.predict import find_images, predict
    from bcmfnet.engine.run_folder import run_folder

    images = find_images(source)
    predictor, metadata = LabelPredictor.from_weights(weights, device, amp)
    table = label_table(metadata, weights)
    with run_folder("predict", output_dir, name, exist_ok) as folder:
        result = predict(predictor, table, images, folder)
    print(f"{result.done} of {len(images)} images written to {folder}")
    return 1 if result.failed else 0
