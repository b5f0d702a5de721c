"""Modules that hold parameters or options."""

from bcmfnet.nn.context import DAPPM, LMFM
from bcmfnet.nn.losses import BoundaryCorrectedLoss, OhemCrossEntropy, UpsampledCrossEntropy

__all__ = ["DAPPM", "LMFM", "BoundaryCorrectedLoss", "OhemCrossEntropy", "UpsampledCrossEntropy"]
