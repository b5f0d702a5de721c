"""Context modules on the 1/64 map: DAPPM (DDRNet, arXiv 2101.06085) and LMFM (BCMFNet, arXiv 2203.00436)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcmfnet.ops import PyramidWeights, _options, pyramid_pool, upsample_add_relu
from bcmfnet.ops._checks import checked_pools, is_channels_last
from bcmfnet.ops._derivatives import in_forward_mode

LEAST_PIXELS = {torch.channels_last: 1024, torch.contiguous_format: 256}
"""Pixels of a batch from which one pooling op is faster than torch's pools on a CPU. Measured in training steps of LMFM
on an AMD EPYC, one thread, in times faster: channels_last 0.94 to 0.98 at 12x512x3x4, 2x512x8x16 and 4x512x8x16, 1.02
to 1.06 at 8x512x16x16; contiguous 0.97, 1.00 to 1.05, 1.02 to 1.05, 1.08 to 1.14. Without gradients torch's pools alone
take half of the op's time at 1x512x6x8 channels_last and no more than 0.1 ms more at 1x512x16x32, contiguous four times
as long."""
DEFAULT_POOLS = ((5, 2, 2), (9, 4, 4), (17, 8, 8))

NormOrder = Literal["pre", "post"]
Direction = Literal["reverse", "forward"]
RootConv = Literal["none", "1x1", "3x3"]


class ContextOptions(TypedDict, total=False):
    """Keywords of `LMFM`; `DAPPM` has the last five."""

    direction: Direction
    interval: Literal[1, 2]
    root_conv: RootConv
    identity_branch: bool
    branch_channels: int
    pools: Sequence[Sequence[int]]
    norm_order: NormOrder
    shortcut: bool


class ConvUnit(nn.Sequential):
    """A convolution with its batch norm and ReLU before or after it."""

    norm: nn.BatchNorm2d
    conv: nn.Conv2d


class PyramidContext(nn.Module):
    """Branches of growing pooling windows, fused by 3x3s, joined by a 1x1 and a shortcut.

    Branch 0 is a 1x1 of the map itself, the next ones are 1x1s of average pools, the last is a 1x1 of the
    global average; all are brought to the size of the map. `scale` holds the 1x1s, `process` the convolutions
    of the fusion, both keyed by the branch number; subclasses say which branch has one and whose result it
    `receives`.

    The pools are one op where that is faster, `bcmfnet.ops.pyramid_pool`. The whole module is one for inference,
    `bcmfnet.ops.lmfm`, with the `pyramid_weights` of its parameters: `bcmfnet.for_inference` makes it so.

    Args:
        in_channels, out_channels: channels of the map and of the result.
        identity_branch: whether branch 0 exists.
        branch_channels: channels of every branch.
        pools: (kernel, stride, padding) of each average pool, kernel = 2 * padding + 1; up to 6.
        norm_order: "pre" is BN, ReLU, conv; "post" is conv, BN, ReLU (no ReLU before the final sum).
        shortcut: whether a 1x1 of the map is added to the result.

    Raises:
        TypeError, ValueError: an unknown option value; in training, a batch of 1.
    """

    receives: dict[int, int]
    """For each branch that receives another's result: from which one."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        identity_branch: bool = True,
        branch_channels: int = 128,
        pools: Sequence[Sequence[int]] = DEFAULT_POOLS,
        norm_order: NormOrder = "pre",
        shortcut: bool = True,
    ) -> None:
        super().__init__()
        in_channels = _channels("in_channels", in_channels)
        out_channels = _channels("out_channels", out_channels)
        identity_branch = _options.boolean("identity_branch", identity_branch)
        shortcut = _options.boolean("shortcut", shortcut)
        self.pools = checked_pools(pools)
        self.norm_order = _options.choice("norm_order", norm_order, ("pre", "post"))
        self.branch_channels = branch_channels = _channels("branch_channels", branch_channels)
        self.branches = tuple(range(0 if identity_branch else 1, len(self.pools) + 2))

        self.scale = nn.ModuleDict({str(i): self._conv(in_channels, branch_channels, 1) for i in self.branches})
        self.process = nn.ModuleDict()
        self.compression = self._conv(len(self.branches) * branch_channels, out_channels, 1, last=True)
        self.shortcut = self._conv(in_channels, out_channels, 1, last=True) if shortcut else None

    def _conv(self, in_channels: int, out_channels: int, kernel: int, last: bool = False) -> ConvUnit:
        conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
        if self.norm_order == "pre":
            return ConvUnit(OrderedDict(norm=nn.BatchNorm2d(in_channels), relu=nn.ReLU(), conv=conv))
        layers = OrderedDict(conv=conv, norm=nn.BatchNorm2d(out_channels))
        if not last:
            layers["relu"] = nn.ReLU()
        return ConvUnit(layers)

    def _fusing_conv(self, kernel: int) -> ConvUnit:
        return self._conv(self.branch_channels, self.branch_channels, kernel)

    def check_batch(self, batch: int) -> None:
        """Refuse a batch of 1 while BN normalises the 1x1 global average by the statistics of the batch."""
        norm = self.scale[str(self.branches[-1])].norm
        if batch == 1 and isinstance(norm, nn.BatchNorm2d) and norm.training:
            raise ValueError(
                "images: expected a batch of at least 2 in training, got 1: "
                "batch norm after the global average has one value for each channel"
            )

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, H, W]."""
        self.check_batch(x.shape[0])
        out = self.compression(torch.cat(self.fuse(self.scaled(x)), dim=1))
        return out if self.shortcut is None else out + self.shortcut(x)

    def scaled(self, x: Tensor) -> dict[int, Tensor]:
        """Every branch's [N, branch_channels, H, W] before fusion, by branch number."""
        size = x.shape[-2:]
        scaled = {0: self.scale["0"](x)} if 0 in self.branches else {}
        for i, y in enumerate(_pooled(x, self.pools), start=1):
            scaled[i] = resize(self.scale[str(i)](y), size)
        return scaled

    def fuse(self, scaled: dict[int, Tensor]) -> list[Tensor]:
        """The fused branches, in order of their number."""
        fused: dict[int, Tensor] = {}

        def result(i: int) -> Tensor:
            if i not in fused:
                y = scaled[i] + result(self.receives[i]) if i in self.receives else scaled[i]
                fused[i] = self.process[str(i)](y) if str(i) in self.process else y
            return fused[i]

        return [result(i) for i in self.branches]

    @torch.no_grad()
    def pyramid_weights(self, dtype: torch.dtype) -> PyramidWeights:
        """What `bcmfnet.ops.lmfm` takes for maps of a dtype: a snapshot of parameters and running statistics.

        Raises ValueError for the norm order "post", which the op does not compute.
        """
        if self.norm_order != "pre":
            raise ValueError(f"norm_order: expected 'pre' for bcmfnet.ops.lmfm, got {self.norm_order!r}")
        fusing: dict[int, Any] = {int(branch): unit for branch, unit in self.process.items()}
        process = [fusing[i] for i in self.branches if i in fusing]
        scale: list[Any] = [self.scale[str(i)] for i in self.branches]
        shortcut = [] if self.shortcut is None else [self.shortcut]

        def norms(units: list[Any], channels: int) -> Tensor:
            """[2, norms, channels]: their multipliers, and their shifts."""
            gamma, beta, mean, var = (
                torch.cat([getattr(unit.norm, name) for unit in units]).to(torch.promote_types(dtype, torch.float32))
                for name in ("weight", "bias", "running_mean", "running_var")
            )
            eps = torch.cat([torch.full_like(unit.norm.running_var, unit.norm.eps) for unit in units]).to(var)
            multiplier = gamma * (var + eps).rsqrt()
            return torch.stack([multiplier, beta - mean * multiplier]).view(2, -1, channels)

        def matrices(units: list[Any]) -> Tensor:
            """[taps, in, out] of the convolutions, one after the other."""
            weights = [unit.conv.weight.flatten(2).permute(2, 1, 0) for unit in units]
            none = (0, self.branch_channels, self.branch_channels)
            return torch.cat(weights).to(dtype) if weights else scale[0].conv.weight.new_zeros(none, dtype=dtype)

        numbers = {branch: number for number, branch in enumerate(self.branches)}
        return PyramidWeights(
            scale_norms=norms(scale + shortcut, scale[0].conv.in_channels),
            fusion_norms=norms([*process, self.compression], self.branch_channels),
            scale=matrices(scale),
            process=matrices(process),
            compression=matrices([self.compression])[0],
            shortcut=matrices(shortcut)[0] if shortcut else None,
            pools=self.pools,
            kernels=tuple(fusing[i].conv.kernel_size[0] if i in fusing else 0 for i in self.branches),
            receives=tuple(numbers[self.receives[i]] if i in self.receives else -1 for i in self.branches),
        )


