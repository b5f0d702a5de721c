"""The one library that every op of this package is defined in; schemas stand in Python, so ops need no binary."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

LIBRARY = torch.library.Library("bcmfnet", "DEF")
EVERY_DEVICE = "CompositeExplicitAutograd"
"""Dispatch key under which ops are registered: of a device type without kernels plain PyTorch serves them."""


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """Outside of autocast, which would run the matmuls of plain PyTorch in half precision."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
