"""Networks of the paper's Tables 2 and 3, in the form that runs at inference, and one that came after it.

Each file is one network, written from its paper: images to logits, at the size that its docstring says. Where a
published count cannot be met, the docstring says by how much and why. There is no code of MSFNet (arXiv 1911.07217):
none was released, and no description of its widths was found; `published` has its figures.
"""

from __future__ import annotations

from torch import nn

from bcmfnet.benchmarks.peers.bisenet import BiSeNet1
from bcmfnet.benchmarks.peers.bisenet_v2 import BiSeNetV2
from bcmfnet.benchmarks.peers.cabinet import CABiNet
from bcmfnet.benchmarks.peers.dfanet import DFANetA
from bcmfnet.benchmarks.peers.enet import ENet
from bcmfnet.benchmarks.peers.icnet import ICNet
from bcmfnet.benchmarks.peers.lednet import LEDNet
from bcmfnet.benchmarks.peers.pidnet import PIDNetS
from bcmfnet.benchmarks.peers.segnet import SegNet

PEERS: dict[str, type[nn.Module]] = {
    "segnet": SegNet,
    "enet": ENet,
    "bisenet1": BiSeNet1,
    "bisenet_v2": BiSeNetV2,
    "icnet": ICNet,
    "lednet": LEDNet,
    "cabinet": CABiNet,
    "dfanet_a": DFANetA,
    "pidnet_s": PIDNetS,
}
"""Classes of the networks by name; each is built with a number of classes."""
