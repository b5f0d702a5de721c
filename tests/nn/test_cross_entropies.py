"""OhemCrossEntropy and UpsampledCrossEntropy against plain torch: interpolate, cross_entropy, sort."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, assert_same_decisions
from hypothesis import given, settings
from hypothesis import strategies as st

from bcmfnet.nn import OhemCrossEntropy, UpsampledCrossEntropy

GRID = 1 / 1024
LEAST = GRID / 2  # what is below rounds to 0 and is never hard
WEIGHT = torch.tensor([1.0, 0.5, 2.0, 0.25, 3.0])


@st.composite
def cases(draw, low=False):
    """Logits of 2 to 5 classes for up to 2x12x70 pixels (one chunk of 64 and a rest), target, weight."""
    size = (draw(st.integers(1, 12)), draw(st.integers(1, 70)))
    grid = tuple(draw(st.integers(1, length)) for length in size) if low else size
    batch, classes = draw(st.integers(1, 2)), draw(st.integers(2, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = 2 * torch.randn(batch, classes, *grid, generator=generator, dtype=torch.float64)
    target = torch.randint(0, classes, (batch, *size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < draw(st.sampled_from([0.0, 0.2, 1.0]))] = 255
    return logits, target, WEIGHT[:classes] if draw(st.booleans()) else None


def cross_entropies(logits, target, weight=None):
    """Of each pixel, in float64."""
    z = logits.double()
    if z.shape[2:] != target.shape[1:]:
        z = F.interpolate(z, target.shape[1:], mode="bilinear")
    weight = None if weight is None else weight.double()
    return F.cross_entropy(z, target, weight=weight, ignore_index=255, reduction="none")


def limit_by_sorting(scores, thresh, min_kept):
    """The score from which the valid pixels are hard: of probability thresh, or the min_kept-th largest."""
    ordered = scores.sort(descending=True).values
    kept = min(min_kept, len(ordered))
    return min(-math.log(thresh), ordered[kept - 1].item()) if kept else -math.log(thresh)


def loss_and_gradient(criterion, logits, target):
    logits = logits.detach().clone().requires_grad_()
    value = criterion(logits, target)
    return value.detach(), torch.autograd.grad(value, logits)[0]


def assert_near(actual, expected):
    """Of float32: log(1 + x) of one easy pixel has the rounding of 1."""
    torch.testing.assert_close(actual, expected.float(), rtol=2e-6, atol=2e-7)


THRESH = st.sampled_from([0.05, 0.7, 0.9, 1.0])
MIN_KEPT = st.sampled_from([0, 1, 30, 100_000])


@settings(max_examples=200, deadline=None)
@given(cases(), THRESH, MIN_KEPT)
def test_ohem_selects_what_a_sort_selects(case, thresh, min_kept):
    """At full resolution the gradient shows the selection; within the grid of the limit it may fall either way."""
    logits, target, weight = case
    logits = logits.float()
    value, gradient = loss_and_gradient(OhemCrossEntropy(thresh, min_kept, weight=weight), logits, target)
    chosen = (gradient != 0).any(1)
    scores, valid = cross_entropies(logits, target), target != 255
    limit = limit_by_sorting(scores[valid], thresh, min_kept) if valid.any() else 0.0
    unsure = ((scores - limit).abs() <= GRID) | ((scores - LEAST).abs() <= 1e-6)
    assert_same_decisions(chosen, valid & (scores >= max(limit, LEAST)), unsure=unsure)
    expected = cross_entropies(logits, target, weight)[chosen].mean() if chosen.any() else torch.zeros(())
    assert_near(value, expected)


@settings(max_examples=200, deadline=None)
@given(cases(low=True), THRESH, MIN_KEPT)
def test_ohem_of_low_resolution_logits(case, thresh, min_kept):
    """On the grid of the scores the limit is exact, and so is the loss."""
    logits, target, weight = case
    value, gradient = loss_and_gradient(OhemCrossEntropy(thresh, min_kept, weight=weight), logits, target)
    exact = logits.clone().requires_grad_()
    on_grid = (cross_entropies(exact.detach(), target) / GRID + 0.5).floor()
    hard = (target != 255) & (on_grid > 0)
    limit = math.floor(-math.log(thresh) / GRID + 0.5)
    if min_kept and hard.any():
        limit = min(limit, on_grid[hard].sort(descending=True).values[:min_kept][-1].item())
    hard &= on_grid >= limit
    terms = cross_entropies(exact, target, weight)
    expected = terms[hard].mean() if hard.any() else 0 * terms.sum()
    assert_close(value, expected)
    assert_close(gradient, torch.autograd.grad(expected, exact)[0])


@settings(max_examples=200, deadline=None)
@given(cases(low=True), st.booleans())
def test_upsampled_cross_entropy_is_torchs(case, full):
    logits, target, weight = case
    if full:
        target = target[:, : logits.shape[2], : logits.shape[3]]
    value, gradient = loss_and_gradient(UpsampledCrossEntropy(weight=weight), logits.float(), target)
    exact = logits.float().double().requires_grad_()
    counts = torch.ones(5, dtype=torch.float64) if weight is None else weight.double()
    valid = target != 255
    total = counts[target[valid]].sum()
    expected = cross_entropies(exact, target, weight).sum() / total if valid.any() else 0 * exact.sum()
    assert_near(value, expected)
    assert_near(gradient, torch.autograd.grad(expected, exact)[0])


@pytest.mark.parametrize("criterion", [OhemCrossEntropy(), UpsampledCrossEntropy()])
@pytest.mark.parametrize("grid", [(8, 8), (2, 2)])
def test_nothing_valid_is_an_attached_zero(criterion, grid):
    value, gradient = loss_and_gradient(criterion, torch.randn(2, 3, *grid), torch.full((2, 8, 8), 255))
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("thresh", [0, -0.1, 1.01, math.nan, math.inf])
def test_a_thresh_that_is_no_probability_is_refused(thresh):
    with pytest.raises(ValueError, match=f"^thresh: expected a probability, 0 < thresh <= 1, got {thresh}$"):
        OhemCrossEntropy(thresh)


def test_the_limit_itself_is_hard_and_ties_are_all_kept():
    """Four equal pixels of p = 1/2 and one that is easier: min_kept asks for two, thresh for p <= 1/2."""
    logits = torch.tensor([0.0, 0.0, 0.0, 0.0, 2.0]).reshape(1, 1, 1, 5)
    logits = torch.cat([logits, torch.zeros_like(logits)], 1)
    target = torch.zeros(1, 1, 5, dtype=torch.uint8)
    for thresh, min_kept, kept in ((0.5, 0, 4), (0.4, 0, 0), (0.4, 2, 4), (0.4, 5, 5), (1.0, 0, 5)):
        stats = OhemCrossEntropy(thresh, min_kept)(logits, target, return_stats=True)[1]
        assert stats.selected == kept


def test_defaults_are_the_peers():
    """HRNet: thres 0.7, min_kept 100000; the torch loss has neither suppression nor a share."""
    ohem = {
        "mode": "ohem", "ce_weight": 0.0, "nms": 1, "ratio": 0.0, "threshold": -math.log(0.7), "min_kept": 100_000,
        "ignore_index": None,
    }  # fmt: skip
    plain = {"label_smoothing": 0.0, "align_corners": False, "ignore_index": -1}
    assert ohem.items() <= OhemCrossEntropy().options.items()
    assert plain.items() <= UpsampledCrossEntropy(ignore_index=-1).options.items()
    assert OhemCrossEntropy(weight=WEIGHT).weight is WEIGHT
