"""What makes one native library serve every torch >= 2.11, every Python, and every processor of an architecture."""

from __future__ import annotations

import importlib
import platform
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import torch

from bcmfnet.ops import _extension, upsample_argmax

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
    assert names("-D", "--defined-only", library) == ["bcmfnet_build_info"]


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


@pytest.mark.exhaustive
def test_builds_of_two_names_live_in_one_process(tmp_path, monkeypatch):
    """As two versions of the ops that packages bring with them: each under its own namespace, beside ours."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    torch_folder = Path(torch.__file__).parent
    options = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", f"-I{ROOT / 'csrc'}", "-DBCMFNET_WITH_CUDA=0"]
    options += [f"-isystem{torch_folder / 'include'}", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"]

    def compiled(source: str, *more: str) -> Path:
        path = tmp_path / f"{len(list(tmp_path.glob('*.o')))}.o"
        subprocess.run([compiler, *options, *more, "-c", ROOT / "csrc" / source, "-o", path], check=True)
        return path

    isas = {"plain": [], "v3": ["-march=x86-64-v3"], "v4": ["-march=x86-64-v4"]} if _is_x86() else {"plain": []}
    ours = [(f"common/{name}.cpp", []) for name in ("tensor", "isa")]
    builds = {
        "bcmfnet_first": [
            *ours,
            ("upsample_argmax/upsample_argmax.cpp", ["-DBCM_LIBRARY=bcmfnet_first"]),
            *(("upsample_argmax/upsample_argmax_cpu.cpp", [f"-DBCM_ISA={isa}", *flags]) for isa, flags in isas.items()),
        ],
        "_bcmfnet_second": [  # as kernel-builder compiles
            (source, ["-DTORCH_EXTENSION_NAME=_bcmfnet_second"])
            for source in (
                *dict(ours),
                "upsample_argmax/upsample_argmax.cpp",
                "upsample_argmax/upsample_argmax_cpu.cpp",
            )
        ],
    }
    logits = torch.randn(2, 5, 7, 9)
    expected = upsample_argmax(logits, (30, 41))
    for name, sources in builds.items():
        library = tmp_path / f"{name}.so"
        objects = [compiled(source, *more) for source, more in sources]
        linked = ["-shared", *objects, f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-ldl"]
        subprocess.run([compiler, *linked, "-o", library], check=True)
        torch.ops.load_library(library)
    for name in builds:
        labels = torch.empty_like(expected)
        getattr(torch.ops, name)._upsample_argmax(logits, labels, None)
        assert torch.equal(labels, expected)
    assert torch.equal(upsample_argmax(logits, (30, 41)), expected)
    package = tmp_path / "kernel"  # where kernel-builder puts its module beside those of torch-ext
    shutil.copytree(ROOT / "torch-ext" / "bcmfnet", package)
    (package / "_ops.py").write_text("import torch\nops = torch.ops._bcmfnet_second\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert torch.equal(importlib.import_module("kernel").upsample_argmax(logits, (30, 41)), expected)


def test_build_toml_names_every_source():
    """Of kernel-builder, which copies and compiles only what is listed: bindings apart from kernels and headers."""
    build = tomllib.loads((ROOT / "build.toml").read_text())
    bindings, kernel = build["torch"], build["kernel"]["bcmfnet"]
    listed = bindings["src"] + kernel["src"]
    assert len(set(listed)) == len(listed) and all((ROOT / source).is_file() for source in listed)
    globs = re.findall(r"CONFIGURE_DEPENDS (csrc/\S+)\)", (ROOT / "CMakeLists.txt").read_text())
    assert len(globs) == 3
    compiled = {path.relative_to(ROOT).as_posix() for pattern in globs for path in ROOT.glob(pattern)}
    headers = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/**/*.h")}
    assert set(listed) == compiled | headers | {"torch-ext/torch_binding.cpp"}
    assert not any(source.endswith((".cu", "_cpu.cpp", ".h")) for source in bindings["src"])
    assert {"csrc"} == set(bindings["include"]) == set(kernel["include"])
    oldest = re.search(r"torch>=([\d.]+)", (ROOT / "pyproject.toml").read_text())[1]
    assert (build["general"]["name"], build["torch"]["stable-abi"]) == ("bcmfnet", {"cuda": oldest})


def _is_x86() -> bool:
    return platform.machine() in ("x86_64", "AMD64")
