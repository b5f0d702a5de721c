"""CUDA graphs of a function of frames, one for each of the last sizes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock

import torch
from torch import Tensor

SIZES = 4
"""Graphs kept. Each holds all the memory of its pass; capturing one costs a few passes."""
WARM_UP = 3
"""Passes before a capture: libraries choose their algorithms, Triton compiles, and torch.compile may do both."""


class CUDAGraphs:
    """A function from frames to one tensor, replayed from a CUDA graph for each size; the result is the caller's own.

    `function` must neither wait for the device nor keep what it is given. Unless `at_once`, a size is captured when it
    comes for the second time, so that frames of ever new sizes cost no captures. Threads may call it at the same time:
    they take turns in handing their work to the device, not in what the device does.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        at_once: bool,
    ):
        self.function, self.dtype, self.memory_format, self.at_once = function, dtype, memory_format, at_once
        self.graphs: OrderedDict[torch.Size, Graph | None] = OrderedDict()
        self.turn = Lock()

    def __call__(self, frames: Tensor) -> Tensor:
        with torch.cuda.device(frames.device):  # whose current stream is meant below
            if torch.cuda.is_current_stream_capturing():
                return self.function(frames)  # the caller's own graph takes the pass up
            with self.turn:
                graph = self._graph(frames)
                if graph is not None:
                    return graph(frames)
            return self.function(frames.to(self.dtype, memory_format=self.memory_format))

    def _graph(self, frames: Tensor) -> Graph | None:
        again = frames.shape in self.graphs
        graph = self.graphs.pop(frames.shape, None)
        if graph is None and (again or self.at_once):
            graph = Graph(self.function, frames, self.dtype, self.memory_format)
        self.graphs[frames.shape] = graph
        if len(self.graphs) > SIZES:
            self.graphs.popitem(last=False)
        return graph


class Graph:
    """One captured pass, with the memory that it reads frames from and writes its result to."""

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        frames: Tensor,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
    ):
        # Tensors made in inference mode could not be written to outside of it, and these outlive the call.
        with torch.inference_mode(False), torch.no_grad():
            self.frames = torch.empty_like(frames, dtype=dtype, memory_format=memory_format).copy_(frames)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    function(self.frames)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            # Other threads, such as a loader that pins memory, may go on while this one captures.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.result = function(self.frames)
        self.done = torch.cuda.Event()
        self.done.record()

    def __call__(self, frames: Tensor) -> Tensor:
        """The copy into the graph's memory is the cast to its dtype too; a call on another stream waits its turn."""
        torch.cuda.current_stream().wait_event(self.done)
        self.frames.copy_(frames)
        self.graph.replay()
        result = self.result.clone()
        self.done.record()
        return result
