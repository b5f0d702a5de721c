"""The loss on every backend against the float64 reference, given equal decisions, and its rules at the edges."""

from __future__ import annotations

import math
import random

import pytest
import torch
from compare import TOLERANCE, assert_close, relative_error
from gpu_manners import assert_capturable, assert_never_waits, assert_uses_the_current_stream
from grids import grid

from bcmfnet.ops import boundary_corrected_loss
from bcmfnet.reference import bcl as reference
from bcmfnet.reference.bcl import MODES, make_options

OP = "bcl"
# Seeds; each is a shape, labels, options, a dtype and a memory format.
CASES = [pytest.param(range(100), id="100"), pytest.param(range(100, 1000), id="900", marks=pytest.mark.exhaustive)]
CASES_TRITON = 8  # of each; interpreted one takes a good part of a second, on a GPU most compile a kernel
INF, NAN = math.inf, math.nan

FULL_AND_UPSAMPLED = [(24, 40), (3, 5), (7, 13)]  # logits of a target [24, 40]


def draw(seed: int):
    """Logits, target, weight and options of a random case; one of three has logits at full resolution."""
    generator, choose = torch.Generator().manual_seed(seed), random.Random(seed)
    batch, classes = choose.randint(1, 3), choose.choice([1, 2, 3, 5, 12, 19, 33])
    size = (choose.randint(1, 40), choose.randint(1, 90))
    if seed % 50 == 49:
        classes, size = choose.choice([255, 256, 511, 512, 1000, 4096]), (choose.randint(1, 6), choose.randint(1, 40))
    grid = size if seed % 3 == 0 else tuple(choose.randint(1, side) for side in size)
    logits = choose.choice([0.1, 2.0, 30.0]) * torch.randn(batch, classes, *grid, generator=generator)
    logits = logits.to(choose.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16]))
    if choose.random() < 0.5:
        logits = logits.contiguous(memory_format=torch.channels_last)
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
        "nms": choose.choice([1, 3, 5, 7, 9]), "threshold": choose.choice([0.0, 0.3567, 6.0]),
        "ratio": choose.choice([0, 1 / 16, 0.5, 1]), "min_kept": choose.choice([0, 0, 20]),
        "max_kept": choose.choice([None, None, 5, 10**6]), "norm": choose.choice(["selected", "valid"]),
        "per_image": choose.random() < 0.3,
    }  # fmt: skip
    types = [torch.uint8, torch.int16, torch.int32, torch.int64]
    return logits, target.to(choose.choice(types if classes <= 256 else types[1:])), weight, options


def resolved(options: dict) -> reference.BclOptions:
    step = options.get("step", 1)
    return make_options(**options | {"step": (step, step) if isinstance(step, int) else step})


def decided_by_a_rounding(maps: reference.BclMaps, options: reference.BclOptions, logits: torch.Tensor) -> bool:
    """Whether float32 may put a score on another step of the grid: it lies within its error of the border of two."""
    position = 1024 * reference._weighted(options.score, maps[:3]) + 0.5
    error = 1024 * 1e-6 * (1 + logits.abs().max().item())
    return bool(((position - position.round()).abs() < error).any())


def run(device, logits, target, weight=None, **options):
    """Loss, figures and gradient, on the CPU."""
    z = logits.to(device).requires_grad_()
    weight = None if weight is None else weight.to(device)
    value, stats = boundary_corrected_loss(z, target.to(device), weight=weight, return_stats=True, **options)
    (gradient,) = torch.autograd.grad(value, z)
    return value.detach().cpu(), reference.BclStats(*(figure.cpu() for figure in stats)), gradient.cpu()


def agrees(device, logits, target, weight, options, name: str) -> bool:
    """Compare a case with the reference; False where a rounding may decide, and only counts are compared."""
    value, stats, gradient = run(device, logits, target, weight, **options)
    exact = logits.double().requires_grad_()
    expected, figures, maps = reference.loss(exact, target, resolved(options), weight)
    assert stats.valid.item() == figures.valid.item(), name
    assert_close(stats.ce, figures.ce, f"ce of {name}", 5e-6)
    if decided_by_a_rounding(maps, resolved(options), logits):
        assert abs(stats.selected.item() - figures.selected.item()) <= 0.05 * maps.candidates.sum().item() + 2, name
        return False
    assert stats.threshold.tolist() == figures.threshold.tolist(), name
    assert stats.selected.item() == figures.selected.item(), name
    assert_close(stats.boundary, figures.boundary, f"boundary term of {name}", 5e-6)
    assert_close(value, expected.detach(), f"loss of {name}", 5e-6)
    (exact_gradient,) = torch.autograd.grad(expected, exact)
    assert gradient.dtype == logits.dtype and gradient.stride() == logits.stride(), name
    tolerance = max(5e-6, TOLERANCE[logits.dtype])
    assert relative_error(gradient, exact_gradient) < tolerance or exact_gradient.norm() < 1e-6, name
    return True


