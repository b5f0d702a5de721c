"""Context modules on the 1/64 map: DAPPM (DDRNet, arXiv 2101.06085) and LMFM (BCMFNet, arXiv 2203.00436)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEFAULT_POOLS = ((5, 2, 2), (9, 4, 4), (17, 8, 8))


class PyramidContext(nn.Module):
    """Branches of growing pooling windows, joined by a 1x1 and a shortcut; subclasses say how they are fused.

    Branch 0 is a 1x1 of the map itself, the next ones are 1x1s of average pools, the last is a 1x1 of the
    global average; all are brought to the size of the map. `scale` holds the 1x1s, `process` the convolutions
    of the fusion, both keyed by the branch number.

    Args:
        in_channels, out_channels: channels of the map and of the result.
        identity_branch: whether branch 0 exists.
        branch_channels: width of every branch.
        pools: (kernel, stride, padding) of each average pool, kernel = 2 * padding + 1.
        norm_order: "pre" is BN, ReLU, conv; "post" is conv, BN, ReLU (no ReLU before the final sum).
        shortcut: whether a 1x1 of the map is added to the result.

    Raises:
        ValueError: an unknown option value; in training, a batch of 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        identity_branch: bool = True,
        branch_channels: int = 128,
        pools: Sequence[Sequence[int]] = DEFAULT_POOLS,
        norm_order: str = "pre",
        shortcut: bool = True,
    ):
        super().__init__()
        _check_choice("norm_order", norm_order, ("pre", "post"))
        _check_choice("identity_branch", identity_branch, (True, False))
        _check_choice("shortcut", shortcut, (True, False))
        if type(branch_channels) is not int or branch_channels < 1:
            raise ValueError(f"branch_channels: expected an integer >= 1, got {branch_channels!r}")
        self.pools = _checked_pools(pools)
        self.norm_order = norm_order
        self.branch_channels = branch_channels
        self.branches = tuple(range(0 if identity_branch else 1, len(self.pools) + 2))

        width = branch_channels
        self.scale = nn.ModuleDict({str(i): self._conv(in_channels, width, 1) for i in self.branches})
        self.process = nn.ModuleDict()
        self.compression = self._conv(len(self.branches) * width, out_channels, 1, last=True)
        self.shortcut = self._conv(in_channels, out_channels, 1, last=True) if shortcut else None

    def _conv(self, in_channels: int, out_channels: int, kernel: int, last: bool = False) -> nn.Sequential:
        conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
        if self.norm_order == "pre":
            return nn.Sequential(OrderedDict(norm=nn.BatchNorm2d(in_channels), relu=nn.ReLU(), conv=conv))
        layers = OrderedDict(conv=conv, norm=nn.BatchNorm2d(out_channels))
        if not last:
            layers["relu"] = nn.ReLU()
        return nn.Sequential(layers)

    def check_batch(self, batch: int) -> None:
        """Refuse a batch of 1 while BN normalises the 1x1 global average by the statistics of the batch."""
        norm = self.scale[str(self.branches[-1])].norm
        if batch == 1 and isinstance(norm, nn.BatchNorm2d) and norm.training:
            raise ValueError(
                "images: expected a batch of at least 2 in training, got 1: "
                "batch norm after the global average has one value for each channel"
            )

    def scaled(self, x: Tensor) -> dict[int, Tensor]:
        """Every branch's [N, branch_channels, H, W] before fusion, by branch number."""
        size = x.shape[-2:]
        pooled = [F.avg_pool2d(x, *pool) for pool in self.pools] + [F.adaptive_avg_pool2d(x, 1)]
        scaled = {0: self.scale["0"](x)} if 0 in self.branches else {}
        for i, y in enumerate(pooled, start=1):
            scaled[i] = resize(self.scale[str(i)](y), size)
        return scaled

    def fuse(self, scaled: dict[int, Tensor]) -> list[Tensor]:
        """The fused branches, in order of their number."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, H, W]."""
        self.check_batch(x.shape[0])
        out = self.compression(torch.cat(self.fuse(self.scaled(x)), dim=1))
        return out if self.shortcut is None else out + self.shortcut(x)


class DAPPM(PyramidContext):
    """Deep aggregation pyramid pooling (DDRNet): y0 = s0, y_i = P_i(s_i + y_{i-1}), P_i a 3x3.

    Options as in `PyramidContext`.
    """

    def __init__(self, in_channels: int, out_channels: int, **options):
        super().__init__(in_channels, out_channels, **options)
        width = self.branch_channels
        self.process.update({str(i): self._conv(width, width, 3) for i in self.branches[1:]})

    def fuse(self, scaled: dict[int, Tensor]) -> list[Tensor]:
        first, *others = self.branches
        fused = [scaled[first]]
        for i in others:
            fused.append(self.process[str(i)](scaled[i] + fused[-1]))
        return fused


class LMFM(PyramidContext):
    """Low-resolution multi-scale fusion module (BCMFNet, section 2.2).

    With the defaults y4 = s4, y3 = s3, y2 = P2(s2 + y4), y1 = P1(s1 + y3), y0 = P0(s0 + y2), P_i a 3x3: the
    smaller the pooling kernel the deeper its branch is processed, and it receives the shallower result of a
    larger one, an interval of two away.

    Args:
        direction: "reverse" fuses from the global branch to branch 0, "forward" the other way.
        interval: distance, 1 or 2, between a branch and the one whose result it receives.
        root_conv: convolution of the `interval` branches that receive nothing: "none", "1x1" or "3x3".
        options: as in `PyramidContext`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        direction: str = "reverse",
        interval: int = 2,
        root_conv: str = "none",
        **options,
    ):
        super().__init__(in_channels, out_channels, **options)
        _check_choice("direction", direction, ("reverse", "forward"))
        _check_choice("interval", interval, (1, 2))
        _check_choice("root_conv", root_conv, ("none", "1x1", "3x3"))
        self.interval = interval
        self.order = self.branches if direction == "forward" else self.branches[::-1]

        width = self.branch_channels
        roots, others = self.order[:interval], self.order[interval:]
        if root_conv != "none":
            self.process.update({str(i): self._conv(width, width, int(root_conv[0])) for i in roots})
        self.process.update({str(i): self._conv(width, width, 3) for i in others})

    def fuse(self, scaled: dict[int, Tensor]) -> list[Tensor]:
        fused: dict[int, Tensor] = {}
        for position, i in enumerate(self.order):
            y = scaled[i]
            if position >= self.interval:
                y = y + fused[self.order[position - self.interval]]
            fused[i] = self.process[str(i)](y) if str(i) in self.process else y
        return [fused[i] for i in self.branches]


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, half-pixel centres, to (H, W)."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _check_choice(name: str, value: object, choices: tuple) -> None:
    if value not in choices or type(value) is not type(choices[0]):
        raise ValueError(f"{name}: expected {' or '.join(map(repr, choices))}, got {value!r}")


def _checked_pools(pools: Sequence[Sequence[int]]) -> tuple[tuple[int, int, int], ...]:
    message = f"pools: expected (kernel, stride, padding) triples, kernel = 2 * padding + 1, got {pools!r}"
    if isinstance(pools, str) or not isinstance(pools, Sequence):
        raise ValueError(message)
    for pool in pools:
        if not isinstance(pool, Sequence) or [type(value) for value in pool] != [int] * 3:
            raise ValueError(message)
        kernel, stride, padding = pool
        if stride < 1 or padding < 0 or kernel != 2 * padding + 1:
            raise ValueError(message)
    return tuple(tuple(pool) for pool in pools)
