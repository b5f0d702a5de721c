"""upsample_argmax on every backend against the float64 reference, and what an op owes torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from grids import grid
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bcmfnet.ops import upsample_argmax
from bcmfnet.reference.upsample_argmax import upsample_argmax as reference

OP = "upsample_argmax"
INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]

# Where two scores are closer than this share of the largest logit, float32 decides by its rounding. Measured on the C++
# kernel over 1.4e7 pixels of standard normal logits: one was decided otherwise, at a gap of 1.2e-8.
TIE = 2e-7
HALF = 2e-3  # of a confidence in float16: half a unit in its last place, and the arithmetic before it

SHAPES = {
    "the network's scale": ((1, 19, 8, 16), (64, 128)),
    "odd sizes, fractional scales": ((2, 5, 3, 4), (7, 11)),
    "identity": ((2, 3, 9, 5), (9, 5)),
    "one source pixel": ((1, 4, 1, 1), (5, 6)),
    "one class": ((1, 1, 2, 3), (4, 5)),
    "rows alone": ((1, 7, 3, 20), (13, 20)),
    "columns alone, one past a block of 256": ((1, 3, 2, 33), (2, 257)),
    "a cell of more rows than a thread holds": ((1, 6, 2, 2), (61, 9)),
    "barely larger": ((1, 3, 30, 31), (31, 32)),
    "more classes than a word has bits": ((1, 33, 4, 5), (9, 17)),
    "int16 labels": ((1, 300, 3, 5), (6, 20)),
}


def normal(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_labels(actual, logits, size):
    """Labels are the reference's, apart from pixels whose two best scores a rounding separates."""
    logits = logits.cpu()
    expected, _ = reference(logits.double(), size)
    assert actual.dtype == (torch.uint8 if logits.shape[1] <= 256 else torch.int16)
    wrong = actual.cpu() != expected
    if wrong.any():
        scores = F.interpolate(logits.double(), size, mode="bilinear", align_corners=False)
        taken = scores.gather(1, actual.cpu().long().unsqueeze(1)).squeeze(1)
        gap = ((scores.amax(1) - taken)[wrong].max() / logits.double().abs().max()).item()
        assert gap <= TIE, f"{wrong.sum()} labels differ, by up to {gap:.3g} of the largest logit"


@grid({"shape, size": SHAPES, "dtype": DTYPES, "layout": LAYOUTS}, together=1)
@pytest.mark.usefixtures("poisoned")
def test_labels_and_confidence_are_the_references(device, shape, size, dtype, layout):
    logits = normal(shape, dtype).contiguous(memory_format=layout)
    labels = upsample_argmax(logits.to(device), size)
    assert_labels(labels, logits, size)
    again, confidence = upsample_argmax(logits.to(device), size, return_confidence=True)
    assert torch.equal(again, labels)
    expected = reference(logits.double(), size)[1]
    assert confidence.dtype == torch.float16
    torch.testing.assert_close(confidence.cpu().double(), expected, rtol=HALF, atol=1e-7)


@pytest.mark.tail
@given(
    batch=st.integers(1, 2), classes=st.integers(1, 40), grid=st.tuples(st.integers(1, 9), st.integers(1, 40)),
    more=st.tuples(st.integers(0, 20), st.integers(0, 40)), seed=st.integers(0, 99),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 1e4]),
)  # fmt: skip
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape(device, batch, classes, grid, more, seed, spread):
    """Logits are an offset per class, and `spread` times noise: 0 is plateaus, where nothing may be rounded."""
    logits = normal((1, classes, 1, 1), seed=seed) + spread * normal((batch, classes, *grid), seed=seed + 1)
    size = (grid[0] + more[0], grid[1] + more[1])
    assert_labels(upsample_argmax(logits.to(device), size), logits, size)


def test_the_first_of_equal_classes_wins(device):
    plateau = normal((1, 1, 3, 40)).expand(1, 5, 3, 40).contiguous()  # equal in every class
    assert not upsample_argmax(plateau.to(device), (20, 300)).any()
    plateau[:, :2] -= 1
    assert (upsample_argmax(plateau.to(device), (20, 300)) == 2).all()


