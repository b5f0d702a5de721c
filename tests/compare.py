"""Values compared by relative norm, decisions (masks) exactly: apart, since one decision moves many values."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
"""Largest relative norm of an error, by the dtype of the result; half precision is rounded once, when it is stored."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`, in float64; inf where infinities or NaN are not the same."""
    assert actual.shape == expected.shape, f"shape: expected {list(expected.shape)}, got {list(actual.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    finite = expected.isfinite()
    if not torch.equal(actual.isfinite(), finite):
        return float("inf")
    if not torch.equal(actual[~finite].nan_to_num(nan=0.5), expected[~finite].nan_to_num(nan=0.5)):
        return float("inf")
    if torch.equal(actual[finite], expected[finite]):
        return 0.0
    norm = expected[finite].norm().item()
    return (actual - expected)[finite].norm().item() / norm if norm else float("inf")


def assert_close(actual: Tensor, expected: Tensor, what: str = "values", tolerance: float | None = None) -> None:
    """Values agree to the tolerance of the dtype of `actual`, or to the one given."""
    tolerance = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what}: relative error {error:.3g} is over {tolerance:.3g} ({actual.dtype})"


def assert_same_decisions(actual: Tensor, expected: Tensor, what: str = "mask", unsure: Tensor | None = None) -> None:
    """Masks are equal, apart from places that are `unsure` because a rounding decides them."""
    assert actual.shape == expected.shape, f"shape: expected {list(expected.shape)}, got {list(actual.shape)}"
    wrong = actual.bool() != expected.bool()
    if unsure is not None:
        wrong = wrong & ~unsure
    places = wrong.nonzero().tolist()
    assert not places, f"{what}: {len(places)} of {wrong.numel()} decisions differ, the first at {tuple(places[0])}"
