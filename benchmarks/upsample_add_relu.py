"""A low-resolution map fused into a high-resolution one: our op, and the interpolate, sum and ReLU that it replaces."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from bcmfnet.benchmarks.harness import Provider, Unavailable, compiled, op_backends, word
from bcmfnet.ops import upsample_add_relu

BASELINE = "eager_best"

ERROR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative; torch rounds the interpolated map, the sum and the result to half precision, ours the result alone."""


@dataclass(frozen=True)
class Case:
    """The high-resolution map, and the size of the low-resolution one."""

    shape: tuple[int, int, int, int]
    low: tuple[int, int]
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.channels_last
    device: str | None = None
    """Type of the device that the case is for; any where there is none."""

    @property
    def name(self) -> str:
        sizes = ("x".join(map(str, size)) for size in (self.shape, self.low))
        return "-".join([*sizes, word(self.dtype), word(self.memory_format)])


FUSIONS = [
    ((1, 64, 128, 256), (64, 128)),  # of a frame of 1024x2048: after the third stage, the fourth, the context module
    ((1, 64, 128, 256), (32, 64)),
    ((1, 128, 128, 256), (16, 32)),
]
CASES = [
    *(Case(*sizes) for sizes in FUSIONS),
    *(Case(*sizes, torch.bfloat16) for sizes in FUSIONS),
    *(Case(*sizes, torch.float16, device="cuda") for sizes in FUSIONS),
    Case(*FUSIONS[0], memory_format=torch.contiguous_format),
    Case(*FUSIONS[0], torch.bfloat16, torch.contiguous_format),
]


def make_inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Both maps, normal noise."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = (case.shape, (*case.shape[:2], *case.low))
    high, low = (torch.randn(shape, generator=generator, device=device) for shape in shapes)
    return tuple(x.to(case.dtype, memory_format=case.memory_format) for x in (high, low))


def providers(case: Case, device: torch.device) -> dict[str, Provider | Unavailable]:
    """Our backends; torch's ops as they are written, also compiled, and in place on the map that only they have."""
    found = op_backends("upsample_add_relu", device, upsample_add_relu)
    return found | {"eager_best": _in_place, "out_of_place": _fuse, "compile": compiled(_fuse)}


def _fuse(high: Tensor, low: Tensor) -> Tensor:
    return torch.relu(high + interpolate(low, high.shape[2:], mode="bilinear", align_corners=False))


def _in_place(high: Tensor, low: Tensor) -> Tensor:
    # The fastest form that was found. Tried as well, 1x64x128x256 from 64x128 in float32 channels_last, one thread,
    # this one taking 1.5 ms: clamp_(0) 1.5, in inference_mode 1.6, clamp_min_(0) 1.9, a sum of its own 2.3, nothing in
    # place 7.1, contiguous between 39. bfloat16: upsampled in float32 2.9 in place of 1.8.
    return interpolate(low, high.shape[2:], mode="bilinear", align_corners=False).add_(high).relu_()


def expected(case: Case, high: Tensor, low: Tensor) -> Tensor:
    """The same in float64."""
    return _fuse(high.double(), low.double())


def disagreement(case: Case, provider: str, output: Tensor, expected: Tensor) -> str | None:
    """The result is within the error of its dtype."""
    error = ((output.double() - expected).norm() / expected.norm()).item()
    return None if error <= ERROR[case.dtype] else f"result is off by {error:.2g} of its norm"


def bytes_moved(case: Case) -> int:
    """Both maps read once, the result written once."""
    n, c, height, width = case.shape
    return n * c * (2 * height * width + case.low[0] * case.low[1]) * case.dtype.itemsize
