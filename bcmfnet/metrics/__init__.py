"""Segmentation metrics pooled over a set: confusion matrix and IoU, Boundary IoU, boundary F, trimap IoU."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "BoundaryMetrics": "bcmfnet.metrics.boundary",
    "BoundaryScores": "bcmfnet.metrics.boundary",
    "ConfusionMatrix": "bcmfnet.metrics.confusion",
}

__all__ = list(_PUBLIC)


if TYPE_CHECKING:
    from bcmfnet.metrics.boundary import BoundaryMetrics as BoundaryMetrics
    from bcmfnet.metrics.boundary import BoundaryScores as BoundaryScores
    from bcmfnet.metrics.confusion import ConfusionMatrix as ConfusionMatrix
else:

    def __getattr__(name: str) -> Any:
        """Import a metric on first use, so that the confusion matrix does not load cv2."""
        if name not in _PUBLIC:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_PUBLIC[name]), name)
