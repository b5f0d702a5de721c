"""stem_conv on every backend against torch's own convolution of normalised images in float64."""

from __future__ import annotations

import re
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from grids import grid
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bcmfnet.data import normalize
from bcmfnet.ops import stem_conv

OP = "stem_conv"
NAN, INF = float("nan"), float("inf")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OF_IMAGES = [torch.uint8, *DTYPES]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
KINDS = [(*kind, LAYOUTS[i % 2]) for i, kind in enumerate(product(OF_IMAGES, DTYPES))]
"""Of images and weights, with a layout of both."""

# Batch, channels, and the size of the images.
CASES = {
    "whole tiles": (1, 32, (8, 128)),
    "odd sizes": (2, 32, (7, 131)),
    "more rows and columns than a block has": (1, 32, (37, 260)),
    "one row of zeros below, none to the right": (1, 64, (5, 34)),
    "channels that no vector fills": (1, 33, (6, 20)),
    "fewer channels than a tile": (2, 5, (9, 40)),
    "pairs of channels": (1, 8, (4, 6)),
    "one channel": (1, 1, (3, 66)),
    "one pixel": (3, 16, (1, 1)),
    "one column": (1, 24, (11, 1)),
    "one row": (1, 40, (1, 75)),
}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def arguments(batch, channels, size, of_images, dtype):
    """Images, weight and bias, and mean and std of uint8."""
    if of_images == torch.uint8:
        generator = torch.Generator().manual_seed(1)
        images = torch.randint(0, 256, (batch, 3, *size), generator=generator, dtype=torch.uint8)
    else:
        images = normal(batch, 3, *size).to(of_images)
    weight, bias = normal(channels, 3, 3, 3, seed=2) / 5, normal(channels, seed=3)
    return images, weight.to(dtype), bias.to(dtype), *((MEAN, STD) if of_images == torch.uint8 else (None, None))


