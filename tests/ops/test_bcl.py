"""The op: autograd, compile, dtypes, layouts, repeatability and arguments. Its values are tests/reference/'s matter."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bcl_oracle import COEFFICIENTS, oracle
from compare import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from bcmfnet.ops import BclStats, backends, boundary_corrected_loss
from bcmfnet.ops._loss_options import pack, unpack
from bcmfnet.reference import bcl as reference
from bcmfnet.reference.bcl import MODES, BclOptions, make_options

GRIDS = [(8, 10), (4, 5), (3, 10)]  # full resolution, a scale of 2, one axis alone at a fractional scale

SPARSE = {"nms": 3, "ratio": 1 / 16}
"""Selects few pixels of random maps, where the default selects nearly all."""


def inputs(grid=(8, 10), dtype=torch.float32, seed=0, classes=4, size=(8, 10)):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, classes, *grid, generator=generator, dtype=torch.float64)
    target = torch.randint(0, classes, (2, *size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.1] = 255
    return logits.to(dtype).requires_grad_(), target


def run(logits, target, **options):
    """Loss, and gradient of a leaf of its own."""
    logits = logits.detach().requires_grad_()
    value = boundary_corrected_loss(logits, target, **SPARSE | options)
    return value.detach(), torch.autograd.grad(value, logits)[0]


@pytest.mark.parametrize("grid", GRIDS)
def test_gradcheck(grid):
    logits, target = inputs(grid, torch.float64)
    weight = torch.tensor([1.0, 0.5, 2.0, 1.5], dtype=torch.float64)
    options = {"weight": weight, "mode": "paper0", "alpha": 0.7, "beta": 1.3, "boundary_weight": 0.6, "ratio": 0.5}
    torch.autograd.gradcheck(lambda z: boundary_corrected_loss(z, target, **options), logits)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("mode", MODES)
def test_value_and_gradient_are_those_of_the_references_autograd(mode, grid):
    logits, target = inputs(grid, torch.float64)
    weight = torch.tensor([1.0, 0.5, 2.0, 0.0], dtype=torch.float64)
    common = {"step": (2, 1), "flip": "mirror", "ignore_index": 3, "nms": 5, "ratio": 0.5, "norm": "valid"}
    target[target == 255] = 3
    value, gradient = run(logits, target, weight=weight, mode=mode, alpha=0.7, beta=1.3, **common)
    expected, _, maps = reference.loss(logits, target, make_options(mode, 0.7, 1.3, **common), weight)
    assert maps.selected.any()
    assert_close(value, expected)
    assert_close(gradient, torch.autograd.grad(expected, logits)[0])


@pytest.mark.parametrize("mode", COEFFICIENTS)
def test_every_option_reaches_the_loss(mode):
    logits, target = inputs((4, 5), torch.float64)
    options = {
        "mode": mode, "ce_weight": 0.3, "boundary_weight": 0.7, "alpha": 0.6, "beta": 1.4, "step": (1, 2),
        "flip": "mirror", "nms": 1, "threshold": 6.0, "ratio": 0.2, "min_kept": 11, "max_kept": 13, "norm": "valid",
        "per_image": True,
    }  # fmt: skip
    value, stats = boundary_corrected_loss(logits, target, weight=torch.ones(4), return_stats=True, **options)
    expected = oracle(logits.detach().numpy(), target.numpy(), **options)
    assert value.item() == pytest.approx(expected.loss, rel=1e-12)
    assert stats.threshold.tolist() == expected.thresholds


@pytest.mark.parametrize("grid", [(8, 10), (4, 5)])
def test_what_is_saved(grid):
    """Full resolution saves lse, mask and scales, low resolution its gradient."""
    logits, target = inputs(grid)
    full = grid == (8, 10)
    saved = torch.ops.bcmfnet.bcl_forward(logits.detach(), target, *[None] * 4, *pack(make_options()), False)[5:]
    shapes = [(2, 8, 10), (2, 8, 10), (3,), None, None] if full else [None, None, None, None, (2, 4, *grid)]
    assert [tensor if tensor is None else tuple(tensor.shape) for tensor in saved] == shapes
    dtypes = [torch.float32, torch.uint8, *[torch.float32] * 3]
    assert all(tensor is None or tensor.dtype == dtype for tensor, dtype in zip(saved, dtypes, strict=True))


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_options_are_the_same_when_they_are_unpacked(data):
    """But for the threshold, which is put on the grid of the scores, as the selection does."""
    real, count = st.floats(0, 1e30), st.integers(0, 2**62)
    drawn = {
        "score": st.tuples(real, real, real), "terms": st.tuples(real, real, real), "ce_weight": real,
        "boundary_weight": real, "ignore_index": st.integers(-(2**63), 2**63 - 1), "step": st.tuples(count, count),
        "flip": st.sampled_from(["swap", "mirror"]), "offset": st.tuples(count, count), "nms": count,
        "threshold": st.floats(0, 100), "ratio": st.floats(0, 1), "min_kept": count, "max_kept": st.none() | count,
        "norm": st.sampled_from(["selected", "valid"]), "per_image": st.booleans(),
    }  # fmt: skip
    options = BclOptions(**{name: data.draw(strategy) for name, strategy in drawn.items()})
    unpacked = unpack(*pack(options))
    assert unpacked._replace(threshold=0.0) == options._replace(threshold=0.0)
    tau = (reference.quantise(torch.tensor(o.threshold, dtype=torch.float64)) for o in (unpacked, options))
    assert torch.equal(*tau)


def with_figures(logits, target, seed):
    value, stats = boundary_corrected_loss(logits, target, jitter=seed, step=2, return_stats=True, **SPARSE)
    return value, stats.selected, stats.threshold


def compiled_agrees(backend, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(with_figures, fullgraph=True, dynamic=dynamic, backend=backend)
    shapes = [((8, 10), (8, 10)), ((12, 6), (12, 6)), ((4, 5), (8, 10)), ((3, 7), (9, 7))]
    for seed, (grid, size) in enumerate(shapes):
        for layout in (torch.contiguous_format, torch.channels_last):
            logits, target = inputs(grid, seed=seed, size=size)
            logits = logits.detach().contiguous(memory_format=layout).requires_grad_()
            actual, expected = compiled(logits, target, seed), with_figures(logits, target, seed)
            for found, wanted in zip(actual, expected, strict=True):
                assert torch.equal(found, wanted)
            gradients = [torch.autograd.grad(results[0], logits)[0] for results in (actual, expected)]
            assert torch.equal(*gradients)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_traces_the_whole_call(dynamic):
    compiled_agrees("aot_eager", dynamic)


@pytest.mark.exhaustive
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_compile_with_inductor():
    compiled_agrees("inductor", True)


@pytest.mark.parametrize("grid", [(8, 10), (4, 5)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_of_logits(dtype, grid):
    logits, target = inputs(grid, dtype)
    value, gradient = run(logits, target)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype
    exact = logits.detach().double().requires_grad_()
    selected = reference.loss(logits, target, make_options(**SPARSE))[2].selected
    expected = reference.loss(exact, target, make_options(**SPARSE), selected=selected)[0]
    assert_close(value, expected)
    assert_close(gradient, torch.autograd.grad(expected, exact)[0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_dtypes_of_target(dtype):
    logits, target = inputs()
    for actual, expected in zip(run(logits, target.to(dtype)), run(logits, target), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(("dtype", "label", "shown"), [(torch.uint8, 254, 254), (torch.int16, -2, -2)])
def test_labels_are_compared_after_widening(dtype, label, shown):
    logits, target = inputs()
    target = target.masked_fill(target == 255, 0).to(dtype)
    target[1, 2, 3] = label
    with pytest.raises(IndexError, match=rf"got {shown} at \(image, row, column\) = \(1, 2, 3\)"):
        boundary_corrected_loss(logits, target, ignore_index=label + 256)


def layouts(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values in other places: every second column of a wider tensor, transposed, batch or channels last."""
    wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype)
    wide[..., ::2] = tensor
    found = {"strided": wide[..., ::2], "transposed": tensor.transpose(-1, -2).contiguous().transpose(-1, -2)}
    found["batch last"] = tensor.movedim(0, -1).contiguous().movedim(-1, 0)
    if tensor.ndim == 4:
        found["channels last"] = tensor.contiguous(memory_format=torch.channels_last)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grid", [(24, 200), (12, 100), (9, 200)])
