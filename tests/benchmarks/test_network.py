"""The benchmark of the network: its frames and networks, its counts, and what it takes for agreement."""

from __future__ import annotations

import pytest
import torch

from bcmfnet.benchmarks import network as benchmark
from bcmfnet.benchmarks.harness import Unavailable
from bcmfnet.benchmarks.network import Case, Expected
from bcmfnet.inference import runtimes

CPU = torch.device("cpu")
SMALL = Case("bcmfnet", (97, 131), 5, batch=2)  # odd, and more than one frame
SLOW = ("compile", "onnxruntime", "openvino")  # they compile or convert for many seconds


def test_names():
    assert [case.name for case in benchmark.CASES] == [
        "bcmfnet-1x3x1024x2048", "bcmfnet-1x3x360x480", "ddrnet23_slim-1x3x1024x2048"
    ]  # fmt: skip


def test_bytes_and_operations_of_cityscapes():
    """2,097,152 pixels of 3 x 4 + 1 bytes; parameters and multiply-adds as counted in tests/models/test_network.py."""
    assert benchmark.bytes_moved(benchmark.CASES[0]) == 13 * 2_097_152 + 4 * 5_548_275
    assert benchmark.operations(benchmark.CASES[0]) == 2 * 36_205_821_952
    assert benchmark.operations(benchmark.CASES[2]) == 2 * 36_281_319_424


def test_frames_and_network_are_the_same_each_time():
    (first,), (second,) = benchmark.make_inputs(SMALL, CPU), benchmark.make_inputs(SMALL, CPU)
    assert torch.equal(first, second) and first.shape == (2, 3, 97, 131)
    logits = benchmark._model(SMALL)(first).logits
    benchmark._model.cache_clear()
    assert torch.equal(benchmark._model(SMALL)(first).logits, logits)
    assert 1 < logits.std() < 100  # maps of a sensible size: no class has all of the frame
    assert benchmark.expected(SMALL, first).labels.unique().numel() > 1


def test_every_provider_agrees():
    inputs = benchmark.make_inputs(SMALL, CPU)
    expected = benchmark.expected(SMALL, *inputs)
    found = benchmark.providers(SMALL, CPU)
    assert {"eager", "eager_best", "eager_best_bf16", "channels_last", "amp_bf16", "ours", "ours_bf16"} <= found.keys()
    for name, provider in found.items():
        if not any(word in name for word in SLOW):
            assert benchmark.disagreement(SMALL, name, provider(*inputs), expected) is None


def test_providers_that_cannot_run_say_why(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    found = benchmark.providers(SMALL, CPU)
    for name in ("compile", "ours_compile", "ours_compile_bf16"):
        assert found[name] == Unavailable("torch.compile needs a C++ compiler")
    for name in ("openvino", "openvino_bf16", "ours_openvino"):
        assert found[name] == Unavailable("runtime: 'openvino' needs openvino: pip install openvino")


def test_half_precision_is_compared_with_eager_half_precision():
    found = [benchmark.baseline(name) for name in ("ours", "ours_bf16", "amp_fp16", "ours_tf32", "compile")]
    assert found == ["eager_best", "eager_best_bf16", "eager_best_fp16", "eager_best_tf32", "eager_best"]


def with_wrong_labels(provider, lead, count):
    """What is said of a provider with `count` wrong labels of 1000 at some lead, where the largest logit is 8."""
    labels = torch.full((1, 10, 100), 3)
    output = labels.clone()
    output.view(-1)[:count] = 2
    return benchmark.disagreement(SMALL, provider, output, Expected(labels, torch.full((1, 10, 100), lead), 8.0))


@pytest.mark.parametrize(
    ("provider", "lead", "count", "agrees"),
    [
        ("ours", 3.9e-5, 0, True),  # 8 * 5e-6 is 4e-5, and a ten-thousandth of 1000 none
        ("ours", 3.9e-5, 1, False),
        ("ours_bf16", 0.79, 100, True),
        ("ours_bf16", 0.81, 1, False),
        ("ours_bf16", 0.1, 101, False),
        ("amp_fp16", 0.15, 20, True),
        ("amp_fp16", 0.17, 20, False),
        ("ours_tf32", 0.15, 20, True),
        ("ours_tf32", 0.17, 20, False),
    ],
)
def test_wrong_labels_are_forgiven_within_the_dtypes_error(provider, lead, count, agrees):
    message = f"{count} of 1000 labels differ, where the winner leads by up to {lead / 8:.2g} of the largest logit"
    assert with_wrong_labels(provider, lead, count) == (None if agrees else message)


def test_float32_is_forgiven_at_ties_alone():
    labels = torch.full((1, 100, 200), 3)
    output = labels.clone()
    output[0, 0, 0] = 2
    for lead, agrees in ((3.9e-5, True), (4.1e-5, False)):
        expected = Expected(labels, torch.full(labels.shape, lead), 8.0)
        assert (benchmark.disagreement(SMALL, "ours", output, expected) is None) == agrees
