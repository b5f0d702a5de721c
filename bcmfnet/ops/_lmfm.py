"""Inference of a pyramid context module (LMFM, DAPPM) as one op."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from bcmfnet.ops import _options
from bcmfnet.ops._checks import check_map, checked_pools, empty_map
from bcmfnet.ops._derivatives import refuse_forward_mode, refuse_gradient
from bcmfnet.ops._library import OPS
from bcmfnet.ops._op import Op
from bcmfnet.reference import lmfm as reference
from bcmfnet.reference.lmfm import PyramidWeights, fusing_levels
from bcmfnet.reference.pyramid_pool import Pools, flat, pooled_sizes, triples

TENSORS = PyramidWeights._fields[:6]
Branches = tuple[int, ...]
"""A number for each branch."""


def lmfm(x: Tensor, weights: PyramidWeights) -> Tensor:
    """A pyramid context module in evaluation mode: pools, 1x1s, fusion, compression and shortcut. It has no gradient.

    Args:
        x: float16, bfloat16, float32 or float64 [N, C, H, W], H and W >= 1, of any strides. Arithmetic is float32
            (float64 for float64); what stands between the kernels is in the dtype of x.
        weights: see `PyramidWeights`, of the dtype of x (norms float32, or float64 for float64), contiguous;
            `PyramidContext.pyramid_weights` makes them.

    Returns:
        [N, O, H, W] in the dtype and memory format of x.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape or value; a tensor that asks for a gradient.
        NotImplementedError: one with a tangent of forward mode.
    """
    pools, kernels, receives, levels = _checked(x, weights)
    tensors: dict[str, Tensor | None] = dict(zip(("x", *TENSORS), (x, *weights[:6]), strict=True))
    refuse_gradient(**tensors)
    refuse_forward_mode("lmfm", **tensors)
    return _FORWARD(*tensors.values(), flat(pools), kernels, receives, levels)


def beats_modules(device: str, dtype: torch.dtype, features: Set[str]) -> bool:
    """Whether the op, with weights that are packed once, is faster than the modules that it replaces.

    On a CPU that depends on what computes torch's convolutions: measured, in times faster than channels_last modules,
    LMFM and DAPPM on one thread, maps of 1x512x6x8 to 1x512x32x64 and 8x512x16x16,

    - float32: 1.01 to 1.46; 1.11 to 1.45 where AVX2 is all there is;
    - bfloat16 with AMX: 1.6 to 2.4;
    - bfloat16 with AVX512-BF16, which the op does not use: 1.0 to 1.8 up to 12x15, but 0.55 to 0.81 from 16x32 on;
    - bfloat16 with neither: 2.3 to 4.7.

    No other CPU was measured, and no GPU, where the op is 5 to 8 launches in place of 43.

    Args:
        device: type of the device.
        dtype: of the map.
        features: of the CPU, `bcmfnet.ops._cpu.features()`.
    """
    if device != "cpu":
        return True
    if dtype == torch.bfloat16 and "avx512_bf16" in features:
        return "amx" in features
    return dtype in (torch.float32, torch.bfloat16) and "avx2" in features


def _checked(x: Tensor, weights: PyramidWeights) -> tuple[Pools, Branches, Branches, Branches]:
    """Pools, kernels, receives, and the levels of the fusing convolutions."""
    check_map("x", x)
    if not isinstance(weights, PyramidWeights):
        raise TypeError(f"weights: expected PyramidWeights, got {type(weights).__name__}")
    for name, tensor in zip(TENSORS, weights, strict=False):
        if not isinstance(tensor, Tensor) and (name != "shortcut" or tensor is not None):
            _options.tensor(name, tensor)
    scale_norms, fusion_norms, scale, process, compression, shortcut, *_ = weights
    pools = checked_pools(weights.pools)
    kernels = _options.integers("kernels", weights.kernels)
    receives = _options.integers("receives", weights.receives)
    given, channels = scale.shape, x.shape[1]
    if len(given) != 3 or given[0] not in (len(pools) + 1, len(pools) + 2) or given[1] != channels:
        raise ValueError(f"scale: expected [{len(pools) + 1} or {len(pools) + 2}, {channels}, b], got {list(given)}")
    branches, _, branch_channels = given
    levels = _checked_levels(branches, kernels, receives)
    taps, outputs = sum([kernel * kernel for kernel in kernels]), compression.shape[-1]
    of_map, device = x.dtype, x.device
    of_norms = torch.float64 if of_map == torch.float64 else torch.float32
    for name, tensor, shape, dtype in (
        ("scale_norms", scale_norms, (2, branches + (0 if shortcut is None else 1), channels), of_norms),
        ("fusion_norms", fusion_norms, (2, 2 * branches - kernels.count(0), branch_channels), of_norms),
        ("scale", scale, given, of_map),
        ("process", process, (taps, branch_channels, branch_channels), of_map),
        ("compression", compression, (branches * branch_channels, outputs), of_map),
        ("shortcut", shortcut, (channels, outputs), of_map),
    ):
        if tensor is None:  # no shortcut
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected {list(shape)}, got {list(tensor.shape)}")
        if tensor.dtype != dtype or tensor.device != device:
            raise TypeError(f"{name}: expected {dtype} on {device}, got {tensor.dtype} on {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {list(tensor.stride())}")
    return pools, kernels, receives, levels


def _checked_levels(branches: int, kernels: Branches, receives: Branches) -> Branches:
    if len(kernels) != branches or not set(kernels) <= {0, 1, 3}:
        raise ValueError(f"kernels: expected {branches} of 0, 1 or 3, got {list(kernels)}")
    if len(receives) != branches or not -1 <= min(receives) <= max(receives) < branches:
        raise ValueError(f"receives: expected {branches} of -1 to {branches - 1}, got {list(receives)}")
    for source, kernel in zip(receives, kernels, strict=True):
        if source >= 0 and not kernel:
            raise ValueError(f"receives: expected -1 where kernels is 0, got {list(receives)} and {list(kernels)}")
    return fusing_levels(kernels, receives)


def _output(
    x: Tensor, scale_norms: Tensor, fusion_norms: Tensor, scale: Tensor, process: Tensor, compression: Tensor,
    *others: Any,
) -> Tensor:  # fmt: skip
    return empty_map(x, (x.shape[0], compression.shape[1], *x.shape[2:]))


def _unpack(
    x: Tensor, scale_norms: Tensor, fusion_norms: Tensor, scale: Tensor, process: Tensor, compression: Tensor,
    shortcut: Tensor | None, pools: Sequence[int], kernels: Sequence[int], receives: Sequence[int],
    levels: Sequence[int], out: Tensor,
) -> tuple[Tensor, PyramidWeights, Tensor]:  # fmt: skip
    tensors = (scale_norms, fusion_norms, scale, process, compression, shortcut)
    return x, PyramidWeights(*tensors, triples(pools), tuple(kernels), tuple(receives)), out


def _reference(x: Tensor, weights: PyramidWeights, out: Tensor) -> None:
    out.copy_(reference.lmfm(x, weights))


_FORWARD = Op("lmfm").define(
    "lmfm(Tensor x, Tensor scale_norms, Tensor fusion_norms, Tensor scale, Tensor process, Tensor compression, "
    "Tensor? shortcut, int[] pools, int[] kernels, int[] receives, int[] levels) -> Tensor",
    outputs=_output, reference=_reference, unpack=_unpack,
)  # fmt: skip


@register_flop_formula(OPS.lmfm)
def _operations(x: Any, scale_norms: Any, fusion_norms: Any, scale: Any, process: Any, compression: Any, shortcut: Any,
                pools: list[int], *others: Any, out_shape: Any = None, **keywords: Any) -> int:  # fmt: skip
    """Two for each multiply-add of the convolutions."""
    batch, channels, height, width = x
    branches, _, branch_channels = scale
    pixels = sum(h * w for h, w in pooled_sizes(height, width, triples(pools)))
    pixels += height * width if branches == len(triples(pools)) + 2 else 0
    per_pixel = process[0] * branch_channels**2 + compression[0] * compression[1]
    per_pixel += 0 if shortcut is None else shortcut[0] * shortcut[1]
    return 2 * batch * (pixels * channels * branch_channels + height * width * per_pixel)
