"""Datasets by name: CamVid in two protocols, Cityscapes, a plain folder, prepared frames, and the drawn streets."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable
from pathlib import Path, PureWindowsPath

from bcmfnet.data.colors import color_ids, read_colors
from bcmfnet.data.decode import UNKNOWN, ColorLabels, IdLabels, id_labels
from bcmfnet.data.files import list_images
from bcmfnet.data.io import IMAGE_ENDINGS, is_gray_png
from bcmfnet.data.labels import (
    CAMVID_VOID_COLORS,
    CITYSCAPES_ROWS,
    cityscapes_id_to_train_id,
    get_label_table,
    make_label_table,
)
from bcmfnet.data.pairs import Dataset, PairedFiles, index_files
from bcmfnet.data.prepared import PreparedFrames
from bcmfnet.data.synthetic import SyntheticStreets
from bcmfnet.errors import ConfigError, DataError, MissingDataError, unknown_name

log = logging.getLogger("bcmfnet.data")
CAMVID_FRAMES = {"train": 367, "val": 101, "test": 233}
CAMVID_VOID = 11
LAYOUTS = (
    ("images/{}", "masks/{}"),
    ("{}/images", "{}/masks"),
    ("images/{}", "labels/{}"),
    ("img_dir/{}", "ann_dir/{}"),
)
"""Folders of images and of masks of a split, below the root of a dataset `folder`."""
SYNTHETIC_FRAMES = {"train": 1000, "val": 100, "test": 100}


def build_dataset(
    name: str, root: str | Path | None = None, split: str = "train", *, strict: bool = True, **options
) -> Dataset:
    """Open a split of a dataset.

    Args:
        name: one of `list_datasets()`.
        root: its folder; `cityscapes` falls back on the environment's CITYSCAPES_DATASET, `synthetic` needs none.
        split: train, val or test.
        strict: raise when an image has no mask; else leave it out and tell it in the dataset's `unpaired`.
        options: `folder`: num_classes, classes, colors (see `colors.read_colors`); `synthetic`: length, size, seed.

    Raises:
        ConfigError: unknown name or option, or a root that is not there.
        MissingDataError: no folder of that split. DataError: an empty folder, an image without a mask.
    """
    if name not in _BUILDERS:
        raise ConfigError(unknown_name("dataset", name, list_datasets()))
    build = _BUILDERS[name]
    known = list(inspect.signature(build).parameters)[3:]
    for option in options:
        if option not in known:
            choices = ", ".join(known) or "none"
            raise ConfigError(f"{option}: dataset {name} has no such option; its options: {choices}")
    return build(root, split, strict, **options)


def list_datasets() -> list[str]:
    """Names that `build_dataset` knows."""
    return sorted(_BUILDERS)


def _folder(root: str | Path | None, name: str) -> Path:
    if not root:
        raise ConfigError(f"root: expected the folder of dataset {name}, got none")
    if not Path(root).is_dir():
        raise ConfigError(f"root: expected a folder, found none at {root}")
    return Path(root)


def _camvid_segnet(root: str | Path | None, split: str, strict: bool) -> PairedFiles:
    """{split}/NAME.png|jpg and {split}annot/NAME.png, as in the SegNet tutorial; 480x360, 11 is void."""
    folder, table = _folder(root, "camvid11-segnet"), get_label_table("camvid11")
    images = index_files(folder / split, IMAGE_ENDINGS)
    labels = index_files(folder / f"{split}annot", IMAGE_ENDINGS)
    _compare_with_camvid(split, len(images))
    return PairedFiles(split, table, images, labels, id_labels(table, void=(CAMVID_VOID,)), strict)


def _camvid_ignore(root: str | Path | None, split: str, strict: bool) -> PairedFiles:
    """960x720 with colour labels, as released (with lists {split}.txt of names) or as in the copies that come split."""
    folder, table = _folder(root, "camvid11-ignore"), get_label_table("camvid11")
    if (folder / "701_StillsRaw_full").is_dir():
        images = index_files(folder / "701_StillsRaw_full", IMAGE_ENDINGS)
        labels = index_files(folder / "LabeledApproved_full", ("_L.png",))
        names = _listed_names(folder / f"{split}.txt")
        absent = sorted(names - images.keys())
        if absent:
            raise DataError(f"{folder / f'{split}.txt'}: no image of the listed frame {absent[0]}")
        images = {name: images[name] for name in names}
        labels = {name: labels[name] for name in names & labels.keys()}
    else:
        images = index_files(folder / split, IMAGE_ENDINGS)
        labels = index_files(folder / f"{split}_labels", ("_L.png",))
    _compare_with_camvid(split, len(images))
    return PairedFiles(split, table, images, labels, _camvid_colors(), strict)


def _camvid_colors() -> ColorLabels:
    """Strays are void; labels of other colours (swapped channels, interpolated when resized) have more than a few."""
    table = get_label_table("camvid11")
    return ColorLabels(color_ids(table, CAMVID_VOID_COLORS), f"the table {table.name}", strays=0.01)


def _listed_names(path: Path) -> set[str]:
    """Names of a list: the first word of each line, without folder (of either slash) and ending; # starts a comment."""
    if not path.is_file():
        raise MissingDataError(f"{path}: expected a list of the split's frames, a name a line, found no file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a list of the split's frames, a name a line: {error}") from None
    return {_frame_name(line.split()[0]) for line in text.splitlines() if line.split("#")[0].strip()}


