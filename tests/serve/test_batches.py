"""Batches without a network: which items come together, in which order, and what becomes of those given up."""

from __future__ import annotations

import asyncio
import threading

import pytest

from bcmfnet.serve.batches import Batches


def served(compute, most, calls):
    """Results, or exceptions, of (key, item, seconds to wait at most) that are asked for at once."""

    async def main():
        batches = Batches(compute, most, wait=0.01)
        running = asyncio.create_task(batches.run())
        asked = [asyncio.wait_for(batches(key, item), seconds) for key, item, seconds in calls]
        results = await asyncio.gather(*asked, return_exceptions=True)
        running.cancel()
        return results, batches

    return asyncio.run(main())


def test_items_of_one_key_come_together_the_oldest_first():
    seen = []

    def compute(key, items):
        seen.append((key, items))
        return [item * 10 for item in items]

    calls = [(key, item, 5) for item, key in enumerate("abaabaab")]
    results, _ = served(compute, 3, calls)
    assert results == [0, 10, 20, 30, 40, 50, 60, 70]
    assert seen == [("a", [0, 2, 3]), ("b", [1, 4, 7]), ("a", [5, 6])]


def test_failure_is_told_to_its_batch_alone():
    def compute(key, items):
        if key == "b":
            raise ValueError(key)
        return items

    results, _ = served(compute, 8, [("a", 0, 5), ("b", 1, 5), ("b", 2, 5), ("c", 3, 5)])
    assert [results[0], results[3]] == [0, 3] and [repr(r) for r in results[1:3]] == ["ValueError('b')"] * 2


def test_items_that_nobody_waits_for_are_not_computed():
    seen, free = [], threading.Event()

    def compute(key, items):
        seen.append(key)
        free.wait(0.3)
        return items

    results, batches = served(compute, 8, [("a", 0, 5), ("b", 1, 0.1), ("c", 2, 5)])
    assert seen == ["a", "c"] and [results[0], results[2]] == [0, 2] and batches._jobs == []
    assert isinstance(results[1], TimeoutError)


@pytest.mark.parametrize("most", [1, 2])
def test_item_given_up_before_its_batch_leaves_the_others(most):
    results, _ = served(lambda key, items: items, most, [("a", 0, 0.001), ("a", 1, 5)])
    assert results[1] == 1
