"""lmfm on every backend against the float64 reference, and what an op owes torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compare import assert_close
from grids import grid
from torch.utils.flop_counter import FlopCounterMode

from bcmfnet.nn.context import DAPPM, LMFM
from bcmfnet.ops import PyramidWeights, _cpu, lmfm
from bcmfnet.ops._lmfm import beats_modules
from bcmfnet.reference.lmfm import lmfm as reference

OP = "lmfm"
POOLS = ((5, 2, 2), (9, 4, 4), (17, 8, 8))
NAN = float("nan")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]

# Relative error. Activations between the steps are in the dtype of x; network.md allows 1e-5 and 1e-2.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}

# Pools, sides of the fusing convolutions, and whose result each branch receives.
STRUCTURES = {
    "LMFM": (POOLS, (3, 3, 3, 0, 0), (2, 3, 4, -1, -1)),
    "DAPPM": (POOLS, (0, 3, 3, 3, 3), (-1, 0, 1, 2, 3)),
    "every branch has a 3x3, in a chain": (POOLS, (3, 3, 3, 3, 3), (1, 2, 3, 4, -1)),
    "1x1s at the roots": (POOLS, (3, 3, 3, 1, 1), (2, 3, 4, -1, -1)),
    "without the map itself": (POOLS, (3, 3, 0, 0), (2, 3, -1, -1)),
    "forward without the map itself": (POOLS, (0, 0, 3, 3), (-1, -1, 0, 1)),
    "no pools": ((), (3, 0), (1, -1)),
    "the global average alone": ((), (0,), (-1,)),
    "nothing is fused": (POOLS, (0, 0, 0, 0, 0), (-1, -1, -1, -1, -1)),
    "other windows, all from one": (((1, 1, 0), (3, 3, 1), (5, 1, 2)), (3, 1, 3, 3, 0), (4, 4, 4, 4, -1)),
    "eight branches": (
        ((3, 2, 1), (5, 2, 2), (7, 3, 3), (9, 4, 4), (11, 5, 5), (17, 8, 8)),
        (3, 3, 3, 3, 3, 3, 0, 0), (2, 3, 4, 5, 6, 7, -1, -1),
    ),
}  # fmt: skip
SIZES = {
    "of a CamVid frame": (1, 6, 8),
    "odd": (2, 17, 9),
    "one pixel": (2, 1, 1),
    "one row": (1, 1, 21),
    "one column": (1, 19, 1),
}
WIDTHS = {"aligned": (32, 16, 32), "odd": (19, 5, 11), "one": (1, 1, 1)}  # of x, of the branches, of the result


V3, BF16, AMX = {"avx2"}, {"avx2", "avx512_bf16"}, {"avx2", "avx512_bf16", "amx"}


@pytest.mark.parametrize(
    ("device", "dtype", "faster_on"),
    [
        ("cpu", torch.float32, [V3, BF16, AMX]),
        ("cpu", torch.bfloat16, [V3, AMX]),  # AVX512-BF16 alone speeds torch's convolutions up, not the op
        ("cpu", torch.float16, []),
        ("cuda", torch.float16, [set(), V3, BF16, AMX]),
    ],
)
def test_where_the_op_is_faster_than_the_modules(device, dtype, faster_on):
    assert [cpu for cpu in (set(), V3, BF16, AMX) if beats_modules(device, dtype, cpu)] == faster_on


def test_features_are_those_that_the_system_names():
    flags = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else None
    if not flags or "avx2" not in flags:
        pytest.skip("this system does not name the features of its x86 CPU")
    named = {"avx2": "avx2", "avx512_bf16": "avx512_bf16", "amx": "amx_tile"}
    assert _cpu.features() == {name for name, flag in named.items() if flag in flags}


def normal(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def weights_of(structure, widths, shortcut=True, dtype=torch.float32, seed=1) -> PyramidWeights:
    """Random weights, scaled so that every map has values of about 1; norms multiply by either sign."""
    pools, kernels, receives = structure
    channels, branch_channels, outputs = widths
    branches = len(kernels)

    def matrix(*shape, fan_in):
        nonlocal seed
        seed += 1
        return (normal(shape, torch.float64, seed) * (2 / fan_in) ** 0.5).to(dtype)

    taps = [
        matrix(kernel**2, branch_channels, branch_channels, fan_in=kernel**2 * branch_channels)
        for kernel in kernels
        if kernel
    ]

    def norms(count, channels):
        values = normal((2, count, channels), torch.float64, seed + count)
        values[1] /= 2
        return values.to(torch.promote_types(dtype, torch.float32))

    return PyramidWeights(
        scale_norms=norms(branches + shortcut, channels),
        fusion_norms=norms(sum(map(bool, kernels)) + branches, branch_channels),
        scale=matrix(branches, channels, branch_channels, fan_in=channels),
        process=torch.cat(taps) if taps else torch.zeros(0, branch_channels, branch_channels, dtype=dtype),
        compression=matrix(branches * branch_channels, outputs, fan_in=branches * branch_channels),
        shortcut=matrix(channels, outputs, fan_in=channels) if shortcut else None,
        pools=pools,
        kernels=kernels,
        receives=receives,
    )


def moved(weights, device, dtype=None):
    """The same weights elsewhere; in another dtype, their values as they are."""
    tensors = [None if t is None else t.to(device).to(dtype or t.dtype) for t in weights[:6]]
    return PyramidWeights(*tensors, *weights[6:])


def assert_reference(device, x, weights, layout=torch.contiguous_format):
    x = x.contiguous(memory_format=layout)
    actual = lmfm(x.to(device), moved(weights, device))
    assert actual.dtype == x.dtype and actual.is_contiguous(memory_format=layout)
    assert_close(
        actual.cpu(), reference(x.double(), moved(weights, "cpu", torch.float64)), tolerance=TOLERANCE[x.dtype]
    )


@grid({"structure": STRUCTURES, "widths": WIDTHS}, together=1)
@pytest.mark.usefixtures("poisoned")
def test_every_structure(device, structure, widths):
    x = normal((2, widths[0], 5, 7))
    assert_reference(device, x, weights_of(structure, widths))
    assert_reference(device, x, weights_of(structure, widths, shortcut=False), torch.channels_last)


@grid({"size": SIZES, "dtype": DTYPES, "layout": LAYOUTS}, together=1)
@pytest.mark.usefixtures("poisoned")
def test_every_size_and_dtype(device, size, dtype, layout):
    batch, height, width = size
    x = normal((batch, 19, height, width), dtype)
    assert_reference(device, x, weights_of(STRUCTURES["LMFM"], WIDTHS["odd"], dtype=dtype), layout)


@pytest.mark.tail
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["LMFM", "DAPPM"])
def test_more_channels_than_a_block_takes(device, name, dtype):
    x = normal((1, 80, 6, 13), dtype)
    assert_reference(device, x, weights_of(STRUCTURES[name], (80, 72, 70), dtype=dtype), torch.channels_last)


@pytest.mark.parametrize(
    ("name", "shape", "widths"),
    [
        pytest.param(
            "DAPPM", (1, 1500, 3, 5), (1500, 72, 20), marks=pytest.mark.tail
        ),  # input channels in several chunks, the last cut short
        pytest.param("DAPPM", (1, 700, 3, 5), (700, 72, 20), marks=pytest.mark.tail),
        ("LMFM", (2, 24, 64, 64), (24, 16, 24)),  # pixels enough for a larger tile
    ],
)
def test_chunks_and_larger_tiles(device, request, name, shape, widths):
    if "triton" in request.node.name:
        shape = (*shape[:2], *(min(side, 12) for side in shape[2:]))  # it is interpreted
    assert_reference(device, normal(shape), weights_of(STRUCTURES[name], widths))


@pytest.mark.parametrize(("module", "name"), [(LMFM, "LMFM"), (DAPPM, "DAPPM")])
def test_the_modules_pack_what_the_reference_reads(module, name):
    """The structures above are those of the modules; their results are compared in tests/nn/test_context.py."""
    packed = module(24, 16, branch_channels=8).pyramid_weights(torch.float32)
    assert (packed.pools, packed.kernels, packed.receives) == STRUCTURES[name]


@pytest.mark.tail
def test_nothing_is_read_beyond_the_map(device):
    weights = moved(weights_of(STRUCTURES["LMFM"], WIDTHS["odd"]), device)
    for layout in (torch.contiguous_format, torch.channels_last):
        for batch, height, width in SIZES.values():
            around = torch.full((batch + 2, 21, height + 2, width + 2), NAN).to(memory_format=layout).to(device)
            view = around[1:-1, 1:-1, 1:-1, 1:-1]
            view.copy_(normal(view.shape))
            assert lmfm(view, weights).isfinite().all()


def test_nan_survives_every_relu(device):
    """A NaN in x is in the global average, and so everywhere in its image, and in no other."""
    x = normal((2, 19, 6, 8))
    x[1, 3, 2, 2] = NAN
    result = lmfm(x.to(device), moved(weights_of(STRUCTURES["LMFM"], WIDTHS["odd"]), device))
    assert result[0].isfinite().all()
    assert result[1].isnan().all()


def test_an_image_does_not_depend_on_its_batch(device):
    x, weights = normal((3, 19, 6, 8)).to(device), moved(weights_of(STRUCTURES["DAPPM"], WIDTHS["odd"]), device)
    assert_close(lmfm(x, weights)[1:2], lmfm(x[1:2], weights))


@pytest.mark.exhaustive
@pytest.mark.parametrize("level", ["v3", "plain", "v4", "amx"])
def test_every_level_of_instruction_sets(at_level, level):
    code = """