class DAPPM(PyramidContext):
    """Deep aggregation pyramid pooling (DDRNet): y0 = s0, y_i = P_i(s_i + y_{i-1}), P_i a 3x3.

    Options as in `PyramidContext`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        identity_branch: bool = True,
        branch_channels: int = 128,
        pools: Sequence[Sequence[int]] = DEFAULT_POOLS,
        norm_order: NormOrder = "pre",
        shortcut: bool = True,
    ) -> None:
        super().__init__(
            in_channels, out_channels, identity_branch=identity_branch, branch_channels=branch_channels, pools=pools,
            norm_order=norm_order, shortcut=shortcut,
        )  # fmt: skip
        self.process.update({str(i): self._fusing_conv(3) for i in self.branches[1:]})
        self.receives = dict(zip(self.branches[1:], self.branches, strict=False))


class LMFM(PyramidContext):
    """Low-resolution multi-scale fusion module (BCMFNet, section 2.2).

    With the defaults y4 = s4, y3 = s3, y2 = P2(s2 + y4), y1 = P1(s1 + y3), y0 = P0(s0 + y2), P_i a 3x3: the
    smaller the pooling kernel the deeper its branch is processed, and it receives the shallower result of a
    larger one, an interval of two away.

    Args:
        direction: "reverse" fuses from the global branch to branch 0, "forward" the other way.
        interval: distance, 1 or 2, between a branch and the one whose result it receives.
        root_conv: convolution of the `interval` branches that receive nothing: "none", "1x1" or "3x3".
        identity_branch, branch_channels, pools, norm_order, shortcut: as in `PyramidContext`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        direction: Direction = "reverse",
        interval: Literal[1, 2] = 2,
        root_conv: RootConv = "none",
        identity_branch: bool = True,
        branch_channels: int = 128,
        pools: Sequence[Sequence[int]] = DEFAULT_POOLS,
        norm_order: NormOrder = "pre",
        shortcut: bool = True,
    ) -> None:
        super().__init__(
            in_channels, out_channels, identity_branch=identity_branch, branch_channels=branch_channels, pools=pools,
            norm_order=norm_order, shortcut=shortcut,
        )  # fmt: skip
        _options.choice("direction", direction, ("reverse", "forward"))
        interval = _options.choice("interval", _options.integer("interval", interval), (1, 2))
        _options.choice("root_conv", root_conv, ("none", "1x1", "3x3"))
        order = self.branches if direction == "forward" else self.branches[::-1]
        self.receives = dict(zip(order[interval:], order, strict=False))

        if root_conv != "none":
            self.process.update({str(i): self._fusing_conv(int(root_conv[0])) for i in order[:interval]})
        self.process.update({str(i): self._fusing_conv(3) for i in order[interval:]})


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, half-pixel centres, to (H, W)."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def fuse_relu(high: Tensor, low: Tensor, training: bool) -> Tensor:
    """relu(high + resize(low)); in training one op, which keeps nothing but its result for the gradients."""
    if training and not torch.compiler.is_compiling() and not _needs_torchs_ops() and high.dtype == low.dtype:
        return upsample_add_relu(high, low)
    return F.relu(high + resize(low, high.shape[-2:]))


def _pooled(x: Tensor, pools: Sequence[tuple[int, int, int]]) -> Sequence[Tensor]:
    if not _needs_torchs_ops() and _one_read_pays(x):
        return pyramid_pool(x, pools)
    return [F.avg_pool2d(x, *pool) for pool in pools] + [F.adaptive_avg_pool2d(x, 1)]


def _one_read_pays(x: Tensor) -> bool:
    """Whether `bcmfnet.ops.pyramid_pool` is faster than torch's pools; with gradients it also saves their sum."""
    if x.device.type != "cpu":
        return True
    memory_format = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    if memory_format == torch.channels_last and not (torch.is_grad_enabled() and x.requires_grad):
        return False
    if torch.compiler.is_compiling():  # for every size at once; the small ones lose 6 % of the pools' time
        return True
    return x.shape[0] * x.shape[2] * x.shape[3] >= LEAST_PIXELS[memory_format]


def _needs_torchs_ops() -> bool:
    """Whether a program is being made that may run where this package is not, or derivatives taken in forward mode."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing() or in_forward_mode()


def _channels(name: str, value: int) -> int:
    channels = _options.integer(name, value)
    if channels < 1:
        raise ValueError(f"{name}: expected an integer >= 1, got {channels}")
    return channels