@pytest.mark.parametrize("seeds", CASES)
def test_random_cases(device, request, seeds):
    """A quarter decides nothing by a rounding; in the others the decisions are compared by their number alone."""
    seeds = seeds[:CASES_TRITON] if "triton" in request.node.name else seeds
    sure = sum(agrees(device, *draw(seed), f"case {seed}") for seed in seeds)
    assert sure > len(seeds) / 10


# Each has more of something than a block, a warp or a group of classes of some backend takes at once.
LARGE = {
    "rows and columns": ((2, 5, 70, 600), (70, 600), {}),
    "many classes": ((1, 150, 9, 300), (9, 300), {}),
    "cells": ((2, 5, 9, 150), (70, 600), {}),
    "cells of many classes": ((1, 150, 3, 40), (20, 300), {}),
    "one large cell": ((2, 19, 1, 1), (40, 300), {}),
    "one large cell of more classes": ((2, 25, 1, 1), (40, 300), {}),
    "suppression": ((1, 3, 40, 300), (40, 300), {"nms": 21}),
    "images": ((9, 3, 4, 6), (12, 20), {"per_image": True}),
}


@pytest.mark.tail
@pytest.mark.parametrize("name", LARGE)
def test_large_cases(device, name):
    shape, size, options = LARGE[name]
    generator = torch.Generator().manual_seed(0)
    # Logits on a coarse grid of numbers: their scores are far from a rounding, or equal.
    logits = torch.randint(-3, 4, shape, generator=generator).float()
    target = torch.randint(0, shape[1], (shape[0], *size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.1] = 255
    agrees(device, logits, target.to(torch.uint8), None, {"nms": 3} | options | {"ratio": 0.5, "threshold": 6.0}, name)


# Several blocks of 32, 16 and 8 columns of cells, several strips of rows; and an axis that keeps its size.
STRIPS = [((2, 19, 9, 37), (72, 296)), ((1, 11, 6, 70), (24, 280)), ((1, 5, 5, 9), (80, 150)),
          ((2, 3, 5, 20), (5, 160)), ((1, 4, 9, 40), (70, 40)), ((1, 25, 5, 20), (40, 160))]  # fmt: skip


@pytest.mark.tail
@pytest.mark.parametrize(("mode", "threshold"), [("detect", 14.0), ("paper0", 21.0), ("ohem", 7.0)])
@pytest.mark.parametrize(("shape", "size"), STRIPS)
def test_where_the_score_decides_some_pixels_are_selected(device, shape, size, mode, threshold):
    """Rows of cells in which all, none or some pixels are, with class weights and labels to ignore."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randint(-2, 3, shape, generator=generator).float()
    blocks = torch.randint(0, shape[1], (shape[0], 1, 6, 6), generator=generator).float()
    target = torch.nn.functional.interpolate(blocks, size)[:, 0].to(torch.uint8)
    target[torch.rand(target.shape, generator=generator) < 0.02] = 255
    weight = torch.arange(shape[1], dtype=torch.float32) / 4  # the first one is 0
    for options in ({}, {"ce_weight": 0.0}):
        options = {"nms": 1, "threshold": threshold, "mode": mode} | options
        value, stats, gradient = run(device, logits, target, weight, **options)
        exact = logits.double().requires_grad_()
        expected, figures, _ = reference.loss(exact, target, resolved(options), weight)
        assert 0.1 < figures.selected.item() / figures.valid.item() < 0.9
        assert stats.selected.item() == figures.selected.item()
        assert_close(value, expected.detach(), f"loss with {options}", 5e-6)
        assert relative_error(gradient, torch.autograd.grad(expected, exact)[0]) < 5e-6, options


@pytest.mark.parametrize("options", [{}, {"nms": 3, "ratio": 0.1}])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_only_ignored_pixels_read_may_be_anything(device, value, options):
    """Rows of pixels below those that meet a logit which is not finite know nothing of it."""
    logits = 2 * torch.randn(1, 3, 9, 5, generator=torch.Generator().manual_seed(0))
    target = torch.arange(72 * 40).view(1, 72, 40) // 50 % 3
    target[:, 8:32] = 255  # all that the third row of logits has a part in
    expected, stats, gradient = run(device, logits, target, ignore_index=255, **options)
    spoilt = logits.detach().clone()
    spoilt[:, :, 2] = value
    found, others, its_gradient = run(device, spoilt, target, ignore_index=255, **options)
    assert torch.equal(found, expected) and found.isfinite() and others.selected.item() == stats.selected.item()
    rows = [0, 1, 3, 4, 5, 6, 7, 8]
    assert_close(its_gradient[:, :, rows], gradient[:, :, rows], "gradient", 1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"mode": "ohem", "ce_weight": 0.0}, {"per_image": True}, {"threshold": 6.0, "ratio": 0.5}]
)
def test_a_limit_that_is_met_changes_nothing(device, options):
    """A pixel may be decided upon while it is scored, or when its rank is known."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, 5, 7, 13, generator=generator)
    target = torch.randint(0, 5, (2, 24, 40), generator=generator)
    value, stats, gradient = run(device, logits, target, **options)
    assert 0 < stats.selected.item() < target.numel()
    for limit in ({"min_kept": 1}, {"max_kept": target.numel()}):
        limited = run(device, logits, target, **options | limit)
        assert limited[1].selected.item() == stats.selected.item()
        assert torch.equal(limited[1].threshold, stats.threshold)
        assert_close(limited[0], value, f"loss with {limit}", 1e-6)
        assert_close(limited[2], gradient, f"gradient with {limit}", 1e-6)


@pytest.mark.parametrize("grid", FULL_AND_UPSAMPLED)
def test_ties_are_all_selected(device, grid):
    """Equal logits, equal scores wherever a flipped label differs: no order among them, and no rounding."""
    target = torch.arange(24)[:, None].expand(24, 40)[None] // 3 % 2  # edges between rows 3k-1 and 3k
    value, stats, gradient = run(device, torch.zeros(1, 2, *grid), target.contiguous(), ratio=0.0, threshold=0.0)
    candidates = 24 * 40  # log 2 for both flips, everywhere: each pixel is a maximum
    assert stats.selected.item() == candidates and stats.threshold.item() == 0
    assert value.item() == pytest.approx(2 * math.log(2), rel=1e-6)
    _, limited, _ = run(device, torch.zeros(1, 2, *grid), target.contiguous(), max_kept=1)
    assert limited.selected.item() == candidates
    assert limited.threshold.item() == round(2048 * math.log(2))


def test_a_limit_counts_up_to_the_number_of_candidates(device):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-3, 4, (1, 3, 24, 40), generator=generator).float()
    target = torch.randint(0, 3, (1, 24, 40), generator=generator)
    candidates = reference.loss(logits.double(), target, make_options(nms=3))[2].candidates.sum().item()
    for more in (-1, 0, 1):
        options = {"nms": 3, "max_kept": candidates + more, "threshold": 0.0}
        assert agrees(device, logits, target, None, options, f"{candidates} candidates, {more} more allowed")