import torch
from test_lmfm import STRUCTURES, WIDTHS, assert_reference, normal, weights_of
from test_pyramid_pool import test_pools_and_gradients_are_torchs as check_pools, CASES
for dtype in (torch.float32, torch.bfloat16):
    for layout in (torch.contiguous_format, torch.channels_last):
        for structure in STRUCTURES.values():
            for widths in (*WIDTHS.values(), (80, 72, 70)):
                x = normal((2, widths[0], 7, 18), dtype)
                assert_reference("cpu", x, weights_of(structure, widths, dtype=dtype), layout)
        for shape, pools in CASES.values():
            check_pools("cpu", shape, pools, dtype, layout)
"""
    at_level(level, OP, code)


def test_operations_are_counted_as_those_of_the_modules():
    """torch's own counter, over the modules' convolutions and over the op."""
    for module in (LMFM, DAPPM):
        context, x = module(24, 16, branch_channels=8).eval(), normal((2, 24, 16, 17))
        with FlopCounterMode(display=False) as modules:
            context(x)
        with FlopCounterMode(display=False) as op, torch.no_grad():
            context(x)
        assert op.get_total_flops() == modules.get_total_flops()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["LMFM", "DAPPM"])
def test_the_networks_size_on_a_gpu(cuda, name, dtype):
    for shape in ((1, 512, 16, 32), (8, 512, 16, 16)):
        weights = weights_of(STRUCTURES[name], (512, 128, 128), dtype=dtype)
        assert_reference(cuda, normal(shape, dtype), weights, torch.channels_last)


GOOD = weights_of(STRUCTURES["LMFM"], (4, 3, 5))


@pytest.mark.parametrize(
    ("x", "changes", "error", "message"),
    [
        ("x", {}, TypeError, "x: expected a tensor, got str"),
        (torch.zeros(1, 4, 6, 8).int(), {}, TypeError, "x: expected float16, bfloat16, float32 or float64, got int32"),
        (torch.zeros(4, 6, 8), {}, ValueError, "x: expected [N, C, H, W] with C, H, W >= 1, got [4, 6, 8]"),
        (torch.zeros(1, 5, 6, 8), {}, ValueError, "scale: expected [4 or 5, 5, b], got [5, 4, 3]"),
        (None, {"scale_norms": torch.zeros(2, 5, 4)}, ValueError, "scale_norms: expected [2, 6, 4], got [2, 5, 4]"),
        (None, {"scale_norms": GOOD.scale_norms.double()}, TypeError,
         "scale_norms: expected torch.float32 on cpu, got torch.float64 on cpu"),
        (None, {"fusion_norms": torch.zeros(2, 24)}, ValueError, "fusion_norms: expected [2, 8, 3], got [2, 24]"),
        (None, {"scale": GOOD.scale.half()}, TypeError,
         "scale: expected torch.float32 on cpu, got torch.float16 on cpu"),
        (None, {"process": GOOD.process[:9]}, ValueError, "process: expected [27, 3, 3], got [9, 3, 3]"),
        (None, {"process": GOOD.process.mT}, ValueError,
         "process: expected a contiguous tensor, got strides [9, 1, 3]"),
        (None, {"compression": GOOD.compression[1:]}, ValueError, "compression: expected [15, 5], got [14, 5]"),
        (None, {"shortcut": GOOD.shortcut.T}, ValueError, "shortcut: expected [4, 5], got [5, 4]"),
        (None, {"kernels": (3, 3, 3.0, 0, 0)}, TypeError, "kernels: expected integers, got (3, 3, 3.0, 0, 0)"),
        (None, {"receives": (2, 3, True, -1, -1)}, TypeError, "receives: expected integers, got (2, 3, True, -1, -1)"),
        (None, {"kernels": (3, 3, 2, 0, 0)}, ValueError, "kernels: expected 5 of 0, 1 or 3, got [3, 3, 2, 0, 0]"),
        (None, {"receives": (2, 3, 5, -1, -1)}, ValueError, "receives: expected 5 of -1 to 4, got [2, 3, 5, -1, -1]"),
        (None, {"receives": (2, 3, 4, -1, 1)}, ValueError,
         "receives: expected -1 where kernels is 0, got [2, 3, 4, -1, 1] and [3, 3, 3, 0, 0]"),
        (None, {"receives": (2, 3, 0, -1, -1)}, ValueError, "receives: expected no circle, got [2, 3, 0, -1, -1]"),
        (None, {"pools": ((4, 2, 2),) * 3}, ValueError,
         "pools: expected (kernel, stride, padding) triples, kernel = 2 * padding + 1, "
         "got ((4, 2, 2), (4, 2, 2), (4, 2, 2))"),
    ],
)  # fmt: skip
def test_bad_arguments(x, changes, error, message):
    with pytest.raises(error) as caught:
        lmfm(torch.zeros(1, 4, 6, 8) if x is None else x, GOOD._replace(**changes))
    assert str(caught.value) == message


def test_weights_of_another_type():
    with pytest.raises(TypeError, match="^weights: expected PyramidWeights, got LMFM$"):
        lmfm(torch.zeros(1, 4, 6, 8), LMFM(4, 5))
