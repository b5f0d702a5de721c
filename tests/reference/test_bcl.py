"""The reference against loops over pixels, and every rule of the loss against a case worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bcl_oracle import COEFFICIENTS, oracle
from compare import assert_close, assert_same_decisions
from grids import UPSAMPLINGS
from hypothesis import given, settings
from hypothesis import strategies as st

from bcmfnet.reference import bcl as reference
from bcmfnet.reference.bcl import make_options

INF, NAN = math.inf, math.nan
IGNORE = 255


def random_case(seed: int, classes: int, size: tuple[int, int], grid: tuple[int, int], batch: int = 2, ignored=0.2):
    generator = np.random.default_rng(seed)
    target = generator.integers(0, classes, (batch, *size))
    target[generator.random(target.shape) < ignored] = IGNORE
    return 2 * generator.standard_normal((batch, classes, *grid)), target


def scored(scores: list[list[list[float]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of two classes, and labels 0, whose own cross-entropies are these: log(1 + (e^s - 1)) = s."""
    s = torch.tensor(scores, dtype=torch.float64)
    return torch.stack([torch.zeros_like(s), torch.log(torch.expm1(s))], 1), torch.zeros(s.shape, dtype=torch.int64)


def run(logits, target, weight=None, selected=None, **options):
    """Loss, gradient by autograd, stats and maps."""
    logits = torch.as_tensor(logits).clone().requires_grad_()
    value, stats, maps = reference.loss(
        logits, torch.as_tensor(target), make_options(**options), weight, selected=selected
    )
    value.backward()
    return value.detach(), logits.grad, stats, maps


def written_out(logits, target, weight=None, **options):
    """The gradient as the op computes it, without autograd."""
    logits, target, options = torch.as_tensor(logits), torch.as_tensor(target), make_options(**options)
    value, _, _, *saved, gradient = reference.forward(
        logits, target, weight, None, None, None, options, needs_grad=True
    )
    if logits.shape[2:] == target.shape[1:]:
        gradient = torch.empty_like(logits)
        reference.backward(torch.ones_like(value), logits, target, weight, None, None, options, *saved, gradient)
    return value, gradient.to(logits.dtype)


LENGTHS = st.integers(1, 7)  # 1: nothing to flip; 2..7: every rest modulo the windows of step 1 and 2


@st.composite
def cases(draw):
    size = (draw(LENGTHS), draw(LENGTHS))
    low = draw(st.booleans())
    grid = tuple(draw(st.integers(1, length)) for length in size) if low else size
    classes = draw(st.integers(1, 4))
    steps = tuple(draw(st.integers(1, 3)) for _ in range(2))
    some = st.sampled_from([0.0, 0.3, 1.0])
    options = {
        "mode": draw(st.sampled_from(sorted(COEFFICIENTS))),
        "flip": draw(st.sampled_from(["swap", "mirror"])),
        "step": steps,
        "offset": tuple(draw(st.integers(0, 2 * step - 1)) for step in steps),
        "nms": draw(st.sampled_from([1, 3, 5, 7])),
        "threshold": draw(st.sampled_from([0.0, 0.3567, 2.0, 100.0])),
        "ratio": draw(st.sampled_from([0.0, 1 / 16, 0.5, 1.0])),
        "min_kept": draw(st.sampled_from([0, 1, 5, 1000])),
        "max_kept": draw(st.sampled_from([None, 1, 3, 1000])),
        "norm": draw(st.sampled_from(["selected", "valid"])),
        "per_image": draw(st.booleans()),
        "alpha": draw(some),
        "beta": draw(some),
        "boundary_weight": draw(some),
        "ce_weight": draw(some),
    }
    weight = draw(st.none() | st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0]), min_size=classes, max_size=classes))
    ignored = draw(st.sampled_from([0.0, 0.3, 1.0]))
    seed, batch = draw(st.integers(0, 10**6)), draw(st.integers(1, 2))
    return *random_case(seed, classes, size, grid, batch, ignored), weight, options


