"""The bindings and the machine code of the CUDA sources as a library of ops for CPU tensors: torch.ops.bcmfnet_sass."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from cuda_on_cpu.build import CSRC
from cuda_on_cpu.native import OPTIONS
from sass.build import HERE, Machine, build

from bcmfnet.ops import _op

SCRATCH = "_ZN7bcmfnet17make_cuda_scratchElRKN5torch6stable6TensorE"  # make_cuda_scratch, see scratch.cpp


def native() -> Any:
    """The kernels of the machine code by name. Skips the test where a tool is missing."""
    executed, kernels = machine(), _op.native("bcmfnet_sass")

    @cache
    def kernel(name: str) -> Any:
        def call(*arguments: Any) -> Any:
            with executed.allowing(arguments):
                return kernels(name)(*arguments)

        return call

    return kernel


@cache
def machine() -> Machine:
    """What those kernels run on."""
    bindings = [path for path in CSRC.glob("*/*.cpp") if not path.stem.endswith("_cpu")]
    bindings = [*sorted(bindings), HERE / "scratch.cpp"]
    library = build(sorted(CSRC.glob("*/*_cuda.cu")), bindings=bindings, options=[*OPTIONS, f"-Wl,--wrap={SCRATCH}"])
    torch.ops.load_library(library)
    return Machine(library)
