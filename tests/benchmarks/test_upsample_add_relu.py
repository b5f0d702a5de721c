"""The benchmark of upsample_add_relu: its inputs, its count of bytes, and what it takes for agreement."""

from __future__ import annotations

import pytest
import torch

from bcmfnet.benchmarks import upsample_add_relu as benchmark
from bcmfnet.benchmarks.harness import Unavailable
from bcmfnet.benchmarks.upsample_add_relu import Case

CPU = torch.device("cpu")
SMALL = ((2, 6, 8, 10), (4, 5))


def test_names():
    names = [case.name for case in benchmark.CASES]
    assert len(set(names)) == len(names)
    assert names[0] == "1x64x128x256-64x128-float32-channels_last"
    assert "1x64x128x256-64x128-bfloat16-channels_last-backward" in names


def test_bytes_moved():
    """80 pixels read and written, 20 read: 180 of 12 channels; 4 or 2 bytes. For the gradients, 80 read twice and
    written, 20 written."""
    assert benchmark.bytes_moved(Case(*SMALL)) == 180 * 12 * 4
    assert benchmark.bytes_moved(Case(*SMALL, backward=True)) == (180 + 260) * 12 * 4
    assert benchmark.bytes_moved(Case(*SMALL, torch.bfloat16)) == 180 * 12 * 2


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", benchmark.ERROR)
def test_every_provider_agrees_and_an_error_is_seen(dtype, backward, memory_format):
    case = Case(*SMALL, dtype, memory_format, backward=backward)
    inputs = benchmark.make_inputs(case, CPU)
    before = [tensor.detach().clone() for tensor in inputs]
    assert all(tensor.is_contiguous(memory_format=memory_format) for tensor in inputs)
    expected = benchmark.expected(case, *inputs)
    found = {
        n: p for n, p in benchmark.providers(case, CPU).items() if not isinstance(p, Unavailable) and n != "compile"
    }
    assert {"reference", "eager_best", "out_of_place"} <= found.keys()
    for name, provider in found.items():
        output = provider(*inputs)
        for tensor in output if backward else (output,):
            assert tensor.is_contiguous(memory_format=memory_format)
        assert benchmark.disagreement(case, name, output, expected) is None
    assert all(map(torch.equal, inputs, before))
    if not backward:
        assert benchmark.disagreement(case, "eager_best", output * 1.1, expected).startswith("result is off by 0.1 ")
        return
    for number, what in enumerate(("result", "gradient of high", "gradient of low")):
        wrong = [value * 1.1 if i == number else value for i, value in enumerate(output)]
        assert benchmark.disagreement(case, "eager_best", wrong, expected).startswith(f"{what} is off by 0.1 ")
