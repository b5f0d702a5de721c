"""The paired bootstrap against metrics of frames that are really drawn again, and against the binomial distribution."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from bcmfnet.errors import DataError
from bcmfnet.metrics import BoundaryMetrics, ConfusionMatrix
from bcmfnet.metrics.bootstrap import frame_sums, iou_of_sums, mean_iou_of_sums, paired_bootstrap

CLASSES, SAMPLES = 5, 300  # more than are drawn at a time


def labelled(seed, errors):
    """A target with void and a prediction with errors; class 3 is in few frames and class 4 in none."""
    rng = np.random.default_rng(seed)
    target = np.kron(rng.integers(0, 3, (4, 5)), np.ones((6, 6), int)).astype(np.uint8)
    if seed % 4 == 0:
        target[:6, :6] = 3
    prediction = np.where(rng.random(target.shape) < errors, rng.integers(0, 3, target.shape), target)
    target[rng.random(target.shape) < 0.1] = 255
    return prediction.astype(np.uint8), target


def metrics_of(prediction, target):
    confusion, edges = ConfusionMatrix(CLASSES), BoundaryMetrics(CLASSES)
    confusion.update(prediction, target)
    edges.update(prediction, target)
    return confusion, edges


def test_sums_of_frames_are_those_of_the_metrics():
    pairs = [labelled(seed, 0.3) for seed in range(6)]
    confusion, edges = ConfusionMatrix(CLASSES), BoundaryMetrics(CLASSES)
    for pair in pairs:
        confusion.update(*pair)
        edges.update(*pair)
    region, boundary = (sum(parts) for parts in zip(*(frame_sums(*pair, CLASSES) for pair in pairs), strict=True))
    np.testing.assert_array_equal(iou_of_sums(region), confusion.iou())
    np.testing.assert_array_equal(iou_of_sums(boundary), edges.compute().boundary_iou)
    assert mean_iou_of_sums(region) == pytest.approx(confusion.miou(), rel=1e-14)
    assert mean_iou_of_sums(boundary) == pytest.approx(edges.compute().mean_boundary_iou, rel=1e-14)
    assert np.isnan(confusion.iou()[4])


def test_the_interval_is_that_of_metrics_of_the_drawn_frames():
    """Every drawn set is scored from its label maps; class 3 is missing in some of them and then not in their mean."""
    models = [[labelled(seed, errors) for seed in range(8)] for errors in (0.2, 0.3)]
    sums = np.array([[frame_sums(*pair, CLASSES) for pair in pairs] for pairs in models])
    counted = [[metrics_of(*pair) for pair in pairs] for pairs in models]
    rng = np.random.default_rng(7)
    differences, without = [], 0
    for _ in range(SAMPLES):
        drawn, scores = rng.integers(8, size=8), []
        for frames in counted:
            confusion, edges = ConfusionMatrix(CLASSES), BoundaryMetrics(CLASSES)
            for i in drawn:
                confusion.merge(frames[i][0])
                edges.merge(frames[i][1])
            scores.append((confusion.miou(), edges.compute().mean_boundary_iou))
            without += np.isnan(confusion.iou()[3])
        differences.append(np.subtract(scores[1], scores[0]))
    assert 0 < without < 2 * SAMPLES
    for score, column in enumerate(np.transpose(differences)):
        column = sorted(column)
        expected = []
        for at in (0.1 * (SAMPLES - 1), 0.9 * (SAMPLES - 1)):  # linear between neighbours
            below = int(at)
            expected.append(column[below] + (at - below) * (column[below + 1] - column[below]))
        low, high = paired_bootstrap(*sums[:, :, score], samples=SAMPLES, confidence=0.8, seed=7)
        assert (low, high) == pytest.approx(expected, abs=1e-12)
        assert low < high < 0, "b has more errors"


def test_the_interval_of_frames_that_are_right_or_wrong_is_binomial():
    """One class and unions of one size: the difference is the share of the frames drawn in which b alone is right.

    Its quantiles are then those of the binomial distribution, and so far from both sides that the draws find them.
    """
    frames, better, samples = 12, 6, 20_000
    a = np.tile([[0], [100]], (frames, 1, 1))
    b = a.copy()
    b[:better, 0] = 100
    for confidence in (0.8, 0.9):
        tails = ((1 - confidence) / 2, (1 + confidence) / 2)
        expected = stats.binom.ppf(tails, frames, better / frames) / frames
        distances = np.abs(stats.binom.cdf(np.arange(frames), frames, better / frames)[:, None] - tails)
        assert distances.min() > 4 * np.sqrt(0.1 * 0.9 / samples)
        assert paired_bootstrap(a, b, samples=samples, confidence=confidence) == pytest.approx(expected)


def test_frames_are_drawn_for_both_models_together():
    """The frames differ a lot and the models by the same in each: drawn apart, the interval would be wide."""
    rng = np.random.default_rng(0)
    a = np.stack([rng.integers(0, 800, (40, 1)), np.full((40, 1), 1000)], 1)
    b = a + [[10], [0]]
    assert paired_bootstrap(a, b, samples=500) == pytest.approx((0.01, 0.01))
    assert paired_bootstrap(b, a, samples=500) == pytest.approx((-0.01, -0.01))


def test_the_seed_decides_the_draws():
    rng = np.random.default_rng(0)
    a, b = (np.stack([rng.integers(0, 90, (30, 3)), np.full((30, 3), 100)], 1) for _ in "ab")
    assert paired_bootstrap(a, b, samples=200, seed=1) == paired_bootstrap(a, b, samples=200, seed=1)
    assert paired_bootstrap(a, b, samples=200, seed=1) != paired_bootstrap(a, b, samples=200, seed=2)


def test_frames_without_a_valid_pixel_count_nothing(recwarn):
    sums = np.zeros((3, 2, 2), np.int64)
    sums[0] = [[5, 0], [10, 0]]
    low, high = paired_bootstrap(sums, sums, samples=100)
    assert (low, high) == (0, 0) and not recwarn.list


@pytest.mark.parametrize(
    ("a", "b", "error", "line"),
    [
        (np.ones((3, 2, 4)), np.ones((3, 2, 5)), ValueError,
         "a, b: expected both [F, 2, C], got [3, 2, 4] and [3, 2, 5]"),
        (np.ones((3, 4)), np.ones((3, 4)), ValueError, "a, b: expected both [F, 2, C], got [3, 4] and [3, 4]"),
        (np.ones((1, 2, 4)), np.ones((1, 2, 4)), DataError,
         "bootstrap: expected at least two frames to draw from, got 1"),
        (np.zeros((3, 2, 4)), np.zeros((3, 2, 4)), DataError,
         "bootstrap: expected a pixel of a class in the frames, got ignored ones alone"),
    ],
)  # fmt: skip
def test_what_nothing_can_be_drawn_from_is_one_line(a, b, error, line):
    with pytest.raises(error) as caught:
        paired_bootstrap(a, b)
    assert str(caught.value) == line
