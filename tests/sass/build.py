"""Compiles .cu files with nvcc, and links them with what runs their machine code on a CPU."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cuda_on_cpu import build as on_cpu
from cuda_on_cpu.build import CSRC, lock, made
from sass import cubin

HERE = Path(__file__).parent
SOURCE_HEADERS = [*CSRC.rglob("*.h")]
OWN_HEADERS = [*HERE.glob("*.h"), HERE.parent / "cuda_on_cpu/accepted.h"]
HOST = "-std=c++17 -fPIC -fno-gnu-unique"
CUDA = "-std=c++17 -O3 -lineinfo --fmad=true -gencode=arch=compute_90,code=sm_90 -Xcompiler -fPIC,-fno-gnu-unique"


def build(sources: Sequence[Path], *, bindings: Sequence[Path] = (), options: Sequence[str] = ()) -> Path:
    """A shared library of .cu files, and of bindings in C++; what has not changed comes from the cache.

    Skips the test where a tool is missing. Raises subprocess.CalledProcessError where sources do not compile.
    """
    if reason := missing():
        pytest.skip(reason)
    compiler, nvcc = shutil.which("g++") or "c++", shutil.which("nvcc") or "nvcc"
    host = [compiler, *HOST.split(), f"-I{CSRC}", "-DBCM_CUDA_ON_CPU=bcmfnet_sass"]
    emulator = [*host, "-O3", "-march=x86-64-v3", "-ffp-contract=off", "-fno-strict-aliasing", "-c"]
    cuda = [nvcc, *CUDA.split(), f"-I{CSRC}", "-c"]
    with lock(), ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [(cuda, path, SOURCE_HEADERS) for path in [*sources, CSRC / "common/cuda_error.cu"]]
        jobs += [(emulator, HERE / name, OWN_HEADERS) for name in ("emulator.cpp", "decode.cpp")]
        jobs += [(cuda, HERE / "runtime.cpp", OWN_HEADERS)]
        jobs += [([*host, *options, "-O1", "-c"], path, SOURCE_HEADERS) for path in bindings]
        objects = list(pool.map(lambda job: made(job[0], [job[1]], job[2]), jobs))
        tool = [sys.executable, str(HERE / "cubin.py")]
        listing = made(tool, objects[: len(sources)], [HERE / "cubin.py"])
        objects.append(made([*host, f'-DSASS_LISTING="{listing}"', "-c"], [HERE / "listing.cpp"], [listing]))
        return made([*host, "-shared", "-Wl,-Bsymbolic"], objects, after=options)


def missing() -> str | None:
    """Why machine code cannot be run here."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        return "the emulator of machine code is for x86-64 and Linux"
    if not {"avx2", "fma", "f16c"} <= set(Path("/proc/cpuinfo").read_text().split()):
        return "the emulator of machine code needs AVX2, FMA and F16C"
    if shutil.which("nvcc") is None:
        return "no nvcc on PATH"
    if cubin.disassembler() is None:
        return "no cuobjdump, neither on PATH nor in an installed triton"
    return None


class Traffic(NamedTuple):
    """Accesses to global memory by warps, and the sectors of 32 bytes that they touch: of each, and of all together."""

    requests: int
    sectors: int
    unique: int


class Count(NamedTuple):
    """What a kernel has done in all of its launches; registers are of a thread, shared memory of a block, in bytes."""

    kernel: str
    launches: int
    blocks: int
    warps: int
    threads: int
    registers: int
    shared: int
    reads: Traffic
    writes: Traffic
    instructions: dict[str, int]  # by class

    @staticmethod
    def of(line: str) -> Count:
        kernel, *values = line.split("\t")
        numbers = [int(value) for value in values[:12]]
        reads, writes = numbers[6:8] + numbers[10:11], numbers[8:10] + numbers[11:]
        classes = {name: int(count) for name, _, count in (value.partition("=") for value in values[12:])}
        return Count(kernel, *numbers[:6], Traffic(*reads), Traffic(*writes), classes)


class Machine:
    """What a library made by `build` runs its kernels on."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        for function in (self.library.sass_report, self.library.sass_text, self.library.sass_launch):
            function.restype = ctypes.c_char_p
        if hasattr(self.library, "sass_scratch"):  # with bindings
            self.library.sass_scratch.restype = ctypes.c_int64
        self.library.sass_allow.argtypes = [ctypes.c_void_p, ctypes.c_uint64]

    def listing(self, kernel: str) -> list[str]:
        """The instructions of the only kernel whose name has this part, as cubin.py writes them."""
        lines = self.library.sass_text(kernel.encode()).decode().splitlines()
        return [line for line in lines[1:] if not line.startswith("constant")]

    @contextmanager
    def inexact(self, error: str) -> Iterator[None]:
        """Within, special functions are off by the most that the PTX ISA allows: up, down, or by turns."""
        self.library.sass_error(("none", "up", "down", "turns").index(error))
        try:
            yield
        finally:
            self.library.sass_error(0)

    @contextmanager
    def counting(self) -> Iterator[list[Count]]:
        """Count what runs within; afterwards the list has one count for each kernel."""
        counts: list[Count] = []
        self.library.sass_count(True)
        try:
            yield counts
            counts += [Count.of(line) for line in self.library.sass_report().decode().splitlines()]
        finally:
            self.library.sass_count(False)

    def scratch(self) -> int:
        """The most bytes of scratch that a call has asked for since this was asked last."""
        return int(self.library.sass_scratch())

    @contextmanager
    def allowing(self, values: Iterable[Any]) -> Iterator[None]:
        """Within, kernels may touch the tensors among some values, and what the library has allocated itself."""
        for tensor in _tensors(values):
            steps = ((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            elements = sum(steps) + 1 if tensor.numel() else 0
            self.library.sass_allow(tensor.data_ptr(), elements * tensor.element_size())
        try:
            yield
        finally:
            self.library.sass_forget()


class Library(on_cpu.Library):
    """The launchers of a library, which may touch the tensors that they are given."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.machine = Machine(path)

    def call(self, name: str, *arguments: Any) -> None:
        with self.machine.allowing(arguments):
            super().call(name, *arguments)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
