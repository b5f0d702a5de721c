"""The step of a SegFormer has one loss, whoever computes it."""

from __future__ import annotations

import pytest
import torch

from bcmfnet.benchmarks import segformer
from bcmfnet.benchmarks.harness import Unavailable


def test_providers_agree_where_the_library_is():
    pytest.importorskip("transformers", exc_type=ImportError)
    case = segformer.Case((1, 3, 64, 64), torch.float32)
    inputs = segformer.make_inputs(case, torch.device("cpu"))
    expected = segformer.expected(case, *inputs)
    for name, provider in segformer.providers(case, torch.device("cpu")).items():
        output = provider(*inputs)
        assert segformer.disagreement(case, name, output, expected) is None, name
        assert "loss" in segformer.disagreement(case, name, (3 * output[0],), expected)


def test_without_the_library_it_says_so(monkeypatch):
    def missing(device):
        raise ImportError("No module named 'transformers'")

    monkeypatch.setattr(segformer, "_model", missing)
    found = segformer.providers(segformer.CASES[0], torch.device("cpu"))
    assert all(isinstance(provider, Unavailable) and "transformers" in provider.reason for provider in found.values())
