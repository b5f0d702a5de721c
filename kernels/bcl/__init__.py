"""The Boundary Corrected Loss as a fixed sequence of kernels, without a wait:

nodes       with upsampling, exponents of logits
score       labels and logits to the cross-entropy and the score of each pixel
candidates  non-maximum suppression, and a histogram of the scores that are left
threshold   the score from which candidates are selected, by rank
select      mask and boundary term of the selected pixels
finish      the loss, its stats, and the scales of its gradient
sums        I, P and Y of the classes, where there is an overlap term
overlap     the values of such terms, and their derivatives by the sums
gradient    of upsampled logits; at full resolution `backward` has a kernel of its own

Where no other pixel has a say in the selection, by rank or as a neighbour, `score` decides without the three after it.
With upsampling, a cell is the output pixels that read the same four logits: there are (h + 1) x (w + 1). Tiles are
[pixels, classes] and [lanes, columns, rows]: the compiler lays lanes along the first axis where it sees no unit stride.
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
from bcmfnet.kernels.bcl import full, overlap, selection, upsampled
from bcmfnet.kernels.bcl import pixels as px
from bcmfnet.kernels.bcl import terms as tm
from bcmfnet.kernels.bcl.pixels import ANY_NUMBERS, INF, OPTIONS, PIXELS, SIZES


@triton.jit(**ANY_NUMBERS)
def finish_kernel(
    partials, programs, select_partials, selections, ce_weight, boundary_weight, focal_weight, distillation_weight,
    smoothing, loss, values, counts, scales, BY_VALID: tl.constexpr, KINDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss, stats and scales from the sums of all programs, added in a fixed order."""
    ce_sum, weight, pixels = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    boundary_sum, chosen = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    spread, focal = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    divergence, taught = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    first = 0
    while first < programs:  # the interpreter takes no argument for the end of a range
        i = first + tl.arange(0, BLOCK)
        ce_sum += tl.load(partials + i, i < programs, 0.0)
        weight += tl.load(partials + programs + i, i < programs, 0.0)
        pixels += tl.load(partials + 2 * programs + i, i < programs, 0.0)
        boundary_sum += tl.load(partials + 3 * programs + i, i < programs, 0.0)
        if tm.SMOOTHED & KINDS:
            spread += tl.load(partials + 4 * programs + i, i < programs, 0.0)
        if tm.FOCAL & KINDS:
            focal += tl.load(partials + 5 * programs + i, i < programs, 0.0)
        if tm.DISTILLED & KINDS:
            divergence += tl.load(partials + 6 * programs + i, i < programs, 0.0)
            taught += tl.load(partials + 7 * programs + i, i < programs, 0.0)
        first += BLOCK
    first = 0
    while first < selections:
        i = first + tl.arange(0, BLOCK)
        boundary_sum += tl.load(select_partials + i, i < selections, 0.0)
        chosen += tl.load(select_partials + selections + i, i < selections, 0.0)
        first += BLOCK
    weight, pixels, chosen = tl.sum(weight), tl.sum(pixels), tl.sum(chosen)
    weight = tl.where(tl.abs(weight) < INF, weight, float("nan"))
    divisor = pixels if BY_VALID else chosen
    ce_scale = 1 / tl.where(weight <= 0, 1.0, weight)
    boundary_scale = tl.where(weight == weight, 1 / tl.where(divisor > 0, divisor, 1.0), float("nan"))
    ce_mean, boundary_mean = tl.sum(ce_sum) * ce_scale, tl.sum(boundary_sum) * boundary_scale
    if tm.SMOOTHED & KINDS:  # without a label that has a weight this is 0
        ce_scale = tl.where(weight <= 0, 0.0, ce_scale)
        ce_mean = (1 - smoothing) * ce_mean + tl.sum(spread) * ce_scale
    taught = tl.sum(taught)
    taught_scale = tl.where(weight == weight, 1 / tl.where(taught > 0, taught, 1.0), float("nan"))
    focal_mean, divergence_mean = tl.sum(focal) * ce_scale, tl.sum(divergence) * taught_scale
    total = tl.where(ce_weight != 0, ce_weight * ce_mean, 0.0)
    total += tl.where(boundary_weight != 0, boundary_weight * boundary_mean, 0.0)
    if tm.FOCAL & KINDS:
        total += focal_weight * focal_mean
    if tm.DISTILLED & KINDS:
        total += distillation_weight * divergence_mean
    tl.store(loss, tl.where(weight == weight, total, float("nan")))
    tl.store(values, ce_mean)
    tl.store(values + 1, boundary_mean)
    tl.store(values + 2, focal_mean if tm.FOCAL & KINDS else 0.0)
    tl.store(values + 3, 0.0)  # of overlap
    tl.store(values + 4, 0.0)
    tl.store(values + 5, 0.0)
    tl.store(values + 6, divergence_mean if tm.DISTILLED & KINDS else 0.0)
    tl.store(counts, chosen.to(tl.int64))
    tl.store(counts + 1, pixels.to(tl.int64))
    if scales is not None:
        tl.store(scales, ce_scale)
        tl.store(scales + 1, boundary_scale)
        tl.store(scales + 2, taught_scale)


def forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, pixel_weight: Tensor | None, teacher: Tensor | None,
    shared_slopes: Tensor | None, options: Any, needs_grad: bool, loss: Tensor, values: Tensor, counts: Tensor,
    threshold: Tensor, sums: Tensor | None, lse: Tensor | None, mask: Tensor | None, scales: Tensor | None,
    slopes: Tensor | None, gradient: Tensor | None,
) -> None:  # fmt: skip
    """Write the loss, its stats and what backward reads, as bcmfnet/ops/_bcl.py allocates them: None is not written.

    logits and teacher float [N, C, h, w], target integer and pixel_weight float32 [N, H, W] of any strides, weight
    float32 [C], shared_slopes float32 [groups, 2, C], options BclOptions.
    """
    inputs = px.make_inputs(logits, target, weight, pixel_weight, teacher, options)
    low, selects = logits.shape[2:] != target.shape[1:], options.boundary_weight != 0
    ranks = selects and selection.ranks(options)
    if low or not needs_grad:
        lse = scratch(target, torch.float32) if needs_grad else None
        scales = scratch(target, torch.float32, 3) if needs_grad else None
        mask = scratch(target, torch.uint8) if selects else None
    scores = scratch(target, torch.uint16) if ranks else None
    terms = scratch(target, torch.float32) if ranks else None
    if low or not needs_grad or not options.has_overlap:
        slopes = (
            scratch(sums, torch.float32, len(sums), 2, sums.shape[2]) if needs_grad and options.has_overlap else None
        )
    with torch.cuda.device_of(logits):
        maps = lse, scores, terms, None if ranks or not selects else mask
        if low:
            nodes = upsampled.nodes_of(logits, options)
            taught = None if inputs.teacher is None else upsampled.nodes_of(inputs.teacher, options)
            partials, chosen, overlap_partials = upsampled.score_cells(inputs, options, nodes, taught, *maps)
        else:
            partials, chosen, overlap_partials = full.score_pixels(inputs, options, *maps)
        if ranks:
            chosen = selection.select(options, scores, terms, threshold, mask)
        else:
            threshold.fill_(px._tau(options))
        if not selects:
            chosen = scratch(target, torch.float64, 2, 0)
            if mask is not None:
                mask.zero_()
        kinds = tm.kinds(options, inputs.teacher)
        finish_kernel[(1,)](
            partials, partials.shape[1], chosen, chosen.shape[1], *px._floats(options)[:2],
            float(options.focal_weight), float(options.distillation_weight), float(options.smoothing),
            loss, values, counts, scales, BY_VALID=options.norm == "valid", KINDS=kinds,
            BLOCK=_finished_at_once(kinds), num_warps=16,
        )  # fmt: skip
        if overlap_partials is not None:
            overlap.write_overlap(overlap_partials, inputs.weight, options, sums, slopes, loss, values)
        if shared_slopes is not None and slopes is not None:
            slopes.copy_(shared_slopes)
        if low and needs_grad:
            upsampled.write_gradient(inputs, options, nodes, taught, lse, mask, scales, slopes, gradient)


def _finished_at_once(kinds: int) -> int:
    """Programs whose sums are added up at once: of more terms the sums of as many spill."""
    return 2048 if kinds & tm.OF_PIXELS.value else 4096


def backward(
    grad: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, pixel_weight: Tensor | None,
    teacher: Tensor | None, options: Any, lse: Tensor, mask: Tensor, scales: Tensor, slopes: Tensor | None,
    result: Tensor,
) -> None:  # fmt: skip
    """Write the gradient of full-resolution logits, times grad, of any strides; the result may be the logits."""
    inputs = px.make_inputs(logits, target, weight, pixel_weight, teacher, options)
    with torch.cuda.device_of(logits):
        full.write_gradient(grad, inputs, options, lse, mask, scales, slopes, result)


