"""`bcmfnet data verify`."""

from __future__ import annotations

import json
from typing import Annotated

from cyclopts import App, Parameter

from bcmfnet.cli.options import CommonOptions, print_table
from bcmfnet.engine.config import PATH

app = App(name="data", help="Look after datasets.")


@app.command
def verify(
    *,
    data_name: Annotated[str, Parameter(name="--data.name")],
    data_root: Annotated[str, Parameter(name="--data.root"), PATH] = "",
    num_classes: Annotated[int | None, Parameter(name="--data.num-classes")] = None,
    splits: Annotated[tuple[str, ...], Parameter(name="--data.splits")] = ("train", "val"),
    json_output: Annotated[bool, Parameter(name="--json")] = False,
    common: CommonOptions = CommonOptions(),
) -> int:
    """Check every frame of a dataset; exit with 1 when something is wrong.

    Reports missing pairs, files that cannot be read, images below 64x64 pixels, of more than 8 bits or turned by their
    EXIF orientation, masks of another size, label values and colours outside the table, splits of one class or none,
    the share of each class, and frames that are in more than one split. A class that a split has no pixel of is a
    warning. A training begins with a part of these checks, which takes seconds.

    Parameters
    ----------
    data_name
        Dataset: camvid11-segnet, camvid11-ignore, cityscapes or folder.
    data_root
        Folder of the dataset.
    num_classes
        Number of classes of a folder dataset.
    splits
        Splits to look at.
    json_output
        Print JSON instead of a table.
    """
    common.start_logging()
    from bcmfnet.data import verify

    options = {"num_classes": num_classes} if num_classes is not None else {}
    report = verify(data_name, data_root, splits, **options)
    if json_output:
        print(json.dumps(report.to_dict(), indent=2))
        return 0 if report.ok else 1
    print_table(report.rows)
    for warning in report.warnings:
        print(f"warning: {warning}")
    for problem in report.problems:
        print(problem)
    print("no problem found" if report.ok else f"{len(report.problems)} problems")
    return 0 if report.ok else 1
