"""Grids of cases: every combination has its place, and every two values meet in those that run everywhere."""

from __future__ import annotations

import itertools

import pytest
import torch
from grids import grid

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
AXES = {"x, y": {"one": (1, 2), "two": (3, 4)}, "dtype": DTYPES, "z": [(5, 6), (7, 8)]}
NAMES, PARAMETERS = grid(AXES).args


def is_tail(parameter):
    return "tail" in {mark.name for mark in parameter.marks}


def test_every_combination_is_there_once():
    combinations = itertools.product([(1, 2), (3, 4)], DTYPES, [(5, 6), (7, 8)])
    assert NAMES == "x, y, dtype, z"
    assert [parameter.values for parameter in PARAMETERS] == [(*pair, dtype, z) for pair, dtype, z in combinations]
    assert PARAMETERS[0].id == "one-float32-(5, 6)"
    assert len({parameter.id for parameter in PARAMETERS}) == 12


def test_every_two_values_meet_before_the_tail():
    chosen = [parameter.values for parameter in PARAMETERS if not is_tail(parameter)]
    assert len(chosen) == 6  # no fewer have each pair of a dtype and another value
    for i, j in itertools.combinations((0, 2, 3), 2):
        all_pairs = {(parameter.values[i], parameter.values[j]) for parameter in PARAMETERS}
        assert {(values[i], values[j]) for values in chosen} == all_pairs


def test_every_value_is_met_before_the_tail():
    chosen = [parameter.values for parameter in grid(AXES, together=1).args[1] if not is_tail(parameter)]
    assert len(chosen) == 3
    for i in range(4):
        assert {values[i] for values in chosen} == {parameter.values[i] for parameter in PARAMETERS}


def test_values_that_are_met_often_are_met_in_turn():
    parameters = grid({"case": range(8), "dtype": DTYPES, "z": [0, 1]}, together=1).args[1]
    chosen = [parameter.values for parameter in parameters if not is_tail(parameter)]
    assert len(chosen) == 8
    assert {values[1:] for values in chosen} == set(itertools.product(DTYPES, [0, 1]))


@grid({"x": [0, 1], "y": [0, 1]}, together=1)
@pytest.mark.parametrize("device", [("cpu", "cpp"), ("cpu", "triton"), ("cpu", "reference"), None])
def test_a_tail_is_exhaustive_but_where_compiled_code_runs(request, device, x, y):
    marked = request.node.get_closest_marker("exhaustive") is not None
    assert marked == (x != y and device != ("cpu", "cpp"))
