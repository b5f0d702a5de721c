"""The terms of a loss on every backend against the float64 reference, in values, sums and gradients."""

from __future__ import annotations

import random

import pytest
import torch
from compare import TOLERANCE, assert_close, relative_error

from bcmfnet.ops import segmentation_loss
from bcmfnet.ops._loss_options import term_options
from bcmfnet.reference import bcl as reference
from bcmfnet.reference.bcl import MODES

OP = "bcl"
CASES = [pytest.param(range(200), id="200"), pytest.param(range(200, 1200), id="1000", marks=pytest.mark.exhaustive)]
CASES_TRITON = 30  # of each; interpreted one takes a second
WEIGHTS = ("ce", "focal", "dice", "jaccard", "tversky", "boundary", "distillation")


def draw(seed: int):
    """Logits, target, tensors by name, and options of a random case; one of three has logits at full resolution."""
    generator, choose = torch.Generator().manual_seed(seed), random.Random(seed)
    batch, binary = choose.randint(1, 3), choose.random() < 0.15
    classes = 1 if binary else choose.choice([2, 3, 5, 12, 19, 33])
    size = (choose.randint(1, 40), choose.randint(1, 90))
    if seed % 40 == 39 and not binary:
        classes, size = choose.choice([150, 255, 512, 1000, 4096]), (choose.randint(1, 6), choose.randint(1, 40))
    labels = max(classes, 2)
    grid = size if seed % 3 == 0 else tuple(choose.randint(1, side) for side in size)
    dtype = choose.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16])
    scale = choose.choice([0.1, 2.0, 10.0])

    def logits_of(*shape: int) -> torch.Tensor:
        values = (scale * torch.randn(batch, classes, *shape, generator=generator)).to(dtype)
        return values.contiguous(memory_format=torch.channels_last) if choose.random() < 0.5 else values

    logits = logits_of(*grid)
    coarse = torch.randint(0, labels, (batch, *size), generator=generator)[:, ::5, ::7]
    target = coarse.repeat_interleave(5, 1).repeat_interleave(7, 2)[:, : size[0], : size[1]].contiguous()
    ignore = choose.choice([255, 0, 2**15 - 1]) if not binary and classes < 255 else 2**15 - 1
    target[torch.rand(target.shape, generator=generator) < choose.choice([0, 0.1, 0.1, 1])] = ignore
    tensors = {}
    if not binary and choose.random() < 0.4:
        tensors["weight"] = torch.rand(classes, generator=generator).round(decimals=1)
    if choose.random() < 0.3:
        u = torch.rand(target.shape, generator=generator)
        tensors["pixel_weight"] = torch.where(u < 0.2, 0.0, u).to(choose.choice([torch.float32, torch.float16]))
    options = {name: choose.choice([0.0, 0.0, 1.0, 0.4]) for name in WEIGHTS}
    options |= {
        "align_corners": choose.random() < 0.3, "ignore_index": ignore, "binary": binary,
        "label_smoothing": choose.choice([0.0, 0.0, 0.1, 0.7]), "focal_gamma": choose.choice([0.0, 0.5, 1.0, 2.0, 3.3]),
        "tversky_alpha": choose.choice([0.5, 0.3, 0.0]), "tversky_beta": choose.choice([0.5, 0.8]),
        "overlap_smooth": choose.choice([0.0, 1.0, 30.0]), "overlap_log": choose.random() < 0.3,
        "overlap_absent": choose.choice(["skip", "zero", "count"]), "overlap_per_image": choose.random() < 0.3,
        "distillation_temperature": choose.choice([1.0, 2.0, 0.7]),
        "distillation_where": choose.choice(["valid", "all"]), "boundary_term": choose.choice(["ce", "ce", "focal"]),
        "pos_weight": choose.choice([1.0, 3.0]) if binary else 1.0, "mode": choose.choice(list(MODES)),
        "alpha": choose.choice([0.0, 0.7, 1.0]), "step": choose.choice([1, (3, 4)]),
        "flip": choose.choice(["swap", "mirror"]), "nms": choose.choice([1, 1, 3]),
        "threshold": choose.choice([0.0, 0.3567, 6.0]), "ratio": choose.choice([0, 0, 0.5]),
        "norm": choose.choice(["selected", "valid"]), "per_image": choose.random() < 0.3,
    }  # fmt: skip
    if options["distillation"] != 0:
        other = tuple(choose.randint(1, side) for side in size)
        tensors["teacher"] = logits_of(*(grid if choose.random() < 0.7 else other))
    return logits, target.to(choose.choice([torch.int16, torch.int32, torch.int64])), tensors, options


def decided_by_a_rounding(maps: reference.BclMaps, options: reference.BclOptions, logits: torch.Tensor) -> bool:
    """Whether float32 may put a score on another step of the grid: it lies within its error of the border of two."""
    position = 1024 * reference._weighted(options.score, maps[:3]) + 0.5
    error = 1024 * 1e-6 * (1 + logits.abs().max().item())
    return options.boundary_weight != 0 and bool(((position - position.round()).abs() < error).any())


def agrees(device, logits, target, tensors, options, name: str) -> bool:
    """Compare a case with the reference; False where a rounding may decide, and only other terms are compared."""
    z = logits.to(device).requires_grad_()
    there = {key: tensor.to(device) for key, tensor in tensors.items()}
    value, stats = segmentation_loss(z, target.to(device), return_stats=True, **there, **options)
    (gradient,) = torch.autograd.grad(256 * value, z)  # times a number: that of a pixel may underflow float16
    exact = logits.double().requires_grad_()
    wide = {key: tensor.double() for key, tensor in tensors.items()}
    known = term_options(**options)
    expected, figures, maps = reference.loss(
        exact, target, known, wide.get("weight"), wide.get("pixel_weight"), wide.get("teacher")
    )
    assert stats.valid.item() == figures.valid.item(), name
    for term in ("ce", "focal", "dice", "jaccard", "tversky"):
        assert_close(getattr(stats, term).cpu(), getattr(figures, term), f"{term} of {name}", 1e-5)
    # A difference of logarithms, which may be near 0.
    torch.testing.assert_close(stats.distillation.double().cpu(), figures.distillation, rtol=1e-5, atol=2e-6)
    if decided_by_a_rounding(maps, known, logits):
        return False
    assert stats.threshold.tolist() == figures.threshold.tolist(), name
    assert stats.selected.item() == figures.selected.item(), name
    assert_close(stats.boundary.cpu(), figures.boundary, f"boundary term of {name}", 1e-5)
    torch.testing.assert_close(value.detach().double().cpu(), expected.detach(), rtol=1e-5, atol=2e-6)
    (exact_gradient,) = torch.autograd.grad(256 * expected, exact)
    assert gradient.dtype == logits.dtype and gradient.stride() == logits.stride(), name
    tolerance = max(1e-5, TOLERANCE[logits.dtype])
    assert relative_error(gradient.cpu(), exact_gradient) < tolerance or exact_gradient.norm() < 1e-6, name
    return True


@pytest.mark.parametrize("seeds", CASES)
def test_random_cases(device, request, seeds):
    """At least half decides nothing by a rounding; in the others the selection is not compared."""
    seeds = seeds[:CASES_TRITON] if "triton" in request.node.name else seeds
    sure = sum(agrees(device, *draw(seed), f"case {seed}") for seed in seeds)
    assert sure > len(seeds) / 2
