"""Public ops."""

from bcmfnet.ops._lmfm import PyramidWeights, lmfm
from bcmfnet.ops._losses import BclStats, boundary_corrected_loss, segmentation_loss
from bcmfnet.ops._pyramid_pool import pyramid_pool
from bcmfnet.ops._stem_conv import stem_conv
from bcmfnet.ops._upsample_add_relu import upsample_add_relu
from bcmfnet.ops._upsample_argmax import upsample_argmax

__all__ = [
    "BclStats",
    "PyramidWeights",
    "boundary_corrected_loss",
    "lmfm",
    "pyramid_pool",
    "segmentation_loss",
    "stem_conv",
    "upsample_add_relu",
    "upsample_argmax",
]
