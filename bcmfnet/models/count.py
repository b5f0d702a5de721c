"""Parameters and multiply-adds of a network, counted without computing it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def count_parameters(model: nn.Module) -> int:
    """Number of parameters; batch norm's running statistics are buffers and do not count."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_multiply_adds(model: nn.Module, size: Sequence[int] = (1, 3, 1024, 2048)) -> int:
    """Multiply-adds of (transposed) convolutions in eval mode for `size` [N, C, H, W]; biases do not count."""
    return sum(multiply_adds_by_module(model, size).values())


def multiply_adds_by_module(model: nn.Module, size: Sequence[int] = (1, 3, 1024, 2048)) -> dict[str, int]:
    """The same for each convolution, by its name, in order of execution; the model is left untouched."""
    counts: dict[str, int] = {}
    shadow = copy.deepcopy(model).to("meta").eval()
    for name, module in shadow.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(_counter(counts, name))
    with torch.no_grad():
        shadow(torch.empty(tuple(size), device="meta"))
    return counts


def _counter(counts: dict[str, int], name: str):
    def hook(conv: nn.Conv2d | nn.ConvTranspose2d, inputs: tuple[Tensor], output: Tensor) -> None:
        spread = inputs[0] if isinstance(conv, nn.ConvTranspose2d) else output  # whose elements each meet weight[0]
        counts[name] = counts.get(name, 0) + spread.numel() * conv.weight[0].numel()

    return hook
