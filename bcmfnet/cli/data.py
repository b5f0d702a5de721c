"""`bcmfnet data verify`, `prepare` and `convert`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import App, Parameter

from bcmfnet.cli.options import CommonOptions, print_table
from bcmfnet.engine.config import PATH, OptionalPath

app = App(name="data", help="Look after datasets.")


@Parameter(name="data")
@dataclass
class SourceOptions:
    """A dataset as a whole."""

    name: str
    """Dataset: camvid11-segnet, camvid11-ignore, cityscapes, folder, prepared or synthetic."""
    root: Annotated[str, PATH] = ""
    """Folder of the dataset."""
    num_classes: int | None = None
    """Number of classes of a folder dataset."""
    colors: OptionalPath = None
    """JSON or CSV file with the classes of a folder dataset and their colours; needed where its masks are colours."""
    splits: tuple[str, ...] = ("train", "val")
    """Splits to take."""

    def options(self) -> dict[str, Any]:
        """What a dataset of that name takes besides its root and split."""
        options = {"num_classes": self.num_classes, "colors": self.colors}
        return {key: value for key, value in options.items() if value is not None}


@app.command
def verify(
    *,
    data: SourceOptions,
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
    json_output
        Print JSON instead of a table.
    """
    common.start_logging()
    from bcmfnet.data import verify

    report = verify(data.name, data.root, data.splits, **data.options())
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


@app.command
def prepare(
    *,
    data: SourceOptions,
    output_dir: Annotated[str, PATH],
    exist_ok: bool = False,
    common: CommonOptions = CommonOptions(),
) -> int:
    """Decode a dataset once, for loaders that are held up by decoding.

    Writes the frames of each split uncompressed, 4 bytes a pixel (29 GB for train and val of Cityscapes), from which a
    crop reads its own rows. `--data.name prepared --data.root OUTPUT_DIR` then trains, evaluates and verifies as the
    dataset itself does, with the same crops. It is refused where it is damaged, or where a file that it was made from
    has changed since.

    Parameters
    ----------
    output_dir
        Folder to write to.
    exist_ok
        Write into a folder that has something in it.
    """
    common.start_logging()
    from bcmfnet.data import build_dataset, prepare
    from bcmfnet.engine.run_folder import run_folder

    datasets = {split: build_dataset(data.name, data.root, split, **data.options()) for split in data.splits}
    with run_folder("prepare", output_dir, None, exist_ok) as folder:
        prepare(folder, datasets)
    print(f"{output_dir}: {', '.join(f'{len(d)} frames of {split}' for split, d in datasets.items())}; use "
          f"--data.name prepared --data.root {output_dir}")  # fmt: skip
    return 0


@app.command
def convert(
    source: Annotated[str, PATH],
    /,
    *,
    output_dir: Annotated[str, PATH],
    split: str = "train",
    images: OptionalPath = None,
    colors: OptionalPath = None,
    background: str = "background",
    void: tuple[str, ...] = (),
    common: CommonOptions = CommonOptions(),
) -> int:
    """Draw polygons into masks: annotations of COCO or of labelme become a dataset `folder`.

    Writes images/SPLIT, masks/SPLIT and colors.json, which `--data.colors` takes; once for each split into the same
    folder, whose later splits have the classes of the first. Where shapes overlap the later one is seen: labelme's as
    they stand in the file, COCO's with the smaller ones over the larger ones. Compressed RLE is refused.

    Parameters
    ----------
    source
        COCO file (instances of polygons or of uncompressed RLE), labelme file, or folder of labelme files.
    output_dir
        Folder of the dataset.
    split
        Split to write.
    images
        Folder of the images; without it they are looked for where the annotations say, beside themselves.
    colors
        JSON or CSV file with the classes and their colours; without it the background and the labels of the source.
    background
        Class of the pixels that no shape covers; void leaves them out.
    void
        Labels that are no classes, and left out too.
    """
    common.start_logging()
    from bcmfnet.data import convert
    from bcmfnet.engine.run_folder import run_folder

    with run_folder("convert", output_dir, None, exist_ok=True) as folder:
        frames, table = convert(source, folder, split, images=images, colors=colors, background=background, void=void)
    print(f"{output_dir}: {frames} frames of {split}, classes {', '.join(table.classes)}; use --data.name folder "
          f"--data.root {output_dir} --data.colors {folder / 'colors.json'}")  # fmt: skip
    return 0
