"""Options of the loss: their checks, and the lists of numbers that the native kernels take them in."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import torch

from bcmfnet.errors import unknown_name
from bcmfnet.ops import _limits, _options
from bcmfnet.reference import bcl as reference
from bcmfnet.reference.bcl import BclOptions, Flip, Mode, Norm
from bcmfnet.reference.terms import Absent

BoundaryTerm = Literal["ce", "focal"]
Where = Literal["valid", "all"]


def checked_options(**options: Any) -> BclOptions:
    """Options of a loss as its kernels take them, by the names of `boundary_corrected_loss`.

    Raises TypeError or ValueError for a wrong one.
    """
    options["step"] = _options.pair("step", options.get("step", 1), "(rows, columns)")
    if torch.compiler.is_compiling():
        return _checked(**options)
    try:
        return _checked_once(**options)
    except TypeError:  # of a wrong type, which is named here, or not hashable
        return _checked(**options)


def _checked(
    *, step: tuple[int, int], ignore_index: int | None = None, mode: Mode = "detect", ce_weight: float = 1.0,
    boundary_weight: float = 1.0, alpha: float = 1.0, beta: float = 1.0, flip: Flip = "swap", nms: int = 1,
    threshold: float = 0.3567, ratio: float = 0.0, min_kept: int = 0, max_kept: int | None = None,
    norm: Norm = "selected", per_image: bool = False, align_corners: bool = False,
) -> BclOptions:  # fmt: skip
    _limits.check_at_least("step", min(step), 1)
    _limits.check_at_most("step", max(step), _limits.MAX_STEP)
    return reference.make_options(
        _options.choice("mode", mode, get_args(Mode)),
        _options.coefficient("alpha", alpha),
        _options.coefficient("beta", beta),
        ce_weight=_options.coefficient("ce_weight", ce_weight),
        boundary_weight=_options.coefficient("boundary_weight", boundary_weight),
        ignore_index=_ignore_index(ignore_index),
        step=step,
        flip=_options.choice("flip", flip, get_args(Flip)),
        nms=_window(nms),
        threshold=_threshold(threshold),
        ratio=_ratio(ratio),
        min_kept=_least(min_kept),
        max_kept=_most(max_kept),
        norm=_options.choice("norm", norm, get_args(Norm)),
        per_image=_options.boolean("per_image", per_image),
        align_corners=_options.boolean("align_corners", align_corners),
    )


_checked_once = lru_cache(typed=True)(_checked)
"""`typed` tells 1 from True and 1.0, but not inside of a tuple: `step` has integers already."""


def _ignore_index(value: int | None) -> int:
    if value is None:
        return _limits.DEFAULT_IGNORE_INDEX
    label = _options.integer("ignore_index", value)
    _limits.check_at_least("ignore_index", label, _limits.MIN_INTEGER)
    _limits.check_at_most("ignore_index", label, _limits.MAX_INTEGER)
    return label


def _window(value: int) -> int:
    side = _options.integer("nms", value)
    if side < 1 or side % 2 == 0:
        raise ValueError(f"nms: expected an odd window >= 1, got {side}")
    _limits.check_at_most("nms", side, _limits.MAX_WINDOW)
    return side


def _threshold(value: float) -> float:
    threshold = _options.number("threshold", value)
    if not threshold >= 0:
        raise ValueError(f"threshold: expected >= 0, got {threshold}")
    return threshold


def _ratio(value: float) -> float:
    ratio = _options.number("ratio", value)
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio: expected 0 to 1, got {ratio}")
    return ratio


def _least(value: int) -> int:
    count = _options.integer("min_kept", value)
    if count < 0:
        raise ValueError(f"min_kept: expected >= 0, got {count}")
    _limits.check_at_most("min_kept", count, _limits.MAX_INTEGER)
    return count


def _most(value: int | None) -> int | None:
    if value is None:
        return None
    count = _options.integer("max_kept", value)
    if count < 1:
        raise ValueError(f"max_kept: expected >= 1 or None, got {count}")
    _limits.check_at_most("max_kept", count, _limits.MAX_INTEGER)
    return count


def term_options(*, ce: float = 1.0, boundary: float = 0.0, **others: Any) -> BclOptions:
    """Options of a loss as its kernels take them, by the names of `segmentation_loss`.

    Raises TypeError or ValueError for a wrong one, and for a name that is none.
    """
    for name in others:  # not a difference of sets, which torch 2.11 does not compile
        if name not in _TERM_NAMES and name not in _PLAIN_NAMES:
            raise TypeError(unknown_name("options of the loss", name, sorted(_TERM_NAMES | _PLAIN_NAMES)))
    plain = {name: value for name, value in others.items() if name in _PLAIN_NAMES}
    ce, boundary = _options.coefficient("ce", ce), _options.coefficient("boundary", boundary)
    options = checked_options(ce_weight=ce, boundary_weight=boundary, **plain)
    terms = {name: value for name, value in others.items() if name in _TERM_NAMES}
    if torch.compiler.is_compiling():
        return options._replace(**_checked_terms(**terms))
    try:
        return options._replace(**_checked_terms_once(**terms))
    except TypeError:  # of a wrong type, which is named here, or not hashable
        return options._replace(**_checked_terms(**terms))


def _checked_terms(
    *, focal: float = 0.0, dice: float = 0.0, jaccard: float = 0.0, tversky: float = 0.0, distillation: float = 0.0,
    boundary_term: BoundaryTerm = "ce", label_smoothing: float = 0.0, focal_gamma: float = 2.0,
    tversky_alpha: float = 0.5, tversky_beta: float = 0.5, overlap_smooth: float = 0.0, overlap_log: bool = False,
    overlap_absent: Absent = "skip", overlap_per_image: bool = False, distillation_temperature: float = 1.0,
    distillation_where: Where = "valid", binary: bool = False, pos_weight: float = 1.0,
) -> dict[str, Any]:  # fmt: skip
    if not 0 <= (smoothing := _options.number("label_smoothing", label_smoothing)) < 1:
        raise ValueError(f"label_smoothing: expected 0 <= label_smoothing < 1, got {smoothing}")
    if not (temperature := _options.coefficient("distillation_temperature", distillation_temperature)) > 0:
        raise ValueError(f"distillation_temperature: expected > 0, got {temperature}")
    if not (foreground := _options.coefficient("pos_weight", pos_weight)) > 0:
        raise ValueError(f"pos_weight: expected > 0, got {foreground}")
    if foreground != 1 and not _options.boolean("binary", binary):
        raise ValueError(f"pos_weight: expected 1 without binary, got {foreground}; weight has a number for each class")
    return {
        "focal_weight": _options.coefficient("focal", focal),
        "dice_weight": _options.coefficient("dice", dice),
        "jaccard_weight": _options.coefficient("jaccard", jaccard),
        "tversky_weight": _options.coefficient("tversky", tversky),
        "distillation_weight": _options.coefficient("distillation", distillation),
        "focal_boundary": _options.choice("boundary_term", boundary_term, get_args(BoundaryTerm)) == "focal",
        "smoothing": smoothing,
        "gamma": _options.coefficient("focal_gamma", focal_gamma),
        "tversky_alpha": _options.coefficient("tversky_alpha", tversky_alpha),
        "tversky_beta": _options.coefficient("tversky_beta", tversky_beta),
        "smooth": _options.coefficient("overlap_smooth", overlap_smooth),
        "log": _options.boolean("overlap_log", overlap_log),
        "absent": _options.choice("overlap_absent", overlap_absent, get_args(Absent)),
        "overlap_per_image": _options.boolean("overlap_per_image", overlap_per_image),
        "temperature": temperature,
        "everywhere": _options.choice("distillation_where", distillation_where, get_args(Where)) == "all",
        "binary": _options.boolean("binary", binary),
        "pos_weight": foreground,
    }


_checked_terms_once = lru_cache(typed=True)(_checked_terms)
_TERM_NAMES = frozenset(inspect.signature(_checked_terms).parameters)
_PLAIN_NAMES = frozenset(inspect.signature(_checked).parameters) - {"ce_weight", "boundary_weight"}


class Reals(NamedTuple):
    """Options that are real numbers, in the order of the native kernels: score and terms of the boundary term first."""

    own_score: float
    row_score: float
    column_score: float
    own_term: float
    row_term: float
    column_term: float
    ce_weight: float
    boundary_weight: float
    ratio: float
    smoothing: float
    focal_weight: float
    gamma: float
    dice_weight: float
    jaccard_weight: float
    tversky_weight: float
    tversky_alpha: float
    tversky_beta: float
    smooth: float
    distillation_weight: float
    temperature: float
    pos_weight: float


class Integers(NamedTuple):
    """The other options, in the order of the native kernels; for `max_kept` -1 is no limit."""

    ignore_index: int
    step_rows: int
    step_columns: int
    offset_rows: int
    offset_columns: int
    nms: int
    min_kept: int
    max_kept: int
    tau: int
    mirror: int
    by_valid: int
    per_image: int
    focal_boundary: int
    log: int
    absent: int
    overlap_per_image: int
    everywhere: int
    binary: int
    align_corners: int

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Integers:
        """Numbers by their names; torch's dispatcher makes lists of them."""
        return numbers if isinstance(numbers, Integers) else cls(*numbers)


