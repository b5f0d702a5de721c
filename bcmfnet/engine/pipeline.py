"""Work that overlaps: results of other threads in order, a bounded number ahead, and the time that each stage takes."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import Generic, TypeVar

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


class ReadAhead(Generic[Item]):
    """An iterator over items that a thread of its own produces, with room for a few that wait.

    Args:
        items: what is iterated in the thread.
        room: items that wait at most.
        drop: asked where there is no room: whether the oldest one that waits makes it, or the thread waits too.
    """

    def __init__(self, items: Iterable[Item], room: int, drop: Callable[[], bool]) -> None:
        self.dropped = 0
        self._room, self._drop = room, drop
        self._waiting: deque[Item] = deque()
        self._changed = threading.Condition()
        self._ended = self._closed = False
        self._error: BaseException | None = None
        threading.Thread(target=self._produce, args=(items,), daemon=True).start()

    def _produce(self, items: Iterable[Item]) -> None:
        try:
            for item in items:
                with self._changed:
                    self._changed.wait_for(lambda: len(self._waiting) < self._room or self._closed or self._drop())
                    if self._closed:
                        break
                    if len(self._waiting) == self._room:
                        self._waiting.popleft()
                        self.dropped += 1
                    self._waiting.append(item)
                    self._changed.notify()
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        """The next item that waits. Raises what the items raised, once all before that are taken."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ended)
            if self._waiting:
                item = self._waiting.popleft()
                self._changed.notify()
                return item
        raise self._error or StopIteration

    def close(self) -> None:
        """Let the thread end at its next item. It may be waiting for that one, so it is not waited for."""
        with self._changed:
            self._closed = True
            self._changed.notify()


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
