"""The benchmark of lmfm: its counts, and what it takes for agreement."""

from __future__ import annotations

import pytest
import torch

from bcmfnet.benchmarks import lmfm as benchmark
from bcmfnet.benchmarks.harness import Unavailable
from bcmfnet.benchmarks.lmfm import Case
from bcmfnet.inference import runtimes

CPU = torch.device("cpu")
SLOW = ("compile", "onnxruntime", "openvino")  # they compile or convert for seconds


def test_names():
    names = [case.name for case in benchmark.CASES]
    assert len(set(names)) == len(names)
    assert names[0] == "lmfm-1x512x16x32-float32-channels_last"


def test_bytes_and_operations_of_a_frame():
    """512 pixels of 640 channels in and out, weights without norms; multiply-adds as network.md has them."""
    lmfm, dappm = Case("lmfm", (1, 512, 16, 32)), Case("dappm", (1, 512, 16, 32), torch.bfloat16)
    weights = 6 * 512 * 128 + 3 * 9 * 128 * 128 + 640 * 128
    assert benchmark.bytes_moved(lmfm) == 4 * (512 * 640 + weights)
    assert benchmark.bytes_moved(dappm) == 2 * (512 * 640 + weights + 9 * 128 * 128)
    assert benchmark.operations(lmfm) == 2 * 346_619_904
    assert benchmark.operations(dappm) == 2 * 422_117_376


@pytest.mark.parametrize("dtype", benchmark.ERROR)
@pytest.mark.parametrize("context", benchmark.CONTEXTS)
def test_every_provider_agrees_and_an_error_is_seen(context, dtype):
    case = Case(context, (2, 512, 3, 5), dtype)
    inputs = benchmark.make_inputs(case, CPU)
    expected = benchmark.expected(case, *inputs)
    found = benchmark.providers(case, CPU)
    found = {n: p for n, p in found.items() if not isinstance(p, Unavailable) and n not in SLOW}
    assert {"reference", "module", "eager", "eager_best"} <= found.keys()
    for name, provider in found.items():
        output = provider(*inputs)
        assert benchmark.disagreement(case, name, output, expected) is None
    wrong = benchmark.disagreement(case, "eager", output * 1.1, expected)
    assert wrong.startswith("result is off by 0.") and wrong.endswith(" of its norm")


def test_runtimes_that_are_not_installed_say_so(monkeypatch):
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    found = benchmark.providers(Case("lmfm", (1, 512, 3, 5), torch.bfloat16), CPU)
    assert found["openvino"] == Unavailable("runtime: 'openvino' needs openvino: pip install openvino")
    assert "onnxruntime" not in found  # it has no bfloat16
