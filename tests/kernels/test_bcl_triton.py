"""What is special to the Triton kernels of the loss: programs, pieces of cells, the histogram, offsets of 64 bits."""

from __future__ import annotations

import struct

import pytest
import torch
from compare import assert_close

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from bcmfnet.kernels import _common  # noqa: E402
from bcmfnet.kernels.bcl import full, pixels, selection, upsampled  # noqa: E402
from bcmfnet.ops import backends, boundary_corrected_loss  # noqa: E402
from bcmfnet.reference import bcl as reference  # noqa: E402

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="Triton does not interpret here")

ON_A_GPU = {"PIXELS": 512, "LANES": 128, "SIDE": 32, "ROWS": 8, "HELD": 32}
SMALL = {"PIXELS": 128, "LANES": 32, "SIDE": 4, "ROWS": 4, "HELD": 2}


def run(grid, size, classes=3, **options):
    """Loss, figures and gradient of a case whose scores are equal or far from a rounding."""
    options = {"nms": 3, "ratio": 1 / 16} | options
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-3, 4, (2, classes, *grid), generator=generator).float().requires_grad_()
    target = torch.randint(0, classes, (2, *size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.1] = 255
    with backends.use_backend("triton"):
        value, stats = boundary_corrected_loss(logits, target, mode="paper0", return_stats=True, **options)
        (gradient,) = torch.autograd.grad(value, logits)
    exact = logits.detach().double().requires_grad_()
    expected, figures, _ = reference.loss(exact, target, reference.make_options("paper0", **options))
    return (value, stats, gradient), (expected, figures, torch.autograd.grad(expected, exact)[0])


def assert_agree(actual, expected):
    (value, stats, gradient), (wanted, figures, exact) = actual, expected
    assert_close(value, wanted.detach())
    assert (stats.selected, stats.valid) == (figures.selected, figures.valid)
    assert torch.equal(stats.threshold, figures.threshold)
    assert_close(gradient, exact)


# Pixels of three programs; cells of a piece, of two in a row, of two in a column and of 2 x 3; a scale of 8 / 7.
@pytest.mark.parametrize(
    ("sizes", "grid", "size"),
    [
        (ON_A_GPU, (20, 30), (20, 30)), (ON_A_GPU, (2, 3), (9, 100)), (SMALL, (8, 20), (8, 20)),
        (SMALL, (2, 3), (8, 12)), (SMALL, (3, 2), (3, 12)), (SMALL, (7, 7), (8, 8)),
        pytest.param(SMALL, (1, 5), (8, 5), marks=pytest.mark.exhaustive),
        pytest.param(SMALL, (1, 2), (7, 20), marks=pytest.mark.exhaustive),
    ],
)  # fmt: skip
def test_programs_and_pieces(monkeypatch, sizes, grid, size):
    """The interpreter's own sizes are large enough for one program; these are those of a GPU, and small ones."""
    for name, number in sizes.items():
        for room in (full, upsampled, selection):
            if hasattr(room, name):
                monkeypatch.setattr(room, name, number)
    assert_agree(*run(grid, size, ratio=0.5, nms=5))


@pytest.mark.parametrize(("grid", "size"), [((20, 30), (20, 30)), ((3, 5), (24, 40))])
@pytest.mark.parametrize("per_image", [False, True])
def test_offsets_of_64_bits_change_no_bit(monkeypatch, grid, size, per_image):
    narrow, _ = run(grid, size, per_image=per_image)
    for room in (full, upsampled, selection):
        monkeypatch.setattr(room, "index_type", lambda largest: tl.int64)
    wide, _ = run(grid, size, per_image=per_image)
    assert torch.equal(narrow[0], wide[0]) and torch.equal(narrow[2], wide[2])


@pytest.mark.parametrize(("shape", "largest"), [((2, 3, 4, 5), 119), ((1, 3, 1, 1), 2), ((0, 3, 4, 5), -1)])
def test_the_largest_offset_decides_their_width(shape, largest):
    assert _common.extent(torch.empty(shape)) == largest
    assert _common.index_type(2**31 - 1) == tl.int32 and _common.index_type(2**31) == tl.int64


@triton.jit
def flip(result, length, step, offset, MIRROR: tl.constexpr, BLOCK: tl.constexpr):
    position = tl.arange(0, BLOCK)
    tl.store(result + position, pixels._flipped(position, length, step, offset, MIRROR))


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("step", [1, 2, 3, 40])
def test_flips(mirror, step):
    for length in (1, 2, 7, 32):
        for offset in range(0, 2 * step, 1 + step // 4):
            result = torch.empty(32, dtype=torch.int32)
            flip[1,](result, length, step, offset, mirror, 32)
            expected = reference.flip_index(length, step, "mirror" if mirror else "swap", offset)
            assert torch.equal(result[:length].long(), expected), (length, offset)


def threshold_of(scores, tau, ratio, min_kept, max_kept):
    histogram = torch.zeros(256, 256, dtype=torch.int32)
    histogram.index_put_((scores % 256, scores // 256), torch.tensor(1, dtype=torch.int32), accumulate=True)
    result = torch.empty(1, dtype=torch.int32)
    bits = struct.unpack("q", struct.pack("d", ratio))[0]
    selection.threshold_kernel[1,](histogram, result, tau, bits, min_kept, max_kept, BLOCK=64)
    return result.item()


# No score, one, all equal, ties around the borders of high bytes, all over the grid, two far apart.
@pytest.mark.parametrize(
    "scores",
    [
        [],
        [1],
        [65535],
        [255, 256, 257, 511, 512] * 4,
        *(
            pytest.param(scores, marks=pytest.mark.exhaustive)
            for scores in ([256] * 9, list(range(1, 65536, 113)), [7] * 5 + [65535])
        ),
    ],
    ids=len,
)
def test_thresholds_are_those_of_a_sort(scores):
    scores = torch.tensor(scores, dtype=torch.int64)
    count = len(scores)
    for tau in (0, 256, 65535):
        for ratio, min_kept in ((0.0, 0), (0.0, 3), (1 / 3, 0), (0.29, 1), (0.7, 10**6), (1.0, 0)):
            for max_kept in (1, 4, max(count, 1), count + 1, 2**62):
                options = reference.BclOptions((1, 0, 0), (1, 0, 0), ratio=ratio, min_kept=min_kept, max_kept=max_kept)
                expected = reference._threshold(scores, tau, options).item()
                assert threshold_of(scores, tau, ratio, min_kept, max_kept) == expected, (tau, options)


def test_floor_of_the_share_is_taken_in_float64():
    """0.29 * 100 is 28.999999999999996: float32 has 29."""
    scores = torch.arange(1, 101)
    assert threshold_of(scores, 65535, 0.29, 0, 2**62) == 100 - 28 + 1
