"""Streams as frames, and frames as a video, through PyAV (the extra `video`), imported when it is asked for."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bcmfnet.data.files import list_images
from bcmfnet.data.io import MAX_PIXELS, read_image
from bcmfnet.data.pairs import check_frame_size
from bcmfnet.errors import ConfigError, DataError, MissingDataError, MissingPackageError, printable

log = logging.getLogger("bcmfnet.predict")

VIDEO_ENDINGS = tuple(".3gp .avi .flv .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv .y4m".split())
CAMERAS = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}")}
"""By platform, FFmpeg's name of the device that cameras are read from, and of the camera of an index."""
TICKS = 60_000
"""Of a second in the videos that are written: frames of all usual rates come at their very time."""
FLUSHED = {"flush_packets": "1", "cluster_time_limit": "1000"}  # a kill loses a second
FRAGMENTED = {"flush_packets": "1", "movflags": "frag_keyframe+empty_moov+default_base_moof"}
QUICK = {"preset": "veryfast", "tune": "zerolatency", "crf": "23"}
ITU709, BT709 = 1, 1  # the same matrix as swscale and as a file's header number it


def require_av() -> Any:
    """The module of PyAV. Raises MissingPackageError where it is not installed."""
    try:
        import av
    except ImportError:
        raise MissingPackageError("av: needed for video; pip install 'bcmfnet[video]'") from None
    return av


def is_stream(source: str) -> bool:
    """Whether a source is `-`, the index of a camera, a URL or named as a video, and not a folder or an image."""
    if os.path.isdir(source):
        return False
    return source == "-" or source.isdecimal() or "://" in source or source.lower().endswith(VIDEO_ENDINGS)


class Moment(NamedTuple):
    """A frame RGB uint8 [H, W, 3], the second of the stream that it is shown at, `time.perf_counter()` when it came."""

    image: np.ndarray
    second: float
    arrived: float


