"""The steps of a frame: each provider gives what float64 does, and a wrong one is refused."""

from __future__ import annotations

import pytest
import torch

from bcmfnet.benchmarks import fps
from bcmfnet.benchmarks.harness import Unavailable

CPU = torch.device("cpu")
SIZE = (64, 136)


@pytest.mark.parametrize("case", [fps.Case(w, SIZE, step) for w, step in zip(fps.WEIGHTS * 2, fps.STEPS, strict=True)])
def test_every_provider_agrees_and_a_wrong_one_does_not(case):
    inputs = fps.make_inputs(case, CPU)
    expected = fps.expected(case, *inputs)
    for name, provider in fps.providers(case, CPU).items():
        if isinstance(provider, Unavailable):
            assert case.step == "upsampled" and name.startswith("ours")
            continue
        output = provider(*inputs)
        assert fps.disagreement(case, name, output, expected) is None, name
        assert fps.disagreement(case, name, output + 9, expected), name


def test_a_decoded_frame_is_bytes_side_by_side():
    (frame,) = fps.make_inputs(fps.Case("random", SIZE, "frame"), CPU)
    assert frame.shape == (1, *SIZE, 3) and frame.dtype == torch.uint8
    (normalised,) = fps.make_inputs(fps.Case("random", SIZE, "labels"), CPU)
    assert normalised.shape == (1, 3, *SIZE) and normalised.dtype == torch.float32
