"""Runs what Triton compiles for a GPU that is not here: a driver that launches its machine code on a CPU.

Triton asks its driver for the target to compile for, and hands it each binary and each launch. After `install()` that
is this one, for sm_90, in a process where Triton does not interpret; of a kernel's configurations the first is taken.
"""

from __future__ import annotations

import ctypes
import hashlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sass import cubin, native

TYPES = {
    "i1": ctypes.c_int8, "i8": ctypes.c_int8, "i16": ctypes.c_int16, "i32": ctypes.c_int32, "i64": ctypes.c_int64,
    "u1": ctypes.c_uint8, "u8": ctypes.c_uint8, "u16": ctypes.c_uint16, "u32": ctypes.c_uint32, "u64": ctypes.c_uint64,
    "fp32": ctypes.c_float, "f32": ctypes.c_float, "fp64": ctypes.c_double,
}  # fmt: skip
SHARED, THREADS = 227 << 10, 1024  # of a block, at most


@cache
def install() -> None:
    """Make this the driver of Triton in this process. Skips the test where a tool is missing."""
    triton = pytest.importorskip("triton")
    native.machine()
    triton.runtime.driver.set_active(Driver())


@contextmanager
def scratch() -> Iterator[list[int]]:
    """The bytes of each scratch tensor that the Triton kernels' launchers ask torch for inside."""
    from bcmfnet.kernels import _common

    sizes = []

    def empty(*arguments: Any, **options: Any) -> torch.Tensor:
        tensor = torch.empty(*arguments, **options)
        sizes.append(tensor.nbytes)
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_common, "torch", SimpleNamespace(empty=empty))
        yield sizes


class Driver:
    def __init__(self) -> None:
        self.launcher_cls = Launcher
        self.utils = SimpleNamespace(
            load_binary=load_binary, get_device_properties=lambda device: {"max_shared_mem": SHARED}
        )

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Callable[..., list[float]]:
        return lambda call, quantiles: [0.0 for _ in quantiles]


def load_binary(name: str, binary: bytes, shared: int, device: int) -> tuple[None, str, int, int, int]:
    """Module, function, registers, spills and threads at most, of which Triton needs the function and the last.

    A kernel has one name in all configurations, so the function is named by what is in it too.
    """
    function = f"{name}#{hashlib.sha256(binary).hexdigest()[:16]}"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        lines = cubin.listing(Path(file.name))
        text = "".join(f"{line}\n" for line in lines).replace(f"kernel {name} ", f"kernel {function} ", 1)
    native.machine().library.sass_add(text.encode())
    return None, function, 0, 0, THREADS


class Launcher:
    """Launches a kernel with the arguments of its signature that are not constants, and two pointers to no scratch."""

    def __init__(self, source: Any, metadata: Any) -> None:
        assert not metadata.global_scratch_size and not metadata.profile_scratch_size and metadata.num_ctas == 1
        self.types = list(source.signature.values())
        self.threads, self.shared = 32 * metadata.num_warps, metadata.shared

    def __call__(self, x: int, y: int, z: int, stream: int, function: str, *rest: Any) -> None:
        if 0 in (x, y, z):  # as Triton's own does
            return
        values = rest[4:]  # after packed metadata, that of the launch, and two hooks
        pairs = [(kind, value) for kind, value in zip(self.types, values, strict=True) if kind != "constexpr"]
        arguments = [_argument(*pair) for pair in pairs] + [ctypes.c_void_p(), ctypes.c_void_p()]
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        machine = native.machine()
        with machine.allowing(value for _, value in pairs):
            error = machine.library.sass_launch(
                function.encode(), (ctypes.c_uint * 3)(x, y, z), self.threads, self.shared, pointers
            )
        if error:
            raise RuntimeError(error.decode())


def _argument(kind: str, value: Any) -> Any:
    if kind.startswith("*"):
        return ctypes.c_void_p(value.data_ptr() if isinstance(value, torch.Tensor) else None)
    return TYPES[kind](value)
