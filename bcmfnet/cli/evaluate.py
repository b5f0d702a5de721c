"""`bcmfnet evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bcmfnet.cli.options import CommonOptions, DataOptions, InferenceOptions, TTAOptions, print_table
from bcmfnet.engine.bounds import Between
from bcmfnet.engine.config import DataConfig, TTAConfig
from bcmfnet.errors import ConfigError


def evaluate(
    *,
    weights: Path,
    data: DataOptions = DataOptions(),
    inference: InferenceOptions = InferenceOptions(),
    tta: TTAOptions = TTAConfig(),
    submission: bool = False,
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
        Weights file, the folder of a run, whose best weights are taken, camvid11, which comes with the package, or a
        file of bcmfnet export.
    submission
        Score nothing: fill the folder with the labelIds of each frame as the Cityscapes server takes them, in files
        CITY_SEQUENCE_FRAME_pred_labelIds.png; the split, such as test, needs no labels.
    min_miou
        Exit with 3 when the mIoU, in per cent, is below this.
    json_output
        Print JSON instead of tables.
    """
    common.start_logging()
    if submission:
        return _submit(weights, data, inference, tta, min_miou, json_output)
    from bcmfnet.engine.evaluate import evaluate, scores_table, summary_table
    from bcmfnet.engine.exported import load_predictor
    from bcmfnet.engine.report import draw_evaluation
    from bcmfnet.engine.run_folder import write_json
    from bcmfnet.engine.tta import with_tta
    from bcmfnet.viz import require_matplotlib

    require_matplotlib("the confusion matrix")
    single, metadata = load_predictor(weights, inference.device, inference.amp)
    predictor = with_tta(single, tta)
    dataset = data.build(metadata, weights)
    with inference.folder("evaluate") as folder:
        result = evaluate(predictor, dataset, workers=data.workers)
        assert result is not None  # since nothing asks it to stop
        scores = result.to_dict() | tta.changes()
        write_json(folder / "evaluation.json", scores)
        draw_evaluation(folder, result, predictor, dataset, {"weights": weights} | tta.changes(), metadata)
    if json_output:
        print(json.dumps(scores, indent=2))
    else:
        print_table(scores_table(result))
        print()
        print_table(summary_table(result))
        print(f"\nfolder: {folder}")
    return 3 if min_miou is not None and not 100 * result.miou >= min_miou else 0


def _submit(
    weights: Path,
    data: DataOptions,
    inference: InferenceOptions,
    tta: TTAConfig,
    min_miou: float | None,
    json_output: bool,
) -> int:
    from bcmfnet.engine.exported import load_predictor
    from bcmfnet.engine.inference import label_table, trained_on
    from bcmfnet.engine.submission import submission_frames, write_submission
    from bcmfnet.engine.tta import with_tta

    if min_miou is not None:
        raise ConfigError(f"min_miou: expected none with --submission, which scores nothing, got {min_miou}")
    if data.name not in (None, "cityscapes"):
        raise ConfigError(f"data.name: expected cityscapes with --submission, got {data.name!r}")
    predictor, metadata = load_predictor(weights, inference.device, inference.amp)
    trained = trained_on(metadata, weights) or DataConfig()
    frames = submission_frames(data.root, data.split or trained.val_split)
    with inference.folder("evaluate") as folder:
        write_submission(with_tta(predictor, tta), label_table(metadata, weights), frames, folder)
    written = {"frames": len(frames), "folder": str(folder)}
    print(json.dumps(written, indent=2) if json_output else f"{len(frames)} label maps written to {folder}")
    return 0
