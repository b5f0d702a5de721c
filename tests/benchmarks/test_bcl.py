"""The providers of the loss's benchmark compute the same loss."""

from __future__ import annotations

import pytest
import torch

from bcmfnet.benchmarks import bcl

CASES = [
    bcl.Case((2, 5, 64, 96), (64, 96), "smooth"),
    bcl.Case((2, 5, 8, 12), (64, 96), "rough"),
    bcl.Case((2, 5, 64, 96), (64, 96), "rough", torch.bfloat16, backward=False),
    bcl.Case((2, 5, 8, 12), (64, 96), "rough", loss="paper"),
    bcl.Case((2, 5, 64, 96), (64, 96), "smooth", loss="paper"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_providers_agree_and_a_wrong_one_is_refused(case):
    device = torch.device("cpu")
    inputs = bcl.make_inputs(case, device)
    expected = bcl.expected(case, *inputs)
    found = bcl.providers(case, device)
    for name in ("reference", "eager_best", "naive", "careful", "ohem", "cross_entropy"):
        assert bcl.disagreement(case, name, found[name](*inputs), expected) is None, name
    loss, *gradient = found["reference"](*inputs)
    assert len(gradient) == case.backward
    for name in ("cpp", "eager_best", "naive", "ohem", "cross_entropy"):
        assert "loss" in bcl.disagreement(case, name, (2 * loss, *gradient), expected)
    if case.backward:
        assert "gradient" in bcl.disagreement(case, "cpp", (loss, 1.1 * gradient[0]), expected)


def test_bytes_are_those_of_a_hand_count():
    assert bcl.bytes_moved(CASES[1]) == 2 * 4 * (2 * 5 * 8 * 12) + 2 * 64 * 96
    assert bcl.bytes_moved(CASES[2]) == 2 * (2 * 5 * 64 * 96) + 2 * 64 * 96
