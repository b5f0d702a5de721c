"""The C++ kernels on other processors, without torch: what tests/ops asks of them, some cases of each op.

aarch64 is emulated. The same program compiled for this processor shows that the program itself is right.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, product

import pytest
import torch
from ops import test_bcl_backends as bcl
from ops import test_lmfm as lmfm
from ops import test_pyramid_pool as pyramid_pool
from ops import test_stem_conv as stem_conv
from ops import test_terms_backends as terms
from ops import test_upsample_add_relu as upsample_add_relu
from ops import test_upsample_argmax as upsample_argmax
from processors.driver import PROCESSORS, Driver, build, missing

from bcmfnet.ops import backends

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
NOT_FINITE = (float("nan"), float("inf"), -float("inf"))


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.exhaustive) for name in PROCESSORS])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Driver:
    processor = PROCESSORS[request.param]
    reason = missing(processor)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return Driver(build(processor, tmp_path_factory.mktemp(request.param)), processor)


@pytest.fixture(autouse=True)
def calls(program: Driver, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """The program serves every op on a CPU, in place of the C++ library; a test that does not call it fails."""
    monkeypatch.setattr(backends, "_table", {key: dict(row) for key, row in backends._table.items()})
    for op in [op for op, device in backends._table if device == "cpu"]:
        backends.register(op, "cpu", "cpp", program)
    before = program.calls
    with backends.use_backend("cpp"):
        yield program
    assert program.calls > before, "the program was not called"


def test_random_losses():
    """Upsampled and at full resolution, with gradients."""
    assert sum(bcl.agrees("cpu", *bcl.draw(seed), f"case {seed}") for seed in range(14)) > 2


@pytest.mark.parametrize("grid", bcl.FULL_AND_UPSAMPLED)
def test_equal_scores(grid):
    bcl.test_ties_are_all_selected("cpu", grid)


def test_random_terms():
    assert sum(terms.agrees("cpu", *terms.draw(seed), f"case {seed}") for seed in range(14)) > 3


def test_label_maps():
    for (shape, size), dtype, layout in zip(upsample_argmax.SHAPES.values(), cycle(DTYPES), cycle(LAYOUTS)):
        upsample_argmax.test_labels_and_confidence_are_the_references("cpu", shape, size, dtype, layout)


def test_label_maps_of_values_that_are_not_finite():
    upsample_argmax.test_nan_wins_in_every_pixel_that_reads_it("cpu", (1, 40, 3, 9), (24, 72))
    for dtype in DTYPES:
        upsample_argmax.test_infinities_are_large_numbers("cpu", dtype)


def test_sums_of_maps():
    for case, dtype, layouts in zip(upsample_add_relu.CASES.values(), cycle(DTYPES), cycle(product(LAYOUTS, LAYOUTS))):
        upsample_add_relu.test_values_are_torchs("cpu", *case, dtype, layouts)


def test_sums_of_values_that_are_not_finite():
    for dtype, layout in product(DTYPES, LAYOUTS):
        upsample_add_relu.test_nan_and_infinities_are_where_the_reference_has_them("cpu", (12, 20), dtype, layout)


def test_first_convolutions():
    kinds = cycle(product(stem_conv.OF_IMAGES, DTYPES, LAYOUTS))
    for case, of_images, dtype, layout in ((case, *next(kinds)) for case in stem_conv.CASES.values() for _ in range(5)):
        stem_conv.test_values_are_torchs("cpu", *case, of_images, dtype, layout)
    stem_conv.test_nan_and_infinities_stay_in_the_windows_that_have_them("cpu", DTYPES[0], DTYPES[0], LAYOUTS[1])


def test_pools():
    for (shape, pools), dtype, layout in zip(pyramid_pool.CASES.values(), cycle(DTYPES), cycle(LAYOUTS)):
        pyramid_pool.test_pools_and_gradients_are_torchs("cpu", shape, pools, dtype, layout)
    pyramid_pool.test_nan_and_infinity_stay_in_the_windows_that_read_them("cpu")


def test_context_modules():
    for structure, widths in zip(lmfm.STRUCTURES.values(), cycle(lmfm.WIDTHS.values())):
        lmfm.test_every_structure("cpu", structure, widths)
    for size, dtype, layout in zip(lmfm.SIZES.values(), cycle(DTYPES), cycle(LAYOUTS)):
        lmfm.test_every_size_and_dtype("cpu", size, dtype, layout)
    lmfm.test_nan_survives_every_relu("cpu")


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_every_half_becomes_the_float_that_it_is_and_back(dtype):
    """All 65536 bit patterns; a NaN stays one. Those below zero come as they are from the other map."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(1, 1, 256, 256)
    zero = torch.zeros_like(every)
    for x, y in ((every, zero), (zero, every), (-every, zero)):
        result = upsample_add_relu.upsample_add_relu(x, y)
        torch.testing.assert_close(result, (x + y).relu(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_floats_are_rounded_to_the_nearest_half(dtype):
    """Sums of two halves that lie next to a tie, on either side and on it: as torch rounds them, to even."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 64, 256, generator=generator).exp().to(dtype)
    y = (x * 2.0 ** -torch.randint(6, 14, x.shape, generator=generator)).to(dtype)
    y = torch.where(torch.rand(x.shape, generator=generator) < 0.5, -y, y)
    result = upsample_add_relu.upsample_add_relu(x, y)
    assert torch.equal(result, (x.float() + y.float()).to(dtype).relu())