def test_layouts_give_equal_bits(grid, dtype):
    for seed in range(10):  # another order of a sum shows in one loss of five
        logits, target = inputs(grid, dtype, seed, size=(24, 200))
        logits = logits.detach()
        expected = run(logits, target)
        others = [(name, other, target) for name, other in layouts(logits).items()]
        others += [(name, logits, other) for name, other in layouts(target).items()]
        for name, *tensors in others:
            for actual, wanted in zip(run(*tensors), expected, strict=True):
                assert torch.equal(actual, wanted), (name, seed)


@pytest.mark.parametrize("grid", [(136, 256), (17, 32)])  # torch splits maps and sums of more than 32768 over threads
def test_equal_bits_from_run_to_run_and_for_any_number_of_threads(grid):
    logits, target = inputs(grid, classes=19, size=(136, 256))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 1, 2, 2):
            torch.set_num_threads(count)
            results.append(run(logits, target))
    finally:
        torch.set_num_threads(threads)
    for value, gradient in results[1:]:
        assert torch.equal(value, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("grid", [(8, 10), (4, 5)])
def test_gradients_accumulate(grid):
    logits, target = inputs(grid, torch.float64)
    _, once = run(logits, target)
    value = boundary_corrected_loss(logits, target, **SPARSE)
    (3 * value).backward(retain_graph=True)
    (-0.5 * value).backward()
    assert_close(logits.grad, 2.5 * once)


@pytest.mark.parametrize("grid", [(256, 256), (32, 32)])
def test_a_scaled_loss_does_not_underflow_in_half_precision(grid):
    """1 / 131072 pixels times a small p is below float16's 6e-8: only the product with the scale is stored."""
    logits, target = inputs(grid, torch.float16, size=(256, 256))
    value = boundary_corrected_loss(logits, target, boundary_weight=0.0)
    (65536 * value).backward()
    exact = logits.detach().double().requires_grad_()
    up = F.interpolate(exact, target.shape[1:], mode="bilinear") if grid != (256, 256) else exact
    F.cross_entropy(up, target, ignore_index=255).backward()
    assert_close(logits.grad, 65536 * exact.grad)
    if grid == (256, 256):
        unscaled = run(logits, target, boundary_weight=0.0)[1]
        assert (unscaled == 0).sum() > (logits.grad == 0).sum()


def test_second_derivative_is_refused():
    logits, target = inputs()
    value = boundary_corrected_loss(logits, target)
    (first,) = torch.autograd.grad(value, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="loss: expected a first derivative"):
        first.sum().backward()


@pytest.mark.parametrize("grid", [(8, 10), (4, 5)])
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("parts", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_stats(parts, per_image, grid):
    logits, target = inputs(grid)
    options = {"ce_weight": parts[0], "boundary_weight": parts[1], "per_image": per_image, "threshold": 6.0}
    options |= SPARSE
    value, stats = boundary_corrected_loss(logits, target, return_stats=True, **options)
    assert isinstance(stats, BclStats)
    assert [tensor.dtype for tensor in stats[:5]] == [torch.float32] * 2 + [torch.int64] * 2 + [torch.int32]
    assert all(tensor.dtype == torch.float32 and tensor == 0 for tensor in stats[5:])  # of terms that there are not
    assert not any(tensor.requires_grad for tensor in stats)
    expected = oracle(logits.detach().double().numpy(), target.numpy(), **options)
    assert stats.threshold.shape == ((2,) if per_image else ())
    assert stats.threshold.reshape(-1).tolist() == expected.thresholds
    assert (stats.selected.item(), stats.valid.item()) == (expected.selected.sum(), expected.valid)
    assert stats.ce.item() == pytest.approx(expected.ce_mean, rel=2e-6)
    assert stats.boundary.item() == pytest.approx(expected.boundary, rel=2e-6)
    with torch.no_grad():
        value *= 2  # as a training loop may
    assert stats.ce.item() == pytest.approx(expected.ce_mean, rel=2e-6)
    assert stats.boundary.item() == pytest.approx(expected.boundary, rel=2e-6)


def test_without_gradients_the_value_is_the_same():
    for grid in GRIDS:
        logits, target = inputs(grid)
        with torch.no_grad():
            alone = boundary_corrected_loss(logits, target, **SPARSE)
        assert not alone.requires_grad
        assert torch.equal(alone, boundary_corrected_loss(logits, target, **SPARSE))
        assert not boundary_corrected_loss(logits.detach(), target).requires_grad


@pytest.mark.parametrize("grid", [(8, 10), (4, 5)])
def test_nothing_valid_is_an_attached_zero(grid):
    logits, target = inputs(grid)
    value, gradient = run(logits, torch.full_like(target, 255))
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.fixture
def calls(monkeypatch):
    """Options of each call, and whether it saves, as they reach the kernel."""
    seen = []
    serve = backends.implementation("bcl", "cpu")

    def kernel(*arguments):
        *_, reals, integers, saves = arguments[:9]
        seen.append((unpack(reals, integers), saves))
        return serve("bcl_forward")(*arguments)

    monkeypatch.setitem(backends._table, ("bcl", "cpu"), {})
    backends.register("bcl", "cpu", "reference", lambda name: kernel)
    return seen


def offsets_of(calls, step, seeds):
    logits, target = torch.zeros(1, 2, 1, 1), torch.zeros(1, 1, 1, dtype=torch.uint8)
    calls.clear()
    for seed in seeds:
        boundary_corrected_loss(logits, target, step=step, jitter=seed)
    return [tuple(options.offset) for options, _ in calls]


@pytest.mark.parametrize("step", [1, (3, 2)])
def test_jitter_is_uniform_over_the_windows_and_decided_by_its_seed(calls, step):
    rows, columns = (1, 1) if step == 1 else step
    cells = list(itertools.product(range(2 * rows), range(2 * columns)))
    seen = offsets_of(calls, step, range(50 * len(cells)))
    counts = Counter(seen)
    assert sorted(counts) == cells
    assert all(25 <= count <= 75 for count in counts.values()), counts
    assert offsets_of(calls, step, range(20)) == seen[:20]
    assert set(offsets_of(calls, step, [None, None])) == {(0, 0)}
    assert set(offsets_of(calls, step, [-1, 2**31, 2**63])) <= set(cells)


def test_jitter_moves_the_windows():
    logits, target = inputs(dtype=torch.float64)
    values = {boundary_corrected_loss(logits, target, jitter=seed).item() for seed in range(20)}
    expected = {
        oracle(logits.detach().numpy(), target.numpy(), offset=offset).loss
        for offset in itertools.product(range(2), range(2))
    }
    assert sorted(values) == pytest.approx(sorted(expected), rel=1e-12)


def test_jitter_is_refused_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    logits, target = inputs()
    with pytest.raises(ValueError, match="jitter: expected None while a CUDA graph is captured"):
        boundary_corrected_loss(logits, target, jitter=0)
    boundary_corrected_loss(logits, target)


LOGITS, TARGET, WEIGHT = torch.zeros(2, 4, 8, 10), torch.zeros(2, 8, 10, dtype=torch.int64), torch.ones(4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"logits": LOGITS.long()},
            TypeError,
            "logits: expected float16, bfloat16, float32 or float64, got int64",
        ),
        (
            {"target": TARGET.float()},
            TypeError,
            "target: expected uint8, int16, int32 or int64 [N, H, W], got float32 [2, 8, 10]",
        ),
        (
            {"target": TARGET.bool()},
            TypeError,
            "target: expected uint8, int16, int32 or int64 [N, H, W], got bool [2, 8, 10]",
        ),
        ({"logits": LOGITS[0]}, ValueError, "logits: expected [N, C, h, w] with C, h, w >= 1, got [4, 8, 10]"),
        ({"logits": LOGITS[:, :0]}, ValueError, "logits: expected [N, C, h, w] with C, h, w >= 1, got [2, 0, 8, 10]"),
        ({"logits": LOGITS[..., :0]}, ValueError, "logits: expected [N, C, h, w] with C, h, w >= 1, got [2, 4, 8, 0]"),
        ({"target": TARGET[:, None]}, ValueError, "target: expected [N, H, W] with N = 2, got int64 [2, 1, 8, 10]"),
        ({"target": TARGET[:1]}, ValueError, "target: expected [N, H, W] with N = 2, got int64 [1, 8, 10]"),
        ({"target": TARGET[:, :7]}, ValueError, "logits: expected at most the target's [7, 10] pixels, got [8, 10]"),
        ({"target": TARGET[:, :, :9]}, ValueError, "logits: expected at most the target's [8, 9] pixels, got [8, 10]"),
        ({"size": (10, 8)}, ValueError, "size: expected the target's [8, 10], got [10, 8]"),
        ({"weight": torch.ones(3)}, ValueError, "weight: expected [4], one for each class, got [3]"),
        ({"weight": torch.ones(1, 4)}, ValueError, "weight: expected [4], one for each class, got [1, 4]"),
        ({"target": TARGET.to("meta")}, ValueError, "target: expected it on the logits' device cpu, got meta"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "weight: expected it on the logits' device cpu, got meta"),
        ({"mode": "hard"}, ValueError, "mode: expected one of detect, detect0, paper, paper0, ohem, got 'hard'"),
        ({"flip": "roll"}, ValueError, "flip: expected one of swap, mirror, got 'roll'"),
        ({"norm": "mean"}, ValueError, "norm: expected one of selected, valid, got 'mean'"),
        ({"step": 0}, ValueError, "step: expected at least 1, got 0"),
        ({"step": (2, -1)}, ValueError, "step: expected at least 1, got -1"),
        ({"step": (1, 2, 3)}, TypeError, "step: expected an integer or (rows, columns), got (1, 2, 3)"),
        ({"size": (8.0, 10.0)}, TypeError, "size: expected an integer or (H, W), got (8.0, 10.0)"),
        ({"size": 8}, ValueError, "size: expected the target's [8, 10], got [8, 8]"),
        ({"nms": True}, TypeError, "nms: expected an integer, got True"),
        ({"boundary_weight": float("inf")}, ValueError, "boundary_weight: expected a finite float32, got inf"),
        ({"alpha": 10**400}, ValueError, "alpha: expected a number that a float holds, got a larger one"),
        ({"nms": 4}, ValueError, "nms: expected an odd window >= 1, got 4"),
        ({"nms": -1}, ValueError, "nms: expected an odd window >= 1, got -1"),
        ({"ratio": 1.5}, ValueError, "ratio: expected 0 to 1, got 1.5"),
        ({"ratio": float("nan")}, ValueError, "ratio: expected 0 to 1, got nan"),
        ({"min_kept": -1}, ValueError, "min_kept: expected >= 0, got -1"),
        ({"max_kept": 0}, ValueError, "max_kept: expected >= 1 or None, got 0"),
        ({"ce_weight": -1.0}, ValueError, "ce_weight: expected >= 0, got -1.0"),
        ({"boundary_weight": -0.5}, ValueError, "boundary_weight: expected >= 0, got -0.5"),
        ({"alpha": -2}, ValueError, "alpha: expected >= 0, got -2"),
        ({"beta": float("nan")}, ValueError, "beta: expected >= 0, got nan"),
        ({"nms": 3.0}, TypeError, "nms: expected an integer, got 3.0"),
        ({"min_kept": 1.5}, TypeError, "min_kept: expected an integer, got 1.5"),
        ({"jitter": 1.5}, TypeError, "jitter: expected an integer, got 1.5"),
        ({"weight": [1.0, 2.0]}, TypeError, "weight: expected a tensor, got list"),
        ({"target": None}, TypeError, "target: expected a tensor, got NoneType"),
        ({"threshold": -0.1}, ValueError, "threshold: expected >= 0, got -0.1"),
        (
            {"target": TARGET + 4},
            IndexError,
            "target: expected labels in [0, 4) or ignore_index, got 4 at (image, row, column) = (0, 0, 0)",
        ),
    ],
)  # fmt: skip
def test_argument_errors(arguments, error, message):
    arguments = {"logits": LOGITS, "target": TARGET} | arguments
    with pytest.raises(error) as caught:
        boundary_corrected_loss(**arguments)
    assert str(caught.value) == message


