"""Every way to compute a sum of terms agrees with the definition, and a wrong one is found."""

from __future__ import annotations

import pytest
import torch

from bcmfnet.benchmarks import terms
from bcmfnet.benchmarks.harness import Unavailable

CASES = [terms.Case(term, (2, 1 if term == "binary" else 5, 8, 12), (64, 96)) for term in terms.TERMS]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.term)
def test_providers_agree_with_the_definition(case):
    device = torch.device("cpu")
    inputs = terms.make_inputs(case, device)
    expected = terms.expected(case, *inputs)
    found = terms.providers(case, device)
    names = {name for name, provider in found.items() if not isinstance(provider, Unavailable)} - {"compile", "triton"}
    assert {"ours_ce", "usual", "eager_best"} < names
    for name in names:
        output = found[name](*inputs)
        assert terms.disagreement(case, name, output, expected) is None, name
    value, gradient = found["eager_best"](*inputs)
    assert torch.allclose(gradient.double(), expected[1], rtol=1e-3, atol=1e-7)
    assert "loss" in terms.disagreement(case, "usual", (2 * value, gradient), expected)
    assert "gradient" in terms.disagreement(case, "cpp", (value, 1.1 * gradient), expected)


def test_bytes_moved():
    assert terms.bytes_moved(CASES[0]) == 2 * 4 * (2 * 5 * 8 * 12) + 8 * 2 * 64 * 96
