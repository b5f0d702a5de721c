"""Image files paired with label files by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from bcmfnet.data.files import list_images
from bcmfnet.data.io import image_size, read_image
from bcmfnet.data.labels import LabelTable
from bcmfnet.errors import DataError, MissingDataError

MIN_SIDE = 64  # pixels of a frame that the networks take


class Dataset(Protocol):
    """What training, evaluation and verification ask of a dataset."""

    @property
    def split(self) -> str: ...

    @property
    def table(self) -> LabelTable: ...

    @property
    def unpaired(self) -> tuple[str, ...]:
        """A line for each image without a mask and each mask without an image."""

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """A name of frame i, unique in the dataset and fit for a file name."""

    def files(self, i: int) -> tuple[str, ...]:
        """What frame i is read from."""

    def frame_size(self, i: int) -> tuple[int, int]:
        """(height, width) of frame i. Raises DataError, naming the file."""

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """RGB uint8 [H, W, 3] and ids uint8 [H, W]. Raises DataError, naming the file."""


class PairedFiles:
    """Frames from files: `images` and `labels` by name, `decode` turning a label file into ids uint8 [H, W].

    Args:
        strict: raise when an image has no mask; else such frames are left out and told in `unpaired`.
    """

    def __init__(
        self,
        split: str,
        table: LabelTable,
        images: dict[str, Path],
        labels: dict[str, Path],
        decode: Callable[[Path], np.ndarray],
        strict: bool = True,
    ) -> None:
        self.split, self.table, self.decode = split, table, decode
        self.images, self.labels = images, labels
        self.names = sorted(images.keys() & labels.keys())
        bare = [f"{path}: image without mask" for name, path in sorted(images.items()) if name not in labels]
        lone = [f"{path}: mask without image" for name, path in sorted(labels.items()) if name not in images]
        self.unpaired = (*bare, *lone)
        if strict and bare:
            more = f" (and {len(bare) - 1} more)" if len(bare) > 1 else ""
            raise DataError(bare[0] + more)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        return self.names[i]

    def files(self, i: int) -> tuple[str, ...]:
        return str(self.images[self.names[i]]), str(self.labels[self.names[i]])

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        image = read_image(self.images[self.names[i]], turn=False)
        return image, self._label_of(i, image.shape[:2])

    def frame_size(self, i: int) -> tuple[int, int]:
        """(height, width) of image i from its header. Raises DataError for an image that cannot be used."""
        return image_size(self.images[self.names[i]])

    def label(self, i: int) -> np.ndarray:
        """Ids of frame i, uint8 [H, W], without decoding its image. Raises DataError."""
        return self._label_of(i, self.frame_size(i))

    def _label_of(self, i: int, size: tuple[int, int]) -> np.ndarray:
        name = self.names[i]
        label = self.decode(self.labels[name])
        if label.shape != size:
            raise DataError(
                f"{self.labels[name]}: mask of {label.shape[1]}x{label.shape[0]} pixels, but its image "
                f"{self.images[name]} has {size[1]}x{size[0]} (width x height)"
            )
        return label


def index_files(folder: Path, endings: Sequence[str], pattern: str = "*") -> dict[str, Path]:
    """Files of a folder that match `pattern`, by their name without its ending; case of endings does not matter.

    Raises:
        MissingDataError: no such folder. DataError: nothing in it, or two files of one name.
    """
    if not folder.is_dir():
        raise MissingDataError(f"{folder}: no such folder")
    found: dict[str, Path] = {}
    for path in list_images(folder, pattern, endings):
        ending = next(ending for ending in endings if path.name.lower().endswith(ending.lower()))
        name = path.name[: -len(ending)]
        if name in found:
            raise DataError(f"{path}: a second file for the frame of {found[name]}")
        found[name] = path
    if not found:
        raise DataError(f"{folder}: no file that ends in {', '.join(endings)}")
    return found


def check_frame_size(path: str | Path, height: int, width: int) -> None:
    """Raise DataError for a frame that is smaller than the networks take."""
    if min(height, width) < MIN_SIDE:
        raise DataError(f"{path}: expected an image of at least {MIN_SIDE}x{MIN_SIDE} pixels, got {width}x{height}")


def check_split_leak(a: Dataset, b: Dataset) -> None:
    """Raise DataError when a frame, told by its name, is in both datasets."""
    shared = shared_names(a, b)
    if shared:
        raise DataError(f"{a.split} and {b.split} share {len(shared)} frames, the first is {shared[0]}")


def shared_names(a: Dataset, b: Dataset) -> list[str]:
    """Names of the frames that are in both datasets, sorted."""
    return sorted({a.name(i) for i in range(len(a))} & {b.name(i) for i in range(len(b))})
