"""Autotuning that also works under the interpreter, which has no clock to choose by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import triton


def autotune(configs: list[triton.Config], key: list[str]) -> Callable[[Any], Any]:
    """triton.autotune on a GPU, the first of `configs` under the interpreter.

    `key` names the arguments of the kernel that decide which configuration is fastest; the dtypes of its tensors always
    belong to it. Leave sizes of images out: each new value of a key argument measures every configuration again.

    The first call of a key compiles, measures and waits for the GPU, so make it before a CUDA graph is captured; later
    calls look the choice up and only launch. The kernel runs many times while it is measured: it must write the same
    outputs however often it runs.
    """
    return triton.autotune(configs[:1] if triton.knobs.runtime.interpret else configs, key=key)


class AotCase(NamedTuple):
    """A kernel as it is launched somewhere: what `aot_cases` of each module yields, to be compiled without a GPU."""

    name: str
    function: Any
    signature: dict[str, str]
    """Types of the arguments that are no constants, by name: "*fp32", "i32"."""
    constants: dict[str, Any]
    num_warps: int
