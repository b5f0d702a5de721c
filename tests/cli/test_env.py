"""What `bcmfnet env` says of a build that lost something."""

from __future__ import annotations

import pytest

from bcmfnet.cli.env import _lines
from bcmfnet.engine.environment import describe_environment

REASON = '/csrc/bcl/bcl_cuda.cu(12): error: identifier "x" is undefined'
BUILD = {"cpu": "x86-64-v4", "compiler": "12.2.0", "cuda": None, "without": REASON}


@pytest.mark.parametrize(
    ("native", "library", "row", "served"),
    [
        (
            {"loaded": True, "reason": None, "build": BUILD},
            f"native library: loaded, x86-64-v4, compiler 12.2.0, CUDA not built ({REASON})",
            {"op": "bcl", "device": "cuda", "backend": "triton", "reason": f"cuda: built without CUDA: {REASON}"},
            "bcl on cuda: triton (cuda: built without CUDA: see the native library)",
        ),
        (
            {"loaded": True, "reason": None, "build": BUILD | {"cuda": "13.0 for 8.0", "without": "nvcc: 12.0"}},
            "native library: loaded, x86-64-v4, compiler 12.2.0, CUDA 13.0 for 8.0 (nvcc: 12.0)",
            {"op": "bcl", "device": "cuda", "backend": "cuda", "reason": "the default"},
            "bcl on cuda: cuda (the default)",
        ),
        (
            {"loaded": False, "reason": f"not built: {REASON}", "build": None},
            f"native library: not built: {REASON}",
            {"op": "bcl", "device": "cpu", "backend": "reference", "reason": f"cpp: not built: {REASON}"},
            "bcl on cpu: reference (cpp: see the native library)",
        ),
    ],
)
def test_what_was_not_built_stands_there_once(native, library, row, served):
    lines = _lines(describe_environment() | {"native": native, "backends": [row]})
    assert lines[-2:] == [library, served]
    assert sum(REASON in line for line in lines) <= 1