@pytest.mark.parametrize("grid", FULL_AND_UPSAMPLED)
def test_one_class_is_exactly_zero(device, grid):
    value, _, gradient = run(device, torch.randn(2, 1, *grid), torch.zeros(2, 24, 40, dtype=torch.uint8))
    assert value.item() == 0 and not gradient.any()


@pytest.mark.parametrize("grid", FULL_AND_UPSAMPLED)
@pytest.mark.parametrize("options", [{}, {"ce_weight": 0.0}, {"boundary_weight": 0.0}, {"norm": "valid"}])
def test_nothing_valid_is_zero_with_zero_gradients(device, grid, options):
    logits = torch.randn(2, 3, *grid)
    logits[0, 0, 0, 0] = NAN  # nor does an ignored pixel reach the gradient
    value, stats, gradient = run(device, logits, torch.full((2, 24, 40), 255), **options)
    assert value.item() == 0 and stats.valid.item() == 0 and stats.selected.item() == 0
    assert not gradient.any()


@pytest.mark.parametrize("grid", FULL_AND_UPSAMPLED)
@pytest.mark.parametrize("options", [{}, {"boundary_weight": 0.0}])
def test_without_terms_the_gradient_is_zero(device, grid, options):
    value, _, gradient = run(
        device, torch.randn(2, 3, *grid), torch.zeros(2, 24, 40, dtype=torch.uint8), **{"ce_weight": 0.0} | options,
        ratio=0.0, threshold=70.0,
    )  # fmt: skip
    assert value.item() == 0 and not gradient.any()


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("grid", [(24, 40), (3, 5)])
def test_an_empty_batch(device, grid, per_image):
    logits, target = torch.randn(0, 3, *grid), torch.zeros(0, 24, 40, dtype=torch.int64)
    value, stats, gradient = run(device, logits, target, per_image=per_image)
    assert value.item() == 0 and stats.valid.item() == 0
    assert stats.threshold.shape == ((0,) if per_image else ())
    assert gradient.shape == (0, 3, *grid)


