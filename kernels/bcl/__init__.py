"""The Boundary Corrected Loss as a fixed sequence of kernels, without a wait:

score       labels and logits to the cross-entropy and the score of each pixel
candidates  non-maximum suppression, and a histogram of the scores that are left
threshold   the score from which candidates are selected, by rank
select      mask and boundary term of the selected pixels
finish      the loss, its stats, and the scales of its gradient
gradient    of upsampled logits; at full resolution `backward` has a kernel of its own

With upsampling, a cell is the output pixels that read the same four logits: there are (h + 1) x (w + 1). Tiles are
[pixels, classes] and [columns, rows]: the compiler lays lanes along the first axis where it sees no unit stride.
Atomics count integers alone, so every run gives the same bits. Counted in the compiled code: no GPU has run this yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bcmfnet.kernels._common import scratch
from bcmfnet.kernels.autotune import AotCase
from bcmfnet.kernels.bcl import full, selection, upsampled
from bcmfnet.kernels.bcl import pixels as px
from bcmfnet.kernels.bcl.pixels import ANY_NUMBERS, HELD, INF, NAN, OPTIONS, PIXELS, SIZES


@triton.jit(**ANY_NUMBERS)
def finish_kernel(
    partials, programs, select_partials, selections, ce_weight, boundary_weight,
    loss, values, counts, scales, BY_VALID: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss, stats and scales from the sums of all programs, added in a fixed order."""
    ce_sum, weight, pixels = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    boundary_sum, chosen = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    first = 0
    while first < programs:  # the interpreter takes no argument for the end of a range
        i = first + tl.arange(0, BLOCK)
        ce_sum += tl.load(partials + i, i < programs, 0.0)
        weight += tl.load(partials + programs + i, i < programs, 0.0)
        pixels += tl.load(partials + 2 * programs + i, i < programs, 0.0)
        boundary_sum += tl.load(partials + 3 * programs + i, i < programs, 0.0)
        first += BLOCK
    first = 0
    while first < selections:
        i = first + tl.arange(0, BLOCK)
        boundary_sum += tl.load(select_partials + i, i < selections, 0.0)
        chosen += tl.load(select_partials + selections + i, i < selections, 0.0)
        first += BLOCK
    weight, pixels, chosen = tl.sum(weight), tl.sum(pixels), tl.sum(chosen)
    weight = tl.where(tl.abs(weight) < INF, weight, NAN)
    divisor = pixels if BY_VALID else chosen
    ce_scale = 1 / tl.where(weight <= 0, 1.0, weight)
    boundary_scale = tl.where(weight == weight, 1 / tl.where(divisor > 0, divisor, 1.0), NAN)
    ce_mean, boundary_mean = tl.sum(ce_sum) * ce_scale, tl.sum(boundary_sum) * boundary_scale
    total = tl.where(ce_weight != 0, ce_weight * ce_mean, 0.0)
    total += tl.where(boundary_weight != 0, boundary_weight * boundary_mean, 0.0)
    tl.store(loss, tl.where(weight == weight, total, NAN))
    tl.store(values, ce_mean)
    tl.store(values + 1, boundary_mean)
    tl.store(counts, chosen.to(tl.int64))
    tl.store(counts + 1, pixels.to(tl.int64))
    if scales is not None:
        tl.store(scales, ce_scale)
        tl.store(scales + 1, boundary_scale)
        tl.store(scales + 2, 0.0)


def forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, pixel_weight: Tensor | None, teacher: Tensor | None,
    shared_slopes: Tensor | None, options: Any, needs_grad: bool, loss: Tensor, values: Tensor, counts: Tensor,
    threshold: Tensor, sums: Tensor, lse: Tensor, mask: Tensor, scales: Tensor, slopes: Tensor, gradient: Tensor,
) -> None:  # fmt: skip
    """Write the loss, its stats and what backward reads, as bcmfnet/ops/_bcl.py allocates them.

    logits and teacher float [N, C, h, w], target integer and pixel_weight float32 [N, H, W] of any strides, weight
    float32 [C], shared_slopes float32 [groups, 2, C], options BclOptions.
    """
    values.zero_()
    low, selects = logits.shape[2:] != target.shape[1:], options.boundary_weight != 0
    if low or not needs_grad:
        lse = scratch(target, torch.float32) if needs_grad else None
        scales = scratch(target, torch.float32, 3) if needs_grad else None
        mask = scratch(target, torch.uint8) if selects else None
    scores = scratch(target, torch.uint16) if selects else None
    terms = scratch(target, torch.float32) if selects else None
    with torch.cuda.device_of(logits):
        score = upsampled.score_cells if low else full.score_pixels
        partials = score(logits, target, weight, options, lse, scores, terms)
        if selects:
            select_partials = selection.select(options, scores, terms, threshold, mask)
        else:
            select_partials = scratch(target, torch.float64, 2, 0)
            threshold.fill_(px._tau(options))
            if mask is not None:
                mask.zero_()
        finish_kernel[(1,)](
            partials, partials.shape[1], select_partials, select_partials.shape[1], *px._floats(options)[:2],
            loss, values, counts, scales, BY_VALID=options.norm == "valid", BLOCK=4096, num_warps=16,
        )  # fmt: skip
        if low and needs_grad:
            upsampled.write_gradient(logits, target, weight, options, lse, mask, scales, gradient)


