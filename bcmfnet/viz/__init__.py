"""Pictures of label maps (OpenCV) and of a run (matplotlib, loaded when a figure is drawn)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "colorize": "bcmfnet.viz.pictures",
    "LossMaps": "bcmfnet.viz.pictures",
    "comparison": "bcmfnet.viz.pictures",
    "legend": "bcmfnet.viz.pictures",
    "loss_maps": "bcmfnet.viz.pictures",
    "overlay": "bcmfnet.viz.pictures",
    "with_legend": "bcmfnet.viz.pictures",
    "plot_confusion": "bcmfnet.viz.plots",
    "plot_training": "bcmfnet.viz.plots",
    "require_matplotlib": "bcmfnet.viz.plots",
}

__all__ = list(_PUBLIC)


if TYPE_CHECKING:
    from bcmfnet.viz.pictures import LossMaps as LossMaps
    from bcmfnet.viz.pictures import colorize as colorize
    from bcmfnet.viz.pictures import comparison as comparison
    from bcmfnet.viz.pictures import legend as legend
    from bcmfnet.viz.pictures import loss_maps as loss_maps
    from bcmfnet.viz.pictures import overlay as overlay
    from bcmfnet.viz.pictures import with_legend as with_legend
    from bcmfnet.viz.plots import plot_confusion as plot_confusion
    from bcmfnet.viz.plots import plot_training as plot_training
    from bcmfnet.viz.plots import require_matplotlib as require_matplotlib
else:

    def __getattr__(name: str) -> Any:
        """Import a function on first use, so that naming the package loads nothing."""
        if name not in _PUBLIC:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_PUBLIC[name]), name)
