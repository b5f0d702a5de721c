"""Public ops."""

from bcmfnet.ops.bcl import BclStats, boundary_corrected_loss
from bcmfnet.ops.lmfm import PyramidWeights, lmfm
from bcmfnet.ops.pyramid_pool import pyramid_pool
from bcmfnet.ops.upsample_add_relu import upsample_add_relu
from bcmfnet.ops.upsample_argmax import upsample_argmax

__all__ = [
    "BclStats",
    "PyramidWeights",
    "boundary_corrected_loss",
    "lmfm",
    "pyramid_pool",
    "upsample_add_relu",
    "upsample_argmax",
]
