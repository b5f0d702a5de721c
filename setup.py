"""Packaging that pyproject.toml cannot say: the mapped packages, and the native library that CMake builds."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
PACKAGES = ["bcmfnet", *(f"bcmfnet.{p.parent.name}" for p in sorted(ROOT.glob("bcmfnet/*/__init__.py")))]
MAPPED = ["kernels", "kernels.bcl", "benchmarks", "benchmarks.peers"]
LIBRARY, RECORD = ROOT / "bcmfnet" / "_C.so", ROOT / "bcmfnet" / "_build.json"  # of an editable install

GENERATIONS = {  # names that TORCH_CUDA_ARCH_LIST may hold
    "Turing": ["7.5+PTX"],
    "Ampere+Tegra": ["8.7"],
    "Ampere": ["8.0", "8.6+PTX"],
    "Ada": ["8.9+PTX"],
    "Hopper": ["9.0+PTX"],
    "Blackwell+Tegra": ["11.0"],
    "Blackwell": ["10.0", "10.3", "12.0", "12.1+PTX"],
}


class NotBuilt(Exception):
    """Why there is no native library, or no CUDA in it; the package works without."""


def wanted(variable: str, mode: str) -> str:
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"{variable}: expected auto, 0 or 1, got {mode}")
    return mode


def torch_directory() -> Path:
    """Folder of an installed torch: any from 2.11 on, since only the stable ABI's headers are taken from it.

    Build isolation hides it from import, not from the disk: pip's is a layer over the interpreter's own packages;
    other tools make an environment of their own, but leave the activated one on PATH.
    """
    spec = find_spec("torch")
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    for prefix in (sys.prefix, sys.base_prefix, *(Path(programs).parent for programs in os.get_exec_path())):
        folders += sorted(Path(prefix).glob("lib/python3*/*-packages/torch"))
    found = {folder: version for folder in folders if (version := torch_version(folder))}
    for folder, version in found.items():
        if version >= (2, 11):
            return folder
    seen = ", ".join(f"{major}.{minor} in {folder}" for folder, (major, minor) in found.items()) or "none"
    raise NotBuilt(
        f"torch >= 2.11: found {seen}, looking where {sys.executable} imports from and in the environments on PATH; "
        "with setuptools, cmake and ninja beside torch, pip install . --no-build-isolation takes that one"
    )


def torch_version(folder: Path) -> tuple[int, int] | None:
    try:
        found = re.search(r"__version__ = '(\d+)\.(\d+)", (folder / "version.py").read_text())
    except OSError:
        return None
    return (int(found[1]), int(found[2])) if found and (folder / "include").is_dir() else None


def find_nvcc() -> str:
    for place in (os.environ.get("CUDACXX"), "nvcc", os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin/nvcc"):
        if place and (nvcc := shutil.which(place)):
            return nvcc
    raise NotBuilt("no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda")


def architectures(nvcc: str) -> tuple[list[str], list[str]]:
    """What TORCH_CUDA_ARCH_LIST names, else CMakeLists.txt: those that nvcc compiles for, and the others."""
    default = re.search(r'BCMFNET_ARCHITECTURES "(.+?)"', (ROOT / "CMakeLists.txt").read_text())[1]
    names = re.split(r"[;,\s]+", (os.environ.get("TORCH_CUDA_ARCH_LIST") or default).strip(";, "))
    names = [number for name in names for number in GENERATIONS.get(name, [name])]
    known = [name for name in names if compiles_for(nvcc, name)]
    return known, [name for name in names if name not in known]


def compiles_for(nvcc: str, name: str) -> bool:
    parts = re.fullmatch(r"(\d+)\.(\d[a-z]?)(\+PTX)?", name)
    if parts is None or int(parts[1]) < 8:  # the kernels take mma and redux, which are of 8.0
        return False
    number = parts[1] + parts[2]
    options = ["--dryrun", "-x", "cu", "-c", os.devnull, f"-gencode=arch=compute_{number},code=sm_{number}"]
    return subprocess.run([nvcc, *options], capture_output=True).returncode == 0


def cuda_options(torch: Path, build: Path, mode: str) -> tuple[list[str], str | None]:
    """CMake's options for the CUDA kernels, and which architectures are left out. Raises NotBuilt where all are."""
    if mode == "0":
        raise NotBuilt("BCMFNET_CUDA=0")
    if mode == "auto" and not (torch / "lib" / "libtorch_cuda.so").exists():
        raise NotBuilt(f"the torch in {torch} has no CUDA")
    nvcc = find_nvcc()
    run(nvcc, "-x", "cu", "-c", os.devnull, "-o", build / "empty.o")  # CMake would not say why it fails
    known, unknown = architectures(nvcc)
    left_out = (
        f"{nvcc} and the kernels (8.0 and later) cannot serve architecture {', '.join(unknown)}" if unknown else None
    )
    if not known or (unknown and mode == "1"):
        raise NotBuilt(left_out)
    return [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DBCMFNET_ARCHITECTURES={';'.join(known)}"], left_out


def run(*command: object) -> None:
    """Run a command and pass its output on. Raises NotBuilt with the line that says why it failed."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    lines = []
    with subprocess.Popen([*map(str, command)], **options) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.strip())
    if process.returncode:
        raise NotBuilt(error_line(lines) or f"{command[0]} ended with {process.returncode}")


def error_line(lines: list[str]) -> str:
    """The first line in which a compiler or a linker names an error, else CMake's message, else the last line."""
    for line in lines:
        if re.search(r"\b(error|fatal) *:|\bld: ", line) and not line.startswith("CMake"):
            return line
    for number, line in enumerate(lines):
        if line.startswith("CMake Error"):
            return " ".join([line, *lines[number + 1 : number + 3]]).strip()
    return next((line for line in reversed(lines) if line), "")


def sources_digest() -> str:
    """Of everything that the library is compiled from."""
    files = sorted(path for path in [ROOT / "CMakeLists.txt", *ROOT.glob("csrc/**/*")] if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def say(message: str) -> None:
    print(f"\n*** bcmfnet: {message}\n", file=sys.stderr, flush=True)


class CMakeBuild(build_ext):
    """Build bcmfnet/_C.so with CMake, or write down what was not built, and why."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self.native = True

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        library.unlink(missing_ok=True)  # one of an earlier build must not be packed where this one fails
        mode = wanted("BCMFNET_CUDA", os.environ.get("BCMFNET_CUDA", "auto"))
        native = wanted("BCMFNET_NATIVE", os.environ.get("BCMFNET_NATIVE", "auto"))
        record = {"native": True, "reason": None, "cuda": None, "sources": sources_digest()}
        try:
            if native == "0":
                raise NotBuilt("BCMFNET_NATIVE=0")
            record["cuda"] = self.compile(library.parent, mode)
        except (NotBuilt, OSError) as error:
            for variable, value in (("BCMFNET_CUDA", mode), ("BCMFNET_NATIVE", native)):
                if value == "1":
                    raise SystemExit(f"bcmfnet: {variable}=1, but the native library was not built: {error}") from error
            record |= {"native": False, "reason": str(error)}
            if native != "0":
                self.take_earlier(library, record)
        self.native = record["native"]
        if not self.native:
            say(f"NATIVE LIBRARY NOT BUILT, plain PyTorch serves every op several times slower: {record['reason']}")
        elif record["cuda"]:
            say(f"no CUDA kernels, or not all: {record['cuda']}")
        self.record = library.parent / RECORD.name
        self.record.write_text(json.dumps(record) + "\n")

    def take_earlier(self, library: Path, record: dict) -> None:
        """Where this build failed: what an editable install has already, if it was built from the same sources.

        One of other sources may have other ops or other results than the Python code beside it: no library is better.
        """
        if not (self.editable_mode and LIBRARY.exists() and RECORD.exists()):
            return
        earlier = json.loads(RECORD.read_text())
        if earlier.get("native") and earlier.get("sources") == record["sources"]:
            say(f"kept the library that was built from the same sources, since this build failed: {record['reason']}")
            shutil.copyfile(LIBRARY, library)
            record |= earlier
        else:
            record["reason"] += " (the library of an earlier build is of other sources and was removed)"

    def copy_extensions_to_source(self) -> None:
        """For an editable install: the library where there is one, none of an earlier build, and the record."""
        LIBRARY.unlink(missing_ok=True)  # a process may have it open: not written over
        super().copy_extensions_to_source()
        shutil.copyfile(self.record, RECORD)

    def compile(self, destination: Path, mode: str) -> str | None:
        """Why there are no CUDA kernels in the library, or not all; None where nothing is missing."""
        for tool in ("cmake", "ninja", os.environ.get("CXX", "c++")):
            if shutil.which(tool) is None:
                raise NotBuilt(f"no {tool} on PATH")
        torch = torch_directory()
        with tempfile.TemporaryDirectory() as build:  # a cache would name the tools of an environment that is gone
            configure = [
                "cmake", "-S", ROOT, "-B", build, "-G", "Ninja",
                f"-DTORCH_DIRECTORY={torch}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={destination}",
                *([] if self.editable_mode or sys.platform == "darwin" else ["-DCMAKE_MODULE_LINKER_FLAGS=-s"]),
            ]  # fmt: skip
            compile_all = ["cmake", "--build", build, "--parallel", os.environ.get("MAX_JOBS", "2")]
            try:
                options, left_out = cuda_options(torch, Path(build), mode)
                run(*configure, "-DBCMFNET_CUDA=1", *options)
                run(*compile_all)
                return left_out
            except NotBuilt as error:
                if mode == "1":
                    raise
                run(*configure, "-DBCMFNET_CUDA=0")
                run(*compile_all)
                return str(error)


class StableABIWheel(bdist_wheel):
    """One wheel for every Python: the library has no Python symbol; and for every machine where there is no library."""

    def get_tag(self) -> tuple[str, str, str]:
        native = self.get_finalized_command("build_ext").native
        return "py3", "none", super().get_tag()[2] if native else "any"


if __name__ == "__main__":
    setup(
        packages=[*PACKAGES, *(f"bcmfnet.{name}" for name in MAPPED)],
        package_dir={"bcmfnet": "bcmfnet", "bcmfnet.kernels": "kernels", "bcmfnet.benchmarks": "benchmarks"},
        package_data={"bcmfnet": ["_build.json", "py.typed"], "bcmfnet.models": ["shipped/*"]},
        ext_modules=[Extension("bcmfnet._C", sources=[], optional=True)],
        cmdclass={"build_ext": CMakeBuild, "bdist_wheel": StableABIWheel},
    )