def aot_cases() -> Iterator[AotCase]:
    """Each kernel as calls meet it: dtypes, layouts, scales, class weights and flipped labels or none, classes held or
    read twice, memory of more than 2^31 elements, terms or none, binary logits and aligned corners."""
    numbers = dict.fromkeys(SIZES + OPTIONS + ANY_NUMBERS["do_not_specialize_on_alignment"], "i32") | {"ratio": "i64"}
    floats = ("s0", "s1", "s2", "g0", "g1", "g2", "ce_weight", "boundary_weight", "focal_weight", "distillation_weight")
    floats += ("smoothing", "gamma", "temperature", "dice", "jaccard", "tversky", "alpha", "beta", "smooth")
    types = numbers | dict.fromkeys(floats, "fp32") | {"scores": "*u16", "histogram": "*i32"}
    types |= dict.fromkeys(("weight", "terms", "scales", "gradient", "grad", "loss", "values"), "*fp32")
    types |= dict.fromkeys(("partials", "chosen", "select_partials"), "*fp64")
    types |= dict.fromkeys(("pixel_weight", "nodes", "teacher_nodes", "lse", "sums", "slopes"), "*fp32")
    types |= dict.fromkeys(("mask", "decided"), "*u8")
    types |= {"threshold": "*i32", "counts": "*i64", "groups": "i32"}

    def case(function: Any, num_warps: int, logits: str = "fp32", target: str = "u8", **constants: Any) -> AotCase:
        known = types | dict.fromkeys(("logits", "result", "teacher"), f"*{logits}") | {"target": f"*{target}"}
        known |= {"partials": "*fp32"} if function is overlap.sums_kernel else {}
        constants = {name: value for name, value in constants.items() if name in function.arg_names}
        signature = {name: known[name] for name in function.arg_names if name in known and name not in constants}
        name = " ".join([function.__name__, logits, target, *(f"{key} {value}" for key, value in constants.items())])
        return AotCase(name, function, signature, constants, num_warps)

    terms = {"KINDS": 127, "SCORE": 6, "TERMS": 1}  # all, but overlap of the batch
    teachers = ("teacher", "teacher_nodes")
    plain = {"KINDS": 0, "FIRST": 0, "ALIGNED": False} | dict.fromkeys((*teachers, "pixel_weight", "sums", "slopes"))
    usual = {"CLASSES": 19, "SCORE": 6, "TERMS": 7, "MIRROR": False, "INDEX": tl.int32, "step_y": 1, "target_w": 1}
    default = usual | plain | {"TERMS": 1, "scores": None, "terms": None}  # scores decide
    usual |= plain | {"decided": None, "chosen": None}
    kinds = [("w", usual | {"logits": logits}) for logits in ("fp32", "fp16", "bf16")]
    kinds += [("c", usual), ("c", default | {"logits": "bf16"}), ("w", default | {"weight": None})]
    unselected = dict.fromkeys(("scores", "terms", "mask")) | {"SCORE": 0, "TERMS": 0}
    kinds += [("w", usual | unselected | {"weight": None})]
    kinds += [("w", usual | {"CLASSES": 150, "target": "i64", "MIRROR": True}), ("w", usual | {"INDEX": tl.int64})]
    rich = {name: value for name, value in usual.items() if name not in plain or value is not None} | terms
    kinds += [("w", rich), ("c", rich | {"logits": "bf16"}), ("w", rich | {"CLASSES": 150, "KINDS": 255})]
    overlapping = rich | {"KINDS": 64} | dict.fromkeys(teachers)
    kinds += [("w", overlapping), ("w", overlapping | unselected)]
    kinds += [("w", usual | {"CLASSES": 2, "FIRST": 1, "ALIGNED": True})]
    for unit, kind in kinds:
        constants = kind | {f"stride_{unit}": 1, "CHUNK": full.held_at_once(kind["CLASSES"], kind["KINDS"])}
        pixels = full.scored_at_once(kind["KINDS"])
        yield case(full.score_pixels_kernel, full.scoring_warps(kind["KINDS"]), **constants, PIXELS=pixels)
        yield case(full.gradient_pixels_kernel, 8, **constants | {f"result_{unit}": 1}, PIXELS=PIXELS // 2)
        yield case(upsampled.nodes_kernel, 4, **constants, NODES=upsampled.NODES)
        for side in (2, 8) if kind == kinds[0][1] else (8,):
            for kernel in (upsampled.score_cells_kernel, upsampled.gradient_cells_kernel):
                columns = upsampled.differentiated_at_once(kind["KINDS"], kind["TERMS"])
                if kernel is upsampled.score_cells_kernel:
                    columns = upsampled.scored_at_once(kind["KINDS"], kind["INDEX"], kind["SCORE"])
                columns = min(side, columns)
                cells = {"LANES": upsampled.LANES, "SIDE": side // columns, "COLUMNS": columns, "ROWS": side}
                yield case(kernel, 4, **constants, **cells, PIECES_Y=1, PIECES_X=1)
    for per_image in (False, True):
        pixels = {"PER_IMAGE": per_image, "INDEX": tl.int32}
        rows, columns = selection.candidates_at_once(100)
        tile = pixels | {"ROWS": rows, "COLUMNS": columns}
        yield from (case(selection.candidates_kernel, 4, REACH=reach, **tile) for reach in range(4))
        yield case(selection.select_kernel, 4, **pixels, PIXELS=selection.SELECTED)
    yield case(selection.threshold_kernel, 8, BLOCK=32)
    for kinds in (0, 127):
        yield case(finish_kernel, 16, BY_VALID=False, BLOCK=_finished_at_once(kinds), KINDS=kinds)
    for classes, log in ((19, False), (150, True)):
        numbers = {"NUMBERS": 3 * classes, "ROWS": 256, "COLUMNS": 16}
        yield case(overlap.sums_kernel, 4, **numbers)
        chunk = triton.next_power_of_2(classes)
        yield case(overlap.overlap_kernel, 4, CLASSES=classes, FIRST=0, LOG=log, ABSENT=0, CHUNK=chunk)
