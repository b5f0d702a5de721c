"""BCMFNet (arXiv 2203.00436): DDRNet-23-slim whose context module is the LMFM."""

from __future__ import annotations

from bcmfnet.models.ddrnet import DDRNet23Slim
from bcmfnet.nn.context import LMFM


class BCMFNet(DDRNet23Slim):
    """DDRNet-23-slim with the LMFM in place of the DAPPM. `options` are the LMFM's."""

    context_class = LMFM
