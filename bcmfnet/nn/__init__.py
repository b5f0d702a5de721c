"""Modules that hold parameters or options."""

from bcmfnet.nn.context import DAPPM, LMFM
from bcmfnet.nn.losses import (
    BinaryCrossEntropy,
    BoundaryCorrectedLoss,
    DiceLoss,
    DistillationLoss,
    FocalLoss,
    JaccardLoss,
    OhemCrossEntropy,
    SegmentationLoss,
    TverskyLoss,
    UpsampledCrossEntropy,
)

__all__ = [
    "DAPPM",
    "LMFM",
    "BinaryCrossEntropy",
    "BoundaryCorrectedLoss",
    "DiceLoss",
    "DistillationLoss",
    "FocalLoss",
    "JaccardLoss",
    "OhemCrossEntropy",
    "SegmentationLoss",
    "TverskyLoss",
    "UpsampledCrossEntropy",
]
