"""`bcmfnet evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from bcmfnet.cli.options import CommonOptions, DataOptions, print_table


def evaluate(
    *,
    weights: Path,
    data: DataOptions = DataOptions(),
    output_dir: str | None = None,
    name: str = "evaluate",
    exist_ok: Annotated[bool, Parameter(negative=())] = False,
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto",
    device: str = "auto",
    min_miou: float | None = None,
    json_output: Annotated[bool, Parameter(name="--json", negative=())] = False,
    common: CommonOptions = CommonOptions(),
) -> int:
    """Evaluate weights on a labelled split: IoU, Boundary IoU, boundary F and trimap IoU, pooled over the set.

    The dataset is the one that the weights were trained on, and its validation split, unless a flag says otherwise.

    Parameters
    ----------
    weights
        Weights file of a run (.safetensors).
    output_dir
        Folder for evaluation.json, confusion_matrix.png and overlays; without it runs/evaluate/NAME[-N].
    name
        Name of the folder under runs/evaluate.
    exist_ok
        Write into an output folder that has something in it.
    amp
        Mixed precision; auto is bf16 where the device computes in it, else off.
    device
        cpu, cuda or cuda:N; auto is the GPU where there is one.
    min_miou
        Exit with 3 when the mIoU, in per cent, is below this.
    json_output
        Print JSON instead of tables.
    """
    common.start_logging()
    from bcmfnet.engine.evaluate import evaluate, scores_table, summary_table
    from bcmfnet.engine.inference import LabelPredictor
    from bcmfnet.engine.report import draw_evaluation
    from bcmfnet.engine.run_folder import run_folder, write_json

    predictor, metadata = LabelPredictor.from_weights(weights, device, amp)
    dataset = data.build(metadata)
    with run_folder("evaluate", output_dir, name, exist_ok) as folder:
        result = evaluate(predictor, dataset, workers=data.workers)
        write_json(folder / "evaluation.json", result.to_dict())
        draw_evaluation(folder, result, predictor, dataset)
    if json_output:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        print_table(scores_table(result))
        print()
        print_table(summary_table(result))
        print(f"\nfolder: {folder}")
    return 3 if min_miou is not None and not 100 * result.miou >= min_miou else 0
