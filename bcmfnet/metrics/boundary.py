"""Boundary IoU, boundary F and trimap IoU of label maps, streamed over a set.

Label maps are partitions, so one pass finds the bands or contours of all classes at once: the cost of an
image does not depend on the number of classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from bcmfnet.metrics._common import mean_of_present, ratio, valid_labels
from bcmfnet.metrics.confusion import class_iou

VOID = 255


@dataclass(frozen=True)
class ClassScores:
    """A score per class, float64 [C], NaN where a class has none, and its mean over the others."""

    per_class: np.ndarray
    mean: float


@dataclass(frozen=True)
class BoundaryScores:
    """Scores of a set; dictionaries are keyed by radius in pixels; NaN where nothing was there to score.

    Attributes:
        boundary_iou, mean_boundary_iou: Boundary IoU per class, float64 [C], and its mean over classes.
        boundary_f: boundary F, per class the mean over images.
        skipped_pairs: pairs (class, image) with a contour in neither map, left out of boundary F.
        trimap_iou: mIoU over the pixels within r of a ground-truth edge.
        interior_miou: mIoU over the pixels farther than the largest r from every ground-truth edge.
    """

    boundary_iou: np.ndarray
    mean_boundary_iou: float
    boundary_f: dict[int, ClassScores]
    skipped_pairs: int
    trimap_iou: dict[int, float]
    interior_miou: float

    def to_dict(self, classes: Sequence[str]) -> dict[str, Any]:
        """Plain values for JSON, per class under its name; a score that does not exist is None."""

        def plain(scores: np.ndarray, mean: float) -> dict[str, Any]:
            return {"mean": _number(mean), "per_class": dict(zip(classes, map(_number, scores), strict=True))}

        return {
            "boundary_iou": plain(self.boundary_iou, self.mean_boundary_iou),
            "boundary_f": {str(r): plain(f.per_class, f.mean) for r, f in self.boundary_f.items()},
            "skipped_pairs": self.skipped_pairs,
            "trimap_iou": {str(r): _number(score) for r, score in self.trimap_iou.items()},
            "interior_miou": _number(self.interior_miou),
        }


class BoundaryMetrics:
    """Streaming boundary metrics.

    Ignored pixels are taken out of prediction and ground truth alike. With P and G the two maps that remain:

    - **Boundary IoU** (Cheng et al., CVPR 2021). The band of a class is its mask minus the mask's erosion by
      d iterations of 3x3, d = max(1, round(dilation_ratio * diagonal)). Whatever is outside the mask erodes
      it: other classes, ignored pixels and the image border. Intersection and union of the bands of P and G
      are summed over the set.
    - **Boundary F at r.** The contour of a class is its pixels with a 4-neighbour of another class; neither
      the image border nor an ignored pixel is another class. Precision is the share of P's contour within r
      (Euclidean, so a disk) of G's contour of the same class, recall the same with P and G exchanged,
      F = 2PR / (P + R), and 0 where P + R is 0, so also where just one contour is empty. Where both are
      empty the pair (class, image) is skipped. Mean over images, then over classes.
    - **Trimap IoU at r.** Edge pixels are the contours of all classes of G; IoU from the confusion matrix,
      pooled over the set, of the valid pixels within r (Euclidean) of an edge pixel. The interior is the
      valid pixels beyond the largest r, those of an image without an edge included.

    Args:
        num_classes: class ids are 0 .. num_classes - 1, at most 255 of them.
        ignore_index: target value of the pixels that do not count.
        dilation_ratio: width of the Boundary IoU band as a share of the image's diagonal.
        f_radii, trimap_radii: tolerances, pixels, increasing.

    Attributes:
        state: name -> array; every entry is a plain sum over images, so ranks may all-reduce them in place.
    """

    def __init__(
        self,
        num_classes: int,
        ignore_index: int = 255,
        dilation_ratio: float = 0.02,
        f_radii: Sequence[int] = (1, 3, 5),
        trimap_radii: Sequence[int] = (1, 3, 5, 10),
    ) -> None:
        if not 1 <= num_classes <= VOID:
            raise ValueError(f"num_classes: expected 1..{VOID}, got {num_classes}")
        for name, radii in (("f_radii", f_radii), ("trimap_radii", trimap_radii)):
            if not radii or radii[0] < 0 or list(radii) != sorted(set(radii)):
                raise ValueError(f"{name}: expected increasing radii >= 0, got {tuple(radii)}")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.dilation_ratio = dilation_ratio
        self.f_radii = tuple(f_radii)
        self.trimap_radii = tuple(trimap_radii)
        self.state: dict[str, np.ndarray] = {
            "images": np.zeros((), np.int64),
            "band_intersection": np.zeros(num_classes, np.int64),
            "band_union": np.zeros(num_classes, np.int64),
            "f_sum": np.zeros((len(self.f_radii), num_classes)),
            "f_pairs": np.zeros(num_classes, np.int64),
            "trimap_rings": np.zeros((len(self.trimap_radii) + 1, num_classes, num_classes), np.int64),
        }

    def update(self, prediction: Any, target: Any) -> None:
        """Count one image.

        Args:
            prediction, target: integer numpy arrays or torch tensors, both [H, W].

        Raises:
            TypeError: labels that are not integers.
            ValueError: other shapes, or (DataError) a class id out of range; nothing is counted then.
        """
        predicted, truth, valid = valid_labels(prediction, target, self.num_classes, self.ignore_index)
        if valid.ndim != 2 or not valid.size:
            raise ValueError(f"target: expected [H, W] with H, W >= 1, got {list(valid.shape)}")
        p, g = np.full((2, *valid.shape), VOID, np.uint8)
        p[valid], g[valid] = predicted, truth
        p_contour, g_contour = contours(p), contours(g)
        self.state["images"] += 1
        self._update_bands(p, g)
        self._update_f(p_contour, g_contour)
        self._update_trimap(predicted, truth, edge_distance(g_contour)[valid])

    def merge(self, other: BoundaryMetrics) -> None:
        """Add the sums of another part of the set, for example another rank's."""
        if self._options() != other._options():
            raise ValueError(f"other: expected the options {self._options()}, got {other._options()}")
        for name, total in self.state.items():
            total += other.state[name]

    def compute(self) -> BoundaryScores:
        """Scores of all images so far."""
        state = self.state
        boundary_iou = ratio(state["band_intersection"], state["band_union"])
        boundary_f = ratio(state["f_sum"], np.broadcast_to(state["f_pairs"], state["f_sum"].shape))
        f_scores = (ClassScores(f, mean_of_present(f)) for f in boundary_f)
        *rings, interior = state["trimap_rings"]
        trimap_iou = class_iou(np.cumsum(rings, axis=0))
        return BoundaryScores(
            boundary_iou=boundary_iou,
            mean_boundary_iou=mean_of_present(boundary_iou),
            boundary_f=dict(zip(self.f_radii, f_scores, strict=True)),
            skipped_pairs=int(state["images"] * self.num_classes - state["f_pairs"].sum()),
            trimap_iou=dict(zip(self.trimap_radii, map(mean_of_present, trimap_iou), strict=True)),
            interior_miou=mean_of_present(class_iou(interior)),
        )

    def _options(self) -> tuple:
        return (self.num_classes, self.ignore_index, self.dilation_ratio, self.f_radii, self.trimap_radii)

    def _update_bands(self, p: np.ndarray, g: np.ndarray) -> None:
        width = max(1, round(self.dilation_ratio * math.hypot(*g.shape)))
        p_band, g_band = bands(p, width), bands(g, width)
        intersection = self._count(p_band[p_band == g_band])
        self.state["band_intersection"] += intersection
        self.state["band_union"] += self._count(p_band) + self._count(g_band) - intersection

    def _update_f(self, p_contour: np.ndarray, g_contour: np.ndarray) -> None:
        p_pixels, g_pixels = self._count(p_contour), self._count(g_contour)
        precision = self._matched(p_contour, g_contour) / np.maximum(p_pixels, 1)
        recall = self._matched(g_contour, p_contour) / np.maximum(g_pixels, 1)
        self.state["f_sum"] += np.nan_to_num(ratio(2 * precision * recall, precision + recall))
        self.state["f_pairs"] += (p_pixels + g_pixels) > 0

    def _update_trimap(self, predicted: np.ndarray, truth: np.ndarray, distance: np.ndarray) -> None:
        rings = self.state["trimap_rings"]
        cell = truth * np.intp(self.num_classes) + predicted.astype(np.intp, copy=False)
        for radius in self.trimap_radii:
            # Squared distances are integers: the half keeps the transform's float32 root off the tie.
            cell += (distance > math.sqrt(radius**2 + 0.5)) * np.intp(self.num_classes**2)
        rings += np.bincount(cell, minlength=rings.size).reshape(rings.shape)

    def _matched(self, contour: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Contour pixels per radius and class, int64 [R, C], with a pixel of the other's same class within r.

        Looks up the disk's offsets, ring by ring, for the contour pixels alone, and drops those that matched
        after each ring: contours are a few percent of an image, and most of them match at once.
        """
        margin = self.f_radii[-1]
        contour, other = (np.pad(labels, margin, constant_values=VOID) for labels in (contour, other))
        row, other = contour.shape[1], other.ravel()
        pixel = np.flatnonzero(contour != VOID)
        label = contour.ravel()[pixel]
        matched = np.zeros((len(self.f_radii), self.num_classes), np.int64)
        for ring, offsets in enumerate(disk_rings(self.f_radii)):
            hit = np.zeros(pixel.size, bool)
            for dy, dx in offsets:
                hit |= other[pixel + (dy * row + dx)] == label
            matched[ring] = self._count(label[hit])
            pixel, label = pixel[~hit], label[~hit]
        return matched.cumsum(0)

    def _count(self, labels: np.ndarray) -> np.ndarray:
        """Pixels of each class, int64 [C]; VOID is not counted."""
        return np.bincount(labels.ravel(), minlength=VOID + 1)[: self.num_classes]


def bands(labels: np.ndarray, width: int) -> np.ndarray:
    """Bands of all classes: labels within `width` of their own region's end, VOID elsewhere; uint8 [H, W].

    A pixel survives the erosion of its class exactly if the square window around it lies inside the image and
    holds a single value, that is, if its minimum equals its maximum.
    """
    window = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
    band = cv2.erode(labels, window) != cv2.dilate(labels, window)
    band[:width] = band[-width:] = True
    band[:, :width] = band[:, -width:] = True
    return np.where(band, labels, np.uint8(VOID))


def contours(labels: np.ndarray) -> np.ndarray:
    """Labels of the pixels with a 4-neighbour of another class, VOID elsewhere; uint8 [H, W].

    VOID pixels and the outside of the image are no class.
    """
    edge = np.zeros(labels.shape, bool)
    for a, b in ((np.s_[:, 1:], np.s_[:, :-1]), (np.s_[1:], np.s_[:-1])):
        differ = (labels[a] != labels[b]) & (labels[a] != VOID) & (labels[b] != VOID)
        edge[a] |= differ
        edge[b] |= differ
    return np.where(edge, labels, np.uint8(VOID))


def edge_distance(contour: np.ndarray) -> np.ndarray:
    """Euclidean distance of each pixel to the nearest contour pixel, float32 [H, W]; infinite without one."""
    away = (contour == VOID).astype(np.uint8)
    if away.all():
        return np.full(contour.shape, np.inf, np.float32)
    return cv2.distanceTransform(away, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


def disk_rings(radii: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Offsets (dy, dx) of disk(radii[-1]); those new with each radius in a list of their own."""
    span = range(-radii[-1], radii[-1] + 1)
    square = [(dy, dx) for dy in span for dx in span]
    inner = [-1, *(radius**2 for radius in radii[:-1])]
    return [
        [(dy, dx) for dy, dx in square if low < dy**2 + dx**2 <= radius**2]
        for low, radius in zip(inner, radii, strict=True)
    ]


def _number(score: float) -> float | None:
    return None if math.isnan(score) else float(score)
