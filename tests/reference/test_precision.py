"""The reference computes its products in float32, whatever torch was told to compute others in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.overrides import TorchFunctionMode

from bcmfnet.nn import LMFM
from bcmfnet.reference.bilinear import downsample
from bcmfnet.reference.lmfm import lmfm
from bcmfnet.reference.precision import PRODUCTS
from bcmfnet.reference.pyramid_pool import pyramid_pool_backward

POOLS = [(5, 2, 2)]


def _lmfm() -> torch.Tensor:
    context = LMFM(8, 4, branch_channels=4, pools=POOLS).eval()
    return lmfm(torch.randn(1, 8, 6, 7), context.pyramid_weights(torch.float32))


CALLS = {
    "downsample": lambda: downsample(torch.randn(1, 3, 16, 24), (4, 6)),
    "pyramid_pool_backward": lambda: pyramid_pool_backward(
        [torch.randn(1, 3, 4, 4), torch.randn(1, 3, 1, 1)], (8, 7), POOLS
    ),
    "lmfm": _lmfm,
}


class Precisions(TorchFunctionMode):
    """Records what each product inside is computed in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[str]] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ in ("matmul", "__matmul__", "__rmatmul__", "einsum", "conv2d"):
            self.seen.append(precisions())
        return function(*args, **kwargs or {})


def precisions() -> list[str]:
    return [products.fp32_precision for products in PRODUCTS]


@pytest.fixture
def imprecise() -> Iterator[None]:
    """TF32 on a GPU, and where a CPU has it bfloat16, for all products."""
    before = precisions()
    for products, precision in zip(PRODUCTS, ("tf32", "tf32", "bf16", "bf16"), strict=True):
        products.fp32_precision = precision
    yield
    for products, precision in zip(PRODUCTS, before, strict=True):
        products.fp32_precision = precision


@pytest.mark.parametrize("name", CALLS)
def test_products_are_in_full_precision(name, imprecise):
    asked = precisions()
    with Precisions() as recorded:
        CALLS[name]()
    assert recorded.seen and all(seen == ["ieee"] * len(PRODUCTS) for seen in recorded.seen)
    assert precisions() == asked
