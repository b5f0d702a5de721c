"""The loss on every backend against the float64 reference, given equal decisions: random shapes, labels and options."""

from __future__ import annotations

import random

import pytest
import torch
from compare import assert_close, relative_error

from bcmfnet.ops import boundary_corrected_loss
from bcmfnet.reference import bcl as reference
from bcmfnet.reference.bcl import MODES, make_options

OP = "bcl"
CASES = 200  # seeds; each is a shape, labels and options


def draw(seed: int):
    """Logits, target, weight and options of a random case; one of three has logits at full resolution."""
    generator, choose = torch.Generator().manual_seed(seed), random.Random(seed)
    batch, classes = choose.randint(1, 3), choose.choice([1, 2, 3, 5, 19, 33])
    size = (choose.randint(1, 40), choose.randint(1, 90))
    grid = size if seed % 3 == 0 else tuple(choose.randint(1, side) for side in size)
    logits = choose.choice([0.1, 2.0, 30.0]) * torch.randn(batch, classes, *grid, generator=generator)
    coarse = torch.randint(0, classes, (batch, *size), generator=generator)[:, ::5, ::7]
    target = coarse.repeat_interleave(5, 1).repeat_interleave(7, 2)[:, : size[0], : size[1]].contiguous()
    ignored = choose.choice([0, 0.1, 1]) if seed % 10 == 0 else 0.1
    ignore = choose.choice([255, 0])
    target[torch.rand(target.shape, generator=generator) < ignored] = ignore
    weight = torch.rand(classes, generator=generator).round(decimals=1) if choose.random() < 0.4 else None
    options = {
        "mode": choose.choice(list(MODES)), "alpha": choose.choice([0.0, 0.7, 1.0]), "beta": choose.choice([1.0, 1.3]),
        "ce_weight": choose.choice([1.0, 0.0, 0.4]), "boundary_weight": choose.choice([1.0, 0.6, 0.0]),
        "ignore_index": ignore, "step": choose.choice([1, (2, 1), (3, 4)]), "flip": choose.choice(["swap", "mirror"]),
        "nms": choose.choice([1, 3, 5, 7]), "threshold": choose.choice([0.0, 0.3567, 6.0]),
        "ratio": choose.choice([0, 1 / 16, 0.5, 1]), "min_kept": choose.choice([0, 0, 20]),
        "max_kept": choose.choice([None, None, 5, 10**6]), "norm": choose.choice(["selected", "valid"]),
        "per_image": choose.random() < 0.3,
    }  # fmt: skip
    return logits, target.to(choose.choice([torch.uint8, torch.int16, torch.int32, torch.int64])), weight, options


def resolved(options: dict) -> reference.BclOptions:
    step = options["step"]
    return make_options(**options | {"step": (step, step) if isinstance(step, int) else step})


def decided_by_a_rounding(maps: reference.BclMaps, options: reference.BclOptions, logits: torch.Tensor) -> bool:
    """Whether float32 may put a score on another step of the grid: it lies within its error of the border of two."""
    position = 1024 * reference._weighted(options.score, maps[:3]) + 0.5
    error = 1024 * 1e-6 * (1 + logits.abs().max().item())
    return bool(((position - position.round()).abs() < error).any())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_random_cases(device, layout):
    """Half of them decide nothing by a rounding; in the others the decisions are compared by their number alone."""
    sure = 0
    for seed in range(CASES):
        logits, target, weight, options = draw(seed)
        packed = resolved(options)
        z = logits.to(device).contiguous(memory_format=layout).requires_grad_()
        value, stats = boundary_corrected_loss(
            z, target.to(device), weight=None if weight is None else weight.to(device), return_stats=True, **options
        )
        (gradient,) = torch.autograd.grad(value, z)
        exact = logits.double().requires_grad_()
        expected, figures, maps = reference.loss(exact, target, packed, weight)
        assert stats.valid.item() == figures.valid.item(), seed
        assert_close(stats.ce.cpu(), figures.ce, f"ce of case {seed}", 5e-6)
        if decided_by_a_rounding(maps, packed, logits):
            assert abs(stats.selected.item() - figures.selected.item()) <= 0.05 * maps.candidates.sum().item() + 2, seed
            continue
        sure += 1
        assert stats.threshold.tolist() == figures.threshold.tolist(), seed
        assert stats.selected.item() == figures.selected.item(), seed
        assert_close(stats.boundary.cpu(), figures.boundary, f"boundary term of case {seed}", 5e-6)
        assert_close(value.detach().cpu(), expected.detach(), f"loss of case {seed}", 5e-6)
        (exact_gradient,) = torch.autograd.grad(expected, exact)
        assert relative_error(gradient.cpu(), exact_gradient) < 5e-6 or exact_gradient.norm() < 1e-6, seed
    assert sure > CASES / 4
