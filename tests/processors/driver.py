"""The C++ kernels and their bindings as a program without torch, compiled for a processor and run on it or emulated."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
OPTIONS = "-std=c++17 -O2 -fno-math-errno -fno-trapping-math -Wall -Wextra -Werror -DBCMFNET_WITH_CUDA=0"
DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip
NOTHING, TENSOR, REALS, INTEGERS, FLAG = range(5)


class Processor(NamedTuple):
    """How to compile for a processor, with one of the levels of csrc/common/isa.h, and to run what comes out."""

    compiler: str
    options: Sequence[str]
    level: str = "plain"
    emulator: Sequence[str] = ()
    machine: str = ""
    """The machine that it is, where it is not emulated."""


# On x86-64 the bindings name the kernels of every level; those that are not here are not called.
_ONE_LEVEL = ("-no-pie", "-Wl,--unresolved-symbols=ignore-in-object-files")
PROCESSORS = {
    "aarch64": Processor("aarch64-linux-gnu-g++", ["-static"], emulator=["qemu-aarch64-static"]),
    "x86-64": Processor("g++", _ONE_LEVEL, machine="x86_64"),
    "x86-64-v3": Processor("g++", ["-march=x86-64-v3", *_ONE_LEVEL], "v3", machine="x86_64"),
}


def missing(processor: Processor) -> str | None:
    """Why a processor's program cannot be made or run here."""
    if platform.system() != "Linux":
        return "the programs are for Linux"
    for program in (processor.compiler, *processor.emulator[:1]):
        if shutil.which(program) is None:
            return f"{program} is not on PATH"
    if processor.machine and processor.machine != platform.machine():
        return f"this processor is {platform.machine()}, not {processor.machine}"
    if processor.level == "v3" and " avx2 " not in Path("/proc/cpuinfo").read_text():
        return "this processor has no AVX2"
    return None


def build(processor: Processor, folder: Path) -> Path:
    """The program, in a folder for it and its objects. Warnings are errors: subprocess.CalledProcessError."""
    sources = [HERE / "driver.cpp", *(path for path in CSRC.glob("*/*.cpp") if path.stem != "build_info")]
    command = [
        processor.compiler, *OPTIONS.split(), *processor.options,
        f"-DBCM_ISA={processor.level}", f"-I{CSRC}", f"-I{HERE}",
    ]  # fmt: skip

    def compiled(source: Path) -> Path:
        output = folder / f"{source.stem}.o"
        subprocess.run([*command, "-c", str(source), "-o", str(output)], check=True)
        return output

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    subprocess.run([*command, *map(str, objects), "-o", str(folder / "driver")], check=True)
    return folder / "driver"


class Driver:
    """Kernels by name, as `bcmfnet.ops._op.native` has them; each call is a process. `calls` counts them."""

    def __init__(self, program: Path, processor: Processor) -> None:
        self.calls = 0
        self._command = [*processor.emulator, str(program)]
        self._environment = {**os.environ, "BCMFNET_CPU_LEVEL": processor.level}

    def __call__(self, kernel: str) -> Callable[..., bool]:
        return lambda *arguments: self._run(f"_{kernel}", arguments)

    def _run(self, name: str, arguments: Sequence[Any]) -> bool:
        self.calls += 1
        call = b"".join([_counted(name.encode()), _integers(len(arguments)), *map(_argument, arguments)])
        done = subprocess.run(self._command, input=call, env=self._environment, capture_output=True)
        if done.returncode:
            raise RuntimeError(f"{name}: the program returned {done.returncode}: {done.stderr.decode()}")
        at = 8
        for tensor in arguments:
            if isinstance(tensor, Tensor):  # outputs come last: they may stand in the memory of an input
                storage = tensor.untyped_storage()
                ctypes.memmove(storage.data_ptr(), done.stdout[at : at + storage.nbytes()], storage.nbytes())
                at += storage.nbytes()
        assert at == len(done.stdout), f"{name}: expected an answer of {at} bytes, got {len(done.stdout)}"
        return done.stdout[0] != 0


def _argument(value: Any) -> bytes:
    match value:
        case None:
            return _integers(NOTHING)
        case bool():
            return _integers(FLAG, value)
        case Tensor():
            storage = value.untyped_storage()
            offset = value.storage_offset() * value.element_size()
            return b"".join([
                _integers(TENSOR, DTYPES.index(value.dtype)), _list(value.shape), _list(value.stride()),
                _integers(offset), _counted(ctypes.string_at(storage.data_ptr(), storage.nbytes())),
            ])  # fmt: skip
        case [float(), *_]:
            return _integers(REALS, len(value)) + struct.pack(f"<{len(value)}d", *value)
        case _:
            return _integers(INTEGERS) + _list(value)


def _integers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def _list(values: Sequence[int]) -> bytes:
    return _integers(len(values), *values)


def _counted(data: bytes) -> bytes:
    return _integers(len(data)) + data
