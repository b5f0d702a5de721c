"""What makes one native library serve every torch >= 2.11, every Python, and every processor of an architecture."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bcmfnet.ops import _extension

ROOT = Path(__file__).parents[1]
KERNELS = sorted(ROOT.glob("csrc/*/*_cpu.cpp"))


def names(*options: str | Path) -> list[str]:
    lines = subprocess.run(["nm", "-C", *options], capture_output=True, text=True, check=True).stdout.splitlines()
    return [re.sub(r"^[0-9a-f]* *\w ", "", line) for line in lines]


@pytest.fixture
def library() -> Path:
    reason = _extension.load()
    if reason is not None:
        pytest.skip(reason)
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    return _extension.PACKAGE / "_C.so"


def test_it_asks_torch_for_the_stable_abi_alone(library):
    needed = names("-D", "--undefined-only", library)
    assert any(name.startswith("aoti_torch_") for name in needed)
    assert [name for name in needed if re.match(r"(at|c10|torch)::|_?Py|cuda", name)] == []


def test_it_exports_nothing_but_its_description(library):
    defined = names("-D", "--defined-only", library)
    foreign = r"(void )?std::|typeinfo |vtable |__bss_start|_edata|_end"  # the standard library's, the linker's
    assert [name for name in defined if not re.match(foreign, name)] == ["bcmfnet_build_info"]


@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.stem)
def test_code_of_an_instruction_set_stays_in_its_namespace(source, tmp_path):
    """A symbol that two of them share would be linked once: perhaps the one of new instructions, for every CPU."""
    compiler = shutil.which("g++")
    if compiler is None or shutil.which("nm") is None:
        pytest.skip("no g++ or nm")
    compiled = tmp_path / "kernel.o"
    options = ["-std=gnu++17", "-O3", "-DBCM_ISA=some_isa", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *options, "-c", source, "-o", compiled], check=True)
    defined = names("--defined-only", "--extern-only", compiled)
    assert defined
    assert [name for name in defined if not name.startswith("bcmfnet::some_isa::")] == []
