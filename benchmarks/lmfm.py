"""Inference of a context module, LMFM or DAPPM: our op, its modules in torch, and runtimes."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcmfnet.benchmarks.harness import Provider, Unavailable, compiled, op_backends, through_runtime, word
from bcmfnet.inference.runtimes import RUNTIMES
from bcmfnet.nn.context import DAPPM, LMFM, resize
from bcmfnet.ops import lmfm

BASELINE = "eager_best"

CONTEXTS = {"lmfm": LMFM, "dappm": DAPPM}
ERROR = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 2e-2}
"""Relative; torch rounds every map in between to the dtype."""


@dataclass(frozen=True)
class Case:
    """A context module of the network's widths, and a map."""

    context: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.channels_last
    device: str | None = None
    """Type of the device that the case is for; any where there is none."""

    @property
    def name(self) -> str:
        words = [self.context, "x".join(map(str, self.shape)), word(self.dtype), word(self.memory_format)]
        return "-".join(words)


FRAME, CAMVID, BATCH = (1, 512, 16, 32), (1, 512, 6, 8), (8, 512, 16, 16)
CASES = [
    Case("lmfm", FRAME),  # of a frame of 1024x2048: the goals are stated for it
    Case("lmfm", FRAME, memory_format=torch.contiguous_format),
    Case("lmfm", FRAME, torch.bfloat16),
    Case("lmfm", FRAME, torch.float16, device="cuda"),
    Case("lmfm", CAMVID),
    Case("lmfm", BATCH, torch.bfloat16),
    Case("dappm", FRAME),
    Case("dappm", FRAME, torch.bfloat16),
    Case("dappm", FRAME, torch.float16, device="cuda"),
]


def make_inputs(case: Case, device: torch.device) -> tuple[Tensor]:
    """Normal noise."""
    x = torch.randn(case.shape, generator=torch.Generator(device).manual_seed(0), device=device)
    return (x.to(case.dtype, memory_format=case.memory_format),)


@lru_cache(1)
def _context(case: Case) -> nn.Module:
    """Initial weights, batch norms that multiply by either sign."""
    torch.manual_seed(0)
    context = CONTEXTS[case.context](512, 128)
    for norm in context.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias, std=0.5)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return context.eval().requires_grad_(False)


class Modules(nn.Module):
    """What a context module computes, by torch's ops alone."""

    def __init__(self, context: nn.Module):
        super().__init__()
        self.context = context

    def check_batch(self, batch: int) -> None:
        """Nothing: there is no training."""

    def forward(self, x: Tensor) -> Tensor:
        context = self.context
        pooled = [F.avg_pool2d(x, *pool) for pool in context.pools] + [F.adaptive_avg_pool2d(x, 1)]
        scaled = {0: context.scale["0"](x)}
        for i, y in enumerate(pooled, start=1):
            scaled[i] = resize(context.scale[str(i)](y), x.shape[-2:])
        return context.compression(torch.cat(context.fuse(scaled), dim=1)) + context.shortcut(x)


class BestModules(Modules):
    """The fastest form of it in eager PyTorch that was found on a CPU: channels_last, whatever comes in."""

    # Tried on one thread, LMFM at 1x512x16x32, ms: channels_last modules 11.4 in float32 and 6.6 in bfloat16, with the
    # global average by `mean` and the last sum in place 6.3 in bfloat16, and 12.5 for 12.7 of DAPPM in float32;
    # contiguous weights for channels_last maps 13.0 and 7.5, contiguous maps 12.6 and 10.9.
    def forward(self, x: Tensor) -> Tensor:
        context = self.context
        x = x.contiguous(memory_format=torch.channels_last)
        pooled = [F.avg_pool2d(x, *pool) for pool in context.pools] + [x.mean((2, 3), keepdim=True)]
        scaled = {0: context.scale["0"](x)}
        for i, y in enumerate(pooled, start=1):
            scaled[i] = resize(context.scale[str(i)](y), x.shape[-2:])
        return context.compression(torch.cat(context.fuse(scaled), dim=1)).add_(context.shortcut(x))


def providers(case: Case, device: torch.device) -> dict[str, Provider | Unavailable]:
    """Our backends with weights packed before, and `module`, what a model calls; torch's ops as one writes them,
    compiled too, and the fastest form of them in eager PyTorch; runtimes.
    """
    context = copy.deepcopy(_context(case)).to(device, case.dtype, memory_format=case.memory_format)
    packed, modules = context.pyramid_weights(case.dtype), Modules(context)
    found = op_backends("lmfm", device, lambda x: lmfm(x, packed)) | {"module": context, "eager": modules}
    best = BestModules(copy.deepcopy(context).to(memory_format=torch.channels_last))
    found["eager_best"] = lambda x: best(x).contiguous(memory_format=case.memory_format)
    found["compile"] = compiled(modules)
    if device.type == "cuda":
        found["compile_max"] = compiled(modules, "max-autotune-no-cudagraphs")
    for runtime, facts in RUNTIMES.items():
        if case.dtype in facts.dtypes:
            found[runtime] = through_runtime(runtime, Modules(_context(case)), case.dtype, device)
    return found


def expected(case: Case, x: Tensor) -> Tensor:
    """The modules' result in float64, with weights rounded to the dtype."""
    context = copy.deepcopy(_context(case)).to(case.dtype).double().to(x.device)
    with torch.no_grad():
        return Modules(context)(x.double())


def disagreement(case: Case, provider: str, output: Tensor, expected: Tensor) -> str | None:
    """The result is within the error of its dtype."""
    error = ((output.double() - expected).norm() / expected.norm()).item()
    return None if error <= ERROR[case.dtype] else f"result is off by {error:.2g} of its norm"


def bytes_moved(case: Case) -> int:
    """The map and the convolutions' weights read once, the result written once."""
    n, _, h, w = case.shape
    weights = sum(m.weight.numel() for m in _context(case).modules() if isinstance(m, nn.Conv2d))
    return ((512 + 128) * n * h * w + weights) * case.dtype.itemsize


def operations(case: Case) -> int:
    """Two for each multiply-add of the convolutions."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        Modules(_context(case))(torch.randn(case.shape))
    return counter.get_total_flops()
