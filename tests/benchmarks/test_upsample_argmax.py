"""The benchmark of upsample_argmax: its inputs, its count of bytes and operations, and what it takes for agreement."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch.nn.functional import interpolate

from bcmfnet.benchmarks import upsample_argmax as benchmark
from bcmfnet.benchmarks.harness import Unavailable
from bcmfnet.benchmarks.upsample_argmax import Case, Expected

CPU = torch.device("cpu")
SMALL = ((2, 5, 6, 7), (24, 30))  # two images, a whole factor and a fraction


def callables(case):
    found = benchmark.providers(case, CPU)
    return {name: provider for name, provider in found.items() if not isinstance(provider, Unavailable)}


def test_names_are_unique_and_say_the_case():
    names = [case.name for case in benchmark.CASES]
    assert len(set(names)) == len(names)
    assert names[0] == "1x19x128x256-1024x2048-float32-rough"
    assert "1x19x128x256-1024x2048-float32-smooth-channels_last" in names
    assert "1x19x128x256-1024x2048-float32-smooth-confidence" in names


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        # 19 * 128 * 256 logits of 4 bytes and 1024 * 2048 labels of 1
        (Case((1, 19, 128, 256), (1024, 2048), "rough"), 2_490_368 + 2_097_152),
        (Case((1, 19, 128, 256), (1024, 2048), "rough", torch.bfloat16), 1_245_184 + 2_097_152),
        # and as many confidences of 2
        (Case((1, 19, 128, 256), (1024, 2048), "rough", confidence=True), 2_490_368 + 2_097_152 + 4_194_304),
        (Case((3, 256, 2, 2), (4, 5), "rough"), 12_288 + 60),
        (Case((3, 257, 2, 2), (4, 5), "rough"), 12_336 + 120),  # labels of 2 bytes from 257 classes on
    ],
)
def test_bytes_moved(case, expected):
    assert benchmark.bytes_moved(case) == expected


def test_operations():
    """2 classes of 3 rows to 4 x 5 pixels: 15 columns of logits at 4 operations a class, 20 pixels at 3 or 6."""
    assert benchmark.operations(Case((1, 2, 3, 4), (4, 5), "rough")) == 2 * (15 * 4 + 20 * 3)
    assert benchmark.operations(Case((1, 2, 3, 4), (4, 5), "rough", confidence=True)) == 2 * (15 * 4 + 20 * 6)


@pytest.mark.parametrize("content", ["rough", "smooth"])
def test_inputs_are_the_same_each_time(content):
    case = Case((2, 19, 24, 40), (96, 160), content, torch.bfloat16, torch.channels_last)
    (first,), (second,) = benchmark.make_inputs(case, CPU), benchmark.make_inputs(case, CPU)
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()
    assert first.shape == case.shape and first.dtype == torch.bfloat16
    assert first.is_contiguous(memory_format=torch.channels_last)


def test_smooth_logits_have_a_clear_winner_and_rough_ones_have_not():
    for content, low, high in (("smooth", 0.95, 1.0), ("rough", 0.0, 0.2)):
        case = Case((1, 19, 32, 64), (256, 512), content)
        confidence = benchmark.expected(case, *benchmark.make_inputs(case, CPU)).confidence
        assert low < confidence.median().item() < high


def test_expected_against_interpolate_and_topk():
    case = Case(*SMALL, "rough")
    (logits,) = benchmark.make_inputs(case, CPU)
    scores = interpolate(logits.double(), case.size, mode="bilinear", align_corners=False)
    best = scores.topk(2, dim=1)
    found = benchmark.expected(case, logits)
    assert torch.equal(found.labels, best.indices[:, 0])
    torch.testing.assert_close(found.lead, best.values[:, 0] - best.values[:, 1])
    torch.testing.assert_close(found.confidence, scores.softmax(1).amax(1))
    assert found.largest == logits.abs().max().item()


@pytest.mark.parametrize("confidence", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("content", ["rough", "smooth"])
def test_every_provider_agrees(content, memory_format, confidence):
    case = Case(*SMALL, content, memory_format=memory_format, confidence=confidence)
    inputs = benchmark.make_inputs(case, CPU)
    expected = benchmark.expected(case, *inputs)
    providers = callables(case)
    assert {"reference", "eager", "eager_best"} <= providers.keys()
    for name in providers.keys() - {"compile"}:
        assert benchmark.disagreement(case, name, providers[name](*inputs), expected) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_provider_agrees_in_half_precision(dtype):
    case = Case(*SMALL, "rough", dtype)
    inputs = benchmark.make_inputs(case, CPU)
    expected = benchmark.expected(case, *inputs)
    providers = callables(case)
    for name in providers.keys() - {"compile"}:
        assert benchmark.disagreement(case, name, providers[name](*inputs), expected) is None


@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")
def test_compiled_provider_agrees():
    case = Case(*SMALL, "rough")
    inputs = benchmark.make_inputs(case, CPU)
    output = callables(case)["compile"](*inputs)
    assert benchmark.disagreement(case, "compile", output, benchmark.expected(case, *inputs)) is None


def test_providers_that_cannot_run_say_why(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = benchmark.providers(Case(*SMALL, "rough"), CPU)
    assert found["triton"] == Unavailable("on a CPU Triton only interprets, which is not timed")
    assert found["cuda"].reason.startswith("it is served by")
    assert found["compile"] == Unavailable("torch.compile needs a C++ compiler")


def one_pixel(lead, confidence=0.5):
    label = torch.tensor([[[3]]])
    return Expected(label, torch.full((1, 1, 1), lead), torch.full((1, 1, 1), confidence).double(), 8.0)


@pytest.mark.parametrize(
    ("provider", "dtype", "lead", "agrees"),
    [
        # the largest logit is 8: 8 * 8 * 2^-23 is 7.6e-6, and 8 * 2^-7 of bfloat16 is 0.0625
        ("cpp", torch.float32, 7.6e-6, True),
        ("cpp", torch.float32, 7.7e-6, False),
        ("eager", torch.float32, 7.7e-6, False),
        ("cpp", torch.bfloat16, 7.7e-6, False),
        ("eager", torch.bfloat16, 0.0625, True),
        ("eager", torch.bfloat16, 0.0626, False),
        ("eager", torch.float16, 0.0078, True),
        ("eager", torch.float16, 0.0079, False),
    ],
)
def test_a_wrong_label_is_forgiven_in_the_tie_band_alone(provider, dtype, lead, agrees):
    case = Case((1, 5, 1, 1), (1, 1), "rough", dtype)
    wrong = benchmark.disagreement(case, provider, torch.tensor([[[2]]]), one_pixel(lead))
    assert wrong == (None if agrees else f"1 of 1 labels differ where the winner leads by up to {lead:.2g}")


@pytest.mark.parametrize(("confidence", "agrees"), [(0.50025, True), (0.4995, False), (torch.nan, False)])
def test_confidence_agrees_to_float16(confidence, agrees):
    case = Case((1, 5, 1, 1), (1, 1), "rough", confidence=True)
    output = torch.tensor([[[3]]]), torch.tensor([[[confidence]]])
    assert (benchmark.disagreement(case, "cpp", output, one_pixel(1.0)) is None) == agrees
