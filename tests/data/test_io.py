import os
import struct

import cv2
import numpy as np
import pytest
from frames import png_bytes, png_chunk, with_exif

from bcmfnet.data import read_image, read_label, write_jpeg, write_png
from bcmfnet.data.io import image_size
from bcmfnet.errors import DataError

GRAY, RGB, PALETTE = 0, 2, 3
RAMP = np.add.outer(np.arange(40), np.arange(60)).astype(np.uint8)


@pytest.fixture
def photo():
    """Smooth enough that JPEG keeps it within a few grey levels; its channels differ, so that BGR would show."""
    return np.stack([RAMP, 2 * RAMP, 255 - 2 * RAMP], -1)


def refusal(read, path) -> str:
    with pytest.raises(DataError) as caught:
        read(path)
    line = str(caught.value)
    assert str(path) in line and "\n" not in line
    return line


def test_png_round_trip_keeps_rgb(tmp_path, photo):
    write_png(tmp_path / "a.png", photo)
    assert np.array_equal(read_image(tmp_path / "a.png"), photo)


def test_jpeg_round_trip_keeps_rgb(tmp_path, photo):
    write_jpeg(tmp_path / "a.jpg", photo, quality=95)
    assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - photo).mean() < 2


def test_gray_image_becomes_rgb(tmp_path):
    write_png(tmp_path / "a.png", RAMP)
    assert np.array_equal(read_image(tmp_path / "a.png"), np.stack([RAMP] * 3, -1))


def test_name_that_is_not_ascii(tmp_path, photo):
    write_png(tmp_path / "Straße.png", photo)
    assert np.array_equal(read_image(tmp_path / "Straße.png"), photo)


@pytest.mark.parametrize("part", [0.03, 0.3, 0.6, 0.99])  # in the tables, early and late in the data, at the end mark
@pytest.mark.parametrize("ending", [".jpg", ".png"])
def test_truncated_image(tmp_path, photo, ending, part):
    path = tmp_path / f"a{ending}"
    (write_jpeg if ending == ".jpg" else write_png)(path, photo)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    assert "truncated" in refusal(read_image, path)


def test_jpeg_padded_with_zeros_is_truncated(tmp_path, photo):
    write_jpeg(tmp_path / "a.jpg", photo)
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2].ljust(len(data), b"\0"))
    assert "truncated" in refusal(read_image, tmp_path / "a.jpg")


@pytest.mark.parametrize(
    "options",
    [
        (cv2.IMWRITE_JPEG_PROGRESSIVE, 1),  # several scans, with tables between them
        (cv2.IMWRITE_JPEG_RST_INTERVAL, 2),  # restart markers inside the data
        (cv2.IMWRITE_JPEG_QUALITY, 100),
    ],
)
def test_whole_jpegs_of_every_kind_pass(tmp_path, photo, options):
    path = tmp_path / "a.jpg"
    path.write_bytes(cv2.imencode(".jpg", photo[..., ::-1], options)[1].tobytes() + b"trailing bytes of a camera")
    assert read_image(path).shape == photo.shape


def test_flipped_bit_in_a_png(tmp_path, photo):
    write_png(tmp_path / "a.png", photo)
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[len(data) // 2] ^= 4
    (tmp_path / "a.png").write_bytes(data)
    assert "checksum" in refusal(read_image, tmp_path / "a.png")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "cannot be read: No such file"),
        (b"", "is empty"),
        (b"plain text, not an image", "not an image that can be decoded"),
        (b"\xff\xd8\xff", "truncated JPEG"),
        (b"\x89PNG\r\n\x1a\n", "truncated PNG"),
    ],
)
def test_no_image(tmp_path, content, line):
    path = tmp_path / "a.jpg"
    if content is not None:
        path.write_bytes(content)
    assert line in refusal(read_image, path)


def test_folder_in_place_of_a_file(tmp_path):
    assert "cannot be read" in refusal(read_image, tmp_path)


@pytest.mark.parametrize("color_type", [GRAY, PALETTE])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_label_is_the_stored_sample(tmp_path, bits, color_type):
    # Odd width: a row of 1, 2 and 4 bits ends inside a byte.
    ids = np.random.default_rng(bits).integers(0, 2**bits, (5, 13), dtype=np.uint8)
    palette = bytes(np.random.default_rng(1).integers(0, 256, 3 * 2**bits, dtype=np.uint8))
    (tmp_path / "a.png").write_bytes(png_bytes(ids, bits, color_type, palette if color_type == PALETTE else b""))
    assert np.array_equal(read_label(tmp_path / "a.png"), ids)


def test_color_label(tmp_path, photo):
    write_png(tmp_path / "a.png", photo)
    assert np.array_equal(read_label(tmp_path / "a.png", color=True), photo)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (png_bytes(RAMP.astype(np.uint16), 16, GRAY), "8 bits a pixel, got 16"),
        (png_bytes(np.stack([RAMP] * 3, -1), 8, RGB), "one channel"),
        (png_bytes(RAMP, 8, GRAY)[:-20], "truncated PNG"),
        (cv2.imencode(".jpg", RAMP)[1].tobytes(), "expected a PNG label"),
    ],
)
def test_label_refused(tmp_path, data, line):
    (tmp_path / "a.png").write_bytes(data)
    assert line in refusal(read_label, tmp_path / "a.png")