def normalized(images, mean=None, std=None):
    """In float64."""
    images = images.double().cpu()
    return (
        images if mean is None else (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    )


def torchs(images, weight, bias, *affine):
    x = normalized(images, *affine)
    return F.relu(F.conv2d(x, weight.double().cpu(), bias.double().cpu(), stride=2, padding=1))


ROUNDING = {torch.float32: 2**-19, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""Of half precision one of the image and one of the result, half a unit each; of float32 those of 28 sums."""


def assert_rounded(actual, images, weight, bias, *affine):
    """Every element is within the roundings of what it is the sum of, however much of that cancels."""
    x, weight, bias = normalized(images, *affine), weight.double(), bias.double()
    sums = F.conv2d(x.abs(), weight.abs(), bias.abs(), stride=2, padding=1)
    error = (actual.double() - torchs(images, weight, bias, *affine)).abs()
    assert (error <= ROUNDING[actual.dtype] * sums).all()


@grid({"batch, channels, size": CASES, "of_images, dtype, layout": KINDS}, together=1)
@pytest.mark.usefixtures("poisoned")
def test_values_are_torchs(device, batch, channels, size, of_images, dtype, layout):
    images, weight, bias, *affine = arguments(batch, channels, size, of_images, dtype)
    images = images.contiguous(memory_format=layout).to(device)
    result = stem_conv(images, weight.contiguous(memory_format=layout).to(device), bias.to(device), *affine)
    assert result.dtype == dtype and result.is_contiguous(memory_format=torch.channels_last)
    assert_close(result.cpu(), torchs(images, weight, bias, *affine))


@pytest.mark.tail
@given(
    batch=st.integers(1, 2), channels=st.integers(1, 70), size=st.tuples(st.integers(1, 40), st.integers(1, 150)),
    of_images=st.sampled_from(OF_IMAGES), dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS),
)  # fmt: skip
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape(device, batch, channels, size, of_images, dtype, layout):
    images, weight, bias, *affine = arguments(batch, channels, size, of_images, dtype)
    result = stem_conv(images.contiguous(memory_format=layout).to(device), weight.to(device), bias.to(device), *affine)
    assert_rounded(result.cpu(), images, weight, bias, *affine)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_normalises_as_normalize_does(device, layout):
    """Also at the border, where zeros stand for the mean colour and not for black."""
    images, weight, bias, *affine = arguments(1, 8, (6, 9), torch.uint8, torch.float32)
    images = images.contiguous(memory_format=layout).to(device)
    weight, bias = weight.to(device), bias.to(device)
    expected = stem_conv(normalize(images, *affine), weight, bias)
    torch.testing.assert_close(stem_conv(images, weight, bias, *affine), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.tail
@grid({"of_images": DTYPES, "dtype": DTYPES, "layout": LAYOUTS})
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities, where Triton interprets
def test_nan_and_infinities_stay_in_the_windows_that_have_them(device, of_images, dtype, layout):
    images, weight, bias, *_ = arguments(3, 32, (12, 70), of_images, dtype)
    weight = weight.abs() + 0.1  # an infinity has a sign, and meets no other one
    for image, value in enumerate((NAN, INF, -INF)):
        for channel, y, x in ((image, 3, 8), (0, 6, 20), (0, 11, 69), (2, 0, 33)):
            images[image, channel, y, x] = value
    images = images.contiguous(memory_format=layout).to(device)
    assert_close(stem_conv(images, weight.to(device), bias.to(device)).cpu(), torchs(images, weight, bias))


@pytest.mark.tail
@pytest.mark.parametrize("of_images", OF_IMAGES)
def test_nothing_is_read_beyond_the_images(device, of_images):
    """Cut out of larger ones, whose other pixels are not numbers, or white."""
    for layout in LAYOUTS:
        for batch, channels, size in CASES.values():
            images, weight, bias, *affine = arguments(batch, channels, size, of_images, torch.float32)
            outside = 255 if of_images == torch.uint8 else NAN
            around = torch.full([n + 2 for n in images.shape], outside, dtype=of_images).to(memory_format=layout)
            view = around.to(device)[tuple(slice(1, -1) for _ in images.shape)].copy_(images)
            result = stem_conv(view, weight.to(device), bias.to(device), *affine)
            assert_close(result.cpu(), torchs(images, weight, bias, *affine))


@pytest.mark.tail
def test_frames_of_any_strides(device):
    images, weight, bias, *affine = arguments(2, 16, (9, 24), torch.uint8, torch.float32)
    expected = torchs(images, weight, bias, *affine)
    bgr = images.flip(1).movedim(1, -1).contiguous()  # as OpenCV has them
    rgba = torch.cat([images, images[:, :1]], 1).movedim(1, -1).contiguous()
    for view in (rgba[..., :3].movedim(-1, 1), images.transpose(2, 3).contiguous().transpose(2, 3),
                 bgr.movedim(-1, 1).flip(1), torch.stack([images, images], -1)[..., 0]):  # fmt: skip
        assert torch.equal(view, images)
        assert_close(stem_conv(view.to(device), weight.to(device), bias.to(device), *affine).cpu(), expected)
    for one in (images[..., :1].expand_as(images), images[:, :1].expand_as(images)):
        result = stem_conv(one.to(device), weight.to(device), bias.to(device), *affine)
        assert_close(result.cpu(), torchs(one, weight, bias, *affine))


@pytest.mark.parametrize("level", ["plain", "v3", "v4"])
def test_every_level_of_instruction_sets(at_level, level):
    code = """
from itertools import cycle, islice, product
from test_stem_conv import CASES, DTYPES, LAYOUTS, OF_IMAGES, arguments, assert_close, stem_conv, torchs
kinds = cycle(product(OF_IMAGES, DTYPES, LAYOUTS))  # 24, so that with 11 cases all would meet
for case, (of_images, dtype, layout) in islice(zip(cycle(CASES.values()), kinds), 66):
    images, *others = arguments(*case, of_images, dtype)
    assert_close(stem_conv(images.contiguous(memory_format=layout), *others), torchs(images, *others))
"""
    at_level(level, OP, code)


IMAGES, WEIGHT, BIAS = torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 3, 3), torch.zeros(2)
BYTES = IMAGES.byte()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((None, WEIGHT, BIAS), TypeError, "images: expected a tensor, got NoneType"),
        ((IMAGES.long(), WEIGHT, BIAS), TypeError, "images: expected uint8, float16, bfloat16 or float32, got int64"),
        ((IMAGES[:, :2], WEIGHT, BIAS), ValueError, "images: expected [N, 3, H, W] with H, W >= 1, got [1, 2, 4, 4]"),
        ((IMAGES[0], WEIGHT, BIAS), ValueError, "images: expected [N, 3, H, W] with H, W >= 1, got [3, 4, 4]"),
        ((IMAGES, WEIGHT.double(), BIAS), TypeError, "weight: expected float16, bfloat16 or float32, got float64"),
        ((IMAGES, WEIGHT[:, :, 1:], BIAS), ValueError, "weight: expected [C, 3, 3, 3] with C >= 1, got [2, 3, 2, 3]"),
        ((IMAGES, WEIGHT, BIAS[:1]), ValueError, "bias: expected [2], contiguous, got [1] of strides [1]"),
        ((IMAGES, WEIGHT, torch.zeros(4)[::2]), ValueError, "bias: expected [2], contiguous, got [2] of strides [2]"),
        ((IMAGES, WEIGHT, BIAS.half()), TypeError, "bias: expected float32 as weight, got float16"),
        ((IMAGES, WEIGHT.to("meta"), BIAS), ValueError, "weight: expected it on cpu as images, got meta"),
        ((IMAGES, WEIGHT, BIAS, MEAN), ValueError,
         f"mean: expected None with float32 images, which are normalised, got {MEAN}"),
        ((BYTES, WEIGHT, BIAS), TypeError, "mean: expected three numbers, got None"),
        ((BYTES, WEIGHT, BIAS, MEAN), TypeError, "std: expected three numbers, got None"),
        ((BYTES, WEIGHT, BIAS, MEAN, (1.0, 1.0)), TypeError, "std: expected three numbers, got (1.0, 1.0)"),
        ((BYTES, WEIGHT, BIAS, (0, 0, NAN), STD), ValueError, "mean: expected three finite numbers, got (0, 0, nan)"),
        ((BYTES, WEIGHT, BIAS, MEAN, (1, INF, 1)), ValueError, "std: expected three finite numbers, got (1, inf, 1)"),
        ((BYTES, WEIGHT, BIAS, MEAN, (1, 0, 1)), ValueError,
         "std: expected three numbers above 0, got (1.0, 0.0, 1.0)"),
        ((IMAGES, WEIGHT.clone().requires_grad_(), BIAS), ValueError,
         "weight: expected a tensor without requires_grad, it has no gradient; detach it"),
    ],
)  # fmt: skip
def test_bad_arguments(given, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        stem_conv(*given)
