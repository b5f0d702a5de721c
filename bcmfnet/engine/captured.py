"""The gradients of a batch from a CUDA graph: a pass forward and back is handed to the GPU as one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bcmfnet.inference.cuda_graphs import WARM_UP, measured_algorithms


class Captured(NamedTuple):
    """A captured pass, with the memory that it reads a batch from and writes its result to."""

    graph: torch.cuda.CUDAGraph
    images: Tensor
    labels: Tensor
    result: Tensor

    def replay(self, images: Tensor, labels: Tensor) -> Tensor:
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()
        return self.result.clone()


class CapturedGradients:
    """A function of images and labels that adds to the gradients of a model, replayed from a CUDA graph for each shape.

    `function` must not wait for the device, and what it reads beside its arguments must stay where it is: parameters,
    class weights, and the gradients too, which `zero_grad(set_to_none=False)` sees to.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], model: nn.Module):
        self.function, self.model = function, model
        self.graphs: dict[torch.Size, Captured] = {}

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        captured = self.graphs.get(images.shape)
        if captured is None:
            captured = self.graphs[images.shape] = self._capture(images.clone(), labels.clone())
        return captured.replay(images, labels)

    def _capture(self, images: Tensor, labels: Tensor) -> Captured:
        """The passes before it leave gradients and running statistics as they were, none as zeros."""
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        gradients = [None if parameter.grad is None else parameter.grad.clone() for parameter in parameters]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), measured_algorithms():
            for _ in range(WARM_UP):
                self.function(images, labels)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # The loader's thread pins memory while this one captures.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = self.function(images, labels)
        for buffer, before in buffers:
            buffer.copy_(before)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if parameter.grad is not None:
                parameter.grad.zero_() if gradient is None else parameter.grad.copy_(gradient)
        return Captured(graph, images, labels, result)
