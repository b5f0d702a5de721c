"""The terms of a loss on every backend against the float64 reference, in values, sums and gradients."""

from __future__ import annotations

import math
import random

import pytest
import torch
from compare import TOLERANCE, assert_close, relative_error

from bcmfnet.ops import backends, segmentation_loss
from bcmfnet.ops._bcl import Inputs, evaluate
from bcmfnet.ops._loss_options import term_options
from bcmfnet.reference import bcl as reference
from bcmfnet.reference.bcl import MODES

OP = "bcl"
INF, NAN = math.inf, math.nan
CASES = [pytest.param(range(200), id="200"), pytest.param(range(200, 1200), id="1000", marks=pytest.mark.exhaustive)]
EVERY = {"triton": 66, "cuda": 4, "sass": 4}  # of so many cases one is taken: interpreted it takes a second
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


@pytest.mark.timeout(1200)  # interpreted, the thousand take some minutes
@pytest.mark.parametrize("seeds", CASES)
def test_random_cases(device, request, seeds):
    """At least half decides nothing by a rounding; in the others the selection is not compared."""
    if len(seeds) == 200:
        seeds = seeds[:: next((every for name, every in EVERY.items() if name in request.node.name), 1)]
    elif "triton" in request.node.name:
        seeds = seeds[::5]
    sure = sum(agrees(device, *draw(seed), f"case {seed}") for seed in seeds)
    assert sure > len(seeds) / 2


SIZE = (12, 37)
GRIDS = [SIZE, (3, 5)]
EVERYTHING = {
    "ce": 1.0, "focal": 0.5, "dice": 1.0, "jaccard": 0.4, "tversky": 0.3, "boundary": 1.0, "distillation": 0.7,
    "boundary_term": "focal", "label_smoothing": 0.1, "distillation_temperature": 2.0, "mode": "paper0",
    "threshold": 0.0,
}  # fmt: skip
EDGES = {
    "smoothing": {"label_smoothing": 0.1},
    "focal": {"ce": 0.0, "focal": 1.0, "focal_gamma": 0.5},
    "overlap": {"ce": 0.0, "dice": 1.0, "jaccard": 0.4, "tversky": 0.3, "tversky_alpha": 0.3},
    "overlap by image": {"dice": 1.0, "overlap_log": True, "overlap_per_image": True},
    "distillation": {"ce": 0.0, "distillation": 0.7, "distillation_temperature": 2.0},
    "binary": EVERYTHING | {"binary": True, "pos_weight": 3.0},
    "everything": EVERYTHING,
    "everything, aligned": EVERYTHING | {"align_corners": True},
}
# Of all terms at once on every backend; of some on the first one alone, but for the exhaustive run.
NAMES = [name if "every" in name else pytest.param(name, marks=pytest.mark.any_backend) for name in EDGES]


@pytest.mark.parametrize("classes", [4, pytest.param(40, marks=pytest.mark.tail)])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    "terms", [["boundary"], ["boundary", "focal", "dice", "jaccard", "distillation"],
              pytest.param([], marks=pytest.mark.tail), pytest.param(["dice"], marks=pytest.mark.tail)], ids=" ".join,
)  # fmt: skip
def test_classes_that_are_masked_by_the_least_number(device, terms, grid, classes):
    """That is what is often written in the logits of a class that is to be left out, and no factor may carry it on."""
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (2 * torch.randn(2, classes, *grid, generator=generator) for _ in range(2))
    logits[:, 2] = teacher[:, 2] = torch.finfo(torch.float32).min
    target = torch.randint(0, 2, (2, *SIZE), generator=generator)
    tensors = {"teacher": teacher} if "distillation" in terms else {}
    options = {"ce": 1.0, "threshold": 0.0} | dict.fromkeys(terms, 1.0)  # no rounding decides what is selected
    value, _, gradient = evaluated(device, logits, target, tensors, options)
    exact = logits.double().requires_grad_()
    known = term_options(**options)
    expected = reference.loss(exact, target, known, None, None, teacher.double() if tensors else None)[0]
    assert_close(value, expected.detach())
    assert_close(gradient, torch.autograd.grad(expected, exact)[0])


