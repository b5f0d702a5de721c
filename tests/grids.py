"""Sizes of upsampling that several tests share, and grids of cases of which a part is in the default run."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

# A whole factor, a fraction, each axis alone, one source pixel, and a scale that float32 cannot hold (3/7).
UPSAMPLINGS = [
    ((2, 3), (16, 24)),
    ((3, 5), (7, 8)),
    ((4, 3), (4, 9)),
    ((2, 9), (6, 9)),
    ((1, 1), (5, 4)),
    ((3, 3), (7, 7)),
]


def grid(axes: Mapping[str, Mapping[str, Any] | Sequence[Any]], together: int = 2) -> pytest.MarkDecorator:
    """Parametrize over every combination of the values of each axis, which is the name of an argument, or several.

    A few combinations are chosen in which any two values of two axes meet, or with together=1 each value; the others
    have the mark `tail`, which tests/conftest.py explains. The values of a mapping have its keys as their ids.
    """
    labelled = [
        list(axis.items()) if isinstance(axis, Mapping) else [(str(v), v) for v in axis] for axis in axes.values()
    ]
    combinations = list(itertools.product(*(range(len(axis)) for axis in labelled)))
    chosen = _covering(combinations, together)
    parameters = []
    for combination in combinations:
        ids, values = zip(*(axis[i] for axis, i in zip(labelled, combination, strict=True)), strict=True)
        flat = [
            part for names, value in zip(axes, values, strict=True) for part in (value if "," in names else [value])
        ]
        marks = () if combination in chosen else pytest.mark.tail
        parameters.append(pytest.param(*flat, id="-".join(ids).replace("torch.", ""), marks=marks))
    return pytest.mark.parametrize(", ".join(axes), parameters)


def _covering(combinations: list[tuple[int, ...]], together: int) -> set[tuple[int, ...]]:
    """Combinations that have all that can stand together: first those with most of it, of the values least used."""

    def parts(combination: tuple[int, ...]) -> set[tuple]:
        return set(itertools.combinations(enumerate(combination), together))

    def gain(combination: tuple[int, ...]) -> tuple[int, int]:
        return len(parts(combination) & missing), -sum(used[value] for value in enumerate(combination))

    missing, chosen, used = set().union(*map(parts, combinations)), set(), Counter()
    while missing:
        best = max(combinations, key=gain)
        chosen.add(best)
        used.update(enumerate(best))
        missing -= parts(best)
    return chosen
