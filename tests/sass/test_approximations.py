"""What approximate exponentials, logarithms and reciprocals cost the loss at the most that the PTX ISA allows."""

from __future__ import annotations

import pytest
import torch
from sass import native

from bcmfnet.ops import backends, boundary_corrected_loss, segmentation_loss

pytestmark = pytest.mark.exhaustive

ULP = 2.0**-22
"""Of ex2.approx and lg2.approx; rcp.approx has half of it. An exponential is off by one, its sum by as much, and what
is multiplied by the sum's reciprocal by half of one."""


@pytest.fixture(autouse=True)
def executed(monkeypatch):
    """The loss is served by the machine code."""
    monkeypatch.setattr(backends, "_table", {key: dict(row) for key, row in backends._table.items()})
    backends.register("bcl", "cpu", "cuda", native.native())
    with backends.use_backend("cuda"):
        yield


def value_and_gradient(loss, logits, target, **options):
    z = logits.clone().requires_grad_()
    value = loss(z, target, **options)
    return value.detach(), torch.autograd.grad(value, z)[0]


@pytest.mark.parametrize("error", ["none", "up", "down", "turns"])
@pytest.mark.parametrize("grid", [(9, 13), (72, 104)])
@pytest.mark.parametrize(("loss", "options"), [
    (segmentation_loss, {}), (segmentation_loss, {"dice": 1.0}),
    (boundary_corrected_loss, {"threshold": 0.0}), (boundary_corrected_loss, {"mode": "paper0", "threshold": 0.0}),
])  # fmt: skip
def test_a_loss_is_as_exact_as_its_exponentials(loss, options, grid, error):
    """Threshold 0 selects by what is exact: the labels alone."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 19, *grid, generator=generator)
    target = torch.randint(0, 19, (2, 72, 104), generator=generator, dtype=torch.uint8)
    with native.machine().inexact(error):
        value, gradient = value_and_gradient(loss, logits, target, ignore_index=255, **options)
    with backends.use_backend("reference"):
        exact, expected = value_and_gradient(loss, logits.double(), target, ignore_index=255, **options)
    assert (value - exact).abs() < 2 * ULP * (1 + exact)
    assert (gradient - expected).norm() < 2 * ULP * expected.norm()
