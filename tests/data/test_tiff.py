"""TIFF files of every layout in windows: the samples are those of the whole image, or one line says why not."""

from __future__ import annotations

import sys

import cv2
import numpy as np
import pytest

from bcmfnet.data import tiff
from bcmfnet.data.io import read_image
from bcmfnet.data.tiff import LargeTiff, open_if_large, write_label_tiff
from bcmfnet.errors import DataError, MissingPackageError

tifffile = pytest.importorskip("tifffile")
HEIGHT, WIDTH = 150, 131
RGB = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
ALPHA = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
GRAY = np.repeat(RGB[..., :1], 3, axis=2)
TILED, STRIPED = {"tile": (32, 64)}, {"rowsperstrip": 7}
WINDOWS = [(slice(0, 64), slice(0, 64)), (slice(31, 97), slice(63, 131)), (slice(149, 150), slice(0, 131))]


def save(path, samples=RGB, **options):
    options = {"photometric": "rgb" if samples.ndim == 3 and samples.shape[-1] > 2 else "minisblack"} | options
    tifffile.imwrite(path, samples, metadata=None, **options)
    return path


LAYOUTS = {
    "one strip": {},
    "strips": STRIPED,
    "strips, zlib": STRIPED | {"compression": "zlib"},
    "strips, zlib, differences": STRIPED | {"compression": "zlib", "predictor": True},
    "strips, packbits": STRIPED | {"compression": "packbits"},
    "tiles": TILED,
    "tiles, zlib": TILED | {"compression": "zlib"},
    "tiles, zlib, differences": TILED | {"compression": "zlib", "predictor": True},
    "tiles, lzw": TILED | {"compression": "lzw"},
    "tiles, BigTIFF": TILED | {"bigtiff": True},
    "tiles, big endian": TILED | {"byteorder": ">"},
}


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
def test_windows_are_of_the_whole_image(tmp_path, options):
    if options.get("compression") in ("lzw", "packbits"):
        pytest.importorskip("imagecodecs")
    planar = np.ascontiguousarray(RGB.transpose(2, 0, 1))
    files = {
        "rgb": (RGB, {}, RGB),
        "rgba": (np.concatenate([RGB, ALPHA], 2), {"extrasamples": ["unassalpha"]}, RGB),
        "planar": (planar, {"planarconfig": "separate", "photometric": "rgb"}, RGB),
        "gray": (RGB[..., 0], {}, GRAY),
    }
    for name, (samples, more, expected) in files.items():
        path = save(tmp_path / f"{name}.tif", samples, **options | more)
        with LargeTiff(path) as image:
            assert (image.height, image.width) == (HEIGHT, WIDTH)
            for rows, columns in WINDOWS:
                np.testing.assert_array_equal(image.read(rows, columns), expected[rows, columns], err_msg=name)
        np.testing.assert_array_equal(read_image(path), expected, err_msg=name)  # and of what is read at once


def test_past_the_image_its_last_pixels_are_repeated(tmp_path):
    with LargeTiff(save(tmp_path / "a.tif", **TILED)) as image:
        expected = np.pad(RGB[100:, 90:], [(0, 2), (0, 5), (0, 0)], "edge")
        np.testing.assert_array_equal(image.read(slice(100, HEIGHT + 2), slice(90, WIDTH + 5)), expected)


