"""What the CPU has, as far as choosing between kernels depends on it."""

from __future__ import annotations

from functools import cache

import torch

FEATURES = {
    "avx2": torch.cpu._is_avx2_supported,
    "avx512_bf16": torch.cpu._is_avx512_bf16_supported,
    "amx": torch.cpu._is_amx_tile_supported,
}


@cache
def features() -> frozenset[str]:
    """The names in `FEATURES` that this CPU has."""
    return frozenset(name for name, supported in FEATURES.items() if supported())
