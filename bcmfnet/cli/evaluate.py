"""`bcmfnet evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bcmfnet.cli.options import CommonOptions, DataOptions, InferenceOptions, print_table
from bcmfnet.engine.bounds import Between


def evaluate(
    *,
    weights: Path,
    data: DataOptions = DataOptions(),
    inference: InferenceOptions = InferenceOptions(),
    min_miou: Annotated[float | None, Between(0, 100)] = None,
    json_output: Annotated[bool, Parameter(name="--json")] = False,
    common: CommonOptions = CommonOptions(),
) -> int:
    """Evaluate weights on a labelled split: IoU, Boundary IoU, boundary F and trimap IoU, pooled over the set.

    The dataset is the one that the weights were trained on, and its validation split, unless a flag says otherwise.
    The folder gets evaluation.json, confusion_matrix.png, overlays and report.html, which shows them all.

    Parameters
    ----------
    weights
        Weights file, the folder of a run, whose best weights are taken, or camvid11, which comes with the package.
    min_miou
        Exit with 3 when the mIoU, in per cent, is below this.
    json_output
        Print JSON instead of tables.
    """
    common.start_logging()
    from bcmfnet.engine.evaluate import evaluate, scores_table, summary_table
    from bcmfnet.engine.inference import LabelPredictor
    from bcmfnet.engine.report import draw_evaluation
    from bcmfnet.engine.run_folder import write_json
    from bcmfnet.viz import require_matplotlib

    require_matplotlib("the confusion matrix")
    predictor, metadata = LabelPredictor.from_weights(weights, inference.device, inference.amp)
    dataset = data.build(metadata, weights)
    with inference.folder("evaluate") as folder:
        result = evaluate(predictor, dataset, workers=data.workers)
        write_json(folder / "evaluation.json", result.to_dict())
        draw_evaluation(folder, result, predictor, dataset, {"weights": weights}, metadata)
    if json_output:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        print_table(scores_table(result))
        print()
        print_table(summary_table(result))
        print(f"\nfolder: {folder}")
    return 3 if min_miou is not None and not 100 * result.miou >= min_miou else 0
