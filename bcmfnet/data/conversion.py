"""Polygons made label maps: COCO's and labelme's annotations as a dataset `folder`."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from bcmfnet.data.annotations import Annotated, read_annotations
from bcmfnet.data.colors import VOID, read_colors, write_colors
from bcmfnet.data.io import IMAGE_ENDINGS, image_size, write_png
from bcmfnet.data.labels import MAX_CLASSES, LabelTable, make_label_table
from bcmfnet.errors import ConfigError, DataError, unknown_name

log = logging.getLogger("bcmfnet.data")
COLORS = "colors.json"
PARTS = ("images", "masks")


def convert(
    source: str | Path,
    folder: str | Path,
    split: str = "train",
    *,
    images: str | Path | None = None,
    colors: str | Path | None = None,
    background: str = "background",
    void: Iterable[str] = (),
) -> tuple[int, LabelTable]:
    """Draw the polygons of a split into images/SPLIT, masks/SPLIT and colors.json of a dataset `folder`.

    The classes are those of colors.json where a former split has left it, else of `colors`, else the background and the
    labels of the source. Images are copied. Where shapes overlap the later one is seen: in labelme's files as they
    stand, in COCO's the one of smaller area.

    Args:
        source: a COCO file, or labelme's, one or a folder of them.
        images: folder of the images; without it they are where the annotations say, from their own folder on.
        colors: file of names and colours (see `colors.read_colors`).
        background: class of the pixels that no shape covers; void leaves them out.
        void: labels that are no classes; void is one anyway.

    Returns:
        How many images there are, and the classes.

    Raises:
        ConfigError: a split that is there already, classes that do not fit. DataError: annotations or images that
            cannot be used, a label that is no class, or not enough room. Nothing of the split is left then.
    """
    folder = Path(folder)
    if not split or Path(split).name != split:
        raise ConfigError(f"split: expected the name of a folder, got {split!r}")
    for part in PARTS:
        if (folder / part / split).exists():
            raise ConfigError(f"split: expected one that is not in {folder} yet, got {split!r}")
    labels, frames = read_annotations(Path(source), None if images is None else Path(images))
    ignored = {VOID, *void}
    for name in sorted(ignored - {VOID, *labels}):
        log.warning("%s: no label %r, which void names", source, name)
    table = _classes(folder, source, colors, [name for name in (background, *labels) if not _is_void(name, ignored)])
    ids = dict(zip(table.classes, range(table.num_classes), strict=True))
    ids |= {name: table.ignore_index for name in (background, *labels) if _is_void(name, ignored)}
    if background not in ids:
        raise ConfigError(unknown_name("background", background, [*table.classes, VOID]))
    for frame in frames:
        for shape in frame.shapes:
            if shape.label not in ids:
                raise DataError(unknown_name(f"{frame.source}: label", shape.label, table.classes))
    sizes = _check_images(frames)
    _write(folder, split, frames, sizes, ids, ids[background], table)
    return len(frames), table


def _is_void(name: str, void: set[str]) -> bool:
    return name in void or name.lower() == VOID


def _classes(folder: Path, source: str | Path, colors: str | Path | None, names: list[str]) -> LabelTable:
    kept = folder / COLORS
    table = read_colors(colors)[0] if colors is not None else None
    if kept.exists():
        former = read_colors(kept)[0]
        if table is not None and table.classes != former.classes:
            raise ConfigError(f"colors: expected the classes of {kept}, got those of {colors}")
        return former
    if table is not None:
        return table
    names = list(dict.fromkeys(names))
    if not 2 <= len(names) <= MAX_CLASSES:
        raise DataError(f"{source}: expected 2 to {MAX_CLASSES} classes, got {len(names)}: {', '.join(names[:9])}")
    return make_label_table("folder", len(names), tuple(names))


def _check_images(frames: list[Annotated]) -> list[tuple[int, int]]:
    """(height, width) of each image. Raises DataError for one that is not there or not what its annotation says."""
    sizes: list[tuple[int, int]] = []
    named: dict[str, Path] = {}
    for frame in frames:
        if not frame.image.is_file():
            raise DataError(f"{frame.source}: expected its image at {frame.image}, found no file")
        if frame.image.suffix.lower() not in IMAGE_ENDINGS:
            raise DataError(f"{frame.image}: expected a name that ends in {', '.join(IMAGE_ENDINGS)}")
        if (first := named.setdefault(frame.image.stem, frame.image)) is not frame.image:
            raise DataError(f"{frame.source}: expected images of different names, got {first} and {frame.image}")
        size = image_size(frame.image)
        if frame.size not in (None, size):
            expected, got = (f"{width}x{height}" for height, width in (frame.size, size))
            raise DataError(f"{frame.image}: expected {expected} pixels, as {frame.source} has it, got {got}")
        sizes.append(size)
    return sizes


def _write(
    folder: Path,
    split: str,
    frames: list[Annotated],
    sizes: list[tuple[int, int]],
    ids: dict[str, int],
    background: int,
    table: LabelTable,
) -> None:
    unfinished = folder / f".{split}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        for part in PARTS:
            (unfinished / part).mkdir(parents=True)
            (folder / part).mkdir(exist_ok=True)
        for frame, size in zip(frames, sizes, strict=True):
            mask = np.full(size, background, np.uint8)
            for shape in frame.shapes:
                shape.draw(mask, ids[shape.label])
            write_png(unfinished / "masks" / f"{frame.image.stem}.png", mask)
            shutil.copyfile(frame.image, unfinished / "images" / frame.image.name)
        if not (folder / COLORS).exists():
            write_colors(folder / COLORS, table)
        for part in PARTS:
            os.rename(unfinished / part, folder / part / split)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