def backward(
    grad: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, pixel_weight: Tensor | None,
    teacher: Tensor | None, options: Any, lse: Tensor, mask: Tensor, scales: Tensor, slopes: Tensor, result: Tensor,
) -> None:  # fmt: skip
    """Write the gradient of full-resolution logits, times grad, of any strides; the result may be the logits."""
    with torch.cuda.device_of(logits):
        full.write_gradient(grad, logits, target, weight, options, lse, mask, scales, result)


def aot_cases() -> Iterator[AotCase]:
    """Each kernel as calls meet it: dtypes, layouts, scales, class weights and flipped labels or none, classes held or
    read twice, memory of more than 2^31 elements."""
    numbers = dict.fromkeys(SIZES + OPTIONS + ANY_NUMBERS["do_not_specialize_on_alignment"], "i32") | {"ratio": "i64"}
    floats = ("s0", "s1", "s2", "g0", "g1", "g2", "ce_weight", "boundary_weight")
    types = numbers | dict.fromkeys(floats, "fp32") | {"scores": "*u16", "mask": "*u8", "histogram": "*i32"}
    types |= dict.fromkeys(("weight", "lse", "terms", "scales", "gradient", "grad", "loss", "values"), "*fp32")
    types |= {"partials": "*fp64", "select_partials": "*fp64", "threshold": "*i32", "counts": "*i64"}

    def case(function: Any, num_warps: int, logits: str = "fp32", target: str = "u8", **constants: Any) -> AotCase:
        known = types | {"logits": f"*{logits}", "result": f"*{logits}", "target": f"*{target}"}
        constants = {name: value for name, value in constants.items() if name in function.arg_names}
        signature = {name: known[name] for name in function.arg_names if name in known and name not in constants}
        name = " ".join([function.__name__, logits, target, *(f"{key} {value}" for key, value in constants.items())])
        return AotCase(name, function, signature, constants, num_warps)

    usual = {"CLASSES": 19, "SCORE": 6, "TERMS": 7, "MIRROR": False, "INDEX": tl.int32, "step_y": 1, "target_w": 1}
    kinds = [("w", usual | {"logits": logits}) for logits in ("fp32", "fp16", "bf16")]
    kinds += [("c", usual), ("c", usual | {"logits": "bf16", "TERMS": 1}), ("w", usual | {"TERMS": 1, "weight": None})]
    kinds += [("w", usual | dict.fromkeys(("weight", "scores", "terms", "mask")) | {"SCORE": 0, "TERMS": 0})]
    kinds += [("w", usual | {"CLASSES": 150, "target": "i64", "MIRROR": True}), ("w", usual | {"INDEX": tl.int64})]
    for unit, kind in kinds:
        constants = kind | {f"stride_{unit}": 1, "CHUNK": min(triton.next_power_of_2(kind["CLASSES"]), HELD)}
        yield case(full.score_pixels_kernel, 16, **constants, PIXELS=PIXELS)
        yield case(full.gradient_pixels_kernel, 8, **constants | {f"result_{unit}": 1}, PIXELS=PIXELS // 2)
        for side in (2, 8) if kind == kinds[0][1] else (8,):
            cells = constants | {"LANES": upsampled.LANES, "SIDE": side, "ROWS": side, "PIECES_Y": 1, "PIECES_X": 1}
            yield case(upsampled.score_cells_kernel, 4, **cells)
            yield case(upsampled.gradient_cells_kernel, 4, **cells)
    for per_image in (False, True):
        pixels = {"PER_IMAGE": per_image, "INDEX": tl.int32, "PIXELS": PIXELS}
        yield from (case(selection.candidates_kernel, 4, REACH=reach, **pixels) for reach in range(4))
        yield case(selection.select_kernel, 4, **pixels)
    yield case(selection.threshold_kernel, 8, BLOCK=32)
    yield case(finish_kernel, 16, BY_VALID=False, BLOCK=4096)
