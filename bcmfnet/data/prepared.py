"""A dataset decoded once, into files that are mapped into memory: a crop reads its own rows and decodes nothing.

SPLIT.frames holds for each frame its image uint8 [H, W, 3] and then its ids uint8 [H, W], one frame after the other;
index.json says where, and is written last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np

from bcmfnet.data.labels import LabelTable
from bcmfnet.data.pairs import Dataset
from bcmfnet.errors import ConfigError, DataError, MissingDataError, unknown_name

log = logging.getLogger("bcmfnet.data")
FORMAT = 1
INDEX = "index.json"
BYTES = 4  # of a pixel: three colours and an id
AGAIN = "; prepare it again"


class PreparedFrames:
    """A split of a prepared dataset; its arrays are views of the file, whose pages are read when they are touched.

    Raises:
        ConfigError: no such split. MissingDataError: no index.
        DataError: a folder that is damaged or of another format, or older than the files it was made from.
    """

    def __init__(self, folder: Path, split: str) -> None:
        index = _read_index(folder / INDEX)
        if split not in index["splits"]:
            raise ConfigError(unknown_name("split", split, index["splits"]))
        content = index["splits"][split]
        table = index["table"]
        self.split, self.path = split, folder / f"{split}.frames"
        self.table = LabelTable(
            table["name"], tuple(table["classes"]), tuple(map(tuple, table["colors"])), table["ignore_index"]
        )
        self.unpaired: tuple[str, ...] = tuple(content["unpaired"])
        self.frames: list[dict[str, Any]] = content["frames"]
        self.offsets = np.cumsum([0, *(BYTES * frame["height"] * frame["width"] for frame in self.frames)]).tolist()
        self._check_size()
        self._check_sources()

    def __len__(self) -> int:
        return len(self.frames)

    def name(self, i: int) -> str:
        return self.frames[i]["name"]

    def files(self, i: int) -> tuple[str, ...]:
        return (f"{self.path}:{self.name(i)}",)

    def frame_size(self, i: int) -> tuple[int, int]:
        return self.frames[i]["height"], self.frames[i]["width"]

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """RGB uint8 [H, W, 3] and ids uint8 [H, W]; what is written to them does not reach the file."""
        size, data = self.frame_size(i), self._map(i)
        pixels = size[0] * size[1]
        return data[: 3 * pixels].reshape(*size, 3), data[3 * pixels :].reshape(size)

    def label(self, i: int) -> np.ndarray:
        """Ids of frame i, uint8 [H, W]."""
        return self.read(i)[1]

    def check(self, i: int) -> None:
        """Raise DataError unless frame i holds what was written."""
        if zlib.crc32(self._map(i).data) != self.frames[i]["crc32"]:
            raise DataError(f"{self.files(i)[0]}: damaged, its CRC-32 is not the one of the index{AGAIN}")

    def _map(self, i: int) -> np.ndarray:
        # A map for each frame leaves nothing open to hand to a worker; torch warns of arrays that cannot be written to.
        size = self.offsets[i + 1] - self.offsets[i]
        try:
            return np.asarray(np.memmap(self.path, np.uint8, "c", self.offsets[i], (size,)))
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None

    def _check_size(self) -> None:
        try:
            size = self.path.stat().st_size
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}{AGAIN}") from None
        if size != self.offsets[-1]:
            raise DataError(f"{self.path}: damaged, expected {self.offsets[-1]} bytes, got {size}{AGAIN}")

    def _check_sources(self) -> None:
        """Files that are gone, as on another machine, are no reason to refuse."""
        for frame in self.frames:
            for path, *state in frame["sources"]:
                if _state(path) not in (None, state):
                    raise DataError(f"{self.path}: older than {path}, which has changed since{AGAIN}")


def prepare(folder: Path, datasets: Mapping[str, Dataset]) -> None:
    """Write datasets, by the name of their split, into a folder that `build_dataset("prepared", folder, split)` opens.

    Needs 4 bytes for each pixel, and logs how many that are before it writes. A folder without its index is not whole.

    Raises:
        DataError: a frame that cannot be read, or not enough room.
    """
    sizes = [data.frame_size(i) for data in datasets.values() for i in range(len(data))]
    needed = sum(BYTES * height * width for height, width in sizes)
    log.info("%s: %d frames, %s", folder, len(sizes), _megabytes(needed))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(f"{folder}: expected room for {_megabytes(needed)}, got {_megabytes(free)}")
    paths = {split: folder / f"{split}.frames" for split in datasets}
    (folder / INDEX).unlink(missing_ok=True)
    try:
        splits = {split: _write_split(paths[split], data) for split, data in datasets.items()}
        content = {"table": asdict(next(iter(datasets.values())).table), "splits": splits}
        with _written_whole(folder / INDEX) as file:
            index = {"format": FORMAT, "sha256": _digest(content), "content": content}
            file.write(json.dumps(index).encode())
    except BaseException:
        for path in paths.values():
            path.unlink(missing_ok=True)
        raise


def _write_split(path: Path, dataset: Dataset) -> dict[str, Any]:
    frames = []
    with _written_whole(path) as file:
        for i in range(len(dataset)):
            sources = [[os.path.abspath(source), *state] for source in dataset.files(i) if (state := _state(source))]
            image, label = dataset.read(i)
            pixels = image.tobytes() + label.tobytes()
            file.write(pixels)
            size = {"height": label.shape[0], "width": label.shape[1]}
            frames.append({"name": dataset.name(i), **size, "crc32": zlib.crc32(pixels), "sources": sources})
    return {"unpaired": dataset.unpaired, "frames": frames}


def _state(path: str) -> list[int] | None:
    """Size and time of the last change of a file, None where there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return [found.st_size, found.st_mtime_ns]


@contextlib.contextmanager
def _written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file under a temporary name that takes the place of `path` when the code inside is done."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_bytes())
        number, digest, content = index["format"], index["sha256"], index["content"]
    except FileNotFoundError:
        raise MissingDataError(
            f"{path}: no such file; `bcmfnet data prepare` writes it when all else is done"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise DataError(f"{path}: damaged, or not the index of a prepared dataset{AGAIN}") from None
    if number != FORMAT:
        raise DataError(f"{path}: expected format {FORMAT}, got {number!r}{AGAIN}")
    if digest != _digest(content):
        raise DataError(f"{path}: damaged, its digest is not the one that was written with it{AGAIN}")
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
