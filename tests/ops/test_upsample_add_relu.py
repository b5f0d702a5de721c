"""upsample_add_relu on every backend against torch's own interpolation in float64, and what an op owes torch."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from grids import grid
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bcmfnet.ops import upsample_add_relu
from bcmfnet.reference.upsample_add_relu import upsample_add_relu as reference

OP = "upsample_add_relu"
INF, NAN = float("inf"), float("nan")
CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
LAYOUTS = [(CONTIGUOUS,) * 2, (CHANNELS_LAST,) * 2, (CHANNELS_LAST, CONTIGUOUS)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# The shape of both maps' batch and channels, the size of `low`, the size of `high`.
CASES = {
    "twice the size, whole vectors of channels": ((1, 64), (4, 8), (8, 16)),
    "8 times the size": ((1, 16), (2, 4), (16, 32)),
    "odd sizes, fractional scales": ((2, 5), (3, 4), (7, 11)),
    "of an odd frame": ((1, 24), (5, 9), (17, 33)),
    "identity": ((2, 3), (9, 5), (9, 5)),
    "one source pixel": ((1, 33), (1, 1), (5, 6)),
    "one channel": ((2, 1), (2, 3), (4, 5)),
    "one pixel": ((2, 7), (1, 1), (1, 1)),
    "rows alone": ((1, 17), (3, 20), (13, 20)),
    "columns alone, one past a block of 256": ((1, 3), (2, 33), (2, 257)),
    "more rows between two source rows than a thread holds": ((1, 6), (2, 2), (61, 9)),
    "barely larger": ((1, 8), (30, 31), (31, 32)),
}


def normal(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def maps(planes, low, high, dtype=torch.float32):
    """high and low."""
    return normal((*planes, *high), dtype), normal((*planes, *low), dtype, seed=1)


def torchs(high, low):
    high, low = high.double().cpu(), low.double().cpu()
    return F.relu(high + F.interpolate(low, high.shape[2:], mode="bilinear", align_corners=False))


@grid({"planes, low, high": CASES, "dtype": DTYPES, "layouts": LAYOUTS}, together=1)
@pytest.mark.usefixtures("poisoned")
def test_values_are_torchs(device, planes, low, high, dtype, layouts):
    x, y = (
        tensor.contiguous(memory_format=layout).to(device)
        for tensor, layout in zip(maps(planes, low, high, dtype), layouts, strict=True)
    )
    result = upsample_add_relu(x, y)
    assert result.dtype == dtype and result.is_contiguous(memory_format=layouts[0])
    assert_close(result.cpu(), torchs(x, y))


@pytest.mark.tail
@given(
    planes=st.tuples(st.integers(1, 2), st.integers(1, 40)), low=st.tuples(st.integers(1, 9), st.integers(1, 20)),
    more=st.tuples(st.integers(0, 20), st.integers(0, 40)), layout=st.sampled_from([CONTIGUOUS, CHANNELS_LAST]),
)  # fmt: skip
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape(device, planes, low, more, layout):
    x, y = maps(planes, low, (low[0] + more[0], low[1] + more[1]))
    x, y = x.contiguous(memory_format=layout).to(device), y.to(device)
    assert_close(upsample_add_relu(x, y).cpu(), torchs(x, y))


def test_plateaus_are_exact(device):
    """Between equal source pixels there is nothing to round, at any scale."""
    low = normal((1, 20, 1, 1)).expand(1, 20, 3, 7)
    for size in ((11, 23), (24, 56)):
        for layout in (CONTIGUOUS, CHANNELS_LAST):
            high = torch.zeros(1, 20, *size, device=device).contiguous(memory_format=layout)
            result = upsample_add_relu(high, low.to(device)).cpu()
            assert torch.equal(result, low[:, :, :1, :1].clamp(min=0).expand(result.shape))


@pytest.mark.tail
@pytest.mark.parametrize("dtype", DTYPES)
def test_maps_that_no_vector_is_aligned_to(device, dtype):
    """Whole vectors of channels, one element past where a load of 16 bytes can start, or that far apart."""
    x, y = maps((1, 16), (3, 4), (7, 8), dtype)
    x, y = x.contiguous(memory_format=CHANNELS_LAST), y.contiguous(memory_format=CHANNELS_LAST)
    expected = torchs(x, y)
    for channels, begin in ((17, 1), (32, 1), (17, 0)):
        views = []
        for tensor in (x, y):
            around = torch.zeros(1, channels, *tensor.shape[2:], dtype=dtype).to(memory_format=CHANNELS_LAST).to(device)
            views.append(around[:, begin : begin + 16].copy_(tensor))
        for high, low in (views, (x.to(device), views[1]), (views[0], y.to(device))):
            assert_close(upsample_add_relu(high, low).cpu(), expected)


@pytest.mark.tail
def test_nothing_is_read_beyond_the_maps(device):
    for layout in (CONTIGUOUS, CHANNELS_LAST):
        for planes, low, high in CASES.values():
            views = []
            for tensor in maps(planes, low, high):
                around = torch.full([n + 2 for n in tensor.shape], NAN).to(memory_format=layout).to(device)
                views.append(around[tuple(slice(1, -1) for _ in tensor.shape)].copy_(tensor))
            assert_close(upsample_add_relu(*views).cpu(), torchs(*views))


@pytest.mark.tail
@grid({"size": [(12, 20), (3, 20), (12, 5), (3, 5)], "dtype": DTYPES, "layout": [CONTIGUOUS, CHANNELS_LAST]})
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities, where Triton interprets
def test_nan_and_infinities_are_where_the_reference_has_them(device, size, dtype, layout):
    """Both of `high`, which the ReLU must keep, and of `low`; an axis that keeps its size spreads neither."""
    pair = maps((6, 19), (3, 5), size, dtype)
    for image, (which, value) in enumerate(product(range(2), (NAN, INF, -INF))):
        pair[which][image, 3, 1, 2] = pair[which][image, 18, 0, 4] = value
    x, y = (tensor.contiguous(memory_format=layout).to(device) for tensor in pair)
    assert_close(upsample_add_relu(x, y).cpu(), reference(x.cpu().double(), y.cpu().double()))


@pytest.mark.parametrize("level", ["plain", "v3"])  # above these is what the other tests meet
def test_every_level_of_instruction_sets(at_level, level):
    code = """
