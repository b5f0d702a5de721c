"""Requests of one kind that come within a few milliseconds, or while the network is busy, as one batch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(eq=False)
class _Job(Generic[Key, Item, Result]):
    key: Key
    item: Item
    since: float
    result: asyncio.Future[Result]


class Batches(Generic[Key, Item, Result]):
    """Computes items in batches of one key, in a thread of its own, the oldest first.

    Args:
        compute: results of the items of one key, in their order.
        most: items of a batch.
        wait: seconds that an item waits for others.
    """

    def __init__(self, compute: Callable[[Key, list[Item]], Sequence[Result]], most: int, wait: float) -> None:
        self._compute, self._most, self._wait = compute, most, wait
        self._jobs: list[_Job[Key, Item, Result]] = []
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "network")

    async def __call__(self, key: Key, item: Item) -> Result:
        """The result of an item. Raises what its batch raised."""
        loop = asyncio.get_running_loop()
        job: _Job[Key, Item, Result] = _Job(key, item, loop.time(), loop.create_future())
        self._jobs.append(job)
        self._arrived.set()
        try:
            return await job.result
        finally:  # also where nobody waits for it any more
            if job in self._jobs:
                self._jobs.remove(job)

    async def run(self) -> None:
        """Serve until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                await self._arrived.wait()
                if self._jobs and len(self._of_oldest()) < self._most:
                    await asyncio.sleep(self._jobs[0].since + self._wait - loop.time())
                await self._serve(self._take())
        finally:
            self._thread.shutdown(wait=False)

    def _of_oldest(self) -> list[_Job[Key, Item, Result]]:
        return [job for job in self._jobs if job.key == self._jobs[0].key][: self._most]

    def _take(self) -> list[_Job[Key, Item, Result]]:
        """The next batch."""
        batch = self._of_oldest()
        self._jobs = [job for job in self._jobs if job not in batch]
        if not self._jobs:
            self._arrived.clear()
        return batch

    async def _serve(self, batch: list[_Job[Key, Item, Result]]) -> None:
        if not batch:
            return
        loop = asyncio.get_running_loop()
        try:
            items = [job.item for job in batch]
            results = await loop.run_in_executor(self._thread, self._compute, batch[0].key, items)
        except Exception as error:
            for job in batch:
                if not job.result.done():
                    job.result.set_exception(error)
            return
        for job, result in zip(batch, results, strict=True):
            if not job.result.done():
                job.result.set_result(result)