def test_jpeg_in_tiles(tmp_path):
    """JPEG is of another colour space, and lossy: near the image that OpenCV makes of the same file."""
    pytest.importorskip("imagecodecs")
    smooth = cv2.resize(RGB[:6, :6], (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    path = save(tmp_path / "a.tif", smooth, tile=(32, 64), compression="jpeg")
    with LargeTiff(path) as image:
        window = image.read(slice(0, HEIGHT), slice(0, WIDTH)).astype(int)
    assert np.abs(window - read_image(path)).max() <= 3
    assert np.abs(window - smooth).mean() < 4


def test_tiles_that_a_file_leaves_out_are_black(tmp_path):
    path = tmp_path / "a.tif"
    tiles = iter([RGB[:32, :64], *[None] * 14])
    options = {"shape": RGB.shape, "dtype": np.uint8, "tile": (32, 64), "photometric": "rgb", "compression": "zlib"}
    tifffile.imwrite(path, tiles, metadata=None, **options)
    with LargeTiff(path) as image:
        window = image.read(slice(0, 64), slice(0, WIDTH))
    np.testing.assert_array_equal(window[:32, :64], RGB[:32, :64])
    assert not window[32:].any() and not window[:, 64:].any()


def test_decoded_tiles_are_kept_within_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(tiff, "CACHE_BYTES", 4 * 32 * 64 * 3)
    with LargeTiff(save(tmp_path / "a.tif", **TILED)) as image:
        for _ in range(2):
            image.read(slice(0, 64), slice(0, 128))
        info = image._segment.cache_info()
        assert (info.maxsize, info.currsize, info.misses) == (4, 4, 4)
        image.read(slice(0, HEIGHT), slice(0, WIDTH))
        assert image._segment.cache_info().currsize == 4


REFUSED = {
    "16 bit": (RGB.astype(np.uint16), {}, "expected an image of 8 bits a sample, got 16 (uint16)"),
    "signed": (RGB.view(np.int8), {}, "expected an image of 8 bits a sample, got 8 (int8)"),
    "palette": (
        RGB[..., 0],
        {"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)},
        "expected samples of RGB or gray, got 1 of PALETTE",
    ),
    "white is 0": (RGB[..., 0], {"photometric": "miniswhite"}, "expected samples of RGB or gray, got 1 of MINISWHITE"),
    "inks": (
        np.concatenate([RGB, ALPHA], 2),
        {"photometric": "separated"},
        "expected samples of RGB or gray, got 4 of SEPARATED",
    ),
    "turned": (
        RGB,
        {"extratags": [(274, 3, 1, 6, True)]},
        "expected a large image that is upright, got EXIF orientation 6",
    ),
}


@pytest.mark.parametrize(("samples", "options", "line"), REFUSED.values(), ids=REFUSED)
def test_other_samples_are_refused(tmp_path, samples, options, line):
    path = save(tmp_path / "a.tif", samples, **TILED | options)
    with pytest.raises(DataError) as caught:
        LargeTiff(path)
    assert str(caught.value) == f"{path}: {line}"


def test_strips_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tiff, "CACHE_BYTES", 10_000)
    path = save(tmp_path / "a.tif", compression="zlib", rowsperstrip=HEIGHT)
    with pytest.raises(DataError) as caught:
        LargeTiff(path)
    assert str(caught.value) == f"{path}: expected tiles of at most 10000 bytes, got strips of 131x150 pixels"
    with LargeTiff(save(tmp_path / "b.tif")) as image:  # an uncompressed one is read in parts
        np.testing.assert_array_equal(image.read(slice(0, 9), slice(0, 9)), RGB[:9, :9])


@pytest.mark.parametrize("options", [{}, STRIPED, TILED, TILED | {"compression": "zlib"}], ids=str)
@pytest.mark.parametrize("left", [0.05, 0.5, 0.99])
def test_a_truncated_file_is_one_line(tmp_path, options, left):
    """Wherever the directory lies: what is written here has it at the start."""
    path = save(tmp_path / "a.tif", **options)
    data = path.read_bytes()
    path.write_bytes(data[: int(left * len(data))])
    with pytest.raises(DataError) as caught:
        LargeTiff(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_corrupt_tile_is_one_line(tmp_path):
    path = save(tmp_path / "a.tif", compression="zlib", **TILED)
    with tifffile.TiffFile(path) as file:
        offset = file.pages[0].dataoffsets[3]
    data = bytearray(path.read_bytes())
    data[offset : offset + 20] = b"x" * 20
    path.write_bytes(data)
    with LargeTiff(path) as image:
        image.read(slice(0, 32), slice(0, WIDTH))
        with pytest.raises(DataError) as caught:
            image.read(slice(0, HEIGHT), slice(0, WIDTH))
    assert str(caught.value).startswith(f"{path}: cannot be read: ") and "\n" not in str(caught.value)


def test_what_is_large(tmp_path, monkeypatch):
    path = save(tmp_path / "a.tif")
    assert open_if_large(path, HEIGHT * WIDTH) is None
    with open_if_large(path, HEIGHT * WIDTH - 1) as image:
        assert isinstance(image, LargeTiff)
    cv2.imwrite(str(tmp_path / "a.png"), RGB)
    with pytest.raises(DataError) as caught:
        open_if_large(tmp_path / "a.png", 100)
    line = "expected an image of 1 to 100 pixels, got 131x150; larger ones are read from TIFF, in tiles"
    assert str(caught.value) == f"{tmp_path / 'a.png'}: {line}"
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(MissingPackageError) as missing:
        open_if_large(path, 100)
    assert str(missing.value) == "tifffile: needed for large TIFF images; pip install 'bcmfnet[tiff]'"


@pytest.mark.parametrize("heights", [[300, 1, 0, 219], [520], [8] * 65], ids=str)
def test_a_label_map_is_written_in_bands(tmp_path, heights):
    labels = np.random.default_rng(1).integers(0, 11, (520, 300), np.uint8)
    colors = np.random.default_rng(2).integers(0, 256, (256, 3), np.uint8)
    ends = np.cumsum(heights)
    bands = (labels[end - height : end] for end, height in zip(ends, heights, strict=True))
    write_label_tiff(tmp_path / "a.tif", bands, 520, 300, colors)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        page = file.pages[0]
        assert page.is_tiled and (page.tilelength, page.tilewidth, page.photometric.name) == (256, 256, "PALETTE")
        np.testing.assert_array_equal(page.asarray(), labels)
    shown = cv2.imread(str(tmp_path / "a.tif"), cv2.IMREAD_COLOR_RGB)
    np.testing.assert_array_equal(shown, colors[labels])