class Source:
    """A stream that gives its frames once: a video file, a camera's index, a URL, `-` for raw frames, or a folder.

    Frames have the size of the first one, and are turned upright. One that cannot be decoded is left out and counted
    in `broken`. What is open is opened by the first frame and closed with the iterator, in the thread that iterates.

    Args:
        size: height and width of the raw frames on standard input.
        pixel_format: theirs, by FFmpeg's name.
        fps: theirs, and those of a folder and of a stream that says none.
        timeout: seconds to wait for a network or a camera.
        max_pixels: of a frame.

    Raises:
        ConfigError: raw frames without a size, or of an unknown format; a camera where none can be read.
        MissingDataError: a file that is not there.
        MissingPackageError: PyAV is not installed.
        DataError, from the iterator: what cannot be opened or is no video, has frames of a size that cannot be used,
            breaks off or stalls.
    """

    live = False
    """Whether the source waits for nobody: a camera, or a URL that has no end. Known from the first frame on."""
    total: int | None = None
    """Frames that a file says it has. Known from the first frame on."""
    broken = 0

    def __init__(
        self,
        source: str,
        size: tuple[int, int] | None = None,
        pixel_format: str = "rgb24",
        fps: float = 25.0,
        timeout: float = 10.0,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self._av = require_av()
        self.title = printable(re.sub(r"(?<=://)[^/@]*@", "", source))  # without a password
        self.fps, self._timeout, self._max_pixels = fps, timeout, max_pixels
        self._source, self._format, self._options = f"file:{source}", None, {}
        self._folder = source if os.path.isdir(source) else None
        self._size: tuple[int, int] | None = None
        if source == "-":
            self._source, self._format = "pipe:0", "rawvideo"
            self._options = self._raw(size, pixel_format)
        elif self._folder is None and source.isdecimal():
            if sys.platform not in CAMERAS:
                raise ConfigError(f"SOURCE: expected a file or a URL on {sys.platform}, got the camera {source}")
            self._format, address = CAMERAS[sys.platform]
            self._source = address.format(source)
        elif "://" in source:
            self._source, self._options = source, {"rtsp_transport": "tcp"} if source.startswith("rtsp") else {}
        elif not os.path.exists(source):
            raise MissingDataError(f"SOURCE: expected a video, found no file {source}")

    def _raw(self, size: tuple[int, int] | None, pixel_format: str) -> dict[str, str]:
        if size is None:
            raise ConfigError("stream.size: expected the height and width of the frames on standard input, got none")
        try:
            self._av.VideoFormat(pixel_format)
        except ValueError:
            expected = "a pixel format of FFmpeg, such as rgb24, bgr24, gray, yuv420p or nv12"
            raise ConfigError(f"stream.format: expected {expected}, got {pixel_format!r}") from None
        return {"video_size": f"{size[1]}x{size[0]}", "pixel_format": pixel_format, "framerate": str(self.fps)}

    @property
    def name(self) -> str:
        """Name for files about it: the stem of its own, `camera0`, `stdin`."""
        if self._format is not None:
            return "stdin" if self._source == "pipe:0" else f"camera{self.title}"
        if self._folder is not None:
            return os.path.basename(os.path.abspath(self._folder)) or "clip"
        return re.sub(r"[^\w.-]+", "_", Path(self.title.partition("?")[0]).stem) or "stream"

    def __iter__(self) -> Iterator[Moment]:
        return self._images(self._folder) if self._folder is not None else self._decoded()

    def _images(self, folder: str) -> Iterator[Moment]:
        count = 0
        self.total = len(paths := list_images(Path(folder)))
        for path in paths:
            try:
                image = read_image(path, self._max_pixels)
                height, width = image.shape[:2]
                if self._size is None:
                    self._check(str(path), height, width)
                    self._size = height, width
                if (height, width) != self._size:
                    expected = f"{self._size[1]}x{self._size[0]} pixels, as the frames before"
                    raise DataError(f"{path}: expected {expected}, got {width}x{height}")
            except DataError as error:
                log.warning("%s", error)
                self.broken += 1
                continue
            yield Moment(image, count / self.fps, time.perf_counter())
            count += 1
        if not count:
            raise DataError(f"{folder}: expected a folder of images, found none that can be read")

    def _decoded(self) -> Iterator[Moment]:
        count, start = 0, None
        try:
            with self._open() as container:
                stream = self._describe(container)
                for packet in container.demux(stream):
                    for picture in self._pictures(packet):
                        arrived = time.perf_counter()
                        at = count / self.fps if picture.time is None else picture.time
                        start = at if start is None else start
                        yield Moment(self._upright(picture), at - start, arrived)
                        count += 1
        except self._av.error.ExitError:
            raise DataError(f"{self.title}: nothing came for {self._timeout:g} s, after {count} frames") from None
        except self._av.error.FFmpegError as error:
            after = f" after {count} frames" if count else ""
            raise DataError(f"{self.title}: cannot be read{after}: {error.strerror}") from None
        if not count:
            raise DataError(f"{self.title}: expected a video, found no frame that can be decoded")
        if stream.frames > count + self.broken:
            log.warning("%s: ended after %d of %d frames", self.title, count + self.broken, stream.frames)

    def _open(self) -> Any:
        how = {"format": self._format, "options": self._options, "timeout": self._timeout}
        return self._av.open(self._source, metadata_errors="replace", **how)

    def _describe(self, container: Any) -> Any:
        """The stream of frames in a container; what it says of itself is kept."""
        if not container.streams.video:
            raise DataError(f"{self.title}: expected a video, found no frames in it")
        stream = container.streams.video[0]
        self.fps = float(stream.average_rate or stream.guessed_rate or self.fps)
        remote = "://" in self._source
        endless = container.duration is None or not self._source.startswith("http")
        self.live = self._format in dict(CAMERAS.values()) or (remote and endless)
        if container.duration is not None and not self.live:
            self.total = stream.frames or round(container.duration / 1e6 * self.fps) or None
        stream.thread_type = "SLICE" if self.live else "AUTO"  # threads for frames would hold some back
        return stream

    def _pictures(self, packet: Any) -> list[Any]:
        """Frames of a packet, none where it is damaged."""
        try:
            pictures = packet.decode()
        except self._av.error.InvalidDataError:
            self.broken += 1
            return []
        whole = [picture for picture in pictures if not picture.is_corrupt]
        self.broken += len(pictures) - len(whole)
        return whole

    def _upright(self, picture: Any) -> np.ndarray:
        if self._size is None:
            self._check(self.title, picture.height, picture.width)
            self._size = picture.height, picture.width
        height, width = self._size
        image = picture.to_ndarray(format="rgb24", width=width, height=height)
        return np.ascontiguousarray(np.rot90(image, picture.rotation // 90))

    def _check(self, name: str, height: int, width: int) -> None:
        check_frame_size(name, height, width)
        if height * width > self._max_pixels:
            raise DataError(f"{name}: expected frames of at most {self._max_pixels} pixels, got {width}x{height}")


class VideoWriter:
    """A video that plays up to where its writing ended, however that was.

    Args:
        path: `.mkv` keeps gray frames uint8 [H, W] exactly (FFV1); `.mp4` holds RGB frames uint8 [H, W, 3] in H.264, in
            fragments of a second, without an odd last row or column.
        height, width: of the frames.
        fps: of the frames, roughly: each comes at its own time.

    Raises:
        DataError, from every method: it cannot be written.
    """

    def __init__(self, path: Path, height: int, width: int, fps: float) -> None:
        self._av, self._path, self._exact = require_av(), path, path.suffix == ".mkv"
        self._last, self._step = -1, max(round(TICKS / fps), 1)
        rate = Fraction(fps).limit_denominator(1001)
        with self._told():
            if self._exact:
                self._container = self._av.open(f"file:{path}", "w", container_options=FLUSHED)
                stream = self._container.add_stream("ffv1", rate=rate, options={"level": "3"})
                stream.width, stream.height, stream.pix_fmt = width, height, "gray"
            else:
                self._container = self._av.open(f"file:{path}", "w", container_options=FRAGMENTED)
                stream = self._container.add_stream("libx264", rate=rate, options=QUICK)
                stream.width, stream.height, stream.pix_fmt = width // 2 * 2, height // 2 * 2, "yuv420p"
                stream.codec_context.colorspace = BT709
                stream.codec_context.gop_size = max(round(fps), 1)
            stream.codec_context.time_base = Fraction(1, TICKS)
        self._stream = stream

    def write(self, picture: np.ndarray, second: float) -> None:
        """Write a frame at its second; where that is none after the frame before, a usual time after that one."""
        if self._exact:
            frame = self._av.VideoFrame.from_ndarray(picture, format="gray")
        else:
            even = np.ascontiguousarray(picture[: self._stream.height, : self._stream.width])
            frame = self._av.VideoFrame.from_ndarray(even, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=ITU709)
        ticks = round(second * TICKS)
        self._last = ticks if ticks > self._last else self._last + self._step
        frame.pts, frame.time_base = self._last, Fraction(1, TICKS)
        self._encode(frame)

    def close(self) -> None:
        """Write what is left, and close the file also where that fails."""
        try:
            self._encode(None)
        finally:
            with self._told():
                self._container.close()

    def _encode(self, frame: Any) -> None:
        with self._told():
            self._container.mux(self._stream.encode(frame))

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (OSError, self._av.error.FFmpegError) as error:
            raise DataError(f"{self._path}: cannot be written: {error.strerror}") from None