import torch
from test_upsample_add_relu import (
    CASES, CHANNELS_LAST, CONTIGUOUS, assert_close, assert_gradients, maps, normal, safe, torchs, upsample_add_relu,
)
for sizes in CASES.values():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x, y = maps(*sizes, dtype)
        for layout in (CONTIGUOUS, CHANNELS_LAST):
            assert_gradients(safe(x, y).contiguous(memory_format=layout), y, normal(x.shape, dtype, seed=2))
        x[0, 0, 0, 0] = float("nan")
        for layout in (CONTIGUOUS, CHANNELS_LAST):
            assert_close(upsample_add_relu(x.contiguous(memory_format=layout), y), torchs(x, y))
"""
    at_level(level, OP, code)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST])
def test_more_than_2_to_the_31_elements(cuda, layout):
    """Offsets beyond 32 bits. Takes about 13 GiB."""
    high = torch.zeros(2, 4104, 512, 512, dtype=torch.float16, device=cuda).to(memory_format=layout)  # 2.2e9 elements
    low = torch.zeros(2, 4104, 2, 2, dtype=torch.float16, device=cuda).to(memory_format=layout)
    low[1, -1, 1, 1] = 4
    high[1, -1, -1, 0] = 1
    result = upsample_add_relu(high, low)
    assert result[1, -1, -1, -1] == 4 and result[1, -1, -1, 0] == 1
    assert not result[0].any() and not result[1, :-1].any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("high", torch.zeros(1, 2, 3, 3)), TypeError, "high: expected a tensor, got str"),
        ((torch.zeros(1, 2, 3, 3), None), TypeError, "low: expected a tensor, got NoneType"),
        ((torch.zeros(1, 2, 3, 3).long(), torch.zeros(1, 2, 3, 3).long()), TypeError,
         "high: expected float16, bfloat16, float32 or float64, got int64"),
        ((torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3).half()), TypeError,
         "low: expected float32 as high, got float16"),
        ((torch.zeros(2, 3, 3), torch.zeros(2, 3, 3)), ValueError,
         "high: expected [N, C, H, W] with C, H, W >= 1, got [2, 3, 3]"),
        ((torch.zeros(1, 2, 3, 3), torch.zeros(2, 3, 3)), ValueError,
         "low: expected [1, 2, h, w] with h, w >= 1, got [2, 3, 3]"),
        ((torch.zeros(1, 2, 3, 3), torch.zeros(1, 1, 3, 3)), ValueError,
         "low: expected [1, 2, h, w] with h, w >= 1, got [1, 1, 3, 3]"),
        ((torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 0, 3)), ValueError,
         "low: expected [1, 2, h, w] with h, w >= 1, got [1, 2, 0, 3]"),
        ((torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 4)), ValueError,
         "low: expected at most the [3, 3] of high, got [3, 4]"),
        ((torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3, device="meta")), ValueError,
         "low: expected it on cpu as high, got meta"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error) as caught:
        upsample_add_relu(*arguments)
    assert str(caught.value) == message


def gradients(high, low, grad):
    """Of both maps, by torch's own ops in float64; where the result is 0 there is none."""
    high, low = (x.double().cpu().requires_grad_() for x in (high, low))
    return torch.autograd.grad(torchs(high, low), (high, low), grad.double().cpu())


