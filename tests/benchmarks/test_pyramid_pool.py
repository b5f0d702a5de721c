"""The benchmark of pyramid_pool: its inputs, its count of bytes, and what it takes for agreement."""

from __future__ import annotations

import pytest
import torch

from bcmfnet.benchmarks import pyramid_pool as benchmark
from bcmfnet.benchmarks.harness import Unavailable
from bcmfnet.benchmarks.pyramid_pool import Case

CPU = torch.device("cpu")
SMALL = (2, 6, 5, 7)


def test_names():
    names = [case.name for case in benchmark.CASES]
    assert len(set(names)) == len(names)
    assert names[0] == "1x512x16x32-float32-channels_last"
    assert "12x512x16x16-bfloat16-channels_last-backward" in names


def test_bytes_moved():
    """5 x 7 positions, 3 x 4 + 2 x 2 + 1 of the pools, 1 of the mean: 53 of 12 channels; 4 or 2 bytes; once, twice."""
    assert benchmark.bytes_moved(Case(SMALL)) == 53 * 12 * 4
    assert benchmark.bytes_moved(Case(SMALL, torch.bfloat16, backward=True)) == 2 * 53 * 12 * 2


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", benchmark.ERROR)
def test_every_provider_agrees_and_an_error_is_seen(dtype, backward, memory_format):
    case = Case(SMALL, dtype, memory_format, backward=backward)
    inputs = benchmark.make_inputs(case, CPU)
    expected = benchmark.expected(case, *inputs)
    found = {
        n: p for n, p in benchmark.providers(case, CPU).items() if not isinstance(p, Unavailable) and n != "compile"
    }
    assert {"reference", "eager", "eager_best"} <= found.keys()
    for name, provider in found.items():
        output = provider(*inputs)
        assert len(output) == 4 + backward
        assert benchmark.disagreement(case, name, output, expected) is None
    wrong = [value.detach().clone() for value in output]
    wrong[-1][0] *= 1.1
    what = "gradient" if backward else "pool 3"
    assert benchmark.disagreement(case, "eager", wrong, expected).startswith(f"{what} is off by 0.0")
