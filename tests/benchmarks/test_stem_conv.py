"""The benchmark of stem_conv: its inputs, its count of bytes, and what it takes for agreement."""

from __future__ import annotations

import pytest
import torch

from bcmfnet.benchmarks import stem_conv as benchmark
from bcmfnet.benchmarks.harness import Unavailable
from bcmfnet.benchmarks.stem_conv import Case

CPU = torch.device("cpu")


def test_names():
    names = [case.name for case in benchmark.CASES]
    assert len(set(names)) == len(names)
    assert names[0] == "1x3x1024x2048-uint8-float32"
    assert "1x3x1024x2048-normalized-bfloat16" in names


def test_bytes_moved():
    """24 pixels of three channels, six of 32."""
    assert benchmark.bytes_moved(Case((4, 6))) == 24 * 3 + 6 * 32 * 4
    assert benchmark.bytes_moved(Case((4, 6), torch.bfloat16, normalized=True)) == 24 * 3 * 4 + 6 * 32 * 2


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("dtype", benchmark.ERROR)
def test_every_provider_agrees_and_an_error_is_seen(dtype, normalized):
    case = Case((12, 20), dtype, normalized)
    inputs = benchmark.make_inputs(case, CPU)
    assert inputs[0].is_contiguous(memory_format=torch.channels_last)
    expected = benchmark.expected(case, *inputs)
    found = {
        n: p for n, p in benchmark.providers(case, CPU).items() if not isinstance(p, Unavailable) and n != "compile"
    }
    assert {"reference", "eager_best", "eager"} <= found.keys()
    for name, provider in found.items():
        output = provider(*inputs)
        assert benchmark.disagreement(case, name, output, expected) is None, name
    assert benchmark.disagreement(case, "eager", output * 1.1, expected).startswith("result is off by 0.1")
