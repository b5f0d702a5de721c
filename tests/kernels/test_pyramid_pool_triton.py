"""What is special to the Triton kernels of pyramid pooling: blocks, launches, offsets of 64 bits, what they read."""

from __future__ import annotations

import pytest
import torch
from compare import assert_close

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from bcmfnet.kernels import pyramid_pool as kernels  # noqa: E402
from bcmfnet.reference import pyramid_pool as reference  # noqa: E402

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="Triton does not interpret here")

POOLS = ((5, 2, 2), (9, 4, 4), (1, 3, 0))  # windows summed along with others, alone, and of one pixel
NUMBERS = [number for pool in POOLS for number in pool]
GUARD = 16
NAN = float("nan")


def normal(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def guarded(count):
    """Memory of that many elements, within NaN."""
    return torch.full([count + 2 * GUARD], NAN)[GUARD:-GUARD]


def assert_guarded(view):
    around = torch.as_strided(view, [view.numel() + 2 * GUARD], [1], view.storage_offset() - GUARD)
    assert around[:GUARD].isnan().all() and around[-GUARD:].isnan().all()


def packed(maps, channels_last):
    return torch.cat([(y.movedim(1, 3) if channels_last else y).flatten() for y in maps])


def check(shape, channels_last):
    """Maps and gradient, written between guards; the gradient of the maps is read between guards."""
    x = normal(shape)
    expected = packed(reference.pyramid_pool(x.double(), POOLS), channels_last)
    result = guarded(expected.numel())
    kernels.forward(x, NUMBERS, channels_last, result)
    assert_close(result, expected)
    assert_guarded(result)

    sizes = reference.pooled_sizes(*shape[2:], POOLS)
    grads = [normal((*shape[:2], *size), seed) for seed, size in enumerate(sizes)]
    grad, gradient = guarded(expected.numel()), guarded(x.numel())
    grad.copy_(packed(grads, channels_last))
    kernels.backward(grad, NUMBERS, channels_last, gradient.view(shape))
    exact = reference.pyramid_pool_backward([g.double() for g in grads], shape[2:], POOLS)
    assert_close(gradient.view(shape), exact)
    assert_guarded(gradient)
    return result, gradient


@pytest.fixture
def blocks_of_a_gpu(monkeypatch):
    """The interpreter's own are large enough for one program each."""
    monkeypatch.setattr(kernels, "LANES", kernels.MANY)
    monkeypatch.setattr(kernels, "PIXELS", 32)


# Blocks cut short, and whole ones; a block of channels and one more; a map of one pixel.
@pytest.mark.parametrize("shape", [(2, 3, 7, 9), (1, 33, 8, 8), (3, 2, 1, 1)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.usefixtures("blocks_of_a_gpu")
def test_blocks(shape, channels_last):
    check(shape, channels_last)


@pytest.mark.parametrize("channels_last", [False, True])
def test_offsets_of_64_bits_change_no_bit(monkeypatch, channels_last):
    narrow = check((2, 3, 7, 9), channels_last)
    monkeypatch.setattr(kernels, "index_type", lambda largest: tl.int64)
    assert all(map(torch.equal, narrow, check((2, 3, 7, 9), channels_last)))


def test_a_launch_each(monkeypatch):
    launches = []
    for name in ("pool_kernel", "gradient_kernel"):
        monkeypatch.setattr(kernels, name, Counted(getattr(kernels, name), launches))
    check((2, 3, 7, 9), True)
    assert launches == ["pool_kernel", "gradient_kernel"]


class Counted:
    """A kernel that notes its launches."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        self.launches.append(self.kernel.__name__)
        return self.kernel[grid]


@triton.jit
def locate(result, batch, H, W, MAPS: tl.constexpr, BLOCKS: tl.constexpr):
    place = kernels.locate_block(tl.program_id(0), batch, H, W, MAPS, BLOCKS)
    for i in tl.static_range(3):
        tl.store(result + tl.program_id(0) * 3 + i, place[i])


@pytest.mark.parametrize("size", [(1, 1), (7, 9)])
def test_every_block_belongs_to_one_map(size):
    maps, blocks = (*POOLS, kernels.GLOBAL), (4, 1, 128, 1)
    expected, before = [], 0
    for number, ((h, w), block) in enumerate(zip(kernels.sizes(*size, maps), blocks, strict=True)):
        expected += [[number, row, before] for row in range(0, 2 * h * w, block)]
        before += 2 * h * w
    result = torch.empty(len(expected), 3, dtype=torch.int32)
    batch, H, W = torch.tensor([2, *size]).tolist()
    locate[len(expected),](result, batch, H, W, maps, blocks)
    assert result.tolist() == expected


def test_windows_are_summed_with_as_many_taps_as_they_need():
    maps = ((1, 1, 0), (3, 2, 1), (5, 2, 2), (7, 3, 3), (17, 8, 8), kernels.GLOBAL)
    constants = kernels.windows(maps)
    few, many = kernels.FEW, kernels.MANY
    assert [row[3] for row in constants["MAPS"]] == [1, few, few, many, many, many]
    assert constants["TAPS"] == (1, few, many)
    assert all(
        row[3] * block == kernels.LANES for row, block in zip(constants["MAPS"], constants["BLOCKS"], strict=True)
    )


@pytest.mark.parametrize("size", [(1, 1), (6, 8), (17, 40)])
def test_no_pixel_is_in_more_windows_than_are_gathered(size):
    pools = [(2 * padding + 1, stride, padding) for padding in range(5) for stride in range(1, 12)]
    for (kernel, stride, padding, *most), maps in zip(
        kernels._holders(*size, pools), kernels.sizes(*size, pools), strict=True
    ):
        for length, count, limit in zip(size, maps, most, strict=True):
            held = reference._window(length, count, kernel, stride, padding).sum(0).max()
            assert held <= limit, (kernel, stride, length)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities
def test_bfloat16_is_rounded_to_the_nearest():
    """By the interpreter too, which by itself cuts off: halfway cases, the largest value, NaN, infinities."""
    values = torch.tensor([1.00390625, 1.01171875, -1.00390625, 3.4e38, 1e-40, NAN, float("inf"), -float("inf")])
    x, result = torch.cat([values, normal(56)]), torch.empty(64 * 2, dtype=torch.bfloat16)
    kernels.pool(x.view(1, 64, 1, 1), [kernels.GLOBAL, (1, 1, 0)], False, result)
    assert torch.equal(result.view(2, 64)[1].nan_to_num(nan=7), x.bfloat16().nan_to_num(nan=7))