OVERLAP_WEIGHTS = slice(Reals._fields.index("dice_weight"), Reals._fields.index("tversky_weight") + 1)
"""Where the weights of the overlap terms stand among the real numbers."""
_PLAIN_REALS, _ABSENT = Reals._fields[6:], get_args(Absent)
_FLAGS = ("per_image", "focal_boundary", "log", "overlap_per_image", "everywhere", "binary", "align_corners")


def pack(options: BclOptions) -> tuple[list[float], Integers]:
    """Options as the native kernels take them."""
    return _packed(options) if torch.compiler.is_compiling() else _packed_once(options)


def _packed(options: BclOptions) -> tuple[list[float], Integers]:
    reals = [*options.score, *options.terms, *(getattr(options, name) for name in _PLAIN_REALS)]
    tau = math.floor(min(reference.Q_SCALE * options.threshold + 0.5, reference.Q_MAX))
    max_kept = -1 if options.max_kept is None else options.max_kept
    return reals, Integers(
        options.ignore_index, *options.step, *options.offset, options.nms, options.min_kept, max_kept, tau,
        int(options.flip == "mirror"), int(options.norm == "valid"), int(options.per_image),
        int(options.focal_boundary), int(options.log), _ABSENT.index(options.absent), int(options.overlap_per_image),
        int(options.everywhere), int(options.binary), int(options.align_corners),
    )  # fmt: skip


_packed_once = lru_cache(_packed)


def unpack(reals: Sequence[float], integers: Sequence[int]) -> BclOptions:
    """The options that were packed, the threshold on the grid of the scores."""
    packed, numbers = Integers.of(integers), Reals(*reals)
    same = {name: getattr(numbers, name) for name in _PLAIN_REALS}
    flags = {name: bool(getattr(packed, name)) for name in _FLAGS}
    return BclOptions(
        numbers[:3], numbers[3:6], ignore_index=packed.ignore_index, step=(packed.step_rows, packed.step_columns),
        flip="mirror" if packed.mirror else "swap", offset=(packed.offset_rows, packed.offset_columns), nms=packed.nms,
        threshold=packed.tau / reference.Q_SCALE, min_kept=packed.min_kept,
        max_kept=None if packed.max_kept < 0 else packed.max_kept, norm="valid" if packed.by_valid else "selected",
        absent=_ABSENT[packed.absent], **same, **flags,
    )  # fmt: skip