def test_validate_does_not_trust_the_backend(monkeypatch):
    def kernel(*arguments):
        raise RuntimeError("served")

    monkeypatch.setitem(backends._table, ("bcl", "cpu"), {})
    backends.register("bcl", "cpu", "reference", lambda name: kernel)
    wrong = TARGET.clone()
    wrong[1, 7, 9] = -3
    with pytest.raises(IndexError, match=r"got -3 at \(image, row, column\) = \(1, 7, 9\)"):
        boundary_corrected_loss(LOGITS, wrong, validate=True)
    for target, validate in ((wrong, False), (TARGET, True), (torch.full_like(TARGET, 255), True)):
        with pytest.raises(RuntimeError, match="served"):
            boundary_corrected_loss(LOGITS, target, validate=validate)


def test_size_and_step_take_what_stands_for_them():
    logits, target = inputs()
    expected = boundary_corrected_loss(logits, target, step=(2, 2))
    for options in ({"step": 2}, {"step": [2, 2]}, {"step": 2, "size": torch.Size((8, 10))}):
        assert torch.equal(boundary_corrected_loss(logits, target, **options), expected)


def test_random_maps_have_work_for_the_selection():
    """What the cases above would not notice: that nothing, or everything, is selected."""
    logits, target = inputs(size=(8, 10))
    found = oracle(logits.detach().double().numpy(), target.numpy(), **SPARSE)
    assert 0 < found.selected.sum() < np.count_nonzero(target.numpy() != 255) / 4


@pytest.mark.parametrize("grid", GRIDS)
def test_nan_is_not_swallowed_where_only_the_selection_sees_it(grid):
    """With ce_weight 0 a NaN pixel is in no term: its score is q = 0, so it is never selected."""
    logits, target = inputs(grid)
    logits.data[0, :, 2, 2] = float("nan")
    target[0] = 0
    assert boundary_corrected_loss(logits, target, mode="ohem", ce_weight=0.0, nms=1).isnan()
    target[0] = 255
    assert boundary_corrected_loss(logits, target, mode="ohem", ce_weight=0.0, nms=1).isfinite()
