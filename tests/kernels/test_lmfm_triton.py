"""What is special to the Triton kernels of a context module: order, blocks, 64-bit offsets, what they read."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from compare import assert_close

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from bcmfnet.kernels import lmfm as kernels  # noqa: E402
from bcmfnet.kernels import pyramid_pool as pooling  # noqa: E402
from bcmfnet.reference.bilinear import _source as reference_source  # noqa: E402
from bcmfnet.reference.lmfm import PyramidWeights, fusing_levels  # noqa: E402
from bcmfnet.reference.lmfm import lmfm as reference  # noqa: E402

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="Triton does not interpret here")

LMFM = ((3, 3, 3, 0, 0), (2, 3, 4, -1, -1))
DAPPM = ((0, 3, 3, 3, 3), (-1, 0, 1, 2, 3))
POOLS = ((5, 2, 2), (9, 4, 4), (17, 8, 8))
ON_A_GPU = [(16, 32), (32, 32), (32, 64), (64, 64)]
GUARD = 16
NAN = float("nan")


def normal(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def guarded(values):
    """The values, within memory of NaN."""
    whole = torch.full([values.numel() + 2 * GUARD], NAN)
    view = whole[GUARD:-GUARD].view(values.shape)
    view.copy_(values)
    return view


def weights_of(structure, channels, width, outputs):
    kernels, receives = structure
    branches, fusing, taps = len(kernels), sum(map(bool, kernels)), sum(kernel**2 for kernel in kernels)
    shapes = ((2, branches + 1, channels), (2, fusing + branches, width), (branches, channels, width),
              (taps, width, width), (branches * width, outputs), (channels, outputs))  # fmt: skip
    fans = (1, 1, channels, 9 * width, branches * width, channels)
    tensors = [
        normal(shape, seed) * (2 / fan) ** 0.5 for seed, (shape, fan) in enumerate(zip(shapes, fans, strict=True))
    ]
    return PyramidWeights(*map(guarded, tensors), POOLS, kernels, receives)


def check(structure=LMFM, shape=(2, 19, 6, 7), width=5, outputs=11):
    """The result, which is written between guards; weights are read between guards."""
    x, weights = guarded(normal(shape, 7)), weights_of(structure, shape[1], width, outputs)
    out = guarded(torch.full((shape[0], outputs, *shape[2:]), NAN))
    kernels.lmfm(x, weights, out)
    exact = PyramidWeights(*(tensor.double() for tensor in weights[:6]), *weights[6:])
    assert_close(out, reference(x.double(), exact))
    around = torch.as_strided(out, [out.numel() + 2 * GUARD], [1], 0)
    assert around[:GUARD].isnan().all() and around[-GUARD:].isnan().all()
    return out


def test_blocks_of_a_gpu(monkeypatch):
    """The interpreter's own are large enough for one program each."""
    monkeypatch.setattr(kernels, "TILES", ON_A_GPU[:1])
    monkeypatch.setattr(kernels, "BEGIN", {"ROWS": 16, "COLUMNS": 16})
    check(shape=(2, 3, 3, 5), width=33)


def test_offsets_of_64_bits_change_no_bit(monkeypatch):
    narrow = check()
    for module in (kernels, pooling):
        monkeypatch.setattr(module, "index_type", lambda largest: tl.int64)
    assert torch.equal(check(), narrow)


