"""The native build: what it does where tools, torch or CUDA are missing, in a small tree with the real setup.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
BROKEN = "int broken = unheard_of;\n"
AS_TORCH_KNOWS = [
    ("8.0;9.0+PTX", ["8.0", "9.0+PTX"], []),
    ("8.0 8.6,9.0a", ["8.0", "8.6", "9.0a"], []),
    ("Ampere", ["8.0", "8.6+PTX"], []),
    ("Hopper;Blackwell+Tegra;", ["9.0+PTX"], ["11.0"]),
    ("7.5;8.0;12.0+PTX", ["8.0"], ["7.5", "12.0+PTX"]),
    ("Ampre;9", [], ["Ampre", "9"]),
    ("", ["8.0", "9.0"], ["10.0", "12.0+PTX"]),
]


@pytest.fixture
def build() -> ModuleType:
    """setup.py as a module, which builds nothing."""
    spec = spec_from_file_location("setup_of_bcmfnet", ROOT / "setup.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def fake_torch(prefix: Path, version: str, cuda: bool = False) -> Path:
    folder = prefix / "lib" / "python3.11" / "site-packages" / "torch"
    for name in ("include", "lib"):
        (folder / name).mkdir(parents=True)
    (folder / "version.py").write_text(f"__version__ = '{version}'\n")
    if cuda:
        (folder / "lib" / "libtorch_cuda.so").touch()
    return folder


@pytest.mark.parametrize(("names", "known", "unknown"), AS_TORCH_KNOWS)
def test_architectures_are_those_that_nvcc_knows(build, tmp_path, monkeypatch, names, known, unknown):
    nvcc = script(tmp_path / "nvcc", 'case "$*" in *compute_1*) exit 1 ;; esac')  # one from before Blackwell
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", names)
    assert build.architectures(str(nvcc)) == (known, unknown)


def test_an_unknown_architecture_is_left_out_unless_cuda_is_a_must(build, tmp_path, monkeypatch):
    torch = fake_torch(tmp_path, "2.11.0", cuda=True)
    nvcc = str(script(tmp_path / "nvcc", 'case "$*" in *compute_12*) exit 1 ;; esac'))
    left_out = f"{nvcc} and the kernels (8.0 and later) cannot serve architecture 12.0"
    monkeypatch.setenv("CUDACXX", nvcc)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;12.0")
    options = [f"-DCMAKE_CUDA_COMPILER={nvcc}", "-DBCMFNET_ARCHITECTURES=8.0"]
    assert build.cuda_options(torch, tmp_path, "auto") == (options, left_out)
    with pytest.raises(build.NotBuilt) as caught:
        build.cuda_options(torch, tmp_path, "1")
    assert str(caught.value) == left_out
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "12.0")
    with pytest.raises(build.NotBuilt) as caught:
        build.cuda_options(torch, tmp_path, "auto")
    assert str(caught.value) == left_out


@pytest.mark.parametrize(
    ("line", "before", "after"),
    [
        ("/csrc/tensor.cpp:32:3: error: 'X' was not declared", "FAILED: -Werror tensor.o", "ninja: build stopped"),
        ('csrc/bcl_cuda.cu(12): error: identifier "x" is undefined', "warning: unused", "1 error detected"),
        ("nvcc fatal   : Unsupported gpu architecture 'compute_120'", "CMake Error at CMakeLists.txt:60", "x"),
        ("ptxas a.ptx, line 6; error   : Feature requires sm_80", "FAILED: cuda_error.cu.o", "ptxas fatal   : stopped"),
        ("/usr/bin/ld: cannot find -ltorch_cpu: No such file", "[1/2] Linking", "collect2: error: ld returned 1"),
        ("CMake Error at CMakeLists.txt:3 (x): CMake 3.24 or higher is required.", "-- The", ""),
        ("no error is named", "first", ""),
    ],
)
def test_the_error_is_the_compilers_own_line(build, line, before, after):
    lines = [before, *line.replace(" (x): ", " (x):\n").splitlines(), after]
    assert build.error_line(lines).replace("(x):  ", "(x): ") == line


def test_torch_is_found_in_an_environment_on_path(build, tmp_path, monkeypatch):
    old, new = fake_torch(tmp_path / "old", "2.9.1"), fake_torch(tmp_path / "new", "2.11.0+cu130")
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "isolated"))
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path / "base"))
    monkeypatch.setenv("PATH", f"{old.parents[3]}/bin:{new.parents[3]}/bin")
    assert build.torch_directory() == new
    monkeypatch.setattr(sys, "base_prefix", str(new.parents[3]))
    monkeypatch.setenv("PATH", f"{old.parents[3]}/bin")
    assert build.torch_directory() == new
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path / "base"))
    with pytest.raises(build.NotBuilt) as caught:
        build.torch_directory()
    assert str(caught.value) == (
        f"torch >= 2.11: found 2.9 in {old}, looking where {sys.executable} imports from "
        "and in the environments on PATH; "
        "with setuptools, cmake and ninja beside torch, pip install . --no-build-isolation takes that one"
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout whose C++ is one small file, beside a torch with CUDA and no content."""
    for tool in ("cmake", "ninja", "c++", "nm"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}")
    tree = tmp_path / "tree"
    (tree / "bcmfnet").mkdir(parents=True)
    for name in ("kernels", "kernels/bcl", "benchmarks", "benchmarks/peers", "csrc/op"):
        (tree / name).mkdir(parents=True)
        (tree / name / "__init__.py").touch()
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", "bcmfnet/__init__.py"):
        shutil.copy(ROOT / name, tree / name)
    shutil.copy(ROOT / "csrc/exported.map", tree / "csrc")
    (tree / "csrc/op/op.cpp").write_text('extern "C" __attribute__((visibility("default"))) int op() { return 1; }\n')
    (tree / "csrc/op/op_cpu.cpp").write_text("namespace BCM_ISA { int kernel() { return 2; } }\n")
    (tree / "csrc/op/op_cuda.cu").write_text("__global__ void kernel() {}\n")
    torch = fake_torch(tmp_path / "torch", "2.11.0+cu130", cuda=True)
    (torch / "__init__.py").touch()
    subprocess.run(["c++", "-shared", "-o", torch / "lib" / "libtorch_cpu.so", "-x", "c++", os.devnull], check=True)
    return tree


