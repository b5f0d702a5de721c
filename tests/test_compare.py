"""The comparisons themselves: a test that cannot fail would pass everything."""

from __future__ import annotations

import pytest
import torch
from compare import TOLERANCE, assert_close, assert_same_decisions, relative_error

INF, NAN = float("inf"), float("nan")


def values(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize(
    ("actual", "expected", "error"),
    [
        ((3.0, 4.0), (3.0, 4.0), 0.0),
        ((3.0, 4.5), (3.0, 4.0), 0.1),  # 0.5 / 5
        ((0.0, 0.0), (0.0, 0.0), 0.0),
        ((1e-300, 0.0), (0.0, 0.0), INF),  # nothing is close to exactly zero
        ((1.0, INF, NAN), (1.0, INF, NAN), 0.0),
        ((1.0, -INF), (1.0, INF), INF),
        ((1.0, NAN), (1.0, INF), INF),
        ((1.0, NAN), (1.0, 2.0), INF),
        ((1.0, 2.0), (1.0, NAN), INF),
    ],
)
def test_relative_error(actual, expected, error):
    assert relative_error(values(*actual), values(*expected)) == error


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_tolerance_is_that_of_the_results_dtype(dtype):
    expected = torch.full((8,), 1.0, dtype=torch.float64)
    assert_close(expected.to(dtype), expected)
    with pytest.raises(AssertionError, match="gradient: relative error"):
        wrong = expected * (1 + max(2 * TOLERANCE[dtype], 2 * torch.finfo(dtype).eps))
        assert_close(wrong.to(dtype), expected, "gradient")


def test_shapes_are_not_broadcast():
    with pytest.raises(AssertionError, match=r"shape: expected \[1, 2\], got \[2\]"):
        relative_error(torch.zeros(2), torch.zeros(1, 2))
    with pytest.raises(AssertionError, match=r"shape: expected \[2\], got \[1\]"):
        assert_same_decisions(torch.zeros(1), torch.zeros(2))


def test_decisions_are_equal_except_where_a_rounding_decides():
    expected = torch.tensor([[True, False, True]])
    actual = torch.tensor([[1, 0, 0]], dtype=torch.uint8)
    assert_same_decisions(expected.byte(), expected)
    assert_same_decisions(actual, expected, unsure=torch.tensor([[False, False, True]]))
    with pytest.raises(AssertionError, match=r"selected: 1 of 3 decisions differ, the first at \(0, 2\)"):
        assert_same_decisions(actual, expected, "selected", unsure=torch.tensor([[True, True, False]]))
