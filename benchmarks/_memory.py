"""Peak memory of one call beyond its inputs and outputs."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PROCESS = Path("/proc/self")


def extra_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Peak memory during a call, less what was there before it and what its result takes; None where unknown.

    The call must have run before: memory that it keeps from call to call (loaded code, threads' stacks, caches) is then
    there already, and is not counted.
    """
    return _on_cuda(call) if device.type == "cuda" else _on_cpu(call)


def _on_cuda(call: Callable[[], Any], cuda: Any = torch.cuda) -> int:
    """By torch's allocator; what a kernel's launcher takes from the driver itself is not seen."""
    cuda.synchronize()
    cuda.reset_peak_memory_stats()
    before = cuda.memory_allocated()
    result = call()
    cuda.synchronize()
    return max(0, cuda.max_memory_allocated() - before - result_bytes(result))


def _on_cpu(call: Callable[[], Any]) -> int | None:
    """By the kernel's own peak of resident pages, reset before the call: it sees torch's tensors and malloc alike.

    torch's profiler would miss what native code takes by malloc, and a fresh process would count the libraries that it
    loads on the first call. What glibc holds free is returned first: pages that are resident would be reused unseen.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        (PROCESS / "clear_refs").write_text("5")
    except (AttributeError, OSError):
        return None
    before = _peak()
    result = call()
    return max(0, _peak() - before - result_bytes(result))


def _peak() -> int:
    line = next(line for line in (PROCESS / "status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def result_bytes(result: Any) -> int:
    """Bytes of the tensors in a result: a tensor, or a nested tuple or list with any."""
    if isinstance(result, torch.Tensor):
        return result.nbytes
    return sum(map(result_bytes, result)) if isinstance(result, tuple | list) else 0
