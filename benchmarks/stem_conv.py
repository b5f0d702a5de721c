"""A network's first convolution of a frame: our op, and the normalisation, convolution and ReLU that it replaces."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from bcmfnet.benchmarks.harness import Provider, Unavailable, compiled, op_backends, word
from bcmfnet.data import IMAGENET_MEAN, IMAGENET_STD, normalize
from bcmfnet.ops import stem_conv

BASELINE = "eager_best"

CHANNELS = 32
ERROR = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""Relative; torch rounds the normalised image and the convolution to half precision, ours at most the former."""


@dataclass(frozen=True)
class Case:
    """Size of a frame, the dtype of the network, and whether the frame is normalised already."""

    size: tuple[int, int]
    dtype: torch.dtype = torch.float32
    normalized: bool = False
    device: str | None = None
    """Type of the device that the case is for; any where there is none."""

    @property
    def name(self) -> str:
        size = "x".join(map(str, (1, 3, *self.size)))
        return "-".join([size, "normalized" if self.normalized else "uint8", word(self.dtype)])


STREET, CAMVID = (1024, 2048), (360, 480)
CASES = [
    *(Case(size, dtype) for size in (STREET, CAMVID) for dtype in (torch.float32, torch.bfloat16)),
    *(Case(STREET, dtype, normalized=True) for dtype in (torch.float32, torch.bfloat16)),
    *(Case(STREET, torch.float16, normalized, "cuda") for normalized in (False, True)),
]


def make_inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A frame as decoders give it, RGB after RGB, as [1, 3, H, W]; weights and bias of the folded convolution."""
    generator = torch.Generator(device).manual_seed(0)
    pixels = torch.randint(0, 256, (1, *case.size, 3), generator=generator, device=device, dtype=torch.uint8)
    frame = pixels.permute(0, 3, 1, 2)
    weight = 0.2 * torch.randn(CHANNELS, 3, 3, 3, generator=generator, device=device)
    bias = torch.randn(CHANNELS, generator=generator, device=device)
    if case.normalized:
        frame = normalize(frame, memory_format=torch.channels_last)
    return frame, weight.to(case.dtype, memory_format=torch.channels_last), bias.to(case.dtype)


def providers(case: Case, device: torch.device) -> dict[str, Provider | Unavailable]:
    """Our backends; normalisation and convolution as they are written, also compiled, and the fastest eager form."""
    affine = () if case.normalized else (IMAGENET_MEAN, IMAGENET_STD)
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))

    def written(frame: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        images = frame if case.normalized else (frame.float() / 255 - mean) / std
        return torch.relu(conv2d(images.to(case.dtype), weight, bias, stride=2, padding=1))

    # The fastest form that was found: the affine map in place, on the frame as it lies.
    def best(frame: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        images = frame if case.normalized else normalize(frame, memory_format=torch.channels_last)
        return conv2d(images.to(case.dtype), weight, bias, stride=2, padding=1).relu_()

    def ours(frame: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return stem_conv(frame, weight, bias, *affine)

    found = op_backends("stem_conv", device, ours)
    return found | {"eager_best": best, "eager": written, "compile": compiled(written)}


def expected(case: Case, frame: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """In float64."""
    images = frame.double()
    if not case.normalized:
        mean, std = (torch.tensor(v, device=frame.device).double().view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        images = (images / 255 - mean) / std
    return torch.relu(conv2d(images, weight.double(), bias.double(), stride=2, padding=1))


def disagreement(case: Case, provider: str, output: Tensor, expected: Tensor) -> str | None:
    """The result is within the error of its dtype."""
    error = ((output.double() - expected).norm() / expected.norm()).item()
    return None if error <= ERROR[case.dtype] else f"result is off by {error:.2g} of its norm"


def bytes_moved(case: Case) -> int:
    """The frame read once, the result written once."""
    pixels = case.size[0] * case.size[1]
    return 3 * pixels * (4 if case.normalized else 1) + pixels // 4 * CHANNELS * case.dtype.itemsize
