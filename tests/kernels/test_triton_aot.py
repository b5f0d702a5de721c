"""Every Triton kernel, in every configuration, compiles for GPUs that are not here, without a spill."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / "kernels"
KERNELS = [path for path in FOLDER.rglob("*.py") if "def aot_cases" in path.read_text()]


def compile_ahead(*arguments: str | Path) -> list[dict]:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-P", HERE / "compile_ahead.py", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--few"], id="the first and the last case of each, for one architecture"),
        pytest.param([], id="all", marks=pytest.mark.timeout(1200)),
    ],
)
def test_no_kernel_spills(arguments):
    rows = compile_ahead(*arguments)
    assert {row["kernel"] for row in rows} == {
        f"bcmfnet.kernels.{path.relative_to(FOLDER).parts[0].removesuffix('.py')}" for path in KERNELS
    }
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "sm_100"}
    assert [row for row in rows if row["spills"] or row["registers"] > 255] == []


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: path.stem)
def test_no_global_of_a_kernel_is_nan(path):
    """A launch compares globals with what they were when the kernel was compiled, and NaN has always changed."""
    constexpr = pytest.importorskip("triton.language").constexpr
    name = ".".join(["bcmfnet.kernels", *path.relative_to(FOLDER).with_suffix("").parts]).removesuffix(".__init__")
    found = {key: value.value for key, value in vars(importlib.import_module(name)).items() if type(value) is constexpr}
    assert [key for key, value in found.items() if value != value] == []


@pytest.mark.exhaustive
def test_a_spill_is_seen():
    assert all(row["spills"] > 0 for row in compile_ahead("--few", HERE / "spilling.py"))
