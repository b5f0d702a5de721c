"""TIFF images that are larger than memory, read and written window by window through tifffile (the extra `tiff`)."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bcmfnet.data.headers import UPRIGHT
from bcmfnet.data.io import image_header
from bcmfnet.errors import DataError, MissingPackageError

UNCOMPRESSED, JPEGS = 1, (6, 7)  # values of the tag Compression
CACHE_BYTES = 2**27
"""Of decoded tiles or strips that are kept, since neighbouring windows share them; one alone may not be larger."""
TILE = 256
"""Height and width of the tiles that are written."""
BIG = 2**31
"""Pixels from which on offsets of 32 bits might not do."""


def require_tifffile() -> Any:
    """The module tifffile. Raises MissingPackageError where it is not installed."""
    try:
        import tifffile
    except ImportError:
        raise MissingPackageError("tifffile: needed for large TIFF images; pip install 'bcmfnet[tiff]'") from None
    logging.getLogger("tifffile").addHandler(logging.NullHandler())  # it would print beside the one line of a DataError
    return tifffile


def open_if_large(path: str | Path, max_pixels: int) -> LargeTiff | None:
    """A TIFF image of more than max_pixels; None for an image that can be read at once, or not at all.

    Raises:
        DataError: an image of more than max_pixels that is no TIFF, or one that `LargeTiff` refuses.
        MissingPackageError: tifffile is not installed.
    """
    header = image_header(path)
    if header.width * header.height <= max_pixels:
        return None
    if header.format != "TIFF":
        got = f"got {header.width}x{header.height}; larger ones are read from TIFF, in tiles"
        raise DataError(f"{path}: expected an image of 1 to {max_pixels} pixels, {got}")
    return LargeTiff(path)


class LargeTiff:
    """The first image of a TIFF file, of which windows are read.

    Compressed tiles or strips are decoded once as long as they are among the last CACHE_BYTES of them; of an
    uncompressed strip only what a window needs is read.

    Raises:
        DataError: no TIFF, a truncated one, or one whose samples are not RGB or gray of 8 bits, which is not upright,
            or has compressed tiles or strips of more than CACHE_BYTES.
        MissingPackageError: tifffile is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        tifffile = require_tifffile()
        self.path, header = path, image_header(path)
        try:
            self._file = tifffile.TiffFile(path)
            self._page = page = self._file.pages.first
        except Exception as error:
            raise self._unreadable(error) from None
        try:
            self.height, self.width = self.shape = page.imagelength, page.imagewidth
            self._check(tifffile.PHOTOMETRIC, header.bits, header.orientation)
            self._channels = 1 if page.photometric == tifffile.PHOTOMETRIC.MINISBLACK else 3
            self._apart = page.planarconfig == tifffile.PLANARCONFIG.SEPARATE  # a plane of segments for each sample
            self._samples = 1 if self._apart else page.samplesperpixel
            self._find_segments()
        except BaseException:
            self._file.close()
            raise

    def _check(self, kinds: Any, bits: int, orientation: int) -> None:
        page = self._page
        jpeg = page.compression in JPEGS
        known = [kinds.MINISBLACK, kinds.RGB, *([kinds.YCBCR] if jpeg else [])]
        if bits != 8 or page.dtype != np.uint8:
            raise DataError(f"{self.path}: expected an image of 8 bits a sample, got {bits} ({page.dtype})")
        if page.photometric not in known or page.samplesperpixel < (1 if page.photometric == kinds.MINISBLACK else 3):
            kind = getattr(page.photometric, "name", page.photometric)
            raise DataError(f"{self.path}: expected samples of RGB or gray, got {page.samplesperpixel} of {kind}")
        if page.imagedepth != 1:
            raise DataError(f"{self.path}: expected an image, got a volume of depth {page.imagedepth}")
        if orientation != UPRIGHT:
            raise DataError(f"{self.path}: expected a large image that is upright, got EXIF orientation {orientation}")

    def _find_segments(self) -> None:
        """Where the tiles or strips are, and whether the file has them all."""
        page = self._page
        self._segment_height, self._segment_width = min(page.rowsperstrip, self.height), self.width
        if page.is_tiled:
            self._segment_height, self._segment_width = page.tilelength, page.tilewidth
        self._across = -(-self.width // self._segment_width)
        self._down = -(-self.height // self._segment_height)
        ends = [at + size for at, size in zip(page.dataoffsets, page.databytecounts, strict=True)]
        count = self._across * self._down * (page.samplesperpixel if self._apart else 1)
        if len(ends) != count or max(ends) > self._file.filehandle.size:
            raise DataError(f"{self.path}: truncated TIFF")
        size = self._segment_height * self._segment_width * self._samples
        self._segment = functools.lru_cache(max(CACHE_BYTES // size, 1))(self._decode)
        self._is_raw = not page.is_tiled and page.compression == UNCOMPRESSED and page.fillorder == 1
        if self._is_raw:
            return
        if size > CACHE_BYTES:
            what = f"{'tiles' if page.is_tiled else 'strips'} of {self._segment_width}x{self._segment_height} pixels"
            raise DataError(f"{self.path}: expected tiles of at most {CACHE_BYTES} bytes, got {what}")
        self._told(self._segment, 0)  # a compression that cannot be decoded is known before the network starts

    def __enter__(self) -> LargeTiff:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, and forget what is decoded."""
        self._file.close()
        self._segment.cache_clear()

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        """RGB uint8 [h, w, 3] of these rows and columns; past the image its last ones are repeated.

        Raises DataError where they cannot be read.
        """
        inside = slice(rows.start, min(rows.stop, self.height)), slice(columns.start, min(columns.stop, self.width))
        image = np.empty((*(span.stop - span.start for span in inside), self._channels), np.uint8)
        for plane in range(self._channels if self._apart else 1):
            channels = image[..., plane : plane + 1] if self._apart else image
            self._told(self._read_rows if self._is_raw else self._read_segments, plane, *inside, channels)
        image = np.pad(image, [(0, rows.stop - inside[0].stop), (0, columns.stop - inside[1].stop), (0, 0)], "edge")
        return image if self._channels == 3 else image.repeat(3, axis=2)

    def _told(self, read: Callable[..., Any], *arguments: Any) -> None:
        try:
            read(*arguments)
        except Exception as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> DataError:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        return DataError(f"{self.path}: cannot be read: {reason}")

    def _read_rows(self, plane: int, rows: slice, columns: slice, image: np.ndarray) -> None:
        """From uncompressed strips."""
        for row in range(rows.start, rows.stop):
            strip, below = divmod(row, self._segment_height)
            offset = self._page.dataoffsets[plane * self._down + strip]
            offset += (below * self.width + columns.start) * self._samples
            data = self._bytes(offset, image.shape[1] * self._samples)
            image[row - rows.start] = np.frombuffer(data, np.uint8).reshape(-1, self._samples)[:, : self._channels]

    def _read_segments(self, plane: int, rows: slice, columns: slice, image: np.ndarray) -> None:
        """From tiles, or from compressed strips."""
        height, width = self._segment_height, self._segment_width
        for y, x in itertools.product(_numbers(rows, height), _numbers(columns, width)):
            segment = self._segment((plane * self._down + y) * self._across + x)
            to_rows, from_rows = _overlap(rows, y * height, height)
            to_columns, from_columns = _overlap(columns, x * width, width)
            image[to_rows, to_columns] = segment[from_rows, from_columns, : self._channels]

    def _decode(self, index: int) -> np.ndarray:
        """A tile or strip, uint8 [h, w, samples]; one that the file leaves out is all of one value."""
        page = self._page
        size = page.databytecounts[index]
        tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader} if page.compression in JPEGS else {}
        segment, _, shape = page.decode(self._bytes(page.dataoffsets[index], size) if size else None, index, **tables)
        return np.full(shape[1:], page.nodata, np.uint8) if segment is None else segment[0]

    def _bytes(self, offset: int, size: int) -> bytes:
        self._file.filehandle.seek(offset)
        data = self._file.filehandle.read(size)
        if len(data) < size:
            raise DataError("truncated TIFF")
        return data


def _numbers(span: slice, size: int) -> range:
    """Numbers of the segments of a size that a span overlaps."""
    return range(span.start // size, -(-span.stop // size))


def _overlap(span: slice, start: int, size: int) -> tuple[slice, slice]:
    """What a span and a segment share, counted from the start of each."""
    first, last = max(span.start, start), min(span.stop, start + size)
    return slice(first - span.start, last - span.start), slice(first - start, last - start)


def write_label_tiff(path: Path, bands: Iterable[np.ndarray], height: int, width: int, colors: np.ndarray) -> None:
    """Write a label map as a tiled TIFF whose samples are the ids and whose palette shows their colours.

    Args:
        bands: ids uint8 [h, width], rows of the map from its top on, as many at a time as there happen to be.
        height, width: of the map.
        colors: RGB uint8 [256, 3] of each id.
    """
    require_tifffile().imwrite(
        path,
        _tiles(bands),
        shape=(height, width),
        dtype=np.uint8,
        tile=(TILE, TILE),
        photometric="palette",
        colormap=colors.T.astype(np.uint16) * 257,
        compression="zlib",
        bigtiff=height * width >= BIG,
        metadata=None,
        maxworkers=1,
    )


def _tiles(bands: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Tiles uint8 [TILE, TILE], row by row."""
    for rows in _bands_of(bands, TILE):
        padded = np.pad(rows, [(0, -side % TILE) for side in rows.shape])
        yield from map(np.ascontiguousarray, np.split(padded, padded.shape[1] // TILE, axis=1))


def _bands_of(bands: Iterable[np.ndarray], height: int) -> Iterator[np.ndarray]:
    """The same rows, so many at a time; the last band has what is left."""
    held: np.ndarray | None = None
    for band in bands:
        held = band if held is None else np.concatenate([held, band])
        while len(held) >= height:
            yield held[:height]
            held = held[height:]
    if held is not None and len(held):
        yield held
