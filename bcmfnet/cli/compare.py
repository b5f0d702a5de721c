"""`bcmfnet compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bcmfnet.cli.options import CommonOptions, DataOptions, DeviceOptions, TTAOptions, print_table
from bcmfnet.engine.bounds import Between
from bcmfnet.engine.config import TTAConfig


def compare(
    a: Path,
    b: Path,
    /,
    *,
    data: DataOptions = DataOptions(),
    device: DeviceOptions = DeviceOptions(),
    tta: TTAOptions = TTAConfig(),
    samples: Annotated[int, Between(100, 10**6)] = 10_000,
    confidence: Annotated[float, Between(50, 99.9)] = 95.0,
    seed: Annotated[int, Between(0, 2**63 - 1)] = 0,
    json_output: Annotated[bool, Parameter(name="--json")] = False,
    common: CommonOptions = CommonOptions(),
) -> int:
    """Evaluate two models on the same frames, and print how their IoU and Boundary IoU differ and how sure that is.

    The interval is of a paired bootstrap: as many frames as there are, drawn with replacement, the same for both
    models, and the scores pooled over them. It tells whether other frames would give another answer, not whether
    another training would. Both must have been trained on the same dataset with the same validation split, unless
    flags name one for both.

    Parameters
    ----------
    a
        Weights file, the folder of a run, whose best weights are taken, camvid11, which comes with the package, or a
        file of bcmfnet export.
    b
        The same of the other model.
    samples
        How often frames are drawn.
    confidence
        Share of the drawn differences that the interval holds, per cent.
    seed
        Seed of the draws.
    json_output
        Print JSON instead of tables.
    """
    common.start_logging()
    from bcmfnet.engine.compare import check_same_frames, class_table, compare, summary_table
    from bcmfnet.engine.exported import load_predictor
    from bcmfnet.engine.tta import with_tta

    predictors, datasets = [], []
    for weights in (a, b):
        predictor, metadata = load_predictor(weights, device.device, device.amp)
        predictors.append(with_tta(predictor, tta))
        datasets.append(data.build(metadata, weights))
    check_same_frames(*datasets)
    result = compare(
        predictors[0], predictors[1], datasets[0],
        workers=data.workers, samples=samples, confidence=confidence / 100, seed=seed,
    )  # fmt: skip
    if json_output:
        models = {"a": str(a), "b": str(b), "split": datasets[0].split}
        print(json.dumps(models | result.to_dict() | tta.changes(), indent=2))
        return 0
    print(f"A: {a}\nB: {b}\n")
    print_table(class_table(result))
    print()
    print_table(summary_table(result))
    print(f"\n{result.frames} frames, drawn {samples} times with seed {seed}")
    return 0