def _frame_name(listed: str) -> str:
    """Name of a frame that a list gives as a path, spelt as the file system's encoding has it."""
    name = os.fsdecode(PureWindowsPath(listed).name.encode())
    ending = next((ending for ending in IMAGE_ENDINGS if name.lower().endswith(ending)), "")
    return name[: len(name) - len(ending)]


def _compare_with_camvid(split: str, frames: int) -> None:
    expected = CAMVID_FRAMES.get(split)
    if frames != expected:
        log.warning("CamVid %s: %d frames, but the published split has %s", split, frames, expected)


def _cityscapes(root: str | Path | None, split: str, strict: bool) -> PairedFiles:
    """leftImg8bit/{split}/CITY/*_leftImg8bit.png and gtFine/{split}/CITY/*_gtFine_labelIds.png."""
    folder = _folder(root or os.environ.get("CITYSCAPES_DATASET"), "cityscapes (or CITYSCAPES_DATASET)")
    images = index_files(folder / "leftImg8bit" / split, ("_leftImg8bit.png",), "*/*")
    labels = index_files(folder / "gtFine" / split, ("_gtFine_labelIds.png",), "*/*")
    return PairedFiles(split, get_label_table("cityscapes19"), images, labels, _cityscapes_labels(), strict)


def _cityscapes_labels() -> IdLabels:
    mapping = cityscapes_id_to_train_id()
    highest = max(row.id for row in CITYSCAPES_ROWS)
    mapping[highest + 1 : 255] = UNKNOWN
    return IdLabels(tuple(mapping.tolist()), f"a labelId 0..{highest}, or 255 (the plate's -1)")


def _plain_folder(
    root: str | Path | None,
    split: str,
    strict: bool,
    num_classes: int | None = None,
    classes: tuple[str, ...] = (),
    colors: str | Path | None = None,
) -> PairedFiles:
    """Images and masks in one of LAYOUTS; masks of colours need the file `colors`, masks of ids may have it."""
    folder = _folder(root, "folder")
    if colors is not None:
        table, ids = read_colors(colors)
        if num_classes not in (None, table.num_classes):
            raise ConfigError(f"num_classes: expected {table.num_classes}, as {colors} has, got {num_classes}")
        if classes:
            raise ConfigError(f"classes: expected none beside {colors}, which names them, got {tuple(classes)}")
    elif num_classes is None and not classes:
        raise ConfigError("num_classes: expected the number of classes of dataset folder, got none")
    else:
        table = make_label_table("folder", len(classes) if num_classes is None else num_classes, tuple(classes))
    images, labels = (index_files(path, IMAGE_ENDINGS) for path in _layout(folder, split))
    by_color = colors is not None and not is_gray_png(labels[min(labels)])
    decode = ColorLabels(ids, str(colors)) if by_color else id_labels(table)
    return PairedFiles(split, table, images, labels, decode, strict)


def _layout(folder: Path, split: str) -> tuple[Path, Path]:
    """The folders of images and of masks. Raises DataError where there are masks in two layouts."""
    layouts = [(folder / images.format(split), folder / masks.format(split)) for images, masks in LAYOUTS]
    whole = [layout for layout in layouts if all(map(Path.is_dir, layout))]
    filled = [layout for layout in whole if list_images(layout[1])]
    if len(filled) > 1:
        both = (" with ".join(str(part.relative_to(folder)) for part in layout) for layout in filled)
        raise DataError(f"{folder}: expected one layout of {split}, found {' and '.join(both)}")
    found = filled or whole or [layout for layout in layouts if layout[0].is_dir()]
    if not found:
        known = ", or ".join(f"{images.format(split)} and {masks.format(split)}" for images, masks in LAYOUTS)
        raise MissingDataError(f"{folder}: expected {known}")
    return found[0]


def _synthetic(
    root: str | Path | None,
    split: str,
    strict: bool,
    length: int | None = None,
    size: tuple[int, int] = (256, 512),
    seed: int = 0,
) -> SyntheticStreets:
    """Drawn streets; nothing is read from a disk."""
    return SyntheticStreets(SYNTHETIC_FRAMES.get(split, 1) if length is None else length, size, seed, split)


def _prepared(root: str | Path | None, split: str, strict: bool) -> PreparedFrames:
    """What `prepared.prepare` wrote."""
    return PreparedFrames(_folder(root, "prepared"), split)


_BUILDERS: dict[str, Callable[..., Dataset]] = {
    "camvid11-segnet": _camvid_segnet,
    "camvid11-ignore": _camvid_ignore,
    "cityscapes": _cityscapes,
    "folder": _plain_folder,
    "prepared": _prepared,
    "synthetic": _synthetic,
}
