"""CUDA graphs of a function of images, one for each of the last sizes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock

import torch
from torch import Tensor

SIZES = 4
"""Graphs kept. Each holds all the memory of its pass; capturing one costs a few passes."""
WARM_UP = 3
"""Passes before a capture: libraries choose their algorithms, Triton compiles, and torch.compile may do both."""


class CUDAGraphs:
    """A function from images to one tensor, replayed from a CUDA graph for each size; the result is the caller's own.

    `function` must neither wait for the device nor keep what it is given. Unless `at_once`, a size is captured when it
    comes for the second time, so that images of ever new sizes cost no captures. Threads may call it at the same time:
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

    def __call__(self, images: Tensor) -> Tensor:
        with torch.cuda.device(images.device):  # whose current stream is meant below
            if torch.cuda.is_current_stream_capturing():
                return self.function(images)  # the caller's own graph takes the pass up
            with self.turn:
                graph = self._graph(images)
                if graph is not None:
                    return graph(images)
            return self.function(images.to(self.dtype, memory_format=self.memory_format))

    def _graph(self, images: Tensor) -> Graph | None:
        again = images.shape in self.graphs
        graph = self.graphs.pop(images.shape, None)
        if graph is None and (again or self.at_once):
            graph = Graph(self.function, images, self.dtype, self.memory_format)
        self.graphs[images.shape] = graph
        if len(self.graphs) > SIZES:
            self.graphs.popitem(last=False)
        return graph


@contextmanager
def measured_algorithms() -> Iterator[None]:
    """Let cuDNN time its algorithms for each convolution that the thread meets for the first time, and keep the
    fastest."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class Graph:
    """One captured pass, with the memory that it reads images from and writes its result to."""

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        images: Tensor,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
    ):
        # Tensors made in inference mode could not be written to outside of it, and these outlive the call.
        with torch.inference_mode(False), torch.no_grad():
            self.images = torch.empty_like(images, dtype=dtype, memory_format=memory_format).copy_(images)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side), measured_algorithms():
                for _ in range(WARM_UP):
                    function(self.images)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            # Other threads, such as a loader that pins memory, may go on while this one captures.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.result = function(self.images)
        self.done = torch.cuda.Event()
        self.done.record()

    def __call__(self, images: Tensor) -> Tensor:
        """The copy into the graph's memory is the cast to its dtype too; a call on another stream waits its turn."""
        torch.cuda.current_stream().wait_event(self.done)
        self.images.copy_(images)
        self.graph.replay()
        result = self.result.clone()
        self.done.record()
        return result
