"""What is special to the Triton kernel: its cells, what it skips, and that its launch changes no bit."""

from __future__ import annotations

import pytest
import torch
from grids import grid

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from bcmfnet.kernels import upsample_argmax as kernels  # noqa: E402
from bcmfnet.reference.bilinear import _source as reference_source  # noqa: E402

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="Triton does not interpret here")

GUARD = 64
INF, NAN = float("inf"), float("nan")


def normal(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(logits, size, confident=False):
    """Labels and confidence, each between guards of garbage that must stay; an unwritten element would be garbage."""
    shape = (logits.shape[0], *size)
    outputs = []
    for dtype, garbage in ((torch.uint8 if logits.shape[1] <= 256 else torch.int16, 77), (torch.float16, -7)):
        whole = torch.full([torch.Size(shape).numel() + 2 * GUARD], garbage, dtype=dtype)
        outputs.append((whole, whole[GUARD:-GUARD].view(shape)))
    labels, confidence = outputs[0][1], outputs[1][1] if confident else None
    kernels.upsample_argmax(logits, labels, confidence)
    for whole, _ in outputs:
        assert (torch.cat([whole[:GUARD], whole[-GUARD:]]) == whole[0]).all() and whole[0] in (77, -7)
    return labels, confidence


@pytest.fixture
def relaunched(monkeypatch):
    """Launch with other constants than the launcher's own."""

    def relaunch(cells=kernels.CELLS, **constants):
        class Kernel:
            def __getitem__(self, grid):
                return lambda *a, **k: kernels.upsample_argmax_kernel[grid](*a, **{"ROWS": 8} | k | constants)

        monkeypatch.setattr(kernels, "CELLS", cells)
        monkeypatch.setattr(kernels, "kernel", Kernel())

    return relaunch


@triton.jit
def axis(low, high, first, share, inside, size, out, CELLS: tl.constexpr, OUT: tl.constexpr):
    cell, position = tl.arange(0, CELLS), tl.arange(0, OUT)
    lower, upper, begin = kernels.cell_source(cell, size, out)
    tl.store(low + cell, lower)
    tl.store(high + cell, upper)
    tl.store(first + cell, begin)
    at = cell[:, None] * OUT + position[None, :]
    tl.store(share + at, kernels.lerp_weight(position[None, :], lower[:, None], size, out))
    belongs = kernels.in_cell(position[None, :], cell[:, None], size, out) & (position[None, :] >= begin[:, None])
    tl.store(inside + at, belongs)


# No scale, whole even and odd ones, fractions, barely more than one, one source position, and the network's.
@pytest.mark.parametrize(
    ("size", "out"), [(7, 7), (4, 8), (5, 15), (7, 17), (30, 31), (1, 9), (1, 1), (3, 50), (16, 128), (5, 120)]
)
def test_each_output_is_in_one_cell_with_the_references_sources(size, out):
    cells, length = triton.next_power_of_2(size + 1), triton.next_power_of_2(out)
    low, high, first = torch.zeros(3, cells, dtype=torch.int32)
    share, inside = torch.zeros(cells, length), torch.zeros(cells, length, dtype=torch.bool)
    axis[1,](low, high, first, share, inside, torch.tensor(size).item(), out, cells, length)
    inside = inside[: size + 1, :out]
    assert (inside.sum(0) == 1).all()
    assert inside.sum(1).max() <= triton.cdiv(out, size)
    cell = inside.int().argmax(0)
    expected_low, expected_high, expected_share = reference_source(size, out)
    assert torch.equal(low[cell].long(), expected_low)
    assert torch.equal(share[cell, torch.arange(out)], expected_share.float())
    if size != out:  # the reference does not interpolate there: a second source would bring in its NaN
        assert torch.equal(high[cell].long(), expected_high)
    else:
        assert torch.equal(high[cell], low[cell])
    if out % (8 * size) == 0:  # what ALIGNED promises the compiler
        assert (first[: size + 1] % 4 == 0).all()
        assert (inside.sum(1) % 4 == 0).all()


# Cells of 1 x 15 and 2 x 10 source pixels: 32, a program exactly, and 33, one past it.
@grid(
    {
        "source, size": [((1, 15), (9, 120)), ((2, 10), (16, 80)), ((2, 10), (5, 23))],
        "layout": [torch.contiguous_format, torch.channels_last],
    },
    together=1,
)
def test_the_launch_changes_no_bit(relaunched, source, size, layout):
    logits = normal((2, 5, *source)).contiguous(memory_format=layout)
    expected = run(logits, size, confident=True)
    for cells, constants in (
        (32, {"ROWS": 4}),
        (32, {"ROWS": 2, "MOST_ROWS": 2}),
        (256, {"CHUNK": 16}),
        (64, {"CHUNK": 1}),
        (32, {"INDEX": tl.int64}),
    ):
        relaunched(cells, **constants)
        assert all(map(torch.equal, run(logits, size, confident=True), expected)), (cells, constants)
        assert torch.equal(run(logits, size)[0], expected[0]), (cells, constants)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("size", "seed"),
    [((3, 11), 1), *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in (((8, 24), 0), ((1, 3), 2)))],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's: of NaN, and of overflow where no output is
def test_skipping_classes_is_exact(relaunched, size, seed):
    """With confidence no class is skipped. Logits differ by a few units in the last place, or are out of all bounds."""
    relaunched(1)  # what one cell does not need is skipped
    extremes = torch.tensor([INF, 3e38, 1e38, NAN, -INF, -3e38, -1e38, 0.0])
    draw = torch.randint(24, (2, 11, 1, 3), generator=torch.Generator().manual_seed(seed))
    near = 1 + draw * 2.0**-23
    far, above, below = extremes[draw % 8], extremes[draw % 3], extremes[4 + draw % 3]
    mixed = torch.where(draw % 3 == 0, extremes[draw // 3], normal(draw.shape, seed))
    for logits in (near, far, above, below, mixed):
        assert torch.equal(run(logits, size)[0], run(logits, size, confident=True)[0])


def test_classes_that_cannot_win_are_skipped(relaunched, monkeypatch):
    """Two of 40 classes lead, each in a half: the others, and the one where the other leads, are not evaluated."""
    scored = []
    score = kernels._score
    monkeypatch.setattr(kernels, "_score", lambda *arguments: scored.append(1) or score(*arguments))
    logits = normal((1, 40, 3, 63))
    logits[:, [7, 33]] += 30  # over the others' corners where the halves meet as well
    logits[:, 7, :, :31] += 30
    logits[:, 33, :, 31:] += 30
    relaunched(32)
    labels, _ = run(logits, (24, 504))
    assert (labels[..., :244] == 7).all() and (labels[..., 256:] == 33).all()
    assert len(scored) == 12  # 4 rows of 2 programs: the left one of each meets the border and scores more than one


@pytest.mark.parametrize(
    "classes", [1, 2, *(pytest.param(count, marks=pytest.mark.exhaustive) for count in (150, 256, 257))]
)
def test_the_last_class_can_win(relaunched, classes):
    """One and two classes, a chunk cut short, and the largest label of uint8 and the first that needs int16."""
    relaunched(64)
    logits = normal((1, classes, 2, 3)).clamp(max=2)
    logits[:, -1] = 3
    labels, confidence = run(logits, (9, 10), confident=True)
    assert (labels == classes - 1).all()
    assert torch.equal(run(logits, (9, 10))[0], labels)
    assert (confidence > 0).all()
