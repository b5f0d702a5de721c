"""What every op owes a GPU: its stream, no waiting, and graphs. `call` takes tensors and returns tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Call = Callable[..., tuple[Tensor, ...]]


def assert_never_waits(call: Call, *inputs: Tensor) -> None:
    """The op does not wait for the device, not even the second time, when everything is compiled."""
    call(*inputs)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def assert_uses_the_current_stream(call: Call, *inputs: Tensor) -> None:
    """Inputs that a busy side stream writes late are read after they are written."""
    expected = call(*inputs)
    late = [torch.zeros_like(tensor) for tensor in inputs]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)  # cycles: tens of milliseconds
        for tensor, value in zip(late, inputs, strict=True):
            tensor.copy_(value)
        actual = call(*late)
    torch.cuda.synchronize()
    assert all(map(torch.equal, actual, expected))


def assert_capturable(call: Call, *inputs: Tensor) -> None:
    """A graph that was captured with other inputs gives the result of these."""
    expected = call(*inputs)
    static = [torch.zeros_like(tensor) for tensor in inputs]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call(*static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(*static)
    for tensor, value in zip(static, inputs, strict=True):
        tensor.copy_(value)
    for _ in range(2):
        graph.replay()
        assert all(map(torch.equal, captured, expected))
