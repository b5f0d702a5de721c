"""A low-resolution map fused into a high-resolution one, and the gradients of both.

Our op, and the interpolate, sum and ReLU that it replaces.
"""

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
    """The high-resolution map, the size of the low-resolution one, and whether the gradients of both are asked for."""

    shape: tuple[int, int, int, int]
    low: tuple[int, int]
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.channels_last
    device: str | None = None
    """Type of the device that the case is for; any where there is none."""
    backward: bool = False

    @property
    def name(self) -> str:
        sizes = ("x".join(map(str, size)) for size in (self.shape, self.low))
        return "-".join([*sizes, word(self.dtype), word(self.memory_format)] + ["backward"] * self.backward)


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
    Case(*FUSIONS[0], backward=True),
    Case(*FUSIONS[0], torch.bfloat16, backward=True),
    Case(*FUSIONS[0], memory_format=torch.contiguous_format, backward=True),
]


def make_inputs(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """Both maps, normal noise, and where the gradients are asked for that of the result."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [case.shape, (*case.shape[:2], *case.low)] + [case.shape] * case.backward
    inputs = [torch.randn(shape, generator=generator, device=device) for shape in shapes]
    high, low, *cotangents = (x.to(case.dtype, memory_format=case.memory_format) for x in inputs)
    return high.requires_grad_(case.backward), low.requires_grad_(case.backward), *cotangents


def providers(case: Case, device: torch.device) -> dict[str, Provider | Unavailable]:
    """Our backends; torch's ops as they are written, also compiled, and in place on the map that only they have."""

    def with_gradients(fuse: Provider) -> Provider:
        def call(high: Tensor, low: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
            out = fuse(high, low)
            return (out, *torch.autograd.grad(out, (high, low), cotangent))

        return call if case.backward else fuse

    found = op_backends("upsample_add_relu", device, with_gradients(upsample_add_relu))
    fused = compiled(_fuse)
    return found | {
        "eager_best": with_gradients(_in_place),
        "out_of_place": with_gradients(_fuse),
        "compile": fused if isinstance(fused, Unavailable) else with_gradients(fused),
    }


def _fuse(high: Tensor, low: Tensor) -> Tensor:
    return torch.relu(high + interpolate(low, high.shape[2:], mode="bilinear", align_corners=False))


def _in_place(high: Tensor, low: Tensor) -> Tensor:
    # The fastest form that was found. Tried as well, 1x64x128x256 from 64x128 in float32 channels_last, one thread,
    # this one taking 1.5 ms: clamp_(0) 1.5, in inference_mode 1.6, clamp_min_(0) 1.9, a sum of its own 2.3, nothing in
    # place 7.1, contiguous between 39. bfloat16: upsampled in float32 2.9 in place of 1.8.
    return interpolate(low, high.shape[2:], mode="bilinear", align_corners=False).add_(high).relu_()


def expected(case: Case, high: Tensor, low: Tensor, *cotangents: Tensor) -> tuple[Tensor, ...]:
    """The result in float64, and the gradient of the result in it."""
    return (_fuse(high.detach().double(), low.detach().double()), *(cotangent.double() for cotangent in cotangents))


def disagreement(
    case: Case, provider: str, output: Tensor | tuple[Tensor, ...], expected: tuple[Tensor, ...]
) -> str | None:
    """The result is within the error of its dtype, and so are the gradients of where it is positive: rounding decides
    that for sums next to 0."""
    exact, *cotangents = expected
    out, *gradients = (output,) if isinstance(output, Tensor) else output
    found = {"result": (out.detach(), exact)}
    for cotangent in cotangents:
        masked = torch.where(out > 0, cotangent, 0)
        low = masked.new_zeros((*case.shape[:2], *case.low), requires_grad=True)
        upsampled = interpolate(low, case.shape[2:], mode="bilinear", align_corners=False)
        exacts = (masked, *torch.autograd.grad(upsampled, low, masked))
        found |= {f"gradient of {n}": pair for n, *pair in zip(("high", "low"), gradients, exacts, strict=True)}
    for what, (actual, wanted) in found.items():
        error = ((actual.double() - wanted).norm() / wanted.norm()).item()
        if not error <= ERROR[case.dtype]:
            return f"{what} is off by {error:.2g} of its norm"
    return None


def bytes_moved(case: Case) -> int:
    """Both maps read once, the result written once; for the gradients, the result and its gradient read once too, and
    two more written."""
    n, c, height, width = case.shape
    high, low = height * width, case.low[0] * case.low[1]
    return n * c * (2 * high + low + case.backward * (3 * high + low)) * case.dtype.itemsize
