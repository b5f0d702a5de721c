"""Boundary metrics against loops written from their definitions, and against values counted by hand."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from scipy import ndimage

from bcmfnet.errors import DataError
from bcmfnet.metrics import BoundaryMetrics

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

NEIGHBOURS = ((-1, 0), (1, 0), (0, -1), (0, 1))


def bands_by_definition(labels, valid, label, width):
    mask = (labels == label) & valid
    return mask & ~ndimage.binary_erosion(mask, np.ones((3, 3)), iterations=width, border_value=0)


def contour_by_definition(labels, valid, label):
    contour = np.zeros(labels.shape, bool)
    for y, x in np.argwhere((labels == label) & valid):
        for v, u in ((y + dy, x + dx) for dy, dx in NEIGHBOURS):
            inside = 0 <= v < labels.shape[0] and 0 <= u < labels.shape[1]
            contour[y, x] |= inside and valid[v, u] and labels[v, u] != label
    return contour


def disk(radius):
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return y * y + x * x <= radius * radius


def boundary_f_by_definition(p_contour, g_contour, radius):
    if not p_contour.any() and not g_contour.any():
        return None
    if not p_contour.any() or not g_contour.any():
        return 0.0
    precision = (p_contour & ndimage.binary_dilation(g_contour, disk(radius))).sum() / p_contour.sum()
    recall = (g_contour & ndimage.binary_dilation(p_contour, disk(radius))).sum() / g_contour.sum()
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def near_by_definition(edge, radius):
    near = np.zeros(edge.shape, bool)
    for y, x in np.argwhere(edge):
        v, u = np.indices(edge.shape)
        near |= (v - y) ** 2 + (u - x) ** 2 <= radius**2
    return near


def iou(intersection, union):
    return intersection / union if union else np.nan


def mean(values):
    present = [value for value in values if value is not None and not np.isnan(value)]
    return sum(present) / len(present) if present else np.nan


def scores_by_definition(pairs, classes, ratio, f_radii, trimap_radii):
    """Everything compute() reports, from a list of (prediction, target)."""
    ids = range(classes)
    out = {"skipped_pairs": 0, "boundary_iou": [], "f": {}, "trimap": {}}
    for c in ids:
        intersection = union = 0
        for p, g in pairs:
            width = max(1, round(ratio * np.hypot(*g.shape)))
            a, b = (bands_by_definition(labels, g != 255, c, width) for labels in (p, g))
            intersection, union = intersection + (a & b).sum(), union + (a | b).sum()
        out["boundary_iou"].append(iou(intersection, union))
    contours = [[[contour_by_definition(labels, g != 255, c) for labels in (p, g)] for p, g in pairs] for c in ids]
    for r in f_radii:
        per_image = [[boundary_f_by_definition(*pair, r) for pair in contours[c]] for c in ids]
        out["f"][r] = [mean(values) for values in per_image]
        out["skipped_pairs"] = sum(values.count(None) for values in per_image)
    edges = [np.any([contours[c][i][1] for c in ids], axis=0) for i in range(len(pairs))]
    for r in trimap_radii:
        zones = [near_by_definition(edge, r) for edge in edges]
        out["trimap"][r] = mean(pooled_iou(pairs, zones, ids))
    out["interior"] = mean(pooled_iou(pairs, [~zone for zone in zones], ids))
    return out


def pooled_iou(pairs, zones, ids):
    p, g = (np.concatenate(labels, axis=None) for labels in zip(*pairs, strict=True))
    counted = np.concatenate(zones, axis=None) & (g != 255)
    p, g = p[counted], g[counted]
    return [iou(((p == c) & (g == c)).sum(), ((p == c) | (g == c)).sum()) for c in ids]


def assert_scores(pairs, classes, ratio=0.02, f_radii=(1, 3, 5), trimap_radii=(1, 3, 5, 10)):
    metric = BoundaryMetrics(classes, dilation_ratio=ratio, f_radii=f_radii, trimap_radii=trimap_radii)
    for prediction, target in pairs:
        metric.update(prediction, target)
    got, want = metric.compute(), scores_by_definition(pairs, classes, ratio, f_radii, trimap_radii)
    np.testing.assert_allclose(got.boundary_iou, want["boundary_iou"], rtol=1e-12)
    np.testing.assert_allclose(got.mean_boundary_iou, mean(want["boundary_iou"]), rtol=1e-12)
    assert got.skipped_pairs == want["skipped_pairs"]
    for r in f_radii:
        np.testing.assert_allclose(got.boundary_f[r].per_class, want["f"][r], rtol=1e-12)
        np.testing.assert_allclose(got.boundary_f[r].mean, mean(want["f"][r]), rtol=1e-12)
    for r in trimap_radii:
        np.testing.assert_allclose(got.trimap_iou[r], want["trimap"][r], rtol=1e-12)
    np.testing.assert_allclose(got.interior_miou, want["interior"], rtol=1e-12)


@st.composite
def label_pairs(draw):
    """Maps of blocks, so that regions have an inside; a block of 1 gives one-pixel objects and noise."""
    height, width = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    block = draw(st.sampled_from([1, 2, 4]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = draw(st.sampled_from([(0,), (0, 1), (0, 1, 2), (0, 1, 3, 255), (2, 255), (255,)]))
    cells = (-(-height // block), -(-width // block))

    def blown_up(ids):
        return rng.choice(np.array(ids, np.uint8), cells).repeat(block, 0).repeat(block, 1)[:height, :width]

    target = blown_up(values)
    changed = rng.random(target.shape) < draw(st.sampled_from([0.0, 0.05, 0.5]))
    return np.where(changed | (target == 255), blown_up((0, 1, 2, 3)), target), target


# 0.02 is the default and gives d = 1 here; 0.15 and 0.5 give bands wider than the regions or the image.
@hypothesis.given(st.lists(label_pairs(), min_size=1, max_size=3), st.sampled_from([0.02, 0.15, 0.5]))
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
def test_equals_the_definitions(pairs, ratio):
    assert_scores(pairs, classes=4, ratio=ratio)


def test_equals_the_definitions_at_other_radii():
    rng = np.random.default_rng(0)
    target = rng.integers(0, 3, (5, 6)).astype(np.uint8).repeat(6, 0).repeat(6, 1)
    shifted = np.roll(target, (2, 3), (0, 1))
    assert_scores([(shifted, target)], classes=3, f_radii=(0, 2, 7), trimap_radii=(0, 4))


def split_at(column, height=8, width=8):
    """Class 0 left of the column, class 1 from it on."""
    return np.broadcast_to(np.arange(width) >= column, (height, width)).astype(np.uint8)


def test_shift_by_one_pixel_by_hand():
    metric = BoundaryMetrics(3, f_radii=(0, 1), trimap_radii=(1,))
    metric.update(prediction=split_at(5), target=split_at(4))
    scores = metric.compute()
    # d = 1. Class 0: bands of 20 and 22 pixels share 14. Class 1: bands of 20 and 18 share 12.
    assert scores.boundary_iou == pytest.approx([14 / 28, 12 / 26, np.nan], nan_ok=True)
    assert scores.mean_boundary_iou == pytest.approx((1 / 2 + 6 / 13) / 2)
    assert [scores.boundary_f[r].per_class[:2].tolist() for r in (0, 1)] == [[0, 0], [1, 1]]
    assert scores.skipped_pairs == 1
    # Columns 2..5 are the trimap; column 4 is wrong: 16 of 24 pixels of class 0 and 8 of 16 of class 1 agree.
    assert scores.trimap_iou == {1: pytest.approx((2 / 3 + 1 / 2) / 2)}
    assert scores.interior_miou == 1
    assert scores.to_dict(("left", "right", "none")) == {
        "boundary_iou": {
            "mean": scores.mean_boundary_iou,
            "per_class": {"left": 14 / 28, "right": 12 / 26, "none": None},
        },
        "boundary_f": {
            "0": {"mean": 0, "per_class": {"left": 0, "right": 0, "none": None}},
            "1": {"mean": 1, "per_class": {"left": 1, "right": 1, "none": None}},
        },
        "skipped_pairs": 1,
        "trimap_iou": {"1": scores.trimap_iou[1]},
        "interior_miou": 1,
    }


def all_means(scores):
    f = [score.mean for score in scores.boundary_f.values()]
    return [scores.mean_boundary_iou, *f, *scores.trimap_iou.values(), scores.interior_miou]


def test_tolerance_is_a_disk_closed_at_its_radius():
    target, prediction = np.zeros((2, 24, 24), np.uint8)
    target[10, 10] = prediction[13, 14] = 1
    metric = BoundaryMetrics(2, f_radii=(4, 5))
    metric.update(prediction, target)
    assert [metric.compute().boundary_f[r].per_class[1] for r in (4, 5)] == [0, 1]


def test_object_missed_or_invented_scores_zero():
    empty, pixel = np.zeros((2, 9, 9), np.uint8)
    pixel[4, 4] = 1
    metric = BoundaryMetrics(2)
    metric.update(empty, pixel)
    metric.update(pixel, empty)
    metric.update(pixel, pixel)
    metric.update(empty, empty)
    scores = metric.compute()
    assert scores.boundary_f[3].per_class.tolist() == [1 / 3, 1 / 3]
    assert scores.skipped_pairs == 2


def test_perfect_prediction_scores_one():
    rng = np.random.default_rng(0)
    target = rng.choice(np.array([0, 1, 2, 255], np.uint8), (6, 8)).repeat(9, 0).repeat(7, 1)
    metric = BoundaryMetrics(3, trimap_radii=(1, 2))
    metric.update(np.where(target == 255, 1, target), target)
    assert set(all_means(metric.compute())) == {1.0}


def test_one_class_has_no_contour_but_the_border_bounds_its_band():
    metric = BoundaryMetrics(2)
    metric.update(np.zeros((10, 10), np.uint8), np.zeros((10, 10), np.uint8))
    scores = metric.compute()
    assert metric.state["band_union"].tolist() == [36, 0]
    assert scores.boundary_iou == pytest.approx([1, np.nan], nan_ok=True)
    assert np.isnan(all_means(scores)).tolist() == [False] + 7 * [True] + [False]
    assert scores.interior_miou == 1
    assert scores.skipped_pairs == 2


def test_edge_of_an_ignored_region_is_no_contour_but_bounds_the_band():
    target = np.zeros((9, 9), np.uint8)
    target[3:6, 3:6] = 255
    prediction = np.zeros((9, 9), np.uint8)
    prediction[3:6, 3:6] = 1
    metric = BoundaryMetrics(2)
    metric.update(prediction, target)
    assert metric.compute().skipped_pairs == 2
    # 32 pixels along the image border, 16 around the hole of 3 x 3.
    assert metric.state["band_union"].tolist() == [48, 0]


def test_all_ignored_scores_nothing(recwarn):
    metric = BoundaryMetrics(2)
    metric.update(np.ones((4, 4), np.uint8), np.full((4, 4), 255, np.uint8))
    assert np.isnan(all_means(metric.compute())).all()
    assert not recwarn.list


def test_merged_parts_equal_the_whole():
    rng = np.random.default_rng(3)
    pairs = rng.integers(0, 3, (5, 2, 6, 7)).astype(np.uint8).repeat(3, 2).repeat(3, 3)
    whole, first, second = (BoundaryMetrics(3) for _ in range(3))
    for index, (prediction, target) in enumerate(pairs):
        whole.update(prediction, target)
        (first, second)[index % 2].update(prediction, target)
    first.merge(pickle.loads(pickle.dumps(second)))
    for name, total in whole.state.items():
        np.testing.assert_allclose(first.state[name], total, rtol=1e-12)
    with pytest.raises(ValueError, match="other: expected the options"):
        whole.merge(BoundaryMetrics(3, f_radii=(2,)))


def test_bad_input_is_one_clear_line_and_counts_nothing():
    metric = BoundaryMetrics(3)
    with pytest.raises(DataError, match=r"target: expected class ids 0..2 or ignore_index 255, got 3$"):
        metric.update(np.zeros((4, 4), np.uint8), np.full((4, 4), 3, np.uint8))
    with pytest.raises(ValueError, match=r"target: expected \[H, W\] with H, W >= 1, got \[1, 4, 4\]$"):
        metric.update(np.zeros((1, 4, 4), np.uint8), np.zeros((1, 4, 4), np.uint8))
    assert not any(total.any() for total in metric.state.values())
    with pytest.raises(ValueError, match=r"num_classes: expected 1..255, got 256$"):
        BoundaryMetrics(256)
    with pytest.raises(ValueError, match=r"f_radii: expected increasing radii >= 0, got \(3, 1\)$"):
        BoundaryMetrics(3, f_radii=(3, 1))
