"""A kernel that cannot keep what it needs in registers, for the test of the test."""

import triton
import triton.language as tl

from bcmfnet.kernels.autotune import AotCase


@triton.jit
def spill(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    kept = tl.load(x + at)
    for _ in range(2):
        kept += tl.sum(kept, 1)[:, None] * tl.sum(kept, 0)[None, :]
    tl.store(x + at, kept)


def aot_cases():
    yield AotCase("a tile of 256 values a thread", spill, {"x": "*fp32"}, {"ROWS": 64, "COLUMNS": 128}, 1)
