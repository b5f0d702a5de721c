"""Which files a prediction takes, where it writes, and that a frame that fails ends no other; any network will do."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import struct
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from frames import with_exif

from bcmfnet.data import get_label_table
from bcmfnet.engine import predict as predict_module
from bcmfnet.engine.config import TTAConfig
from bcmfnet.engine.predict import find_images, predict
from bcmfnet.engine.run_folder import owned
from bcmfnet.engine.tta import TTAPredictor
from bcmfnet.errors import ConfigError
from bcmfnet.ops import upsample_argmax

tifffile = pytest.importorskip("tifffile")

PNG = cv2.imencode(".png", np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8))[1].tobytes()
ELSE = "larger ones are read from TIFF, in tiles"
ENDINGS = ("_color.png", "_labelIds.png", "_overlay.jpg")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in, so that names can be relative."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(*names: str, data: bytes = PNG) -> None:
    for name in names:
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        with open(name, "wb") as file:
            file.write(data)


def run(*sources: str, folder: str = "out", network=lambda images: torch.zeros(images[:, 0].shape), **options):
    """Predict with a network that gives label maps; the result, and the rows that were written."""
    os.makedirs(folder, exist_ok=True)
    table = get_label_table("camvid11")
    images = find_images(sources)
    path = Path(folder)
    result = predict(lambda frames: network(frames).byte(), table, images, path, **options)
    return result, [json.loads(line) for line in (path / "predictions.jsonl").read_text().splitlines()]


def written(folder: str = "out") -> list[str]:
    """Names of the frames whose three files are below a folder; and nothing else is."""
    paths = [os.path.join(at, name) for at, _, names in os.walk(folder) for name in names]
    files = sorted(os.path.relpath(path, folder) for path in paths)
    files.remove("predictions.jsonl")
    stems = sorted({name.rsplit("_", 1)[0] for name in files})
    assert files == sorted(stem + ending for stem in stems for ending in ENDINGS)
    return stems


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (["F"], ["a", "b"]),
        (["F/x"], ["a", "c"]),
        (["F/a.png", "F/b.png"], ["a", "b"]),  # as a shell gives a glob
        (["F/x/a.png"], ["a"]),
        (["F/a.png", "F/x/a.png"], ["a", "x/a"]),
        (["F/x/*.png"], ["a", "c"]),
        (["F/*/*.png"], ["x/a", "x/c", "y/a"]),
        (["F/**/*.png"], ["a", "b", "x/a", "x/c", "y/a"]),
        (["F/**"], ["a", "b", "x/a", "x/c", "y/a"]),
        (["F/x", "F/y"], ["x/a", "x/c", "y/a"]),
        (["F", "F/a.png", "./F/../F/a.png"], ["a", "b"]),
        (["F/x/[a].png"], ["a"]),
        (["G/[a].png"], ["[a]"]),  # a file of that very name
    ],
    ids=" ".join,
)
def test_frames_keep_their_folders_below_the_source(here, sources, expected):
    write("F/a.png", "F/b.png", "F/x/a.png", "F/x/c.png", "F/y/a.png", "G/[a].png")
    result, rows = run(*sources)
    assert written() == expected
    assert (result.done, result.failed, len(rows)) == (len(expected), [], len(expected))


def test_hidden_files_and_folders_of_such_a_name_are_no_frames(here):
    write("F/a.png")
    write("F/._a.png", data=b"\0\5\26\7")
    os.mkdir("F/dir.png")
    assert [str(frame.path) for frame in find_images(["F"])] == ["F/a.png"]
    assert [str(frame.path) for frame in find_images(["F/**"])] == ["F/a.png"]


def test_predictions_are_not_predicted_again(here, caplog):
    write("F/a.png", "F/x/b.png")
    caplog.set_level("INFO", "bcmfnet.predict")
    for _ in range(3):
        assert run("F/**/*.png", folder="F")[0].done == 2
    for _ in range(2):  # below the folder of the rows too, and where only they are in the folder
        assert run("F/**/*.*", folder="F/x/out")[0].done == 2
    assert "left out 6 files of an earlier prediction in F" in caplog.messages
    (frame,) = find_images(["F/a_color.png"])  # but where one is asked for by name
    assert str(frame.path) == "F/a_color.png"


def test_a_users_own_file_of_such_a_name_is_a_frame(here):
    write("F/a_color.png")
    run("F")
    assert written() == ["a_color"]


def test_no_frame_is_replaced(here):
    write("F/a.png", "F/a_color.png")
    os.symlink("F", "link")
    line = "^output_dir: expected a folder where F/a.png would not replace F/a_color.png, got {}$"
    for folder in ("F", "link"):
        with pytest.raises(ConfigError, match=line.format(folder)):
            run("F", folder=folder)
    assert sorted(os.listdir("F")) == ["a.png", "a_color.png"]


@pytest.mark.parametrize("sources", [["F"], ["F/a.png", "F/a.jpg"], ["F/**"]], ids=" ".join)
def test_frames_that_would_write_the_same_files_are_refused(here, sources):
    write("F/a.jpg", "F/a.png")
    with pytest.raises(
        ConfigError, match="^SOURCE: F/a.... and F/a.... would write the same files; predict them apart$"
    ):
        find_images(sources)


@pytest.mark.parametrize("source", ["", "none", "none/*.png", "F", "F/x.png/y", "a" * 300, "F/**/*.gif", "**/**/**"])
def test_a_source_without_images(here, source):
    os.mkdir("F")
    with pytest.raises(ConfigError) as caught:
        find_images([source])
    expected = f"expected an image file, a folder of images or a glob, found no image at {source}"
    assert str(caught.value) == f"SOURCE: {expected}"


def test_links_in_circles_end(here):
    write("F/x/a.png", "F/y/b.png")
    for number in range(6):
        os.symlink("..", f"F/x/up{number}")
        os.symlink("..", f"F/y/up{number}")
    run("F/**/*.png")
    assert written() == ["x/a", "y/b"]


@pytest.fixture
def faulty(here):
    """Frames that cannot be predicted, each with its line, and one before and one after them that can."""
    write("F/a.png", "F/z.png")
    os.mkfifo("F/fifo.png")
    os.symlink("/dev/zero", "F/zero.png")
    os.symlink("gone", "F/dangling.png")
    long = "l" * 246 + ".png"
    write(f"F/{long}")
    write("F/small.png", data=cv2.imencode(".png", np.zeros((63, 80, 3), np.uint8))[1].tobytes())
    write("F/bomb.png", data=PNG[:16] + struct.pack(">II", 17000, 17000) + PNG[24:])
    write("F/\x1b[31mred\nline.png", data=b"no image")
    return {
        "F/\\x1b[31mred\\nline.png": "not an image that can be decoded (corrupt, or not PNG, JPEG, BMP, TIFF or WebP)",
        "F/bomb.png": f"expected an image of 1 to 67108864 pixels, got 17000x17000; {ELSE}",
        "F/dangling.png": "cannot be read: No such file or directory",
        "F/fifo.png": "cannot be read: expected a regular file, got a FIFO",
        f"F/{long}": "its prediction cannot be written: File name too long",
        "F/small.png": "expected an image of at least 64x64 pixels, got 80x63",
        "F/zero.png": "cannot be read: expected a regular file, got a device",
    }


def test_whatever_is_wrong_with_a_frame_is_said_of_it_and_the_others_go_on(faulty, caplog):
    result, rows = run("F")
    lines = [f"{name}: {reason}" for name, reason in faulty.items()]
    assert (result.done, result.failed) == (2, lines) and caplog.messages == lines
    assert [row["error"] for row in rows if "error" in row] == lines
    assert [row["file"] for row in rows] == [str(frame.path) for frame in find_images(["F"])]
    assert written() == ["a", "z"]


@pytest.mark.parametrize(
    "error", [MemoryError("much"), RuntimeError("not enough memory:\n you tried to allocate 9 GB")]
)
def test_a_network_that_fails_on_a_frame_goes_on_with_the_next(here, error):
    def network(images):
        calls.append(images)
        if len(calls) == 2:
            raise error
        return torch.zeros(images[:, 0].shape)

    calls = []
    write("a.png", "b.png", "c.png")
    result, _ = run("*.png", network=network)
    text = " ".join(str(error).split())
    assert result.failed == [f"b.png: {type(error).__name__}: {text}"] and written() == ["a", "c"]


def test_a_bound_on_pixels(here):
    write("a.png")
    assert run("a.png", max_pixels=64 * 80)[0].done == 1
    result, _ = run("a.png", max_pixels=64 * 80 - 1)
    assert result.failed == [f"a.png: expected an image of 1 to 5119 pixels, got 80x64; {ELSE}"]


def test_messages_of_decoders_name_their_file(here, caplog, capfd):
    data = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8))[1].tobytes()
    write("a.jpg", "c.jpg", data=data)
    write("b.jpg", data=data[: len(data) // 2] + b"\xff\xd9")
    assert run("*.jpg")[0].done == 3
    assert caplog.messages == ["b.jpg: Corrupt JPEG data: premature end of data segment"]
    assert capfd.readouterr().err == ""


def test_an_image_is_turned_as_its_orientation_says(here):
    write("a.png", data=with_exif(PNG, 6))
    _, rows = run("a.png")
    assert (rows[0]["width"], rows[0]["height"]) == (64, 80)
    assert cv2.imread("out/a_labelIds.png", cv2.IMREAD_UNCHANGED).shape == (80, 64)


def contents(folder: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def brightness(images):
    return images.float().mean(1) // 25


def test_a_prediction_that_was_killed_goes_on_and_leaves_the_same_bytes(here):
    """Frames in folders, some of them corrupt, and a kill while others are read and written."""
    rng = np.random.default_rng(1)
    for number in range(24):
        data = cv2.imencode(".png", rng.integers(0, 256, (64, 80, 3), np.uint8))[1].tobytes()
        write(f"F/{number % 2}/{number:02}.png", data=data[: 300 if number % 5 == 0 else None])

    def kill(images):
        if len(seen) == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(0)
        return brightness(images)

    def predict_and_die():
        torch.set_num_threads(1)
        with owned(Path("out"), "output_dir"):
            run("F/**/*.png", network=kill, workers=3)

    seen: list[int] = []
    os.mkdir("out")
    child = multiprocessing.get_context("fork").Process(target=predict_and_die)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    rows = (here / "out" / "predictions.jsonl").read_text().splitlines()
    assert 0 < len(rows) < 19
    with (here / "out" / "predictions.jsonl").open("a") as file:
        file.write('{"file": "F/0/1')
    (here / "out" / ".1.2.tmp").write_bytes(b"half")

    with owned(Path("out"), "output_dir"):
        result, _ = run("F/**/*.png", network=lambda images: seen.append(0) or brightness(images), resume=True)
    assert (result.done, len(result.failed)) == (19, 5)
    assert result.kept == sum("error" not in json.loads(row) for row in rows) == 19 - len(seen)
    assert all("truncated PNG" in line for line in result.failed)
    straight, _ = run("F/**/*.png", folder="straight", network=brightness)
    expected = {name.replace("straight", "out", 1): data for name, data in contents("straight").items()}
    assert contents("out") == expected and straight.done == 19


class Blocks:
    """A network whose logits are of the colours of blocks of 8x8 pixels."""

    device = torch.device("cpu")

    def __init__(self, called=lambda: None) -> None:
        self.called = called

    def __call__(self, images):
        return upsample_argmax(self.logits(images), images.shape[-2:])

    def logits(self, images):
        self.called()
        means = F.avg_pool2d(images.float(), 8)
        return torch.cat([means, 255 - means, torch.zeros_like(means), means[:, :2]], 1)


def write_tiff(name: str, height: int = 320, width: int = 264, **options) -> np.ndarray:
    """A file of smooth colours in tiles, and what is in it."""
    os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
    small = np.random.default_rng(height).integers(0, 256, (8, 6, 3), np.uint8)
    image = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    tifffile.imwrite(name, image, tile=(64, 64), photometric="rgb", compression="zlib", metadata=None, **options)
    return image


def run_windows(*sources: str, network=None, folder: str = "out", **options):
    predictor = TTAPredictor(network or Blocks(), TTAConfig(window=(64, 64)))
    os.makedirs(folder, exist_ok=True)
    table, frames = get_label_table("camvid11"), find_images(sources)
    return predict(predictor, table, frames, Path(folder), max_pixels=100 * 100, **options)


def test_a_large_tiff_becomes_a_label_map_in_tiles(here, caplog):
    """Beside an image that is predicted at once, one that is too large and no TIFF, and a TIFF that is damaged."""
    image = write_tiff("F/big.tif")
    write_tiff("F/cut.tif")
    Path("F/cut.tif").write_bytes(Path("F/cut.tif").read_bytes()[:-100])
    write("F/a.png")
    write("F/large.jpg", data=cv2.imencode(".jpg", image)[1].tobytes())
    result = run_windows("F")
    lines = ["F/cut.tif: truncated TIFF", f"F/large.jpg: expected an image of 1 to 10000 pixels, got 264x320; {ELSE}"]
    assert (result.done, result.failed, caplog.messages) == (2, lines, lines)
    assert sorted(os.listdir("out")) == [
        "a_color.png", "a_labelIds.png", "a_overlay.jpg", "big_labelIds.tif", "predictions.jsonl"
    ]  # fmt: skip
    labels = tifffile.imread("out/big_labelIds.tif")
    expected = Blocks()(torch.from_numpy(image).permute(2, 0, 1)[None])[0].numpy()
    np.testing.assert_array_equal(labels, expected)
    colors = cv2.imread("out/big_labelIds.tif", cv2.IMREAD_COLOR_RGB)
    table = get_label_table("camvid11")
    np.testing.assert_array_equal(colors, table.color_array()[labels])
    row = json.loads(Path("out/predictions.jsonl").read_text().splitlines()[1])
    assert (row["file"], row["width"], row["height"]) == ("F/big.tif", 264, 320)
    shares = {table.classes[i]: round(float((labels == i).mean()), 5) for i in np.unique(labels)}
    assert len(shares) > 3 and row["share"] == shares
    assert len(find_images(["**/*.*"])) == 4  # what was written is not predicted again


def test_a_killed_prediction_of_a_large_tiff_leaves_no_half_of_it_and_goes_on(here):
    write_tiff("F/a.tif")
    write_tiff("F/b.tif", 328)

    def kill():
        calls.append(0)
        if len(calls) == 80:  # of 48 windows for each image
            os.kill(os.getpid(), signal.SIGKILL)

    def predict_and_die():
        torch.set_num_threads(1)
        with owned(Path("out"), "output_dir"):
            run_windows("F", network=Blocks(kill))

    calls: list[int] = []
    os.mkdir("out")
    child = multiprocessing.get_context("fork").Process(target=predict_and_die)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    left = sorted(os.listdir("out"))
    assert left[:2] == [left[0], ".lock"] and left[0].endswith(".tmp") and "b_labelIds.tif" not in left
    with owned(Path("out"), "output_dir"):
        result = run_windows("F", network=Blocks(lambda: calls.append(0)), resume=True)
    assert (result.done, result.kept, len(calls)) == (2, 1, 48)
    assert sorted(os.listdir("out")) == ["a_labelIds.tif", "b_labelIds.tif", "predictions.jsonl"]
    run_windows("F", folder="straight")
    assert contents("out") == {name.replace("straight", "out", 1): data for name, data in contents("straight").items()}


def test_without_tifffile_a_large_tiff_is_one_line_and_the_others_go_on(here, monkeypatch):
    write_tiff("F/big.tif")
    write("F/a.png")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    result = run_windows("F")
    line = "F/big.tif: tifffile: needed for large TIFF images; pip install 'bcmfnet[tiff]'"
    assert (result.done, result.failed) == (1, [line])


def test_reading_and_writing_overlap_the_network(here, monkeypatch):
    """While the first frame is in the network the next ones are read; while the last ones are, the first is written."""
    write(*(f"F/{number}.png" for number in range(4)))
    read, written_to = threading.Semaphore(0), threading.Event()
    decode, encode = predict_module.read_image, predict_module.write_png
    monkeypatch.setattr(predict_module, "read_image", lambda *args: (decode(*args), read.release())[0])
    monkeypatch.setattr(predict_module, "write_png", lambda *args: (encode(*args), written_to.set())[0])
    calls: list[int] = []

    def network(images):
        waits = [read.acquire(timeout=10) for _ in range(3)] if not calls else [written_to.wait(10)] * (len(calls) == 3)
        calls.append(0)
        assert all(waits)
        return torch.zeros(images[:, 0].shape)

    result, _ = run("F", network=network, workers=2)
    assert (result.done, result.failed) == (4, [])


def test_few_images_are_in_memory(here, monkeypatch):
    """However slow the network is, no more frames are read than threads read ahead and hold one."""
    write(*(f"F/{number:02}.png" for number in range(20)))
    decode, count = predict_module.read_image, []
    monkeypatch.setattr(predict_module, "read_image", lambda *args: (count.append(0), decode(*args))[1])

    def network(images):
        time.sleep(0.005)
        ahead.append(len(count) - len(ahead))
        return torch.zeros(images[:, 0].shape)

    ahead: list[int] = []
    run("F", network=network, workers=3)
    assert len(ahead) == 20 and max(ahead) <= 4


def test_messages_of_decoders_name_their_file_when_several_decode(here, caplog, capfd):
    data = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8))[1].tobytes()
    write(*(f"{number:02}.jpg" for number in range(30)), data=data)
    write("07.jpg", "08.jpg", "21.jpg", data=data[: len(data) // 2] + b"\xff\xd9")
    assert run("*.jpg", workers=4)[0].done == 30
    line = "{}.jpg: Corrupt JPEG data: premature end of data segment"
    assert caplog.messages == [line.format(number) for number in ("07", "08", "21")]
    assert capfd.readouterr().err == ""