def assert_gradients(high, low, grad):
    high, low = (x.detach().requires_grad_() for x in (high, low))
    actual = torch.autograd.grad(upsample_add_relu(high, low), (high, low), grad)
    for one, of, expected in zip(actual, (high, low), gradients(high.detach(), low.detach(), grad), strict=True):
        assert one.dtype == of.dtype
        assert_close(one.cpu(), expected)


def safe(high, low):
    """`high` with no sum so near to 0 that a rounding decides whether the ReLU passes it."""
    total = high.double() + F.interpolate(low.double(), high.shape[2:], mode="bilinear", align_corners=False)
    return torch.where(total.abs() < 0.05, high + 1, high)


@grid({"planes, low, high": CASES, "dtype": DTYPES, "layouts": LAYOUTS}, together=1)
@pytest.mark.usefixtures("poisoned")
def test_gradients_are_torchs(device, planes, low, high, dtype, layouts):
    x, y = maps(planes, low, high, dtype)
    x, y = (
        tensor.contiguous(memory_format=layout).to(device)
        for tensor, layout in zip((safe(x, y), y), layouts, strict=True)
    )
    assert_gradients(x, y, normal((*planes, *high), dtype, seed=2).contiguous(memory_format=layouts[0]).to(device))


@pytest.mark.tail
@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST])
def test_a_gradient_of_any_strides(device, layout):
    x, y = maps((2, 8), (2, 3), (4, 7))
    x, y = safe(x, y).contiguous(memory_format=layout).to(device), y.to(device)
    grad = normal(x.shape, seed=2).to(device)
    for one in (grad, grad.contiguous(memory_format=CHANNELS_LAST), grad[..., :1].expand_as(grad)):
        assert_gradients(x, y, one)


@pytest.mark.tail
@given(
    planes=st.tuples(st.integers(1, 2), st.integers(1, 40)), low=st.tuples(st.integers(1, 9), st.integers(1, 20)),
    more=st.tuples(st.integers(0, 20), st.integers(0, 40)), layout=st.sampled_from([CONTIGUOUS, CHANNELS_LAST]),
)  # fmt: skip
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_gradients_of_any_shape(device, planes, low, more, layout):
    x, y = maps(planes, low, (low[0] + more[0], low[1] + more[1]))
    x, y = safe(x, y).contiguous(memory_format=layout).to(device), y.to(device)
    assert_gradients(x, y, normal(x.shape, seed=2).to(device))


@pytest.mark.tail
def test_the_relu_passes_a_gradient_to_nan_and_none_to_zero(device):
    high = torch.tensor([NAN, 0.0, -1.0, 2.0]).view(1, 1, 1, 4).to(device).requires_grad_()
    low = torch.zeros(1, 1, 1, 4, device=device, requires_grad=True)
    result = upsample_add_relu(high, low)
    for gradient in torch.autograd.grad(result, (high, low), torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]]).to(device)):
        assert gradient.flatten().tolist() == [1, 0, 0, 4]


@pytest.mark.parametrize("sizes", [((1, 2), (2, 3), (5, 6)), ((2, 1), (3, 2), (3, 2))])
def test_gradients_of_gradients(sizes):
    x, y = maps(*sizes, torch.float64)
    x, y = safe(x, y).requires_grad_(), y.requires_grad_()
    assert torch.autograd.gradcheck(upsample_add_relu, (x, y))
    assert torch.autograd.gradgradcheck(upsample_add_relu, (x, y))
