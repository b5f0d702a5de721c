"""Streams from everything that they may come from, good and broken, to videos that play."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from bcmfnet.data import get_label_table, video
from bcmfnet.data.video import Source, VideoWriter, is_stream
from bcmfnet.engine.pipeline import ReadAhead
from bcmfnet.engine.stream import predict_stream
from bcmfnet.errors import ConfigError, DataError, MissingDataError, MissingPackageError

av = pytest.importorskip("av")
HEIGHT, WIDTH = 64, 97
TABLE = get_label_table("camvid11")


def shade(number: int) -> np.ndarray:
    """A frame that tells its number: two shades, so that there is more than one label."""
    frame = np.full((HEIGHT, WIDTH, 3), 20 * (number % 10), np.uint8)
    frame[:, WIDTH // 2 :] = 240
    return frame


def labels_of(images: torch.Tensor) -> torch.Tensor:
    return (images[:, 0] + 5).div(24, rounding_mode="floor").byte()


def clip(path: Path, frames: int = 20, codec: str = "ffv1", pixels: str = "bgr0") -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH // 2 * 2 if pixels == "yuv420p" else WIDTH, HEIGHT, pixels
        for number in range(frames):
            picture = np.ascontiguousarray(shade(number)[:, : stream.width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def frames_of(path: Path, form: str) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format=form) for frame in container.decode(video=0)]


def run(source: Source, folder: Path, network=labels_of, videos: str = "both"):
    folder.mkdir(exist_ok=True)
    return predict_stream(network, TABLE, source, folder, videos)


def assert_labels(folder: Path, name: str, numbers: list[int]) -> None:
    maps = frames_of(folder / f"{name}_labelIds.mkv", "gray")
    expected = [labels_of(torch.from_numpy(shade(number)).permute(2, 0, 1)[None])[0].numpy() for number in numbers]
    assert len(maps) == len(expected)
    assert all(np.array_equal(a, b) for a, b in zip(maps, expected, strict=True))


def test_a_file_loses_no_frame_and_keeps_its_labels_and_times(tmp_path):
    result = run(Source(str(clip(tmp_path / "a.mkv"))), tmp_path / "out")
    assert (result.error, result.written, result.dropped, result.broken) == (None, 20, 0, 0)
    assert_labels(tmp_path / "out", "a", list(range(20)))
    with av.open(str(tmp_path / "out" / "a_overlay.mp4")) as container:
        times = [float(frame.time) for frame in container.decode(video=0)]
    assert times == pytest.approx([n / 25 for n in range(20)], abs=1e-3)
    overlays = frames_of(tmp_path / "out" / "a_overlay.mp4", "rgb24")
    assert overlays[0].shape == (HEIGHT, WIDTH - 1, 3)
    expected = np.array(TABLE.colors[10]) * 0.55 + 240 * 0.45
    assert np.abs(overlays[5][32, 80] - expected).max() < 12
    assert "frames/s, latency p50" in str(result.speed)


def test_a_folder_is_a_clip_without_its_damaged_images(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(5):
        cv2.imwrite(str(tmp_path / "in" / f"{number}.png"), shade(number))
    (tmp_path / "in" / "2.png").write_bytes(b"no image")
    result = run(Source(str(tmp_path / "in"), fps=10), tmp_path / "out", videos="labels")
    assert (result.error, result.written, result.broken) == (None, 4, 1)
    assert_labels(tmp_path / "out", "in", [0, 1, 3, 4])
    assert not (tmp_path / "out" / "in_overlay.mp4").exists()


@contextlib.contextmanager
def standard_input(data: bytes):
    """The bytes as descriptor 0."""
    before, (read, write) = os.dup(0), os.pipe()
    os.dup2(read, 0)
    os.close(read)

    def feed():
        with open(write, "wb") as file:
            file.write(data)

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        yield
    finally:
        os.dup2(before, 0)
        os.close(before)
        thread.join()


def test_raw_frames_on_standard_input(tmp_path):
    with standard_input(b"".join(shade(number).tobytes() for number in range(12))):
        result = run(Source("-", size=(HEIGHT, WIDTH)), tmp_path / "out", videos="labels")
    assert (result.error, result.written, result.dropped) == (None, 12, 0)
    assert_labels(tmp_path / "out", "stdin", list(range(12)))


def test_a_camera_that_is_faster_than_the_network_drops_frames(tmp_path, monkeypatch):
    """FFmpeg's test picture in the place of a camera: it has as many frames as one asks for."""
    monkeypatch.setitem(video.CAMERAS, "linux", ("lavfi", "testsrc=size=96x64:rate=200:duration=1"))
    monkeypatch.setattr(video.sys, "platform", "linux")

    def slow(images):
        time.sleep(0.01)
        return labels_of(images)

    source = Source("0")
    result = run(source, tmp_path / "out", slow, videos="labels")
    assert source.live and source.name == "camera0"
    assert result.error is None and result.dropped > 0 and result.written + result.dropped == 200
    assert len(frames_of(tmp_path / "out" / "camera0_labelIds.mkv", "gray")) == result.written


