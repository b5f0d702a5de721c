"""Compiles .cu files as C++ against the stand-ins of this folder, and calls their launchers."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
ALWAYS = [HERE / "runtime.cpp", CSRC / "common" / "cuda_error.cu"]
HEADERS = [*HERE.glob("*.h"), *CSRC.rglob("*.h")]

# nvcc fuses a * b + c and does not use the rules of aliasing: neither does this build, where the host can fuse.
# Symbols are bound inside: a CUDA runtime or another of these libraries may be loaded beside this one.
OPTIONS = (
    "-std=c++17 -g -fPIC -ffp-contract=fast -fno-strict-aliasing -fno-gnu-unique -Wl,-Bsymbolic -Wno-unknown-pragmas "
    "-Werror=unused-result"
)
SANITIZE = "-O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"


def build(
    sources: Sequence[Path], *, options: Sequence[str] = (), sanitize: bool = False, executable: bool = False
) -> Path:
    """A shared library (or an executable) of .cu and .cpp files; what has not changed comes from the cache.

    Files are compiled side by side, and of several processes that want the same library one makes it. Skips the test
    where there is no compiler. Raises subprocess.CalledProcessError, its output printed, where sources do not compile.
    """
    compiler = [
        _compiler(), *OPTIONS.split(), *(SANITIZE.split() if sanitize else ["-O2"]), *_fused_arithmetic(),
        "-DBCM_CUDA_ON_CPU=bcmfnet_cuda_on_cpu", f"-I{HERE}", f"-I{CSRC}",
    ]  # fmt: skip
    with lock(), ThreadPoolExecutor(os.cpu_count()) as pool:
        compile_one = [*compiler, *options, "-x", "c++", "-c"]
        objects = list(pool.map(lambda path: made(compile_one, [path], HEADERS), [*sources, *ALWAYS]))
        return made([*compiler, *([] if executable else ["-shared"])], objects, after=options)


def made(command: list[str], inputs: Sequence[Path], headers: Sequence[Path] = (), after: Sequence[str] = ()) -> Path:
    """The output of a command, from the cache where neither it nor its inputs have changed."""
    result = _cache() / _digest([*command, *after], [*inputs, *headers])
    if not result.exists():
        with tempfile.TemporaryDirectory(dir=_cache()) as folder:
            output = Path(folder) / "output"
            subprocess.run([*command, *map(str, inputs), *after, "-o", str(output)], check=True)
            os.replace(output, result)
    return result


@contextmanager
def lock() -> Iterator[None]:
    import fcntl  # not everywhere where the tests are collected

    with (_cache() / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Library:
    """The launchers of a library: `library.call("name", tensor, 3, 0.5, None)`."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.bcmfnet_cuda_error.restype = ctypes.c_char_p

    def call(self, name: str, *arguments: Any) -> None:
        """Call a launcher that returns a cudaError_t.

        Tensors and arrays are passed as pointers, None as a null pointer, integers as int64 (which serves int32 as
        well), floats as float, and what ctypes knows as it is.

        Raises RuntimeError with the text of the error.
        """
        error = getattr(self._library, name)(*map(_argument, arguments))
        if error:
            raise RuntimeError(self._library.bcmfnet_cuda_error(error).decode())


def _argument(value: Any) -> Any:
    match value:
        case torch.Tensor():
            return ctypes.c_void_p(value.data_ptr())
        case np.ndarray():
            return ctypes.c_void_p(value.ctypes.data)
        case None:
            return ctypes.c_void_p()
        case int():
            return ctypes.c_int64(value)
        case float():
            return ctypes.c_float(value)
        case _:
            return value


def _compiler() -> str:
    if sys.platform != "linux":
        pytest.skip("tests/cuda_on_cpu/runtime.cpp is for Linux")
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler: neither g++ nor c++ is on PATH")
    return compiler


def _fused_arithmetic() -> list[str]:
    """-mfma where the processor has it; on x86-64 alone it is an option."""
    if platform.machine() != "x86_64":
        return []
    return ["-mfma"] if " fma " in Path("/proc/cpuinfo").read_text() else []


@cache
def _cache() -> Path:
    folder = Path(tempfile.gettempdir()) / f"bcmfnet-cuda-on-cpu-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder}: belongs to another user")
    return folder


def _digest(command: list[str], inputs: Sequence[Path]) -> str:
    digest = hashlib.sha256("\0".join(command).encode())
    digest.update(subprocess.run([command[0], "--version"], capture_output=True, check=True).stdout)
    for path in sorted(inputs):
        digest.update(f"{path}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]
