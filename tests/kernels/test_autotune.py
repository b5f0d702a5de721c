"""The one wrapper for autotuned kernels."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from bcmfnet.kernels.autotune import autotune  # noqa: E402

CONFIGS = [triton.Config({"BLOCK": block}) for block in (32, 64)]


def fill(x, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, BLOCK, at < n)


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="Triton does not interpret here")
def test_the_interpreter_takes_the_first_configuration():
    """triton.autotune itself measures there, with a clock that the interpreter does not have."""
    kernel = autotune(CONFIGS, ["n"])(triton.jit(fill))
    for n in (5, 100):
        x = torch.zeros(128, dtype=torch.int32)
        kernel[lambda meta, n=n: (triton.cdiv(n, meta["BLOCK"]),)](x, n)
        assert x.tolist() == [32] * n + [0] * (128 - n)


def test_a_gpu_chooses_among_all(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert autotune(CONFIGS, ["n"])(triton.jit(fill)).configs == CONFIGS
