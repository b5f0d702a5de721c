import cv2
import numpy as np
import pytest
from frames import png_bytes

from bcmfnet.data import read_image, read_label, write_jpeg, write_png
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