@pytest.mark.parametrize(("shape", "size"), [((1, 5, 4, 6), (4, 6)), ((1, 40, 3, 9), (24, 72))])
def test_nan_wins_in_every_pixel_that_reads_it(device, shape, size):
    logits = normal(shape)
    logits[0, 2, 1, 2] = logits[0, 3, 1, 2] = logits[0, 4, 2, 4] = NAN
    logits[0, 1, 2, 4] = INF  # beaten by NaN
    labels, confidence = upsample_argmax(logits.to(device), size, return_confidence=True)
    expected, probability = reference(logits.double(), size)
    assert torch.equal(labels.cpu(), expected.to(torch.uint8))
    assert torch.equal(confidence.isnan().cpu(), probability.isnan())
    assert (expected == 2).sum() >= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_are_large_numbers(device, dtype):
    logits = normal((1, 4, 3, 5), dtype)
    logits[:, 1] = -INF  # a masked class
    logits[0, 2, 1, 1] = INF
    labels, confidence = upsample_argmax(logits.to(device), (24, 40), return_confidence=True)
    assert not (labels == 1).any()
    assert (labels[0, 5:19, 5:19] == 2).all()  # all that give the infinite pixel some weight
    assert not confidence.isnan().any()
    assert_labels(labels, logits.float().clamp(-1e38, 1e38), (24, 40))
    assert not upsample_argmax(torch.full((1, 4, 2, 2), -INF, device=device), (16, 16)).any()


def test_nothing_is_read_beyond_the_logits(device):
    """The logits lie in the middle of NaN: one of them read and used would win."""
    for shape, size in SHAPES.values():
        around = torch.full([n + 2 for n in shape], NAN, device=device)
        view = around[tuple(slice(1, -1) for _ in shape)]
        view.copy_(normal(shape))
        assert_labels(upsample_argmax(view, size), view, size)


@pytest.mark.parametrize("level", ["plain", "v3"])  # above these is what the other tests meet
def test_every_level_of_instruction_sets(at_level, level):
    code = """
import torch
from test_upsample_argmax import SHAPES, assert_labels, normal, reference, upsample_argmax, HALF
for shape, size in SHAPES.values():
    logits = normal(shape)
    labels, confidence = upsample_argmax(logits, size, return_confidence=True)
    assert_labels(labels, logits, size)
    torch.testing.assert_close(confidence.double(), reference(logits.double(), size)[1], rtol=HALF, atol=1e-7)
"""
    at_level(level, OP, code)


def test_export(device):
    class Head(torch.nn.Module):
        def forward(self, logits):
            return upsample_argmax(logits, (24, 32))

    logits = normal((1, 5, 3, 4)).to(device)
    batch = torch.export.Dim("batch", max=8)
    program = torch.export.export(Head(), (normal((2, 5, 3, 4)).to(device),), dynamic_shapes=({0: batch},))
    assert torch.equal(program.module()(logits), upsample_argmax(logits, (24, 32)))


def test_logits_with_a_gradient_give_labels_without(device):
    logits = normal((1, 5, 3, 4)).to(device).requires_grad_()
    assert not upsample_argmax(logits, (24, 32)).requires_grad


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_2_to_the_31_elements(cuda):
    """Offsets beyond 32 bits in the logits, through their strides, and in the labels. Takes about 16 GiB."""
    wide = torch.zeros(2, 3, 2**15 + 8, 2**14, dtype=torch.float16, device=cuda)  # 3.2e9 elements
    wide[1, 2, -1] = 1
    labels = upsample_argmax(wide[:, :, -8:, :64], (8, 64))
    assert labels[1, 7].eq(2).all() and not labels[0].any() and not labels[1, :7].any()
    del wide
    small = torch.zeros(2, 2, 2**10, 2**10, dtype=torch.float16, device=cuda)
    small[1, 1, -1, -1] = 1
    labels = upsample_argmax(small, (2**15 + 1, 2**15 + 1))  # 2.1e9 labels
    assert labels[1, -1, -1] == 1
    assert labels.sum(dtype=torch.int64) == labels[1, -64:, -64:].sum(dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("logits", (4, 4)), TypeError, "logits: expected a tensor, got str"),
        ((torch.zeros(1, 2, 3, 3).double(), (4, 4)), TypeError,
         "logits: expected float16, bfloat16 or float32, got float64"),
        ((torch.zeros(2, 3, 3), (4, 4)), ValueError,
         "logits: expected [N, C, h, w] with h, w >= 1 and C of 1 to 32768, got [2, 3, 3]"),
        ((torch.zeros(1, 0, 3, 3), (4, 4)), ValueError,
         "logits: expected [N, C, h, w] with h, w >= 1 and C of 1 to 32768, got [1, 0, 3, 3]"),
        ((torch.zeros(1, 2, 3, 3), (4, 4, 4)), TypeError, "size: expected an integer or (H, W), got (4, 4, 4)"),
        ((torch.zeros(1, 2, 3, 5), (4, 4)), ValueError, "size: expected at least the logits' [3, 5], got [4, 4]"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error) as caught:
        upsample_argmax(*arguments)
    assert str(caught.value) == message
