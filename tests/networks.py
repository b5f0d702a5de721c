"""Networks whose batch norms are not fresh, their frames, and what inference is compared with."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from bcmfnet.models import create_model

BF16_ERROR = 2e-2
"""Relative, of logits from maps that are rounded to 8 bits some forty times on their way; measured: 5e-3 to 9e-3."""


def trained(name: str = "bcmfnet", classes: int = 7, **options) -> nn.Module:
    """A model whose batch norms are those of no fresh one: statistics of their own, scales of either sign."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = create_model(name, num_classes=classes, **options)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
    model(torch.randn(4, 3, 128, 192, generator=generator))
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            shape = norm.weight.shape
            norm.weight.data = torch.rand(shape, generator=generator) * 1.5 - 0.5
            norm.bias.data = torch.randn(shape, generator=generator) * 0.5
            norm.running_mean += norm.running_var.sqrt() * torch.randn(shape, generator=generator) * 0.2
            norm.running_var *= torch.rand(shape, generator=generator) + 0.5
    return model.eval()


def frames(size: tuple[int, int], batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def eager_scores(model: nn.Module, images: Tensor) -> Tensor:
    """At full resolution, in float64."""
    return interpolate(eager_logits(model, images), images.shape[-2:], mode="bilinear", align_corners=False)


def eager_logits(model: nn.Module, images: Tensor) -> Tensor:
    """In float64."""
    with torch.no_grad():
        return copy.deepcopy(model).eval().double()(images.double()).logits


def assert_labels(labels: Tensor, scores: Tensor, band: float = 1e-5) -> None:
    """Labels are those of the scores wherever the winner leads by more than a share of the largest score."""
    assert labels.dtype == torch.uint8
    best = scores.topk(2, dim=1)
    wrong = labels != best.indices[:, 0]
    assert not (wrong & (best.values[:, 0] - best.values[:, 1] > band * scores.abs().max())).any()
