"""Packaging that pyproject.toml cannot say: the mapped packages, and the native library that CMake builds."""

import json
import os
import shutil
import subprocess
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
PACKAGES = ["bcmfnet", *(f"bcmfnet.{p.parent.name}" for p in sorted(ROOT.glob("bcmfnet/*/__init__.py")))]


class NotBuilt(Exception):
    """Why there is no native library; the package works without it."""


def torch_directory() -> Path:
    """Folder of the installed torch; build isolation hides it from import, not from the disk."""
    spec = find_spec("torch")
    folder = Path(spec.origin).parent if spec else Path(sysconfig.get_path("purelib")) / "torch"
    if not (folder / "include").is_dir():
        raise NotBuilt("torch is not installed; install it first to build the native library")
    return folder


class CMakeBuild(build_ext):
    """Build bcmfnet/_C.so with CMake, or write down why it was not built."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        library.unlink(missing_ok=True)  # one of an earlier build must not be packed where this one fails
        required = os.environ.get("BCMFNET_CUDA", "auto") == "1"
        try:
            self.compile(library.parent)
            built, reason = True, "built"
        except (NotBuilt, subprocess.CalledProcessError, OSError) as error:
            if required:
                raise SystemExit(f"bcmfnet: BCMFNET_CUDA=1, but the native library was not built: {error}") from error
            built, reason = False, str(error)
            print(f"bcmfnet: native library not built ({reason}); every op is served by plain PyTorch")
        self.record = library.parent / "_build.json"
        self.record.write_text(json.dumps({"native": built, "reason": reason}) + "\n")

    def copy_extensions_to_source(self) -> None:
        """For an editable install: the library where there is one, none of an earlier build, and the record."""
        (ROOT / "bcmfnet" / "_C.so").unlink(missing_ok=True)
        super().copy_extensions_to_source()
        shutil.copyfile(self.record, ROOT / "bcmfnet" / "_build.json")

    def compile(self, destination: Path) -> None:
        for tool in ("cmake", "ninja", os.environ.get("CXX", "c++")):
            if shutil.which(tool) is None:
                raise NotBuilt(f"no {tool} on PATH")
        build = Path(self.build_temp).resolve()
        subprocess.run(
            [
                "cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
                f"-DTORCH_DIRECTORY={torch_directory()}",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={destination}",
                f"-DBCMFNET_CUDA={os.environ.get('BCMFNET_CUDA', 'auto')}",
            ],
            check=True,
        )  # fmt: skip
        subprocess.run(["cmake", "--build", build, "--parallel", os.environ.get("MAX_JOBS", "2")], check=True)


class StableABIWheel(bdist_wheel):
    """One wheel for every Python: the library has no Python symbol."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    packages=[*PACKAGES, "bcmfnet.kernels", "bcmfnet.benchmarks"],
    package_dir={"bcmfnet": "bcmfnet", "bcmfnet.kernels": "kernels", "bcmfnet.benchmarks": "benchmarks"},
    package_data={"bcmfnet": ["_build.json", "py.typed"]},
    ext_modules=[Extension("bcmfnet._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": StableABIWheel},
)