@pytest.fixture
def server(tmp_path):
    """A URL that gives a clip in one chunk, and then ends, breaks off or stalls."""
    data = clip(tmp_path / "s.ts", 30, "mpeg2video", "yuv420p").read_bytes()
    stop = threading.Event()
    listening = socket.create_server(("127.0.0.1", 0))

    def serve():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                with connection:
                    how = connection.recv(9999).split()[1].decode()
                    head = b"HTTP/1.1 200 OK\r\nContent-Type: video/mp2t\r\nTransfer-Encoding: chunked\r\n\r\n"
                    connection.sendall(head + b"%x\r\n" % len(data) + data + b"\r\n")
                    if "end" in how:
                        connection.sendall(b"0\r\n\r\n")
                    if "stall" in how:
                        stop.wait(10)
                    if "drop" in how:  # a reset, once what came is read: a connection that is closed is the end
                        time.sleep(0.3)
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://user:secret@127.0.0.1:{listening.getsockname()[1]}"
    stop.set()
    listening.close()


@pytest.mark.parametrize(("how", "line"), [
    ("end", None),
    ("drop", "cannot be read after"),
    ("stall", "nothing came for 0.5 s, after"),
])  # fmt: skip
def test_a_url_that_ends_breaks_off_or_stalls_leaves_a_video_that_plays(server, tmp_path, how, line):
    source = Source(f"{server}/{how}.ts", timeout=0.5)
    result = run(source, tmp_path / "out")
    assert source.live and source.name == how and "secret" not in source.title
    if line is None:
        assert result.error is None
    else:
        assert isinstance(result.error, DataError) and line in str(result.error) and "secret" not in str(result.error)
    assert result.written > 0 and result.written + result.dropped >= 28
    for name in (f"{how}_labelIds.mkv", f"{how}_overlay.mp4"):
        assert len(frames_of(tmp_path / "out" / name, "gray")) == result.written


PUSH = """
import sys, time
import av, numpy
for _ in range(100):
    try:
        container = av.open(sys.argv[1], "w", format="rtsp", options={"rtsp_transport": "tcp"})
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in range(30):
            picture = numpy.full((64, 96, 3), 8 * number, "uint8")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        break
    except av.error.ConnectionRefusedError:
        time.sleep(0.1)
container.mux(stream.encode(None))
{end}
"""


