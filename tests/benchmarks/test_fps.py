"""The steps of a frame: each provider gives what float64 does, and a wrong one is refused."""

from __future__ import annotations

import pytest
import torch

from bcmfnet.benchmarks import fps
from bcmfnet.benchmarks.harness import Unavailable

CPU = torch.device("cpu")
SIZE = (64, 136)


@pytest.mark.parametrize("weights", fps.WEIGHTS)
def test_every_provider_agrees_and_a_wrong_one_does_not(weights):
    case = fps.Case(weights, SIZE)
    inputs = fps.make_inputs(case, CPU)
    expected = fps.expected(case, *inputs)
    found = fps.providers(case, CPU)
    assert {fps.baseline(name) for name in found} <= found.keys()
    for name, provider in found.items():
        if isinstance(provider, Unavailable):
            assert name.startswith("ours_upsampled")
            continue
        output = provider(*inputs)
        assert fps.disagreement(case, name, output, expected) is None, name
        assert fps.disagreement(case, name, output + 9, expected), name


def test_a_decoded_frame_is_bytes_side_by_side():
    frame, images = fps.make_inputs(fps.Case("random", SIZE), CPU)
    assert frame.shape == (1, *SIZE, 3) and frame.dtype == torch.uint8
    assert images.shape == (1, 3, *SIZE) and images.dtype == torch.float32