def test_pixels_are_counted_before_decoding(tmp_path, monkeypatch, photo):
    """By the header, in every format that is read, so that a small file cannot ask for much memory."""

    def decode(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(cv2, "imdecode", decode)
    lossy = (cv2.IMWRITE_WEBP_QUALITY, 80)
    patches = {".png": (16, ">II"), ".jpg": (None, ">HH"), ".bmp": (18, "<ii"), ".webp": (26, "<HH")}
    for ending, (at, layout) in patches.items():
        path, data = tmp_path / f"a{ending}", bytearray(cv2.imencode(ending, photo, lossy)[1].tobytes())
        at = data.index(b"\xff\xc0") + 5 if at is None else at
        struct.pack_into(layout, data, at, 16000, 16000)
        path.write_bytes(data)
        assert refusal(read_image, path) == f"{path}: expected an image of 1 to {2**26} pixels, got 16000x16000"
    write_png(tmp_path / "b.png", photo)
    line = refusal(lambda path: read_image(path, max_pixels=40 * 60 - 1), tmp_path / "b.png")
    assert line.endswith(": expected an image of 1 to 2399 pixels, got 60x40")
    line = refusal(lambda path: read_label(path, color=True, max_pixels=1), tmp_path / "b.png")
    assert line.endswith(": expected an image of 1 to 1 pixels, got 60x40")


def test_exactly_max_pixels_are_read(tmp_path, photo):
    write_png(tmp_path / "a.png", photo)
    assert read_image(tmp_path / "a.png", max_pixels=40 * 60).shape == (40, 60, 3)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "nowhere.png").symlink_to("gone.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    lines = {
        "fifo.png": "expected a regular file, got a FIFO",
        "zero.png": "expected a regular file, got a device",
        "nowhere.png": "No such file or directory",
        "loop.png": "Too many levels of symbolic links",
    }
    for name, line in lines.items():
        for read in (read_image, read_label, image_size):
            assert refusal(read, tmp_path / name) == f"{tmp_path / name}: cannot be read: {line}"


def test_a_file_too_large_to_be_an_image_is_not_read(tmp_path, photo):
    write_png(tmp_path / "a.png", photo)
    os.truncate(tmp_path / "a.png", 2**40)
    expected = f"{tmp_path / 'a.png'}: expected a file of at most {2**30} bytes, got {2**40}"
    assert refusal(read_image, tmp_path / "a.png") == expected


@pytest.mark.parametrize(("ending", "dtype", "bits"), [(".png", np.uint16, 16), (".tif", np.uint16, 16),
                                                      (".tif", np.float32, 32)])  # fmt: skip
def test_image_of_more_than_8_bits_is_refused(tmp_path, ending, dtype, bits):
    """OpenCV would keep the upper 8 bits: of 12-bit data 16 levels are left."""
    path = tmp_path / f"a{ending}"
    cv2.imwrite(str(path), np.arange(4096).reshape(64, 64).astype(dtype))
    for read in (read_image, image_size):
        assert refusal(read, path) == f"{path}: expected an image of 8 bits a sample, got {bits}"


@pytest.mark.parametrize("ending", [".jpg", ".png"])
def test_orientation_turns_an_image_and_refuses_a_labelled_one(tmp_path, ending):
    """An orientation of 6 shows the stored image turned by 90 degrees clockwise, 3 by 180."""
    stored = np.zeros((64, 96, 3), np.uint8)
    stored[:8, :8] = 255
    path = tmp_path / f"a{ending}"
    for orientation, turned in ((6, np.rot90(stored, -1)), (3, np.rot90(stored, 2)), (1, stored)):
        path.write_bytes(with_exif(cv2.imencode(ending, stored)[1].tobytes(), orientation))
        assert np.array_equal(read_image(path) > 128, turned > 128)
        if orientation > 1:
            line = f"EXIF orientation {orientation} turns the image and not its label; save it upright, without the tag"
            for read in (image_size, lambda path: read_image(path, turn=False)):
                assert refusal(read, path) == f"{path}: {line}"
    assert image_size(path) == (64, 96) and read_image(path, turn=False).shape == (64, 96, 3)


def test_label_with_an_orientation_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(with_exif(png_bytes(RAMP, 8, GRAY), 8))
    assert refusal(read_label, tmp_path / "a.png").endswith("expected a label without EXIF orientation, got 8")


def test_color_label_of_one_channel_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(png_bytes(RAMP, 8, GRAY))
    line = refusal(lambda path: read_label(path, color=True), tmp_path / "a.png")
    assert line == f"{tmp_path / 'a.png'}: expected a label of colours, got one channel (class ids?)"


def test_chunks_that_libpng_warns_of_change_no_pixel_and_print_nothing(tmp_path, photo, capfd):
    write_png(tmp_path / "a.png", photo)
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[:33] + png_chunk(b"iCCP", b"x\0\0junk") + data[33:])
    assert np.array_equal(read_image(tmp_path / "a.png"), photo)
    assert capfd.readouterr().err == ""


def test_other_formats_of_opencv_are_not_read(tmp_path, photo):
    path = tmp_path / "a.png"
    path.write_bytes(b"P6\n60 40\n255\n" + photo.tobytes())
    expected = f"{path}: not an image that can be decoded (corrupt, or not PNG, JPEG, BMP, TIFF or WebP)"
    assert refusal(read_image, path) == expected


def test_names_are_shown_printable(tmp_path):
    path = tmp_path / "a\x1b[31m\nb\udcff ß.png"
    with pytest.raises(DataError) as caught:
        read_image(path)
    assert str(caught.value) == f"{tmp_path}/a\\x1b[31m\\nb\\udcff ß.png: cannot be read: No such file or directory"
