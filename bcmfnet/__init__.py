"""BCMFNet: real-time semantic segmentation with its own kernels, in PyTorch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "BoundaryCorrectedLoss": "bcmfnet.nn",
    "boundary_corrected_loss": "bcmfnet.ops",
    "create_model": "bcmfnet.models",
    "list_models": "bcmfnet.models",
}

__all__ = ["__version__", *_PUBLIC]


if TYPE_CHECKING:
    from bcmfnet.models import create_model as create_model
    from bcmfnet.models import list_models as list_models
    from bcmfnet.nn import BoundaryCorrectedLoss as BoundaryCorrectedLoss
    from bcmfnet.ops import boundary_corrected_loss as boundary_corrected_loss
else:

    def __getattr__(name: str) -> Any:
        """Import a public name on first use, so that the command line starts without loading torch."""
        if name not in _PUBLIC:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
