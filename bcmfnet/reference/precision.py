"""Products in float32 as they are written: neither in TF32, which cuDNN takes unasked, nor in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PRODUCTS = (
    torch.backends.cudnn.conv,
    torch.backends.cuda.matmul,
    torch.backends.mkldnn.conv,
    torch.backends.mkldnn.matmul,
)
"""Settings of torch that let the products of float32 tensors be computed in less, each by its `fp32_precision`."""


@contextmanager
def float32_products(precision: str = "ieee") -> Iterator[None]:
    """Compute what is called inside, or the function so decorated, with products of float32 in a precision of torch's.

    "ieee" is float32 itself, "tf32" rounds the factors to 10 bits on a GPU.
    """
    before = [products.fp32_precision for products in PRODUCTS]
    try:
        for products in PRODUCTS:
            products.fp32_precision = precision
        yield
    finally:
        for products, precision in zip(PRODUCTS, before, strict=True):
            products.fp32_precision = precision
