"""Work that overlaps: results of other threads in order, a bounded number ahead, and the time that each stage takes."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    pool: Executor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Future[Result]]:
    """function(item) of each item, in the items' order; at most `ahead` are worked on while the next one is used."""
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


class StageTimes:
    """Seconds that stages were busy in, whatever their thread, and how often; and the time since the start."""

    def __init__(self, *stages: str) -> None:
        self.seconds = dict.fromkeys(stages, 0.0)
        self.counts = dict.fromkeys(stages, 0)
        self._lock = threading.Lock()
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Count the time of the code inside."""
        start = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[stage] += time.perf_counter() - start
                self.counts[stage] += 1

    def milliseconds(self) -> dict[str, float]:
        """Mean milliseconds of each stage that ran."""
        return {stage: 1000 * self.seconds[stage] / count for stage, count in self.counts.items() if count}

    def rate(self, count: int) -> float:
        """So many frames, by the seconds since the start."""
        return count / (time.perf_counter() - self._start)

    def summary(self, frames: int) -> str:
        """Milliseconds of each stage, and frames/s beside what the network alone would reach."""
        stages = ", ".join(f"{stage} {value:.1f} ms" for stage, value in self.milliseconds().items())
        alone = 1000 / self.milliseconds()["network"]
        return f"{stages} a frame; {self.rate(frames):.1f} frames/s, {alone:.1f} were the network alone"