@pytest.mark.parametrize("grid", FULL_AND_UPSAMPLED)
def test_large_logits(device, grid):
    """Differences of 1e4 in a pixel: exp underflows, the score is cut to its grid, nothing is NaN."""
    generator = torch.Generator().manual_seed(0)
    logits = 1e4 * torch.randint(-1, 2, (1, 4, *grid), generator=generator).float()
    target = torch.randint(0, 4, (1, 24, 40), generator=generator)
    value, _, gradient = run(device, logits, target)
    exact = logits.double().requires_grad_()
    expected = reference.loss(exact, target, make_options())[0]
    assert_close(value, expected.detach())
    assert gradient.isfinite().all()


def one_pixel(value: float, of_label: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits 0 but for one value, of the label's class or another, at one of 24 x 40 pixels of class 0."""
    logits, target = torch.zeros(1, 3, 24, 40), torch.zeros(1, 24, 40, dtype=torch.uint8)
    logits[0, 0 if of_label else 1, 11, 17] = value
    return logits, target


@pytest.mark.parametrize(
    ("value", "of_label", "loss"),
    [(-INF, False, None), (-INF, True, INF), (INF, True, NAN), (INF, False, NAN), (NAN, True, NAN), (NAN, False, NAN)],
)
@pytest.mark.parametrize("options", [{}, {"boundary_weight": 0.0}, {"ce_weight": 0.0, "mode": "ohem"}])
def test_values_that_are_not_finite_come_out_as_torch_has_them(device, value, of_label, loss, options):
    logits, target = one_pixel(value, of_label)
    actual, _, _ = run(device, logits, target, **options)
    if loss is None:
        assert actual.isfinite()
    else:
        assert actual.item() == loss or (math.isnan(loss) and actual.isnan())


def test_an_infinite_score_is_selected_and_a_nan_one_is_not(device):
    logits, target = one_pixel(-INF, True)
    _, stats, _ = run(device, logits, target, mode="ohem", threshold=60.0, ratio=0.0)
    assert stats.selected.item() == 1
    logits, target = one_pixel(NAN, True)
    _, stats, _ = run(device, logits, target, mode="ohem", threshold=60.0, ratio=0.0)
    assert stats.selected.item() == 0 and stats.boundary.isnan()


def test_a_pixel_of_minus_infinities_is_nan(device):
    logits, target = one_pixel(0, True)
    logits[:, :, 5, 5] = -INF
    assert run(device, logits, target)[0].isnan()


@grid({
    "grid": FULL_AND_UPSAMPLED, "value": [NAN, INF],
    "options": {"both terms": {}, "boundary": {"ce_weight": 0.0}, "cross-entropy": {"boundary_weight": 0.0}},
}, together=1)  # fmt: skip
def test_a_class_weight_that_is_not_finite_counts_where_its_class_is(device, options, value, grid):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, *grid, generator=generator)
    target = torch.randint(1, 3, (2, 24, 40), generator=generator)
    target[0, 0, :5] = 255  # the maps hold class 0 there
    absent, of_one = torch.tensor([value, 1.0, 2.0]), torch.tensor([1.0, 1.0, 2.0])
    loss, _, gradient = run(device, logits, target, absent, **options)
    expected, _, expected_gradient = run(device, logits, target, of_one, **options)
    assert loss == expected and torch.equal(gradient, expected_gradient)
    target[1, 7, 9] = 0
    loss, stats, gradient = run(device, logits, target, absent, **options | {"threshold": 0.0})
    assert loss.isnan() and stats.ce.isnan() and stats.boundary.isnan()
    assert gradient[1].isnan().any() and gradient[0].isnan().any()


@pytest.mark.parametrize("grid", FULL_AND_UPSAMPLED)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_value_that_is_not_finite_of_one_class_has_no_gradient(device, value, grid):
    logits = torch.zeros(1, 1, *grid)
    logits[0, 0, 2, 3] = value
    loss, _, gradient = run(device, logits, torch.zeros(1, 24, 40, dtype=torch.uint8))
    assert loss.isnan() and torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("grid", [(24, 40), (3, 5)])
