"""Every .cu compiles for the architectures that are in use, and keeps its numbers in registers."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PRESSURE = ROOT / "tests/cuda_on_cpu/kernels/pressure.cu"  # takes 202 registers
SOURCES = [*sorted(ROOT.glob("csrc/*/*.cu")), PRESSURE]
ARCHITECTURES = (80, 90, 100)

REPORT = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<architecture>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


class Usage(NamedTuple):
    kernel: str
    architecture: str
    registers: int
    spilled: int  # bytes stored and loaded


def compile_for(architectures: Sequence[int], source: Path, folder: Path, *options: str) -> list[Usage]:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH")
    targets = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in architectures]
    command = [nvcc, "-std=c++17", "--fmad=true", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}", *targets, *options]
    result = subprocess.run([*command, "-c", source, "-o", folder / "kernel.o"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [
        Usage(
            found["kernel"], found["architecture"], int(found["registers"]), int(found["stores"]) + int(found["loads"])
        )
        for found in REPORT.finditer(result.stderr)
    ]


@pytest.mark.exhaustive  # each takes seconds to minutes to compile
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_no_kernel_spills(source, architecture, tmp_path):
    usages = compile_for([architecture], source, tmp_path)
    if "__global__" in source.read_text():
        assert {usage.architecture for usage in usages} == {f"sm_{architecture}"}
    table = "\n".join(f"{u.architecture} {u.registers:4} registers {u.spilled:6} B spilled  {u.kernel}" for u in usages)
    assert not any(usage.spilled for usage in usages), f"\n{table}"


def test_a_spill_is_seen(tmp_path):
    usages = compile_for(ARCHITECTURES, PRESSURE, tmp_path, "-maxrregcount=48")
    assert len(usages) == len(ARCHITECTURES)
    assert all(usage.spilled > 0 and usage.registers <= 48 for usage in usages), usages
