"""The emulator of machine code: the faults that it must see, and counts that were made by hand.

That it computes what a GPU does is for the judges of tests/cuda_on_cpu to say, which it runs as well.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sass.build import Library, build
from sass.cubin import disassembler

pytestmark = pytest.mark.exhaustive  # nvcc takes seconds

KERNELS = Path(__file__).parent / "kernels"
THREADS = 64


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(build([KERNELS / "faults.cu"]))


def run(library: Library, kernel: str, given: torch.Tensor, fault: int) -> torch.Tensor:
    out = torch.zeros(THREADS)
    library.call(f"run_{kernel}", given, out, fault)
    return out


def other_warp(given: torch.Tensor) -> torch.Tensor:
    return given.roll(32)


NUMBERS = torch.arange(THREADS).float()
PAIRS = torch.arange(2 * THREADS).float()
FLIPPED = NUMBERS.view(-1, 2).flip(1).flatten()
UNWRITTEN = "stores what follows from shared memory that was not written"

# A kernel, what makes it wrong, what it is given, what it computes where it is right, and where it fails.
FAULTS = [
    ("shifted", 1, NUMBERS, NUMBERS, 63, "LDG.E",
     r"reads 4 bytes at 0x\w+, 0 bytes behind the end of an allocation of 256"),
    ("shifted", -2, NUMBERS, NUMBERS, 0, "LDG.E", r"reads 4 bytes at 0x\w+, 8 bytes before an allocation of 256"),
    ("by_pairs", 1, PAIRS, PAIRS[::2] + PAIRS[1::2], 0, "LDG.E.64", r"reads 8 bytes at 0x\w+, a misaligned address"),
    ("unwritten", 1, NUMBERS, other_warp(NUMBERS), 0, "STG.E", UNWRITTEN),
    ("missing_barrier", 1, NUMBERS, other_warp(NUMBERS), 0, "STG.E", UNWRITTEN),
    ("missing_barrier_in_loop", 1, NUMBERS, 3 * other_warp(NUMBERS) + 3, 32, "LDS",
     "reads shared memory at 0 that another warp has written since the last barrier"),
    ("missing_barrier_before_write", 1, NUMBERS, other_warp(NUMBERS), 32, "STS",
     "writes shared memory at 128 that another warp has read since the last barrier"),
    ("absent_lane", 1, NUMBERS, FLIPPED, 6, "SHFL.BFLY", "reads lane 7, which is not there"),
    ("dynamic_shared", 1, NUMBERS, NUMBERS, 63, "STS",
     "an access of 4 bytes of shared memory at 256, outside of its 256"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kernel", "fault", "given", "expected", "thread", "instruction", "reason"),
    [pytest.param(*values, id=f"{values[0]} by {values[1]}") for values in FAULTS],
)
def test_faults_are_seen(library, kernel, fault, given, expected, thread, instruction, reason):
    torch.testing.assert_close(run(library, kernel, given, 0), expected, rtol=0, atol=0)
    where = rf"block \(0, 0, 0\), warp {thread // 32}, lane {thread % 32}, /\*\w+\*/ {instruction} .* \(faults.cu:\d+\)"
    with pytest.raises(RuntimeError, match=f"^{kernel}(<true>)?, {where}: {reason}$"):
        run(library, kernel, given, fault)
    run(library, kernel, given, 0)  # the error does not stay


def test_a_barrier_that_not_all_meet(library):
    torch.testing.assert_close(run(library, "divergent_barrier", NUMBERS, 0), NUMBERS + 1, rtol=0, atol=0)
    waits = [
        r"warp 0 lanes 0xffffffff wait at /\*\w+\*/ BAR.SYNC.*",
        "warp 1 lanes 0xffffff00 wait at .*, lanes 0xff wait at .*",
    ]
    with pytest.raises(
        RuntimeError, match=rf"^divergent_barrier, block \(0, 0, 0\): divergent barrier: {'; '.join(waits)}$"
    ):
        run(library, "divergent_barrier", NUMBERS, 1)


def test_unwritten_numbers_may_be_computed_with(library):
    """As a compiler does that reads four words for one, and a loop that is unrolled."""
    expected = torch.where(torch.arange(THREADS) < 32, 1, 2 * other_warp(NUMBERS))
    torch.testing.assert_close(run(library, "unwritten_unused", NUMBERS, 1), expected, rtol=0, atol=0)


def test_a_memset_outside_of_what_is_allocated(library):
    out = torch.ones(4)
    library.call("run_clear", out, 16)
    assert not out.any()
    with pytest.raises(RuntimeError, match="^cudaMemsetAsync: writes outside of what is allocated$"):
        library.call("run_clear", out, 17)


def test_instructions_are_counted(library):
    """Of 3 blocks of 2 warps, of which the first goes 5 times through a loop."""
    rows, blocks, warps = 5, 3, 2
    given, out = torch.zeros(rows * 32 * 16), torch.zeros(blocks * THREADS)
    with library.machine.counting() as counts:
        library.call("run_counted", given, out, rows)
    assert (out == rows).all()
    (count,) = counts
    assert (count.kernel, count.launches, count.blocks, count.warps, count.threads) == ("counted", 1, 3, 6, 64)
    assert count.shared == 1024 + 128
    of = count.instructions
    assert of["global load 4"] == rows * blocks and of["global store 4"] == of["shared load 4"] == warps * blocks
    assert of["shared store 4"] == blocks and of["barrier"] == warps * blocks
    assert of["special"] == rows * blocks  # MUFU.EX2
    assert (count.reads.requests, count.reads.sectors) == (rows * blocks, rows * blocks * 32)  # each lane its own
    assert (count.writes.requests, count.writes.sectors) == (warps * blocks, warps * blocks * 4)  # 128 bytes
    assert count.reads.unique == rows * 32 and count.writes.unique == blocks * warps * 4


def test_every_instruction_up_to_the_end_is_counted(library):
    """A kernel without a branch: what its code has before EXIT, and that, twice."""
    with library.machine.counting() as counts:
        run(library, "shifted", NUMBERS, 0)
    (count,) = counts
    code = [line.split(maxsplit=3)[3] for line in library.machine.listing("shifted")]
    assert sum(count.instructions.values()) == 2 * (code.index("EXIT") + 1)


def test_the_disassembler_is_found(library):
    assert Path(disassembler()).name == "cuobjdump"


@pytest.fixture(scope="module")
def features() -> Library:
    return Library(build([KERNELS / "features.cu"]))


def test_asynchronous_copies_and_matrices(features):
    """Lane 4g + t has of each 8x8 matrix the elements (g, 2t) and (g, 2t + 1); transposed, (2t, g) and (2t + 1, g)."""
    halves, words = torch.arange(32 * 8, dtype=torch.int16).view(4, 8, 8), torch.arange(100, 132, dtype=torch.int32)
    out = torch.zeros(32, 8, dtype=torch.int32)
    features.call("run_copied", halves, words, out)
    expected = halves.view(torch.int32).reshape(4, 32).T
    torch.testing.assert_close(out[:, :4], expected)
    turned = halves[:2].transpose(1, 2).contiguous().view(torch.int32).reshape(2, 32).T
    torch.testing.assert_close(out[:, 4:6], turned)
    torch.testing.assert_close(out[:, 6], torch.where(torch.arange(32) < 16, words, 0))


def test_packed_numbers(features):
    a, b = (torch.randint(-(2**31), 2**31, (32,), dtype=torch.int64).to(torch.int32) for _ in range(2))
    out = torch.zeros(32, 7, dtype=torch.int32)
    features.call("run_packed", a, b, out)
    x, y, got = (t.contiguous().view(torch.int16).view(32, -1) for t in (a, b, out[:, :4].contiguous()))
    unsigned = [t.to(torch.int32) & 0xFFFF for t in (x, y)]
    assert ((got[:, :2].to(torch.int32) & 0xFFFF) == torch.maximum(*unsigned)).all()
    assert ((got[:, 2:4].to(torch.int32) & 0xFFFF) == torch.minimum(*unsigned)).all()
    assert (got[:, 4:6] == torch.maximum(x, y)).all()
    assert (got[:, 6:8] == x + y).all()
    assert (out[:, 4] == (a << 20) >> 20).all()
    p, q = x.view(torch.float16), y.view(torch.float16)
    assert (out[:, 5] == torch.where(p[:, 0] < q[:, 1], a, b)).all()
    third = unsigned[0][torch.arange(32) ^ 1]
    largest = torch.maximum(torch.maximum(*unsigned), third)
    assert ((out[:, 6:].contiguous().view(torch.int16).to(torch.int32) & 0xFFFF) == largest).all()


def test_a_dependent_launch(features):
    given, out = torch.rand(32) + 0.1, torch.zeros(32, 2)
    features.call("run_dependent", given, out)
    torch.testing.assert_close(out, torch.stack([given.log2(), given.reciprocal()], 1), rtol=1e-6, atol=1e-6)