@pytest.mark.parametrize("label", [3, -2, 40])
def test_a_wrong_label_is_no_index(device, grid, label):
    """On a CPU it is named; where that would take a wait, it makes the loss NaN."""
    target = torch.zeros(1, 24, 40, dtype=torch.int32)
    target[0, 3, 7] = label
    try:
        value, _, gradient = run(device, torch.randn(1, 3, *grid), target)
        assert value.isnan() and gradient.isnan().any()  # no optimiser shall take a step
    except IndexError as error:
        assert f"got {label} at (image, row, column) = (0, 3, 7)" in str(error)


@pytest.mark.tail
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (24, 1), (2, 3)])
def test_images_smaller_than_the_window_of_the_flip(device, size):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-3, 4, (2, 3, *size), generator=generator).float()
    target = torch.randint(0, 3, (2, *size), generator=generator)
    for step in (1, 4, 100):
        agrees(device, logits, target, None, {"step": step, "mode": "paper0"}, f"step {step}")
        agrees(
            device,
            logits[:, :, :1, :1].contiguous(),
            target,
            None,
            {"step": step, "mode": "paper0"},
            f"upsampled, step {step}",
        )


@pytest.mark.tail
@pytest.mark.usefixtures("poisoned", "deterministic")
@pytest.mark.parametrize(
    ("classes", "options"),
    [(5, {}), (5, {"boundary_weight": 0.0}), (5, {"ce_weight": 0.0}), (5, {"per_image": True}), (40, {})],
)
@pytest.mark.parametrize("grid", [(24, 40), (7, 13)])
def test_nothing_is_read_before_it_is_written(device, grid, classes, options):
    """Memory starts as NaN and largest integers, the kernels' own too; and two runs give equal bits."""
    logits, target = torch.randn(2, classes, *grid), torch.randint(0, classes, (2, 24, 40))
    first, second = (run(device, logits, target, **options) for _ in range(2))
    assert first[0].isfinite() and first[2].isfinite().all()
    assert first[0] == second[0] and torch.equal(first[2], second[2])


@pytest.fixture
def deterministic():
    """torch.empty of C++ fills its memory."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("grid", [(24, 40), (3, 5)])
def test_threads_and_layouts_give_equal_bits(device, grid):
    logits, target = torch.randn(3, 7, *grid), torch.randint(0, 7, (3, 24, 40), dtype=torch.uint8)
    expected = run(device, logits, target)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for layout in (torch.contiguous_format, torch.channels_last):
            actual = run(device, logits.contiguous(memory_format=layout), target)
            assert actual[0] == expected[0] and torch.equal(actual[2], expected[2])
    finally:
        torch.set_num_threads(threads)


def loss_and_gradient(size, **options):
    def call(logits):
        target = torch.arange(size[1], device=logits.device).expand(logits.shape[0], *size) // 5 % logits.shape[1]
        logits = logits.detach().requires_grad_()
        loss, stats = boundary_corrected_loss(logits, target.to(torch.uint8), return_stats=True, **options)
        return loss.detach(), torch.autograd.grad(loss, logits)[0], *stats

    return call


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"per_image": True}, {"boundary_weight": 0.0}])
@pytest.mark.parametrize("classes", [19, 40])
@pytest.mark.parametrize("grid", [(64, 256), (8, 32)])
@pytest.mark.parametrize("check", [assert_never_waits, assert_uses_the_current_stream, assert_capturable])
def test_manners_on_a_gpu(cuda, check, grid, classes, options):
    check(loss_and_gradient((64, 256), **options), torch.randn(2, classes, *grid, device=cuda))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("grid", [(2**14, 2**14), (2**11, 2**11)])
def test_more_than_2_to_the_31_elements(cuda, grid):
    """Of the logits at full resolution; of the pixels' logits with upsampling. Takes about 30 GiB."""
    logits = torch.zeros(1, 9, *grid, dtype=torch.float16, device=cuda).requires_grad_()
    target = torch.zeros(1, 2**14, 2**14, dtype=torch.uint8, device=cuda)
    loss, stats = boundary_corrected_loss(logits, target, nms=1, threshold=0.0, ratio=0.0, return_stats=True)
    assert loss.item() == pytest.approx(2 * math.log(9), rel=1e-5)
    assert stats.valid.item() == stats.selected.item() == 2**28
    (gradient,) = torch.autograd.grad(2.0**20 * loss, logits)  # the gradient of one pixel underflows float16
    per_pixel = 2 * 2.0**20 / (grid[0] * grid[1])
    last = gradient[0, 0, -1].float()
    torch.testing.assert_close(last, torch.full_like(last, -8 / 9 * per_pixel), rtol=2e-2, atol=1e-9)