@pytest.mark.skipif("rtsp" not in av.formats_available, reason="this FFmpeg has no RTSP")
@pytest.mark.parametrize("end", ["container.close()", "import os; os._exit(0)", "time.sleep(60)"], ids=str.split)
def test_rtsp_that_ends_breaks_off_or_stalls(tmp_path, end):
    """FFmpeg on both sides: what pushes to a server with ANNOUNCE and RECORD, in a process of its own, and the source,
    which listens as that server does.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"rtsp://127.0.0.1:{free.getsockname()[1]}/live"
    source = Source(url, timeout=20 if "sleep" not in end else 5)
    source._options |= {"rtsp_flags": "listen", "listen_timeout": "60"}
    with subprocess.Popen([sys.executable, "-c", PUSH.replace("{end}", end), url]) as camera:
        try:
            result = run(source, tmp_path / "out")
        finally:
            camera.kill()
    assert source.live and source.name == "live"
    assert result.written > 0 and result.written + result.dropped == 30
    if "sleep" in end:
        assert str(result.error) == f"{url}: nothing came for 5 s, after 30 frames"
    else:
        assert result.error is None
    for name in ("live_labelIds.mkv", "live_overlay.mp4"):
        assert len(frames_of(tmp_path / "out" / name, "gray")) == result.written


def test_ctrl_c_leaves_videos_that_play(tmp_path):
    calls: list[int] = []

    def network(images):
        calls.append(0)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return labels_of(images)

    result = run(Source(str(clip(tmp_path / "a.mkv"))), tmp_path / "out", network)
    assert isinstance(result.error, KeyboardInterrupt) and result.written == 6
    assert_labels(tmp_path / "out", "a", list(range(6)))


def test_a_full_disk_is_one_line_and_a_file_that_plays(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    try:
        noise = np.random.default_rng(0)
        network = lambda images: torch.from_numpy(noise.integers(0, 11, (1, HEIGHT, WIDTH), np.uint8))  # noqa: E731
        result = run(Source(str(clip(tmp_path / "a.mkv", 200))), folder, network, videos="labels")
        path = folder / "a_labelIds.mkv"
        assert str(result.error) == f"{path}: cannot be written: No space left on device"
        frames = 0
        with av.open(str(path)) as container, contextlib.suppress(av.error.FFmpegError):
            for _ in container.decode(video=0):
                frames += 1
        assert 20 < frames < 200
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize(("name", "form"), [("a.mkv", "gray"), ("a.mp4", "rgb24")])
def test_a_kill_costs_the_last_seconds_alone(tmp_path, name, form):
    """Nothing is closed: what the disk has by then is what a process that is killed leaves."""
    writer = VideoWriter(tmp_path / name, HEIGHT, WIDTH, 10)
    for number in range(100):
        writer.write(shade(number)[..., 0] if form == "gray" else shade(number), number / 10)
    left = (tmp_path / name).read_bytes()
    writer.close()
    (tmp_path / f"left_{name}").write_bytes(left)
    assert 75 <= len(frames_of(tmp_path / f"left_{name}", form)) < 100
    assert len(frames_of(tmp_path / name, form)) == 100


def test_a_writer_puts_frames_in_order(tmp_path):
    """Also where a stream jumps back in time."""
    writer = VideoWriter(tmp_path / "a.mp4", HEIGHT, WIDTH, 25)
    for second in (0, 0.04, 0.02, 0.02, 1):
        writer.write(shade(0), second)
    writer.close()
    with av.open(str(tmp_path / "a.mp4")) as container:
        times = [float(frame.time) for frame in container.decode(video=0)]
    assert times == pytest.approx([0, 0.04, 0.08, 0.12, 1], abs=1e-3)


@pytest.mark.parametrize(("name", "expected"), [
    ("clip.MP4", True), ("0", True), ("-", True), ("rtsp://h/x", True), ("a.png", False), ("*.png", False),
])  # fmt: skip
def test_what_is_a_stream(name, expected):
    assert is_stream(name) is expected


def test_sources_that_cannot_be_used_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(MissingDataError, match="^SOURCE: expected a video, found no file gone.mp4$"):
        Source("gone.mp4")
    with pytest.raises(ConfigError, match="^stream.size: expected the height and width"):
        Source("-")
    with pytest.raises(ConfigError, match="^stream.format: expected a pixel format of FFmpeg.*, got 'nope'$"):
        Source("-", size=(64, 64), pixel_format="nope")
    (tmp_path / "bad.mp4").write_bytes(b"x" * 5000)
    with pytest.raises(DataError, match="bad.mp4: cannot be read: Invalid data"):
        next(iter(Source(str(tmp_path / "bad.mp4"))))
    with pytest.raises(DataError, match="expected frames of at most 100 pixels, got 97x64"):
        next(iter(Source(str(clip(tmp_path / "a.mkv", 1)), max_pixels=100)))
    monkeypatch.setitem(video.sys.modules, "av", None)
    with pytest.raises(MissingPackageError, match=r"^av: needed for video; pip install 'bcmfnet\[video\]'$"):
        Source("a.mp4")


def test_what_waits_is_bounded_and_the_oldest_is_dropped():
    taken = ReadAhead(iter(range(100)), 2, lambda: True)
    deadline = time.monotonic() + 10
    while taken.dropped < 98 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert list(taken) == [98, 99]
    assert list(ReadAhead(iter(range(100)), 2, lambda: False)) == list(range(100))
