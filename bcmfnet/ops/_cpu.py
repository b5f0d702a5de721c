"""What the CPU has, as far as choosing between kernels depends on it, and what of it the native library may use."""

from __future__ import annotations

import os
from functools import cache

import torch

FEATURES = {
    "avx2": torch.cpu._is_avx2_supported,
    "avx512_bf16": torch.cpu._is_avx512_bf16_supported,
    "amx": torch.cpu._is_amx_tile_supported,
}
LEVELS = {"plain": {"avx2", "amx"}, "v3": {"amx"}, "v4": {"amx"}, "amx": set()}
"""Values of BCMFNET_CPU_LEVEL, and the features that the library leaves unused at each."""


@cache
def features() -> frozenset[str]:
    """The names in `FEATURES` that this CPU has and the library may use. Raises ValueError as `level` does."""
    return frozenset(name for name, supported in FEATURES.items() if supported()) - LEVELS[level()]


def level() -> str:
    """The highest instruction set that the library may use. Raises ValueError for an unknown name."""
    name = os.environ.get("BCMFNET_CPU_LEVEL") or "amx"
    if name not in LEVELS:
        raise ValueError(f"BCMFNET_CPU_LEVEL: expected one of {', '.join(LEVELS)}, got {name!r}")
    return name