@pytest.mark.parametrize(
    ("structure", "launches"),
    [
        (LMFM, "pool scale begin convolve convolve compress"),
        (DAPPM, "pool scale begin convolve convolve convolve convolve compress"),
        (((3, 3, 3, 1, 1), LMFM[1]), "pool scale begin convolve convolve convolve compress"),
        (((0, 0, 0, 0, 0), (-1,) * 5), "pool scale begin compress"),
    ],
)
def test_launches(monkeypatch, structure, launches):
    done = []
    for module, name in (
        (pooling, "pool_kernel"), (kernels, "scale_products"), (kernels, "begin_kernel"),
        (kernels, "convolve_products"), (kernels, "compress_products"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, Counted(getattr(module, name), name.split("_")[0], done))
    check(structure, shape=(1, 2, 3, 2), width=1, outputs=1)
    assert " ".join(done) == launches


class Counted:
    """A kernel that notes its launches."""

    def __init__(self, kernel, name, done):
        self.kernel, self.name, self.done = kernel, name, done

    def __getitem__(self, grid):
        self.done.append(self.name)
        return self.kernel[grid]


def is_fusion(kernels, receives):
    if any(source >= 0 and not kernel for kernel, source in zip(kernels, receives, strict=True)):
        return False
    try:
        fusing_levels(kernels, receives)
    except ValueError:
        return False
    return True


def test_every_slot_is_filled_once_and_before_it_is_read():
    """Of all structures with four branches, by the branches that are added to fill a slot."""
    for sides, receives in product(product((0, 1, 3), repeat=4), product(range(-1, 4), repeat=4)):
        if not is_fusion(sides, receives):
            continue
        fusing = [i for i, side in enumerate(sides) if side]
        begin, launches = kernels.plan(sides, receives)
        filled = {slot: {i, other} - {-1} for slot, i, other in begin}
        assert len(filled) == len(begin)
        for side, tasks, jobs in launches:
            for i, slot, tap in tasks:
                assert (sides[i], fusing[slot]) == (side, i) and slot in filled
                assert tap == sum(side**2 for side in sides[:i])
            for slot, i, other in jobs:
                assert slot not in filled and i in {task[0] for task in tasks}
                filled[slot] = {i, other} - {-1}
        assert filled == {slot: {i, receives[i]} - {-1} for slot, i in enumerate(fusing)} | {
            len(fusing) + i: {i} for i in range(4)
        }


# Rows of the maps that a launch reads, its columns, and the block and the number of blocks that read least.
@pytest.mark.parametrize(
    ("rows", "columns", "dtype", "tile", "blocks"),
    [
        ([512, 128, 32, 8, 1, 512], 128, torch.float16, (32, 64), 78),  # the 1x1s of 1 x 16 x 32 pixels
        ([512, 512], 128, torch.float16, (32, 32), 128),  # two 3x3s
        ([512], 128, torch.float16, (16, 32), 128),  # one
        ([2048, 2048], 128, torch.float16, (64, 64), 128),  # of 8 x 16 x 16 pixels
        ([2048, 2048], 128, torch.float32, (32, 64), 256),
    ],
)
def test_a_launch_fills_the_processors(monkeypatch, rows, columns, dtype, tile, blocks):
    monkeypatch.setattr(kernels, "TILES", ON_A_GPU)
    size, across = kernels.tile(rows, columns, dtype)
    assert (size["ROWS"], size["COLUMNS"]) == tile
    assert sum(triton.cdiv(n, tile[0]) for n in rows) * across == blocks


@triton.jit
def axis(low, high, share, size, out, OUT: tl.constexpr):
    position = tl.arange(0, OUT)
    source = kernels._source(position, size, out)
    tl.store(low + position, source[0])
    tl.store(high + position, source[1])
    tl.store(share + position, tl.where(source[3], 0.0, source[2]))


# No scale, whole even and odd ones, fractions, one source position, and the network's.
@pytest.mark.parametrize(("size", "out"), [(7, 7), (4, 8), (5, 15), (7, 17), (1, 9), (1, 1), (2, 16)])
def test_sources_are_the_references(size, out):
    low, high = torch.zeros(2, 32, dtype=torch.int32)
    share = torch.zeros(32)
    axis[1,](low, high, share, size, out, 32)
    expected_low, expected_high, expected_share = reference_source(size, out)
    assert torch.equal(low[:out].long(), expected_low) and torch.equal(high[:out].long(), expected_high)
    assert torch.equal(share[:out], expected_share.float())
