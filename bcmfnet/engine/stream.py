"""Prediction of a stream: frames that are decoded, predicted and encoded at the same time, to videos."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from bcmfnet.data.labels import LabelTable
from bcmfnet.data.video import Moment, Source, VideoWriter
from bcmfnet.engine.inference import Predictor
from bcmfnet.engine.pipeline import ReadAhead, StageTimes, in_order
from bcmfnet.engine.predict import label_ids
from bcmfnet.engine.progress import progress_bar
from bcmfnet.viz import overlay

log = logging.getLogger("bcmfnet.predict")

VIDEOS = {"labels": "_labelIds.mkv", "overlay": "_overlay.mp4"}  # what is written of a stream, after its name
WAITING = 2
"""Frames that wait for the network, and that wait to be written: more would only add to the latency."""
WARM_UP, WINDOW = 10, 1000
"""Frames that the rate and the latencies leave out at the start, and the last ones that they are of."""
SECONDS_TO_LOG = 10.0


class Speed:
    """Frames a second and latencies of the last frames, without the first ones, which find everything cold."""

    def __init__(self) -> None:
        self._seen = 0
        self._written: deque[float] = deque(maxlen=WINDOW)
        self._latencies: deque[float] = deque(maxlen=WINDOW)

    def add(self, arrived: float, written: float) -> None:
        """A frame that was decoded and written at these values of `time.perf_counter()`."""
        self._seen += 1
        if self._seen > WARM_UP:
            self._written.append(written)
            self._latencies.append(written - arrived)

    def fps(self) -> float | None:
        """Frames a second; None before there are two frames to tell it from."""
        if len(self._written) < 2:
            return None
        return (len(self._written) - 1) / (self._written[-1] - self._written[0])

    def latencies_ms(self) -> dict[str, float]:
        """p50, p95 and p99 of the milliseconds from a decoded frame to the written one; empty at first."""
        if not self._latencies:
            return {}
        values = np.percentile(self._latencies, (50, 95, 99)) * 1000
        return dict(zip(("p50", "p95", "p99"), values.tolist(), strict=True))

    def __str__(self) -> str:
        fps = self.fps()
        if fps is None:
            return "too few frames to tell a speed"
        latencies = " ".join(f"{name} {value:.1f}" for name, value in self.latencies_ms().items())
        return f"{fps:.1f} frames/s, latency {latencies} ms"


@dataclass
class StreamResult:
    """What became of a stream: frames written, and left out since nobody had time for them or they were damaged.

    `error` ended it: what was wrong with the source or with the disk, or Ctrl-C.
    """

    written: int = 0
    dropped: int = 0
    broken: int = 0
    error: BaseException | None = None
    speed: Speed = field(default_factory=Speed)
    times: StageTimes = field(default_factory=lambda: StageTimes("network", "write"))


def predict_stream(
    predictor: Predictor, table: LabelTable, source: Source, folder: Path, videos: str = "both"
) -> StreamResult:
    """Write NAME_labelIds.mkv and NAME_overlay.mp4 of a stream until it ends, breaks off or Ctrl-C comes.

    While a frame is in the network the next ones are decoded and the ones before are encoded. A source that is live
    loses the frames that nobody has time for. Memory does not grow with the stream.

    Args:
        videos: labels, overlay or both.
    """
    result = StreamResult()
    frames = ReadAhead(source, WAITING, lambda: source.live)
    try:
        with contextlib.closing(frames):
            _run(predictor, table, source, frames, folder, VIDEOS if videos == "both" else (videos,), result)
    except (Exception, KeyboardInterrupt) as error:
        result.error = error
    result.dropped, result.broken = frames.dropped, source.broken
    return result


def _run(
    predictor: Predictor,
    table: LabelTable,
    source: Source,
    frames: ReadAhead[Moment],
    folder: Path,
    videos: Iterable[str],
    result: StreamResult,
) -> None:
    first = next(frames)
    height, width = first.image.shape[:2]
    with contextlib.ExitStack() as opened:
        writers = {}
        for video in videos:
            writers[video] = VideoWriter(folder / f"{source.name}{VIDEOS[video]}", height, width, source.fps)
            opened.callback(writers[video].close)

        def labelled(moment: Moment) -> tuple[Moment, np.ndarray]:
            with result.times.measure("network"):
                return moment, predictor(torch.from_numpy(moment.image).permute(2, 0, 1)[None])[0].cpu().numpy()

        def write(work: tuple[Moment, np.ndarray]) -> tuple[float, float]:
            moment, labels = work
            with result.times.measure("write"):
                for video, writer in writers.items():
                    exact = video == "labels"
                    picture = label_ids(labels, table) if exact else overlay(moment.image, labels, table)
                    writer.write(picture, moment.second)
            result.written += 1
            return moment.arrived, time.perf_counter()

        pool = opened.enter_context(ThreadPoolExecutor(1))
        progress = opened.enter_context(progress_bar("predict", source.total))
        told = time.monotonic()
        for future in in_order(pool, write, map(labelled, itertools.chain([first], frames)), WAITING):
            result.speed.add(*future.result())
            progress.advance()
            if time.monotonic() - told > (1 if progress.visible else SECONDS_TO_LOG):
                told = time.monotonic()
                line = f"{result.speed}, {frames.dropped} dropped"
                progress.note(line) if progress.visible else log.info("%d frames: %s", result.written, line)
