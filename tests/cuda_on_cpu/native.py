"""The bindings and the CUDA sources as one library of ops for CPU tensors, under torch.ops.bcmfnet_cuda_on_cpu.

Where the address sanitizer is preloaded, they are built with it.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from cuda_on_cpu.build import CSRC, build

from bcmfnet.ops import _op

FOLDER = Path(torch.__file__).parent
OPTIONS = [  # of the bindings
    "-DTORCH_TARGET_VERSION=0x020b000000000000ULL",
    "-DBCMFNET_WITH_CUDA=1",
    '-DBCMFNET_CUDA="on a CPU"',
    f"-I{FOLDER / 'include'}",
    f"-L{FOLDER / 'lib'}",
    "-ltorch_cpu",
]


def native() -> Any:
    """The kernels of the CUDA code by name. Skips the test where there is no compiler."""
    _load()
    return _op.native("bcmfnet_cuda_on_cpu")


@cache
def _load() -> None:
    bindings = [path for path in CSRC.glob("*/*.cpp") if not path.stem.endswith("_cpu")]
    kernels = CSRC.glob("*/*_cuda.cu")
    sanitize = "libasan" in os.environ.get("LD_PRELOAD", "")
    torch.ops.load_library(build(sorted([*bindings, *kernels]), options=OPTIONS, sanitize=sanitize))