def edge(name: str, grid=SIZE):
    """A case with the terms of that name: logits, labels of SIZE with ignored ones, tensors and options."""
    generator, options = torch.Generator().manual_seed(0), dict(EDGES[name])
    classes = 1 if options.get("binary") else 5
    logits, teacher = (2 * torch.randn(2, classes, *grid, generator=generator) for _ in range(2))
    target = torch.randint(0, max(classes, 2), (2, *SIZE), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.2] = 255
    tensors = {}
    if name.startswith("everything"):
        u = torch.rand(target.shape, generator=generator)
        tensors = {"weight": torch.tensor([1.0, 0.5, 0.0, 2.0, 3.0]), "pixel_weight": torch.where(u < 0.2, 0.0, u)}
    return logits, target, tensors | ({"teacher": teacher} if options.get("distillation") else {}), options


def evaluated(device, logits, target, tensors, options):
    """Loss, stats and gradient, on the CPU."""
    z = logits.to(device).detach().requires_grad_()
    there = {key: tensor.to(device) for key, tensor in tensors.items()}
    value, stats = segmentation_loss(z, target.to(device), return_stats=True, **there, **options)
    (gradient,) = torch.autograd.grad(value, z)
    return value.detach().cpu(), reference.BclStats(*(figure.cpu() for figure in stats)), gradient.cpu()


