"""BCMFNet: real-time semantic segmentation with its own kernels, in PyTorch."""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "BoundaryCorrectedLoss": "bcmfnet.nn",
    "boundary_corrected_loss": "bcmfnet.ops",
    "create_model": "bcmfnet.models",
    "for_inference": "bcmfnet.inference",
    "list_models": "bcmfnet.models",
}

__all__ = ["__version__", *_PUBLIC]


if TYPE_CHECKING:
    from bcmfnet.inference import for_inference as for_inference
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


def _why_not_whole(package: Path) -> str | None:
    """What this folder lacks: a clone that was not installed editable shadows the copy that was installed."""
    if not any((package / name).exists() for name in ("_build.json", "_C.so")):
        return "no native code was built in this folder"
    kernels = find_spec(f"{__name__}.kernels")
    if kernels is None or Path(kernels.origin or "").parents[1] not in (package, package.parent):
        return "it has no bcmfnet.kernels"
    return None


if _missing := _why_not_whole(Path(__file__).parent):
    warnings.warn(
        f"bcmfnet: imported from {Path(__file__).parent}, and {_missing}; "
        "run pip install -e . in its checkout, or start Python elsewhere",
        stacklevel=2,
    )