@settings(max_examples=250, deadline=None, derandomize=True)
@given(cases())
def test_definition_by_loops(case):
    logits, target, weight, options = case
    weight_tensor = None if weight is None else torch.tensor(weight, dtype=torch.float64)
    value, stats, maps = reference.loss(
        torch.tensor(logits), torch.tensor(target), make_options(**options), weight_tensor
    )
    expected = oracle(logits, target, weight=weight, q=maps.q.numpy(), **options)

    on_grid = np.where(target == IGNORE, 0, np.minimum(np.floor(expected.grid), 65535))
    decided_by_rounding = np.abs(expected.grid - np.round(expected.grid)) < 1e-9
    assert ((maps.q.numpy() == on_grid) | decided_by_rounding).all()
    assert_same_decisions(maps.candidates, torch.tensor(expected.candidates), "candidates")
    assert_same_decisions(maps.selected, torch.tensor(expected.selected), "selected")
    assert stats.threshold.reshape(-1).tolist() == expected.thresholds
    assert (int(stats.selected), int(stats.valid)) == (expected.selected.sum(), expected.valid)

    for name, term in expected.terms.items():
        assert_close(getattr(maps, name), torch.tensor(term), name)
    for actual, wanted in ((value, expected.loss), (stats.ce, expected.ce_mean), (stats.boundary, expected.boundary)):
        assert float(actual) == pytest.approx(wanted, rel=1e-12, abs=1e-15)

    _, gradient = written_out(logits, target, weight_tensor, **options)
    torch.testing.assert_close(gradient, torch.tensor(expected.gradient), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("grid", [(5, 6), (2, 5)])  # full resolution, and upsampled along both axes
@pytest.mark.parametrize("mode", COEFFICIENTS)
def test_gradient_is_that_of_the_loss_with_decisions_fixed(mode, grid):
    logits, target = random_case(3, 4, (5, 6), grid)
    options = {"mode": mode, "alpha": 0.7, "beta": 1.3, "boundary_weight": 0.6, "ce_weight": 0.4, "ratio": 0.5}
    options["threshold"] = 100.0  # out of reach, so that half of the candidates is selected
    weight = torch.tensor([1.0, 0.5, 2.0, 0.0], dtype=torch.float64)
    _, by_autograd, _, maps = run(logits, target, weight, **options)
    assert 0 < maps.selected.sum() < maps.candidates.sum()
    assert_close(written_out(logits, target, weight, **options)[1], by_autograd)
    torch.autograd.gradcheck(
        lambda z: reference.loss(z, torch.tensor(target), make_options(**options), weight, selected=maps.selected)[0],
        torch.tensor(logits, requires_grad=True),
    )


# Each row is worked out from the windows, written beside it.
@pytest.mark.parametrize(
    ("flip", "step", "offset", "expected"),
    [
        ("swap", 1, 0, [1, 0, 3, 2, 4]),  # 01|23|4.: 4 has no partner
        ("mirror", 1, 0, [1, 0, 3, 2, 4]),  # step 1: the two flips coincide
        ("swap", 2, 0, [2, 3, 0, 1, 6, 5, 4]),  # 01 23|45 6.: 5's partner is outside
        ("mirror", 2, 0, [3, 2, 1, 0, 4, 6, 5]),  # 0123|456.: 4's partner is outside
        ("swap", 3, 0, [3, 4, 5, 0, 1, 2, 6, 7]),  # 012 345|67. ...
        ("mirror", 3, 0, [5, 4, 3, 2, 1, 0, 6, 7, 9, 8]),  # 012345|6789..: 6 and 7 mirror 11 and 10
        ("swap", 3, 0, [0, 1, 2]),  # as long as the step: the identity
        ("mirror", 3, 0, [0, 1, 2]),
        ("swap", 1, 1, [0, 2, 1, 3]),  # .0|12|3.
        ("swap", 2, 1, [2, 1, 0, 3, 4]),  # .0 12|34 ..
        ("mirror", 2, 3, [0, 4, 3, 2, 1, 5]),  # ...0|1234|5...
        ("swap", 1, 0, [0]),
    ],
)
def test_flip_at_borders(flip, step, offset, expected):
    assert reference.flip_index(len(expected), step, flip, offset).tolist() == expected


def test_flip_is_an_involution():
    for flip in ("swap", "mirror"):
        for step in (1, 2, 3, 5):
            for length in range(1, 4 * step + 2):
                for offset in range(2 * step):
                    pi = reference.flip_index(length, step, flip, offset)
                    assert pi[pi].tolist() == list(range(length)), (flip, step, length, offset)


def test_rows_flip_along_height_and_columns_along_width():
    logits = torch.randn(1, 6, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([[[0, 1, 2], [3, 4, 5]]])
    _, _, _, maps = run(logits, target, step=(1, 2))
    by_hand = {"ce": target, "ce_r": [[[3, 4, 5], [0, 1, 2]]], "ce_c": [[[2, 1, 0], [5, 4, 3]]]}
    for name, labels in by_hand.items():
        expected = F.cross_entropy(logits, torch.as_tensor(labels), reduction="none")
        assert_close(getattr(maps, name), expected, name)


def test_an_edge_on_a_windows_border_is_seen_only_with_an_offset():
    target = torch.tensor([[[0, 0, 1, 1]]])
    logits = torch.zeros(1, 2, 1, 4, dtype=torch.float64)
    logits[0, 1] = torch.tensor([-3.0, -3.0, 3.0, 3.0])
    scores = [run(logits, target, offset=(0, offset))[3].ce_c[0, 0] for offset in (0, 1)]
    surprise = math.log1p(math.exp(3))
    assert scores[0].max() < 0.05
    torch.testing.assert_close(scores[1][1:3], torch.full((2,), surprise, dtype=torch.float64))


@pytest.mark.parametrize(
    ("score", "q"),
    [
        (0.0, 0),
        (0.49 / 1024, 0),
        (0.5 / 1024, 1),  # the half goes up
        (1.49 / 1024, 1),
        (0.3567, 365),  # 365.26
        (65534.4 / 1024, 65534),
        (65534.5 / 1024, 65535),
        (1e4, 65535),
        (INF, 65535),
        (NAN, 0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grid_of_the_scores(score, q, dtype):
    assert reference.quantise(torch.tensor([score], dtype=dtype)).tolist() == [q]


def test_suppression_keeps_ties_and_stops_at_its_window():
    q = torch.tensor([[[9, 1, 1, 5, 5, 1, 7]]], dtype=torch.int32)
    kept = {window: reference.suppress(q, window)[0, 0].nonzero()[:, 0].tolist() for window in (1, 3, 5, 7)}
    assert kept == {1: [0, 1, 2, 3, 4, 5, 6], 3: [0, 3, 4, 6], 5: [0, 3, 6], 7: [0, 6]}
    one_apart = torch.tensor([[[65535, 65534], [65533, 65534]]], dtype=torch.int32)
    assert reference.suppress(one_apart, 3).tolist() == [[[True, False], [False, False]]]


def test_ignored_pixels_neither_compete_nor_stand():
    logits, target = scored([[[1.0, 5.0, 2.0, 0.1]]])
    target[0, 0, 1] = IGNORE
    _, _, stats, maps = run(logits, target, mode="ohem", nms=3, threshold=0.0)
    assert maps.q.tolist() == [[[1024, 0, 2048, 102]]]
    assert maps.candidates.tolist() == [[[True, False, True, False]]]
    assert int(stats.valid) == 3


def test_a_score_of_zero_is_no_candidate():
    logits, target = scored([[[1.0, 0.0004, 0.0005]]])  # q = 1024, 0, 1
    _, _, _, maps = run(logits, target, mode="ohem", nms=1, threshold=0.0)
    assert maps.selected.tolist() == [[[True, False, True]]]


# Ten candidates of q = 1024 .. 10240; what is selected is the number of the largest ones.
@pytest.mark.parametrize(
    ("options", "kept", "threshold"),
    [
        ({"threshold": 4.0, "ratio": 0.0}, 7, 4096),  # K = 0: the threshold alone, inclusive
        ({"threshold": 100.0, "ratio": 0.0}, 0, 65535),  # K = 0 and nothing reaches it
        ({"threshold": 100.0, "ratio": 0.35}, 3, 8192),  # floor(3.5)
        ({"threshold": 4.0, "ratio": 0.3}, 7, 4096),  # a share adds, it does not limit
        ({"threshold": 100.0, "ratio": 0.1, "min_kept": 4}, 4, 7168),
        ({"threshold": 100.0, "ratio": 0.5, "min_kept": 4}, 5, 6144),
        ({"threshold": 100.0, "ratio": 0.0, "min_kept": 1000}, 10, 1024),  # no more than there are
        ({"threshold": 0.0, "ratio": 0.0, "max_kept": 2}, 2, 9216),
        ({"threshold": 9.0, "ratio": 0.0, "max_kept": 5}, 2, 9216),  # a limit does not add
        ({"threshold": 0.0, "ratio": 1.0, "min_kept": 9, "max_kept": 1}, 1, 10240),  # the limit is the last word
        ({"threshold": 0.0, "ratio": 1.0, "max_kept": 10}, 10, 1024),
        ({"threshold": 0.0, "ratio": 1.0, "max_kept": 11}, 10, 0),  # more than there are: no effect
    ],
)
def test_selection(options, kept, threshold):
    logits, target = scored([[[4, 9, 1, 10, 2, 8, 3, 7, 5, 6]]])
    _, _, stats, maps = run(logits, target, mode="ohem", nms=1, **options)
    expected = torch.tensor([4, 9, 1, 10, 2, 8, 3, 7, 5, 6]) > 10 - kept
    assert maps.selected[0, 0].tolist() == expected.tolist()
    assert (int(stats.selected), int(stats.threshold)) == (kept, threshold)


@pytest.mark.parametrize("limit", [{"min_kept": 2, "threshold": 100.0}, {"max_kept": 2, "threshold": 0.0}])
def test_ties_at_the_threshold_are_all_selected(limit):
    logits, target = scored([[[3.0, 1.0, 2.0, 2.0, 2.0]]])
    _, _, stats, maps = run(logits, target, mode="ohem", nms=1, ratio=0.0, **limit)
    assert maps.selected.tolist() == [[[True, False, True, True, True]]]
    assert int(stats.selected) == 4


def test_per_image_selects_in_each_image_and_divides_over_the_batch():
    logits, target = scored([[[9.0, 8.0, 7.0]], [[1.0, 2.0, 3.0]]])
    common = {"mode": "ohem", "nms": 1, "ratio": 0.0, "min_kept": 2, "threshold": 100.0}
    _, _, over_batch, maps = run(logits, target, **common)
    assert maps.selected.tolist() == [[[True, True, False]], [[False, False, False]]]
    assert over_batch.threshold.tolist() == 8192
    _, _, by_image, maps = run(logits, target, per_image=True, **common)
    assert maps.selected.tolist() == [[[True, True, False]], [[False, True, True]]]
    assert by_image.threshold.tolist() == [8192, 2048]
    assert by_image.boundary.item() == pytest.approx((9 + 8 + 2 + 3) / 4, rel=1e-12)


@pytest.mark.parametrize(("norm", "divisor"), [("selected", 2), ("valid", 4)])
def test_norm_and_class_weights(norm, divisor):
    logits, target = scored([[[1.0, 2.0, 3.0, 4.0, 5.0]]])
    target[0, 0, 4] = IGNORE
    logits[:, :, :, 3] = logits[:, :, :, 3].flip(1)
    target[0, 0, 3] = 1  # cross-entropy 4 still, of the class that weighs 3
    weight = torch.tensor([0.5, 3.0], dtype=torch.float64)
    value, _, stats, maps = run(
        logits, target, weight, mode="ohem", nms=1, ratio=0, threshold=3, norm=norm, ce_weight=2, boundary_weight=10
    )
    assert maps.selected.tolist() == [[[False, False, True, True, False]]]  # scores know no weights
    ce = (0.5 * (1 + 2 + 3) + 3 * 4) / (3 * 0.5 + 3)
    boundary = (0.5 * 3 + 3 * 4) / divisor  # a count, not a sum of weights
    assert stats.ce.item() == pytest.approx(ce, rel=1e-12)
    assert stats.boundary.item() == pytest.approx(boundary, rel=1e-12)
    assert value.item() == pytest.approx(2 * ce + 10 * boundary, rel=1e-12)


def test_modes_by_hand():
    """One pixel pair 0|1 with logits (0, a) and (0, b): its cross-entropies are softplus values."""
    a, b = 1.0, -0.5
    logits = torch.tensor([[[[0.0, 0.0]], [[a, b]]]], dtype=torch.float64)
    target = torch.tensor([[[0, 1]]])
    own = np.log1p(np.exp([a, -b]))
    flipped = np.log1p(np.exp([-a, b]))  # by columns; one row has no neighbour, so rows see the own label
    options = {"threshold": 0.0, "nms": 1, "boundary_weight": 0.5, "alpha": 2.0, "beta": 3.0}
    score = {
        "detect": 2 * own + 3 * flipped, "detect0": 3 * own + 3 * flipped, "paper": 2 * own + 3 * flipped,
        "paper0": 3 * own + 3 * flipped, "ohem": own,
    }  # fmt: skip
    term = {"detect": own, "detect0": own, "paper": score["paper"], "paper0": score["paper0"], "ohem": own}
    for mode in COEFFICIENTS:
        value, _, _, maps = run(logits, target, mode=mode, **options)
        assert maps.q[0, 0].tolist() == np.floor(1024 * score[mode] + 0.5).tolist(), mode
        assert value.item() == pytest.approx(own.mean() + 0.5 * term[mode].mean(), rel=1e-12), mode


@pytest.mark.parametrize("grid", [(4, 6), (2, 3)])
def test_nothing_valid_is_an_attached_zero(grid):
    logits, _ = random_case(0, 3, (4, 6), grid)
    target = np.full((2, 4, 6), IGNORE)
    for per_image in (False, True):
        value, gradient, stats, _ = run(logits, target, per_image=per_image)
        assert value.item() == 0
        assert torch.equal(gradient, torch.zeros_like(gradient))
        assert torch.equal(written_out(logits, target, per_image=per_image)[1], gradient)
        assert [float(stats.ce), float(stats.boundary), int(stats.selected), int(stats.valid)] == [0, 0, 0, 0]
        assert stats.threshold.reshape(-1).tolist() == [365] * (2 if per_image else 1)


def test_nothing_selected_leaves_the_cross_entropy():
    logits, target = random_case(0, 3, (4, 6), (4, 6))
    value, gradient, stats, _ = run(logits, target, threshold=1000.0, ratio=0.0)
    alone, alone_gradient, _, _ = run(logits, target, boundary_weight=0.0)
    assert (int(stats.selected), float(stats.boundary)) == (0, 0)
    assert torch.equal(value, alone)
    assert torch.equal(gradient, alone_gradient)


def test_a_selected_pixel_whose_flipped_label_is_ignored():
    """Pixel 0 reads ignore by columns and itself by rows: only the row term is left, in score, loss and gradient."""
    logits = torch.tensor([[[[0.0, 5.0]], [[2.0, 5.0]]]], dtype=torch.float64)
    target = torch.tensor([[[0, IGNORE]]])
    value, gradient, stats, maps = run(logits, target, mode="paper", ce_weight=0.0, alpha=0.5, threshold=0.0)
    ce, p = math.log1p(math.exp(2)), 1 / (1 + math.exp(-2))
    assert maps.ce_c.tolist() == [[[0.0, 0.0]]]
    assert maps.q.tolist() == [[[math.floor(1024 * 0.5 * ce + 0.5), 0]]]
    assert value.item() == pytest.approx(0.5 * ce, rel=1e-12)
    expected = torch.tensor([[[[-0.5 * p, 0.0]], [[0.5 * p, 0.0]]]], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        written_out(logits, target, mode="paper", ce_weight=0.0, alpha=0.5, threshold=0.0)[1], expected
    )
    assert int(stats.selected) == 1


@pytest.mark.parametrize("label", [3, 254, -1, -100])
def test_a_label_that_is_no_class_is_named_with_its_place(label):
    logits, target = random_case(0, 3, (4, 6), (4, 6))
    target[1, 2, 5] = label
    message = rf"got {label} at \(image, row, column\) = \(1, 2, 5\)"
    with pytest.raises(IndexError, match=message):
        run(logits, target)
    with pytest.raises(IndexError, match=message):
        written_out(logits, target)


@pytest.mark.parametrize("ignore_index", [-1, 0, 2])
def test_any_label_may_be_the_ignored_one(ignore_index):
    logits, target = random_case(0, 3, (4, 6), (4, 6), ignored=0)
    target[0, :2] = ignore_index
    value, gradient, stats, _ = run(logits, target, boundary_weight=0.0, ignore_index=ignore_index)
    z = torch.tensor(logits, requires_grad=True)
    expected = F.cross_entropy(z, torch.tensor(target), ignore_index=ignore_index)
    expected.backward()
    assert int(stats.valid) == (target != ignore_index).sum()
    assert_close(value, expected)
    assert_close(gradient, z.grad)


@pytest.mark.parametrize("grid", [(4, 6), (2, 3)])
@pytest.mark.parametrize("mode", COEFFICIENTS)
def test_one_class_is_exactly_zero(mode, grid):
    logits, target = random_case(0, 1, (4, 6), grid)
    value, gradient, stats, _ = run(logits, target, mode=mode)
    assert value.item() == 0
    assert not gradient.any()
    assert not written_out(logits, target, mode=mode)[1].any()
    assert int(stats.selected) == 0


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (2, 2)])  # none is longer than the step of 5
def test_images_no_larger_than_the_step_see_their_own_labels(size):
    logits, target = random_case(1, 3, size, size, ignored=0)
    for flip in ("swap", "mirror"):
        _, _, _, maps = run(logits, target, step=(5, 5), flip=flip)
        assert torch.equal(maps.ce_r, maps.ce)
        assert torch.equal(maps.ce_c, maps.ce)


def test_one_pixel():
    logits, target = scored([[[2.0]]])
    value, _, stats, maps = run(logits, target, threshold=3.0)  # detect scores 2 + 2 = 4
    assert maps.q.item() == 4096
    assert value.item() == pytest.approx(4.0, rel=1e-12)
    assert int(stats.selected) == 1


# Two pixels; the second one's class 0 has -inf. With labels 1|0 its own term is infinite, with 0|1 the flipped one.
@pytest.mark.parametrize(
    ("labels", "options", "grid"),
    [
        ((1, 0), {"ce_weight": 0.0, "boundary_weight": 0.0}, [1494, 65535]),  # nothing is left of the loss
        ((1, 0), {"mode": "paper", "ce_weight": 0.0, "alpha": 0.0}, [1024, 0]),  # s0, g0 and the rows' own label
        ((1, 0), {"mode": "ohem", "ce_weight": 0.0, "boundary_weight": 0.0}, [470, 65535]),
        ((0, 1), {}, [None, 65535]),  # detect: infinite score, finite true label
        ((0, 1), {"mode": "paper", "boundary_weight": 0.0}, [None, 65535]),
        ((0, 1), {"mode": "paper", "beta": 0.0}, [1024, 0]),
    ],
)
def test_a_coefficient_of_zero_removes_an_infinite_term(labels, options, grid):
    logits, _ = scored([[[1.0, 1.0]]])
    logits[0, :, 0, 1] = torch.tensor([-INF, 0.0])
    target = torch.tensor([[labels]])
    value, gradient, _, maps = run(logits, target, nms=1, **options)
    for q, expected in zip(maps.q[0, 0].tolist(), grid, strict=True):
        assert expected is None or q == expected
    for result in (value, gradient, *written_out(logits, target, nms=1, **options)):
        assert result.isfinite().all()


def test_an_infinite_score_is_the_largest_on_the_grid():
    logits, target = scored([[[3.0, 1.0, 2.0]]])
    logits[0, :, 0, 1] = torch.tensor([-INF, 0.0])
    value, gradient, stats, maps = run(logits, target, mode="ohem", nms=1, max_kept=1)
    assert maps.q.tolist() == [[[3072, 65535, 2048]]]
    assert (int(stats.threshold), int(stats.selected)) == (65535, 1)
    assert value == INF
    assert gradient.isfinite().all()
    assert written_out(logits, target, mode="ohem", nms=1, max_kept=1)[1].isfinite().all()


def test_infinite_logits_of_other_classes_are_probabilities_of_zero():
    logits, target = random_case(4, 4, (4, 6), (4, 6))
    logits[:, 3], target[target == 3] = -INF, 0
    without = logits[:, :3]
    for mode in COEFFICIENTS:
        value, gradient = written_out(logits, target, mode=mode)
        expected, expected_gradient = written_out(without, target, mode=mode)
        assert_close(value, expected)
        assert_close(gradient[:, :3], expected_gradient)
        assert not gradient[:, 3].any()


@pytest.mark.parametrize("bad", [(NAN, 0.0, 0.0), (INF, 0.0, 0.0), (0.0, INF, 0.0), (-INF, -INF, -INF)])
def test_a_pixel_without_a_softmax_gives_nan_as_torch_does(bad):
    logits, target = random_case(5, 3, (4, 6), (4, 6), ignored=0)
    logits[0, :, 1, 2] = bad
    value, gradient, _, maps = run(logits, target)
    assert value.isnan()
    assert maps.q[0, 1, 2] == 0
    nan = torch.zeros(2, 3, 4, 6, dtype=torch.bool)
    nan[0, :, 1, 2] = True
    assert torch.equal(gradient.isnan(), nan)
    assert torch.equal(written_out(logits, target)[1].isnan(), nan)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_an_ignored_pixel_contributes_nothing_whatever_it_holds(bad):
    logits, target = random_case(6, 3, (4, 6), (4, 6))
    target[0, 1, 2] = IGNORE
    clean = written_out(logits, target)
    by_autograd = run(logits, target)[1]
    logits[0, :, 1, 2] = bad
    value, gradient = written_out(logits, target)
    assert torch.equal(value, clean[0])
    assert torch.equal(gradient, clean[1])
    assert torch.equal(run(logits, target)[1], by_autograd)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_ten_thousand_are_precise(dtype):
    small = torch.tensor([[[[0.25]], [[-1.5]], [[1.0]]]], dtype=dtype)
    for shift in (1e4, -1e4):
        value, gradient, _, _ = run(small + shift, torch.zeros(1, 1, 1, dtype=torch.int64), boundary_weight=0.0)
        shifted = (small + shift).double()  # what float32 holds of it: 0.25 is exact there
        expected = F.cross_entropy(shifted - shift, torch.zeros(1, 1, 1, dtype=torch.int64))
        assert_close(value, expected)
    far = torch.tensor([[[[1e4]], [[-1e4]]]], dtype=dtype)
    value, gradient, _, maps = run(far, torch.ones(1, 1, 1, dtype=torch.int64), boundary_weight=0.0)
    assert value == 2e4
    assert gradient.reshape(-1).tolist() == [1, -1]
    assert maps.q.item() == 65535


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
def test_without_boundary_it_is_torchs_cross_entropy(weighted, dtype):
    logits, target = random_case(7, 5, (9, 11), (9, 11))
    weight = torch.tensor([0.2, 1.0, 3.0, 0.0, 1.5], dtype=dtype) if weighted else None
    z = torch.tensor(logits, dtype=dtype)
    value, gradient = written_out(z, target, weight, boundary_weight=0.0)
    expected = z.double().requires_grad_()
    torch_value = F.cross_entropy(
        expected, torch.tensor(target), None if weight is None else weight.double(), ignore_index=IGNORE
    )
    torch_value.backward()
    assert_close(value, torch_value)
    assert_close(gradient, expected.grad)


@pytest.mark.parametrize(("thresh", "min_kept"), [(0.7, 1), (0.3, 40), (0.05, 10_000)])
def test_ohem_is_that_of_the_toolboxes(thresh, min_kept):
    """Keep the pixels whose p of the true class is below max(thresh, the min_kept-th smallest); mean over those."""
    logits, target = random_case(8, 5, (9, 11), (9, 11))
    _, _, stats, maps = run(
        logits, target, mode="ohem", ce_weight=0.0, nms=1, ratio=0.0, threshold=-math.log(thresh), min_kept=min_kept
    )
    ce = F.cross_entropy(torch.tensor(logits), torch.tensor(target), ignore_index=IGNORE, reduction="none")
    valid = torch.tensor(target) != IGNORE
    p = torch.exp(-ce)[valid].sort().values
    limit = max(thresh, p[min(min_kept, len(p)) - 1].item())
    kept = valid & (torch.exp(-ce) <= limit)
    on_the_grid = ((ce + math.log(limit)).abs() < 1 / 1024) & valid
    assert_same_decisions(maps.selected, kept, unsure=on_the_grid)
    assert stats.boundary.item() == pytest.approx(ce[kept].mean().item(), abs=1e-3)
    assert_close(stats.boundary, ce[maps.selected].mean())


@pytest.mark.parametrize(("grid", "size"), UPSAMPLINGS)
def test_low_resolution_is_upsampling_then_full_resolution(grid, size):
    logits, target = random_case(9, 4, size, grid)
    z = torch.tensor(logits, requires_grad=True)
    up = F.interpolate(z, size, mode="bilinear", align_corners=False)
    value, gradient, _, maps = run(logits, target)
    full, _, full_maps = reference.loss(up, torch.tensor(target), make_options(), selected=maps.selected)
    full.backward()
    assert_close(maps.ce, full_maps.ce)
    assert_close(value, full)
    assert_close(gradient, z.grad)
    assert_close(written_out(logits, target)[1], z.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_arithmetic_is_float32(dtype):
    logits, target = random_case(10, 4, (8, 10), (4, 5))
    z = torch.tensor(logits).to(dtype)
    value, gradient = written_out(z, target)
    assert (value.dtype, gradient.dtype) == (torch.float32, dtype)
    maps = run(z, target)[3]
    expected, expected_gradient, _, _ = run(z.double(), target, selected=maps.selected)
    assert_close(value, expected)
    assert_close(gradient, expected_gradient)
