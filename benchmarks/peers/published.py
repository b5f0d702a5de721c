"""What papers print of the networks of Tables 2 and 3: nothing here was measured or counted by this project."""

from __future__ import annotations

from dataclasses import dataclass

TABLE2, TABLE3 = "arXiv 2203.00436, Table 2", "arXiv 2203.00436, Table 3"
TITAN_X, TITAN_XP, GTX_1080_TI, RTX_2080_TI, RTX_3090, A100 = (
    "Titan X", "Titan XP", "GTX 1080 Ti", "RTX 2080 Ti", "RTX 3090", "A100"
)  # fmt: skip
CITYSCAPES, CAMVID = (1024, 2048), (720, 960)


@dataclass(frozen=True)
class Published:
    """Figures of one network on one dataset; None where the source does not print one.

    Decimals are kept as they are printed, so that a count can be compared to as many digits. Tables 2 and 3 quote other
    papers, whose frames and GPUs they leave out: `size` and `gpu` are those of the network's own paper.
    """

    network: str
    """As in `PEERS`, in `bcmfnet.models`, or its name where there is no code of it here."""
    title: str
    miou: float
    """Per cent, of the test set unless the source says val."""
    fps: float | None
    source: str
    gflops: str | None = None
    params: str | None = None
    """Millions."""
    size: tuple[int, int] | None = None
    """Height and width of the frame that was timed and counted."""
    gpu: str | None = None


PAPER: dict[str, tuple[Published, ...]] = {
    "cityscapes": (
        Published("segnet", "SegNet", 57.0, 16.7, TABLE2, "286", "29.5", (360, 640)),
        Published("enet", "ENet", 57.0, 135.4, TABLE2, "3.8", "0.4", (360, 640)),
        Published("bisenet1", "BiSeNet1", 68.4, 105.8, TABLE2, "14.8", "5.8", (768, 1536), TITAN_XP),
        Published("bisenet_v2", "BiSeNetV2", 72.6, 156.0, TABLE2, "21.1", None, (512, 1024), GTX_1080_TI),
        Published("icnet", "ICNet", 69.5, 30.0, TABLE2, None, "7.8", CITYSCAPES, TITAN_X),
        Published("lednet", "LEDNet", 70.6, 71.0, TABLE2, None, "0.94", (512, 1024), GTX_1080_TI),
        Published("cabinet", "CABiNet", 75.9, 76.5, TABLE2, "12.0", "2.64", CITYSCAPES, RTX_2080_TI),
        Published("ddrnet23_slim", "DDRNet-23-slim", 77.4, 101.6, TABLE2, "36.3", "5.7", CITYSCAPES, RTX_2080_TI),
        Published("bcmfnet", "BCMFNet", 78.2, 103.4, TABLE2, "35.8", "5.6", CITYSCAPES),
    ),
    "camvid": (
        Published("dfanet_a", "DFANet A", 64.7, 120.0, TABLE3, size=CAMVID, gpu=TITAN_X),
        Published("bisenet1", "BiSeNet1", 65.6, 175.0, TABLE3),
        Published("bisenet_v2", "BiSeNetV2", 72.4, 124.0, TABLE3, gpu=GTX_1080_TI),
        Published("msfnet", "MSFNet", 75.4, 91.0, TABLE3),
        Published("ddrnet23_slim", "DDRNet-23-slim", 74.7, 230.0, TABLE3, size=CAMVID, gpu=RTX_2080_TI),
        Published("bcmfnet", "BCMFNet", 76.2, 225.0, TABLE3, size=CAMVID),
    ),
}
"""The rows of Tables 2 and 3, in their order."""

PIDNET, RDRNET = "arXiv 2206.02066", "arXiv 2406.12496, val, from scratch"
BEYOND: dict[str, tuple[Published, ...]] = {
    "cityscapes": (
        Published("pidnet_s", "PIDNet-S", 78.6, 93.2, PIDNET, "47.6", "7.6", CITYSCAPES, RTX_3090),
        Published("dfanet_a", "DFANet A", 71.3, None, "arXiv 1904.02216", "3.4", "7.8", (1024, 1024), TITAN_X),
        Published("msfnet", "MSFNet", 77.1, 41.0, "arXiv 1911.07217", size=CITYSCAPES),
        Published("ddrnet23_slim", "DDRNet-23-slim", 76.3, 131.7, RDRNET, size=CITYSCAPES, gpu=RTX_3090),
        Published("pidnet_s", "PIDNet-S", 76.4, 102.6, RDRNET, size=CITYSCAPES, gpu=RTX_3090),
        Published("rdrnet_s", "RDRNet-S", 76.8, 129.4, RDRNET, size=CITYSCAPES, gpu=RTX_3090),
        Published("ddrnet23_slim", "DDRNet-23-slim", 77.84, 85.85, "mmsegmentation, val", gpu=A100),
        Published("pidnet_s", "PIDNet-S", 78.74, 80.82, "mmsegmentation, val", gpu=A100),
    ),
    "camvid": (Published("pidnet_s", "PIDNet-S", 80.1, 153.7, PIDNET, size=CAMVID, gpu=RTX_3090),),
}
"""What the paper does not print: later networks, and what others print of the same ones."""


def count_as_printed(count: int, printed: str) -> str:
    """A number of parameters in millions, to as many decimals as a printed one has."""
    return f"{count / 1e6:.{len(printed.partition('.')[2])}f}"
