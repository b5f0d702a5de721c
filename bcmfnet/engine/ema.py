"""The exponential moving average of a network's weights."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class MovingAverage(Generic[Model]):
    """A copy of a network that follows its weights and the running statistics of its batch norms.

    torch's AveragedModel does the same, but waits for the device in every step to read its count.

    Args:
        model: the network that is trained.
        decay: 0 <= decay < 1; after each step ours = decay * ours + (1 - decay) * its.
    """

    def __init__(self, model: Model, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False)
        pairs = list(zip(_tensors(self.model), _tensors(model), strict=True))
        self.averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self.counters = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the network after step `step` (from 1).

        The first steps have a lower decay, step / (9 + step), so that the weights of the start are soon forgotten.
        """
        decay = min(self.decay, step / (9 + step))
        ours, its = map(list, zip(*self.averaged, strict=True))
        torch._foreach_lerp_(ours, its, 1 - decay)
        for mine, counter in self.counters:
            mine.copy_(counter)


def _tensors(model: nn.Module) -> chain[Tensor]:
    return chain(model.parameters(), model.buffers())