def assert_equal_bits(actual, expected):
    for one, other in zip((actual[0], *actual[1], actual[2]), (expected[0], *expected[1], expected[2]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.tail
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_valid_is_zero_with_zero_gradients(device, name, grid):
    logits, target, tensors, options = edge(name, grid)
    logits[0, 0, 0, 0] = NAN  # nor does an ignored pixel reach the gradient
    value, stats, gradient = evaluated(device, logits, torch.full_like(target, 255), tensors, options)
    assert value.item() == 0 and stats.valid.item() == 0 and not gradient.any()
    nothing = tensors | {"pixel_weight": torch.zeros(target.shape)}
    value, stats, gradient = evaluated(device, logits, target, nothing, options)
    assert value.item() == 0 and stats.valid.item() == 0 and not gradient.any()


@pytest.mark.tail
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("absent", ["skip", "zero", "count"])
def test_labels_of_one_class_alone(device, absent, grid):
    for name in ("overlap", "overlap by image", "binary"):
        logits, target, tensors, options = edge(name, grid)
        target[target != 255] = 1
        target[1] = 255  # nor has this image a valid pixel
        options |= {"overlap_absent": absent, "boundary": 0.0}
        assert agrees(device, logits, target, tensors, options, name)


@pytest.mark.tail
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_where_nothing_counts_has_no_part(device, name, value):
    """Logits and the teacher's, of pixels that are ignored or weigh nothing."""
    logits, target, tensors, options = edge(name)
    expected = evaluated(device, logits, target, tensors, options)
    void = (target == 255) | (tensors.get("pixel_weight", torch.ones(target.shape)) == 0)
    for tensor in (logits, tensors.get("teacher", logits)):
        tensor[:, 0] = torch.where(void, value, tensor[:, 0])
    assert_equal_bits(evaluated(device, logits, target, tensors, options), expected)


@pytest.mark.tail
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_comes_out_as_the_reference_has_it(device, name, value):
    logits, target, tensors, options = edge(name)
    for label in (0, 1):  # of the label's class or another
        z, y = logits.clone(), target.clone()
        z[0, 0, 3, 4], y[0, 3, 4] = value, label
        if "pixel_weight" in tensors:
            tensors["pixel_weight"][0, 3, 4] = 1.0
        actual, stats, _ = evaluated(device, z, y, tensors, options)
        there = [tensors.get(key) for key in ("weight", "pixel_weight", "teacher")]
        expected, figures, _ = reference.loss(z.double(), y, term_options(**options), *there)
        for one, other in ((actual, expected), (stats.ce, figures.ce), (stats.focal, figures.focal),
                           (stats.dice, figures.dice), (stats.distillation, figures.distillation)):  # fmt: skip
            torch.testing.assert_close(one.double(), other.double(), rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.tail
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_class_weight_that_is_not_finite_makes_the_loss_nan(device, grid, value):
    logits, target, tensors, options = edge("everything", grid)
    tensors["weight"][3] = value
    loss, stats, gradient = evaluated(device, logits, target, tensors, options)
    assert loss.isnan() and stats.ce.isnan() and gradient[0].isnan().any() and gradient[1].isnan().any()


@pytest.mark.tail
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch(device, name, grid):
    logits, target, tensors, options = edge(name, grid)
    tensors = {key: tensor if key == "weight" else tensor[:0] for key, tensor in tensors.items()}
    value, stats, gradient = evaluated(device, logits[:0], target[:0], tensors, options)
    assert value.item() == 0 and stats.valid.item() == 0 and gradient.shape == (0, *logits.shape[1:])


@pytest.mark.parametrize("grid", GRIDS)
def test_a_label_that_binary_logits_have_not(device, grid):
    """On a CPU it is named; where that would take a wait, it makes the loss NaN."""
    logits, target, tensors, options = edge("binary", grid)
    target[0, 3, 7] = 2
    try:
        value, _, gradient = evaluated(device, logits, target, tensors, options)
        assert value.isnan() and gradient.isnan().any()
    except IndexError as error:
        assert "expected labels in [0, 2) or ignore_index, got 2 at (image, row, column) = (0, 3, 7)" in str(error)


@pytest.mark.tail
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", NAMES)
def test_threads_and_layouts_give_equal_bits(device, name, grid):
    logits, target, tensors, options = edge(name, grid)
    expected = evaluated(device, logits, target, tensors, options)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert_equal_bits(evaluated(device, logits, target, tensors, options), expected)
        if backends.choose(OP, device)[0] == "cpp":
            other = logits.contiguous(memory_format=torch.channels_last), target.mT.contiguous().mT
            assert_equal_bits(evaluated(device, *other, tensors, options), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_binary_logit_may_be_the_least_number(device, grid):
    logits, target = torch.zeros(2, 1, *grid), torch.zeros(2, *SIZE, dtype=torch.int64)
    logits[0] = torch.finfo(torch.float32).min
    value, _, gradient = evaluated(device, logits, target, {}, {"ce": 1.0, "binary": True})
    exact = logits.double().requires_grad_()
    expected = reference.loss(exact, target, term_options(ce=1.0, binary=True), None, None, None)[0]
    assert_close(value, expected.detach())
    assert_close(gradient, torch.autograd.grad(expected, exact)[0])


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_distillation_at_a_temperature_where_cells_have_few_pixels(device, temperature):
    """Cells at the border have half as many as others, and the lanes that are left have no part."""
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(2, 5, 3, 5, generator=generator) for _ in range(2))
    target = torch.randint(0, 5, (2, 24, 40), generator=generator)
    options = {"ce": 1.0, "distillation": 1.0, "distillation_temperature": temperature}
    assert agrees(device, logits, target, {"teacher": teacher}, options, "temperature")


@pytest.mark.tail
@pytest.mark.usefixtures("poisoned", "deterministic")
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_read_before_it_is_written(device, name, grid):
    """Memory starts as NaN and largest integers, the kernels' own too; and two runs give equal bits."""
    case = edge(name, grid)
    first = evaluated(device, *case)
    assert first[0].isfinite() and first[2].isfinite().all()
    assert_equal_bits(evaluated(device, *case), first)


@pytest.mark.tail
@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_in_the_logits_memory_has_the_same_bits(device, name):
    if backends.choose(OP, device)[0] == "reference":
        pytest.skip("the reference refuses")
    logits, target, tensors, options = edge(name)
    expected = evaluated(device, logits, target, tensors, options)[2]
    z = logits.to(device).detach().requires_grad_() * 1
    there = {key: tensor.to(device) for key, tensor in tensors.items()}
    value = segmentation_loss(z, target.to(device), inplace_grad=True, **there, **options)
    (gradient,) = torch.autograd.grad(value, z)
    assert gradient.data_ptr() == z.data_ptr() and torch.equal(gradient.cpu(), expected)


@pytest.mark.tail
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("term", ["ce", "focal"])
def test_the_boundary_term_has_the_weights_of_pixels_and_classes(device, term, grid):
    """Without overlap, which has a pass of its own; all pixels are selected, so that no rounding decides."""
    logits, target, tensors, _ = edge("everything", grid)
    tensors.pop("teacher")
    options = {"boundary": 1.0, "boundary_term": term, "mode": "paper0", "threshold": 0.0, "label_smoothing": 0.1}
    value, stats, gradient = evaluated(device, logits, target, tensors, options)
    exact = logits.double().requires_grad_()
    expected, figures, _ = reference.loss(exact, target, term_options(**options), *tensors.values())
    (exact_gradient,) = torch.autograd.grad(expected, exact)
    assert stats.selected == figures.selected == stats.valid
    assert_close(stats.boundary, figures.boundary, "boundary term", 1e-5)
    assert_close(value, expected.detach(), "loss", 1e-5)
    assert_close(gradient, exact_gradient, "gradient", 1e-5)


@pytest.mark.tail
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("per_image", [False, True])
def test_shared_slopes_take_the_place_of_those_of_the_sums(device, per_image, grid):
    """The gradient is that of the given slopes; loss and sums stay those of the logits."""
    logits, target, tensors, options = edge("overlap", grid)
    known = term_options(**(options | {"overlap_per_image": per_image, "ce": 0.5}))
    slopes = torch.randn(2 if per_image else 1, 2, 5, generator=torch.Generator().manual_seed(1))
    z = logits.to(device).detach().requires_grad_()
    outputs = evaluate(Inputs(z, target.to(device), shared_slopes=slopes.to(device)), known, True, False)
    (gradient,) = torch.autograd.grad(outputs.loss, z)
    exact, none = logits.double(), None
    loss, stats, sums, *saved, expected = reference.forward(
        exact, target, none, none, none, slopes.double(), known, True
    )
    if grid == SIZE:
        expected = torch.empty_like(exact)
        reference.backward(torch.ones(()).double(), exact, target, none, none, none, known, *saved, expected)
    assert_close(outputs.loss.detach().cpu(), loss, "loss", 1e-5)
    assert_close(outputs.sums.cpu(), sums, "sums", 1e-5)
    assert_close(gradient.cpu(), expected, "gradient", 1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("level", ["plain", "v3", "v4"])
def test_every_level_of_instruction_sets(at_level, level):
    code = """
from test_terms_backends import agrees, draw
assert sum(agrees("cpu", *draw(seed), f"case {seed}") for seed in range(60)) > 30
"""
    at_level(level, OP, code)


@pytest.mark.tail
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("factor", [2, 8, 21])
def test_steep_logits_between_their_pixels(device, factor, aligned):
    """Sums over pixels and gradients, where a class rises by more than a float's exponent between two columns."""
    generator = torch.Generator().manual_seed(0)
    coarse = (1, 3, 20 // factor + 1, 160 // factor)
    logits = torch.tensor([0.0, 3.0, 28.0, 95.0])[torch.randint(0, 4, coarse, generator=generator)]
    target = torch.randint(0, 3, (1, 20, 160), generator=generator)
    options = {"dice": 1.0, "label_smoothing": 0.1, "align_corners": aligned}
    assert agrees(device, logits, target, {}, options, f"{factor} pixels of a cell")


@pytest.fixture
def deterministic():
    """torch.empty of C++ fills its memory."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
