"""The namespace of the ops in torch, which csrc/common/tensor.h has as BCM_LIBRARY."""

from __future__ import annotations

import torch

NAMESPACE = "bcmfnet"
OPS = getattr(torch.ops, NAMESPACE)
