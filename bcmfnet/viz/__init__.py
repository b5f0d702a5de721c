"""Pictures of label maps (OpenCV) and of a run (matplotlib, loaded when a figure is drawn)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "colorize": "bcmfnet.viz.pictures",
    "LossMaps": "bcmfnet.viz.pictures",
    "comparison": "bcmfnet.viz.pictures",
    "legend": "bcmfnet.viz.pictures",
    "loss_maps": "bcmfnet.viz.pictures",
    "overlay": "bcmfnet.viz.pictures",
    "plot_confusion": "bcmfnet.viz.plots",
    "plot_overlays": "bcmfnet.viz.plots",
    "plot_training": "bcmfnet.viz.plots",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Import a function on first use, so that naming the package loads nothing."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
