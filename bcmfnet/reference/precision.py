"""Products in float32 as they are written: neither in TF32, which cuDNN takes unasked, nor in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_BACKENDS: Any = torch.backends  # whose settings have no types
PRODUCTS = (_BACKENDS.cudnn.conv, _BACKENDS.cuda.matmul, _BACKENDS.mkldnn.conv, _BACKENDS.mkldnn.matmul)
"""Settings of torch that let the products of float32 tensors be computed in less, each by its `fp32_precision`."""


@contextmanager
def float32_products() -> Iterator[None]:
    """Compute what is called inside, or the function so decorated, with products of float32 in float32.

    Only for torch's own ops: exporters and the like read older settings, which refuse to be read meanwhile.
    """
    before = [products.fp32_precision for products in PRODUCTS]
    try:
        for products in PRODUCTS:
            products.fp32_precision = "ieee"
        yield
    finally:
        for products, precision in zip(PRODUCTS, before, strict=True):
            products.fp32_precision = precision
