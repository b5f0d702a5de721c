"""pyramid_pool on every backend against torch's pools in float64, its gradients, and what an op owes torch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from grids import grid
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bcmfnet.ops import pyramid_pool
from bcmfnet.reference.pyramid_pool import pooled_sizes

OP = "pyramid_pool"
POOLS = ((5, 2, 2), (9, 4, 4), (17, 8, 8))
NAN = float("nan")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]

CASES = {
    "the network's map": ((1, 8, 16, 32), POOLS),
    "of a CamVid frame: the largest window has one place": ((2, 5, 6, 8), POOLS),
    "odd sizes": ((2, 3, 17, 9), POOLS),
    "one pixel": ((2, 4, 1, 1), POOLS),
    "one row": ((1, 7, 1, 37), POOLS),
    "one column, one past a warp": ((1, 33, 33, 1), POOLS),
    "the global average alone": ((2, 6, 4, 5), ()),
    "windows of one pixel and gaps between windows": ((1, 9, 7, 11), ((1, 1, 0), (1, 3, 0), (3, 5, 1))),
    "overlaps that are no multiple of the stride": ((1, 4, 13, 10), ((7, 3, 3), (5, 1, 2))),
    "windows larger than the map, six pools": (
        (1, 2, 5, 6), ((31, 1, 15), (31, 16, 15), (5, 2, 2), (3, 2, 1), (3, 1, 1), (1, 2, 0)),
    ),
}  # fmt: skip


def normal(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def torchs(x, pools):
    return [F.avg_pool2d(x, *pool) for pool in pools] + [x.mean((2, 3), keepdim=True)]


def gradient(call, x, cotangents):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(call(x), x, cotangents)[0]


@grid({"shape, pools": CASES, "dtype": DTYPES, "layout": LAYOUTS}, together=1)
@pytest.mark.usefixtures("poisoned")
def test_pools_and_gradients_are_torchs(device, shape, pools, dtype, layout):
    x = normal(shape, dtype).contiguous(memory_format=layout).to(device)
    expected = torchs(x.double(), pools)
    actual = pyramid_pool(x, pools)
    assert [y.shape[2:] for y in actual] == pooled_sizes(*shape[2:], pools)
    for number, (y, z) in enumerate(zip(actual, expected, strict=True)):
        assert y.dtype == dtype and y.is_contiguous(memory_format=layout)
        assert_close(y, z, f"pool {number}")
    cotangents = [normal(y.shape, dtype, seed).to(y) for seed, y in enumerate(actual)]
    expected = gradient(lambda x: torchs(x, pools), x.double(), [c.double() for c in cotangents])
    result = gradient(lambda x: pyramid_pool(x, pools), x, cotangents)
    assert result.is_contiguous(memory_format=layout)
    assert_close(result, expected, "gradient")


@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 40), st.integers(1, 20), st.integers(1, 40)),
    pools=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), max_size=3),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape_and_pools(device, shape, pools):
    pools = [(2 * padding + 1, stride, padding) for padding, stride in pools]
    x = normal(shape).to(device) + 2  # no mean of them is next to nothing, which would multiply a rounding
    for y, z in zip(pyramid_pool(x, pools), torchs(x.double(), pools), strict=True):
        assert_close(y, z)


@pytest.mark.tail
@pytest.mark.parametrize("shape", [(1, 257, 3, 5), (1, 2, 160, 170)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_channels_or_positions_than_a_block_takes(device, request, shape, layout):
    if "triton" in request.node.name:
        shape = (*shape[:2], *(min(side, 40) for side in shape[2:]))  # it is interpreted
    x = normal(shape).contiguous(memory_format=layout).to(device)
    cotangents = [normal(y.shape).to(x) for y in torchs(x, POOLS)]
    for y, z in zip(pyramid_pool(x, POOLS), torchs(x.double(), POOLS), strict=True):
        assert_close(y, z)
    expected = gradient(lambda x: torchs(x, POOLS), x.double(), [c.double() for c in cotangents])
    assert_close(gradient(lambda x: pyramid_pool(x, POOLS), x, cotangents), expected)


def test_gradients_of_any_strides(device):
    """What a sum gives is expanded, what a transposed consumer gives is not dense."""
    x = normal((2, 3, 9, 7)).to(device)
    result = gradient(lambda x: sum(y.sum() for y in pyramid_pool(x, POOLS)), x, None)
    assert_close(result, gradient(lambda x: sum(y.sum() for y in torchs(x, POOLS)), x.double(), None))
    cotangents = [normal((2, y.shape[1], y.shape[3], y.shape[2])).to(x).transpose(2, 3) for y in torchs(x, POOLS)]
    result = gradient(lambda x: pyramid_pool(x, POOLS), x, cotangents)
    assert_close(result, gradient(lambda x: torchs(x, POOLS), x.double(), [c.double() for c in cotangents]))


def test_nothing_is_read_beyond_the_map(device):
    for layout in (torch.contiguous_format, torch.channels_last):
        for shape, pools in CASES.values():
            around = torch.full([n + 2 for n in shape], NAN).to(memory_format=layout).to(device)
            view = around[tuple(slice(1, -1) for _ in shape)]
            view.copy_(normal(shape))
            for y, z in zip(pyramid_pool(view, pools), torchs(view.double(), pools), strict=True):
                assert_close(y, z)


def test_nan_and_infinity_stay_in_the_windows_that_read_them(device):
    for value in (NAN, math.inf):
        x = normal((1, 3, 17, 19))
        x[0, 1, 4, 6] = value
        for y, z in zip(pyramid_pool(x.to(device), POOLS[:2]), torchs(x.double(), POOLS[:2]), strict=True):
            assert torch.equal(y.isfinite().cpu(), z.isfinite())
            assert torch.equal(y.isnan().cpu(), z.isnan())


def test_a_large_offset_is_not_lost(device):
    """Sums of windows, not differences of sums of the whole map: 1e4 + noise, where such differences would cancel."""
    x = 1e4 + normal((1, 4, 40, 64)).to(device)
    for y, z in zip(pyramid_pool(x, POOLS), torchs(x.double(), POOLS), strict=True):
        assert (y.double() - z).abs().max() < 1e-2  # ten roundings of 1e4 in float32


def test_gradcheck():
    """Float64 is served by the reference; the derivatives of its derivatives are linear again."""
    x = normal((2, 3, 9, 7), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pyramid_pool(x, POOLS), x)
    assert torch.autograd.gradgradcheck(lambda x: pyramid_pool(x, POOLS), x)


def test_second_derivatives(device):
    """Of the sum of cubes, 6 times what pooling and its adjoint give."""

    def second(call, x):
        x = x.detach().requires_grad_()
        (first,) = torch.autograd.grad(sum((y**3).sum() for y in call(x)), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    x = normal((1, 3, 6, 8)).to(device)
    assert_close(second(lambda x: pyramid_pool(x, POOLS), x), second(lambda x: torchs(x, POOLS), x.double()))


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_2_to_the_31_elements(cuda):
    """Offsets beyond 32 bits. Takes about 13 GiB."""
    x = torch.zeros(2, 2**12 + 1, 512, 512, dtype=torch.float16, device=cuda)  # 2.1e9 elements
    x[1, -1, -1, -1] = 4
    small, large, mean = pyramid_pool(x, ((1, 1, 0), (3, 64, 1)))
    assert small[1, -1, -1, -1] == 4 and small.sum(dtype=torch.float32) == 4
    assert not large.any()
    assert mean[1, -1].item() == pytest.approx(4 / 512**2, rel=1e-3)


TRIPLES = "pools: expected (kernel, stride, padding) triples, kernel = 2 * padding + 1, got "


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("x", POOLS), TypeError, "x: expected a tensor, got str"),
        ((torch.zeros(1, 2, 3, 3).long(), POOLS), TypeError,
         "x: expected float16, bfloat16, float32 or float64, got int64"),
        ((torch.zeros(2, 3, 3), POOLS), ValueError, "x: expected [N, C, H, W] with C, H, W >= 1, got [2, 3, 3]"),
        ((torch.zeros(1, 2, 0, 3), POOLS), ValueError, "x: expected [N, C, H, W] with C, H, W >= 1, got [1, 2, 0, 3]"),
        ((torch.zeros(1, 2, 3, 3), ((4, 2, 2),)), ValueError, TRIPLES + "((4, 2, 2),)"),
        ((torch.zeros(1, 2, 3, 3), ((5, 0, 2),)), ValueError, TRIPLES + "((5, 0, 2),)"),
        ((torch.zeros(1, 2, 3, 3), (5, 2, 2)), ValueError, TRIPLES + "(5, 2, 2)"),
        ((torch.zeros(1, 2, 3, 3), ((1, 1, 0),) * 7), ValueError, "pools: expected at most 6, got 7"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error) as caught:
        pyramid_pool(*arguments)
    assert str(caught.value) == message