def run(tree: Path, *command: str, status: int = 0, **environment: str) -> str:
    """Output of a command of setup.py."""
    torch = tree.parent / "torch" / "lib" / "python3.11" / "site-packages"
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ("BCMFNET_CUDA", "BCMFNET_NATIVE", "TORCH_CUDA_ARCH_LIST", "CUDACXX")
    }
    env |= {"PYTHONPATH": str(torch)} | environment
    done = subprocess.run(
        [sys.executable, "setup.py", *command], cwd=tree, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def wheel(tree: Path, status: int = 0, **environment: str) -> tuple[str, dict, set[str], str]:
    """Name, record, files and output of a wheel."""
    shutil.rmtree(tree / "dist", ignore_errors=True)
    output = run(tree, "bdist_wheel", status=status, **environment)
    if status:
        return "", {}, set(), output
    (path,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return path.name, json.loads(archive.read("bcmfnet/_build.json")), set(archive.namelist()), output


def editable(tree: Path, **environment: str) -> dict:
    """The record of an editable install."""
    run(tree, "editable_wheel", "--dist-dir", "dist", **environment)
    return json.loads((tree / "bcmfnet" / "_build.json").read_text())


def test_a_build_after_another_whose_ninja_is_gone(tree, tmp_path):
    """As pip's isolated environments, which vanish with the tools that were taken from them."""
    for number in range(2):
        tools = tmp_path / f"tools{number}"
        tools.mkdir()
        (tools / "ninja").symlink_to(shutil.which("ninja"))
        name, record, files, _ = wheel(tree, BCMFNET_CUDA="0", PATH=f"{tools}:{os.environ['PATH']}")
        assert record["native"] and "bcmfnet/_C.so" in files
        assert name.startswith("bcmfnet-0.1.0-py3-none-") and not name.endswith("-any.whl")
        shutil.rmtree(tools)


def test_cpp_survives_an_nvcc_that_fails(tree, tmp_path):
    nvcc = script(tmp_path / "bin" / "nvcc", "echo 'nvcc fatal   : no licence' >&2; exit 1")
    _, record, files, output = wheel(tree, CUDACXX=str(nvcc))
    assert "bcmfnet/_C.so" in files
    assert (record["native"], record["reason"], record["cuda"]) == (True, None, "nvcc fatal   : no licence")
    assert "*** bcmfnet: no CUDA kernels, or not all: nvcc fatal   : no licence" in output
    output = wheel(tree, status=1, CUDACXX=str(nvcc), BCMFNET_CUDA="1")[3]
    assert output.splitlines()[-1] == (
        "bcmfnet: BCMFNET_CUDA=1, but the native library was not built: nvcc fatal   : no licence"
    )


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_a_source_that_nvcc_refuses_takes_cuda_alone_with_it(tree):
    (tree / "csrc/op/op_cuda.cu").write_text(BROKEN)
    _, record, files, _ = wheel(tree, TORCH_CUDA_ARCH_LIST="9.0a;99.0")
    assert "bcmfnet/_C.so" in files and record["native"]
    assert record["cuda"].endswith('op_cuda.cu(1): error: identifier "unheard_of" is undefined')


def test_auto_compiles_no_cuda_for_a_torch_without_it(tree):
    cuda = next(tree.parent.glob("torch/lib/*/*/torch/lib/libtorch_cuda.so"))
    cuda.unlink()
    _, record, _, output = wheel(tree, CUDACXX="/bin/false")
    assert record["cuda"] == f"the torch in {cuda.parents[1]} has no CUDA"
    assert record["native"] and "op_cuda" not in output
    assert wheel(tree, BCMFNET_CUDA="0")[1]["cuda"] == "BCMFNET_CUDA=0"


def test_another_value_of_bcmfnet_cuda(tree):
    assert wheel(tree, status=1, BCMFNET_CUDA="yes")[3].splitlines()[-1] == (
        "BCMFNET_CUDA: expected auto, 0 or 1, got yes"
    )


def test_the_native_library_can_be_left_out_or_insisted_on(tree):
    name, record, files, _ = wheel(tree, BCMFNET_NATIVE="0")
    assert name.endswith("-py3-none-any.whl") and "bcmfnet/_C.so" not in files
    assert (record["native"], record["reason"]) == (False, "BCMFNET_NATIVE=0")
    _, _, files, _ = wheel(tree, BCMFNET_NATIVE="1", BCMFNET_CUDA="0")
    assert "bcmfnet/_C.so" in files
    unpacked = tree / "unpacked"
    shutil.unpack_archive(next((tree / "dist").glob("*.whl")), unpacked, "zip")
    listed = subprocess.run(["nm", unpacked / "bcmfnet" / "_C.so"], capture_output=True, text=True)
    assert "no symbols" in listed.stdout + listed.stderr  # stripped
    output = wheel(tree, status=1, BCMFNET_NATIVE="1", CXX="no-such-compiler")[3]
    said = "bcmfnet: BCMFNET_NATIVE=1, but the native library was not built: no no-such-compiler on PATH"
    assert output.splitlines()[-1] == said


def test_a_wheel_without_native_code_is_of_every_machine(tree):
    (tree / "csrc/op/op.cpp").write_text(BROKEN)
    name, record, files, output = wheel(tree, BCMFNET_CUDA="0")
    assert name == "bcmfnet-0.1.0-py3-none-any.whl"
    assert "bcmfnet/_C.so" not in files and not record["native"]
    assert record["reason"].endswith("error: ‘unheard_of’ was not declared in this scope") or (
        record["reason"].endswith("error: use of undeclared identifier 'unheard_of'")
    )
    assert f"NATIVE LIBRARY NOT BUILT, plain PyTorch serves every op several times slower: {record['reason']}" in output


def test_a_failing_build_keeps_the_library_of_the_same_sources_alone(tree):
    library = tree / "bcmfnet" / "_C.so"
    built = editable(tree, BCMFNET_CUDA="0")
    content = library.read_bytes()
    assert editable(tree, CXX="no-such-compiler") == built
    assert library.read_bytes() == content
    source = tree / "csrc/op/op.cpp"
    source.write_text(source.read_text().replace("return 1", "return 3"))
    record = editable(tree, CXX="no-such-compiler")
    assert (record["native"], library.exists()) == (False, False)
    assert record["reason"] == (
        "no no-such-compiler on PATH (the library of an earlier build is of other sources and was removed)"
    )


def test_the_source_distribution_builds_the_library(tmp_path):
    """Every file that a build reads is in it, and nothing of an earlier build."""
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "_C.so", "_build.json")
    shutil.copytree(ROOT, tree, ignore=ignored)
    expected = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    (tree / "bcmfnet" / "_C.so").touch()
    (tree / "bcmfnet" / "_build.json").touch()
    subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=tree, check=True, capture_output=True)
    (path,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
    made = {"PKG-INFO", "setup.cfg", *(name for name in names if ".egg-info/" in name)}
    assert names - made == expected
