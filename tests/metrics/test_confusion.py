"""The confusion matrix against a pixel loop and against torchmetrics."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from bcmfnet.errors import DataError
from bcmfnet.metrics import ConfusionMatrix
from bcmfnet.metrics.confusion import frame_miou

CLASSES = 5


def random_labels(seed: int, shape: tuple[int, ...] = (3, 17, 23), dtype: type = np.uint8):
    """A prediction and a target with a tenth of it ignored; class 4 is in neither."""
    rng = np.random.default_rng(seed)
    prediction, target = rng.integers(0, CLASSES - 1, (2, *shape)).astype(dtype)
    target[rng.random(shape) < 0.1] = 255
    return prediction, target


def counted_by_a_loop(prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
    matrix = np.zeros((CLASSES, CLASSES), np.int64)
    for predicted, truth in zip(prediction.ravel().tolist(), target.ravel().tolist(), strict=True):
        if truth != 255:
            matrix[truth, predicted] += 1
    return matrix


# uint8: what decoders give; int32, int64: what argmax gives; uint16 lies between numpy's promotion rules.
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_counts_equal_a_loop(dtype):
    prediction, target = random_labels(0, dtype=dtype)
    metric = ConfusionMatrix(CLASSES)
    metric.update(prediction, target)
    np.testing.assert_array_equal(metric.matrix, counted_by_a_loop(prediction, target))
    assert metric.matrix.dtype == np.int64


def test_class_ids_above_the_uint8_range_of_the_product():
    metric = ConfusionMatrix(200)
    metric.update(np.array([199], np.uint8), np.array([198], np.uint8))
    assert np.argwhere(metric.matrix).tolist() == [[198, 199]]


def test_torch_tensors_of_other_dtypes_and_layouts():
    prediction, target = random_labels(1)
    metric = ConfusionMatrix(CLASSES)
    metric.update(torch.from_numpy(prediction).long().mT, torch.from_numpy(target).mT)
    np.testing.assert_array_equal(metric.matrix, counted_by_a_loop(prediction, target))


def test_pooled_scores_equal_torchmetrics():
    classification = pytest.importorskip("torchmetrics.classification")
    options = {"num_classes": CLASSES, "ignore_index": 255}
    metric = ConfusionMatrix(CLASSES)
    matrix = classification.MulticlassConfusionMatrix(**options)
    iou = classification.MulticlassJaccardIndex(**options, average="none")
    recall = classification.MulticlassRecall(**options, average="none")
    accuracy = classification.MulticlassAccuracy(**options, average="micro")
    # Images of different sizes: a mean over images would differ from the pooled score.
    for seed, shape in enumerate([(1, 8, 8), (1, 40, 31), (2, 5, 3)]):
        prediction, target = random_labels(seed, shape)
        metric.update(prediction, target)
        for oracle in (matrix, iou, recall, accuracy):
            oracle.update(torch.from_numpy(prediction).long(), torch.from_numpy(target).long())
    np.testing.assert_array_equal(metric.matrix, matrix.compute().numpy())
    np.testing.assert_allclose(metric.iou()[:4], iou.compute().numpy()[:4], rtol=1e-6)
    np.testing.assert_allclose(metric.class_accuracy()[:4], recall.compute().numpy()[:4], rtol=1e-6)
    assert metric.pixel_accuracy() == pytest.approx(accuracy.compute().item(), rel=1e-6)
    assert np.isnan(metric.iou()[4]) and np.isnan(metric.class_accuracy()[4])


def test_scores_by_hand():
    metric = ConfusionMatrix(4)
    metric.update(np.array([[0, 0, 1, 2, 7]]), np.array([[0, 1, 1, 1, 255]]))
    assert metric.iou() == pytest.approx([1 / 2, 1 / 3, 0, np.nan], nan_ok=True)
    assert metric.miou() == pytest.approx((1 / 2 + 1 / 3 + 0) / 3)
    assert metric.class_accuracy() == pytest.approx([1, 1 / 3, np.nan, np.nan], nan_ok=True)
    assert metric.pixel_accuracy() == 2 / 4


def test_an_update_returns_its_own_counts():
    metric = ConfusionMatrix(CLASSES)
    for seed in range(2):
        prediction, target = random_labels(seed)
        np.testing.assert_array_equal(metric.update(prediction, target), counted_by_a_loop(prediction, target))


def test_miou_of_a_frame_is_over_the_classes_of_its_ground_truth():
    metric = ConfusionMatrix(4)
    counts = metric.update(np.array([[0, 0, 1, 2, 7]]), np.array([[0, 1, 1, 1, 255]]))
    assert frame_miou(counts) == pytest.approx((1 / 2 + 1 / 3) / 2)  # class 2 is in the prediction alone
    assert np.isnan(frame_miou(metric.update(np.array([0]), np.array([255]))))


def test_nothing_seen_is_nan_without_a_warning(recwarn):
    metric = ConfusionMatrix(3)
    metric.update(np.zeros((2, 2), np.uint8), np.full((2, 2), 255, np.uint8))
    assert np.isnan(metric.pixel_accuracy())
    with pytest.raises(
        DataError, match=r"^mIoU: expected a pixel of a class in the set, got ignored ones \(255\) alone$"
    ):
        metric.miou()
    assert not recwarn.list


def test_merged_parts_equal_the_whole():
    whole, parts = ConfusionMatrix(CLASSES), [ConfusionMatrix(CLASSES), ConfusionMatrix(CLASSES)]
    for seed in range(4):
        whole.update(*random_labels(seed))
        parts[seed % 2].update(*random_labels(seed))
    parts[0].merge(pickle.loads(pickle.dumps(parts[1])))
    np.testing.assert_array_equal(parts[0].matrix, whole.matrix)
    with pytest.raises(ValueError, match="other: expected 5 classes, got 4"):
        whole.merge(ConfusionMatrix(4))


def test_ignore_index_of_another_value():
    metric = ConfusionMatrix(2, ignore_index=-1)
    metric.update(np.array([0, 1, -9]), np.array([0, 0, -1]))
    assert metric.matrix.tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize(
    ("prediction", "target", "error", "message"),
    [
        ([0], [5], DataError, r"target: expected class ids 0..4 or ignore_index 255, got 5$"),
        ([0], [-1], DataError, r"target: expected class ids 0..4 or ignore_index 255, got -1$"),
        ([255], [0], DataError, r"prediction: expected class ids 0..4, got 255$"),
        ([0, 1], [0], ValueError, r"prediction: expected the target's shape \[1\], got \[2\]$"),
        ([0.5], [0], TypeError, r"prediction: expected integer class ids, got float64 \[1\]$"),
        ([0], [True], TypeError, r"target: expected integer class ids, got bool \[1\]$"),
    ],
)
def test_bad_labels_are_one_clear_line_and_count_nothing(prediction, target, error, message):
    metric = ConfusionMatrix(CLASSES)
    with pytest.raises(error, match=message):
        metric.update(np.array(prediction), np.array(target))
    assert metric.matrix.sum() == 0
