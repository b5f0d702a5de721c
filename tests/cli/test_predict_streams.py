"""`bcmfnet predict` of streams that cannot be had or break: the exit code, one line on stderr, and what was written."""

from __future__ import annotations

import os
import socket

import numpy as np
import pytest

from bcmfnet.data import video

av = pytest.importorskip("av")


@pytest.fixture
def predict(bcmfnet, local_network, trained, tmp_path):
    """Run it on a stream; its output folder is tmp_path / "out"."""
    return lambda *argv: bcmfnet("predict", *argv, "--weights", trained, "--output-dir", tmp_path / "out")


@pytest.fixture
def clip(tmp_path):
    """60 frames of noise in an MP4 file whose index is at its start."""
    noise, path = np.random.default_rng(0), tmp_path / "a.mp4"
    with av.open(str(path), "w", container_options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for _ in range(60):
            picture = noise.integers(0, 256, (64, 96, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def frames(path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_a_clip(predict, clip, tmp_path):
    result = predict(clip)
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[0] == f"60 frames written to {tmp_path / 'out'}"
    assert frames(tmp_path / "out" / "a_labelIds.mkv") == frames(tmp_path / "out" / "a_overlay.mp4") == 60


def test_a_file_that_is_not_there(predict, tmp_path):
    result = predict(tmp_path / "gone.mp4")
    line = f"bcmfnet: SOURCE: expected a video, found no file {tmp_path / 'gone.mp4'}\n"
    assert (result.code, result.out, result.err) == (2, "", line)
    assert not (tmp_path / "out").exists()


def test_a_camera_that_is_not_there(predict, monkeypatch, tmp_path):
    """On Linux, whatever cameras it has."""
    monkeypatch.setattr(video.sys, "platform", "linux")
    assert not os.path.exists("/dev/video97")
    result = predict(97)
    assert (result.code, result.out, result.err) == (1, "", "bcmfnet: 97: cannot be read: No such file or directory\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scheme", ["http", "rtsp"])
def test_a_url_that_refuses(predict, tmp_path, scheme):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}/live.ts"
    result = predict(f"{scheme}://user:secret@{address}")
    assert (result.code, result.out) == (1, "")
    assert result.err == f"bcmfnet: {scheme}://{address}: cannot be read: Connection refused\n"
    assert not (tmp_path / "out").exists()


def test_a_url_that_says_nothing(predict):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/live.ts"
        result = predict(url, "--stream.timeout", 0.5)
    line = f"bcmfnet: {url}: nothing came for 0.5 s, after 0 frames\n"
    assert (result.code, result.out, result.err) == (1, "", line)


def test_a_file_that_ends_in_the_middle(predict, clip, tmp_path):
    """Within a frame, which is the broken one."""
    data = clip.read_bytes()
    clip.write_bytes(data[: len(data) * 3 // 5])
    result = predict(clip)
    written = frames(tmp_path / "out" / "a_labelIds.mkv")
    assert result.code == 1 and 20 < written < 50
    assert result.out.splitlines()[0] == f"{written} frames written to {tmp_path / 'out'}, 1 broken"
    assert result.err == f"{clip}: ended after {written + 1} of 60 frames\n"
    assert frames(tmp_path / "out" / "a_overlay.mp4") == written


def test_a_file_that_is_no_video(predict, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video" * 1000)
    result = predict(tmp_path / "a.mp4")
    line = f"bcmfnet: {tmp_path / 'a.mp4'}: cannot be read: Invalid data found when processing input\n"
    assert (result.code, result.out, result.err) == (1, "", line)


def test_a_stream_beside_others_and_what_streams_have_not(predict, clip):
    result = predict(clip, clip)
    assert (result.code, result.err) == (2, f"bcmfnet: SOURCE: expected images or one stream, got {clip} {clip}\n")
    result = predict(clip, "--resume")
    assert (result.code, result.err) == (2, f"bcmfnet: --resume: expected images, got the stream {clip}\n")
