"""Times of calls in microseconds, taken in turn so that what disturbs the machine disturbs all of them alike."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

Calls = dict[str, Callable[[], Any]]
Round = dict[str, dict[str, float]]
"""One sample of every call: call -> metric -> microseconds."""

WARM_UP = 1
LEAST_ROUNDS = 5
CUDA_BATCH = 20
GRAPH_BATCH = 5
"""Rounds on a GPU between two synchronisations: the queue stays full, and the budget is still looked at."""
LAUNCHES = 50
FLUSH_BYTES = 2**28
"""Over any L2 (50 MB on H200, 126 MB on B200), and 60 us of writing, behind which the next launches queue up."""
COPY_BYTES = 2**29
"""Beyond the caches of all but the largest CPUs, and long enough for launches not to count."""
QUANTILES = (20, 50, 80, 95)


def on_cpu(calls: Calls, seconds: float, clock: Callable[[], float] = time.perf_counter) -> list[Round]:
    """Wall time ("time") and CPU time of all threads ("cpu"), for `seconds` a call.

    Nothing is flushed: each call finds the caches as the call before it left them.
    """
    for _ in range(WARM_UP):
        _call_all(calls)
    return repeat(lambda: [{name: _stopwatch(call) for name, call in calls.items()}], seconds * len(calls), clock)


def on_cuda(calls: Calls, seconds: float, cuda: Any = torch.cuda) -> list[Round]:
    """Time between two device events around each call, its inputs no longer in L2 ("time").

    Where the host takes longer to launch a call than the device to overwrite L2 and run it, that wait is in the time.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda").zero_
    for _ in range(WARM_UP):
        _call_all(calls)
    return repeat(lambda: events(calls, CUDA_BATCH, flush, cuda), seconds * len(calls), time.perf_counter)


def in_graphs(replays: Calls, calls_in_each: int, seconds: float, cuda: Any = torch.cuda) -> list[Round]:
    """Time of a call inside a CUDA graph of many ("graph"): no launch by the host is in it."""
    _call_all(replays)
    rounds = repeat(lambda: events(replays, GRAPH_BATCH, None, cuda), seconds * len(replays), time.perf_counter)
    return [{name: {"graph": times["time"] / calls_in_each} for name, times in one.items()} for one in rounds]


def capture(
    function: Callable[..., Any], copies: Sequence[tuple[Any, ...]], cuda: Any = torch.cuda
) -> Callable[[], None]:
    """Replay of a CUDA graph that calls the function once on each copy of its inputs.

    The copies are to exceed L2 together, so that each call finds its inputs in memory without a flush, whose own time
    would have to be subtracted. All outputs are kept until the capture ends: each has its own memory, as cold.
    """
    side = cuda.Stream()
    side.wait_stream(cuda.current_stream())
    with cuda.stream(side):
        for _ in range(WARM_UP):
            function(*copies[0])
    cuda.current_stream().wait_stream(side)
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        outputs = [function(*inputs) for inputs in copies]
    del outputs
    return graph.replay


def copies_beyond_cache(bytes_moved: int, cache: int) -> int:
    """How many calls on memory of their own move twice the size of the cache; at least 10, so that a graph is long."""
    return max(10, math.ceil(2 * cache / bytes_moved))


def launches(calls: Calls, cuda: Any = torch.cuda) -> list[Round]:
    """Host time of a call on an idle device, not waiting for its result ("launch")."""
    rounds = []
    for _ in range(LAUNCHES):
        samples = {}
        for name, call in calls.items():
            cuda.synchronize()
            samples[name] = {"launch": _stopwatch(call)["time"]}
        rounds.append(samples)
    cuda.synchronize()
    return rounds


def copy_bandwidth(device: torch.device, seconds: float = 0.3) -> float:
    """GB/s of a large copy, read and written bytes together: the most that memory gives a call on this device."""
    source = torch.ones(COPY_BYTES, dtype=torch.int8, device=device)  # unwritten pages would be read from one page
    target = torch.zeros_like(source)
    timer = on_cpu if device.type == "cpu" else on_cuda
    median = quantiles(timer({"copy": lambda: target.copy_(source)}, seconds))["copy"]["time_us_50"]
    return 2 * COPY_BYTES / median / 1e3


def repeat(turn: Callable[[], list[Round]], seconds: float, clock: Callable[[], float]) -> list[Round]:
    """Rounds of one turn after the other, until the time is spent and there are at least `LEAST_ROUNDS`."""
    rounds: list[Round] = []
    end = clock() + seconds
    while len(rounds) < LEAST_ROUNDS or clock() < end:
        rounds += turn()
    return rounds


def quantiles(rounds: list[Round]) -> dict[str, dict[str, float]]:
    """The `QUANTILES` of each call and metric, as `<metric>_us_<per cent>`."""
    return {
        name: {
            f"{metric}_us_{share}": float(np.quantile([one[name][metric] for one in rounds], share / 100))
            for metric in rounds[0][name]
            for share in QUANTILES
        }
        for name in rounds[0]
    }


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Let torch use that many threads (None: as many as it does) and give it back what it had."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _call_all(calls: Calls) -> None:
    for call in calls.values():
        call()


def _stopwatch(call: Callable[[], Any]) -> dict[str, float]:
    cpu, wall = cpu_time(), time.perf_counter_ns()
    call()
    wall = time.perf_counter_ns() - wall
    return {"time": wall / 1e3, "cpu": (cpu_time() - cpu) / 1e3}


def cpu_time() -> int:
    """CPU time of all threads in nanoseconds.

    The process clock hears of other threads at the next tick, up to 4 ms late: of a call of 2 ms on two threads it sees
    one. A thread's own clock is exact; its id is made of the thread's as in Linux's posix-timers.h.
    """
    try:
        return sum(time.clock_gettime_ns((~int(thread) << 3) | 6) for thread in os.listdir("/proc/self/task"))
    except OSError:
        return time.process_time_ns()


def events(calls: Calls, rounds: int, flush: Callable[[], Any] | None, cuda: Any = torch.cuda) -> list[Round]:
    """Times on the device, each call after a flush; the host waits once, at the end."""
    marks = [{name: _between_events(call, flush, cuda) for name, call in calls.items()} for _ in range(rounds)]
    cuda.synchronize()
    return [{name: {"time": 1e3 * start.elapsed_time(end)} for name, (start, end) in one.items()} for one in marks]


def _between_events(call: Callable[[], Any], flush: Callable[[], Any] | None, cuda: Any) -> tuple[Any, Any]:
    start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    if flush is not None:
        flush()
    start.record()
    call()
    end.record()
    return start, end
