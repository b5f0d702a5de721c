"""Frames a second, step by step: the network alone, with upsampling, with argmax, and from a decoded frame to its
label map; with weights that were trained, and with initial ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from bcmfnet.benchmarks import network
from bcmfnet.benchmarks.harness import Provider, Unavailable
from bcmfnet.benchmarks.network import HALVES, BestLabels, EagerLabels
from bcmfnet.benchmarks.upsample_argmax import best_labels
from bcmfnet.data import normalize
from bcmfnet.data.synthetic import SyntheticStreets
from bcmfnet.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from bcmfnet.inference import for_inference
from bcmfnet.models import count_multiply_adds, count_parameters, model_from_weights
from bcmfnet.reference.bilinear import upsample

__all__ = ["BASELINE", "CASES", "baseline", "bytes_moved", "disagreement", "expected", "make_inputs", "providers"]

BASELINE = "eager_best"
STEPS = ("logits", "upsampled", "labels", "frame")
"""Where a pass ends; `frame` ends at the labels too, and begins at the decoded frame. A provider is WAY_STEP."""
WEIGHTS = ("random", "trained")
CLASSES = 11
TRAINED = Path("camvid11")
"""The weights that come along."""


@dataclass(frozen=True)
class Case:
    """Weights, and the size of the frame; all steps of all ways are timed in turn."""

    weights: str
    size: tuple[int, int]

    @property
    def name(self) -> str:
        return f"{self.weights}-1x3x{self.size[0]}x{self.size[1]}"


CASES = [Case(weights, size) for size in ((1024, 2048), (360, 480)) for weights in WEIGHTS]


def make_inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """A drawn street: RGB uint8 [1, H, W, 3] as decoders give it, and normalised float32 [1, 3, H, W]."""
    image, _ = SyntheticStreets(1, case.size).read(0)
    frame = torch.from_numpy(image)[None].to(device)
    return frame, normalize(frame.permute(0, 3, 1, 2))


@lru_cache(len(WEIGHTS))
def _model(weights: str) -> nn.Module:
    if weights == "random":
        return network._model(network.Case("bcmfnet", (1024, 2048), CLASSES))
    return model_from_weights(TRAINED)[0].eval().requires_grad_(False)


def providers(case: Case, device: torch.device) -> dict[str, Provider | Unavailable]:
    """Eager as one writes it; its fastest form, and `for_inference`, in each precision: each at every step."""
    model = copy.deepcopy(_model(case.weights)).to(device)
    found: dict[str, Provider | Unavailable] = dict(_usual(case, model, device))
    for dtype in (torch.float32, torch.bfloat16, *([torch.float16] if device.type == "cuda" else [])):
        ending = "" if dtype == torch.float32 else f"_{HALVES[dtype]}"
        for way in (_best(case, model, dtype), _ours(model, dtype)):
            found |= {f"{name}{ending}": provider for name, provider in way.items()}
    return found


def baseline(provider: str) -> str:
    """The best eager form of the same step, in the same precision."""
    step = next(step for step in STEPS if f"_{step}" in provider)
    precision = network._precision(provider)
    return f"{BASELINE}_{step}{'' if precision == 'float32' else f'_{precision}'}"


def _steps(
    way: str,
    normalized: Callable[[Tensor], Tensor],
    logits: Callable[[Tensor], Tensor],
    upsampled: Callable[[Tensor], Tensor],
    labels: Callable[[Tensor], Tensor],
) -> dict[str, Provider]:
    """Providers of a way, of what it does to a frame, to images, and twice to logits."""
    return {
        f"{way}_logits": lambda frame, images: logits(images),
        f"{way}_upsampled": lambda frame, images: upsampled(logits(images)),
        f"{way}_labels": lambda frame, images: labels(logits(images)),
        f"{way}_frame": lambda frame, images: labels(logits(normalized(frame))),
    }


def _usual(case: Case, model: nn.Module, device: torch.device) -> dict[str, Provider]:
    usual = EagerLabels(model).model
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))

    def upsampled(logits: Tensor) -> Tensor:
        return interpolate(logits, case.size, mode="bilinear", align_corners=False)

    return _steps(
        "eager",
        lambda frame: ((frame.permute(0, 3, 1, 2).float() / 255 - mean) / std).contiguous(),
        lambda images: usual(images).logits,
        upsampled,
        lambda logits: upsampled(logits).argmax(1),
    )


def _best(case: Case, model: nn.Module, dtype: torch.dtype) -> dict[str, Provider]:
    best = BestLabels(model, dtype).model
    return _steps(
        "eager_best",
        _normalized,
        lambda images: best(images.to(dtype, memory_format=torch.channels_last)).logits,
        lambda logits: interpolate(logits, case.size, mode="bilinear", align_corners=False),
        lambda logits: best_labels(logits, case.size)[0],
    )


def _ours(model: nn.Module, dtype: torch.dtype) -> dict[str, Provider | Unavailable]:
    logits, labels = (for_inference(model, dtype=dtype, output=output) for output in ("logits", "labels"))
    camera = for_inference(model, dtype=dtype, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    return {
        "ours_logits": lambda frame, images: logits(images),
        "ours_upsampled": Unavailable("upsampling and argmax are one op"),
        "ours_labels": lambda frame, images: labels(images),
        "ours_frame": lambda frame, images: camera(frame.permute(0, 3, 1, 2)),
    }


def _normalized(frame: Tensor) -> Tensor:
    return normalize(frame.permute(0, 3, 1, 2), memory_format=torch.channels_last)


class Expected(NamedTuple):
    """In float64: logits, scores at full resolution, and what `network` compares labels with."""

    logits: Tensor
    upsampled: Tensor
    labels: network.Expected


def expected(case: Case, frame: Tensor, images: Tensor) -> Expected:
    """From the network in float64 and its scores at full resolution."""
    with torch.no_grad():
        logits = copy.deepcopy(_model(case.weights)).to(images.device).double()(images.double()).logits
        scores = upsample(logits, images.shape[-2:])
        best = scores.topk(2, dim=1)
    labels = network.Expected(best.indices[:, 0], best.values[:, 0] - best.values[:, 1], logits.abs().max().item())
    return Expected(logits, scores, labels)


def disagreement(case: Case, provider: str, output: Tensor, expected: Expected) -> str | None:
    """Labels agree as those of `network` do, logits and scores within what a precision moves them by."""
    step = next(step for step in STEPS if f"_{step}" in provider)
    if step in ("labels", "frame"):
        return network.disagreement(case, provider, output, expected.labels)
    exact = getattr(expected, step)
    error = ((output.double() - exact).abs().max() / exact.abs().max()).item()
    most = network.ERROR[network._precision(provider)]
    return None if error <= most else f"{step} are off by {error:.2g} of the largest, over {most}"


def bytes_moved(case: Case) -> int:
    """Frame and float32 weights read once, the labels written once."""
    return 4 * case.size[0] * case.size[1] + 4 * count_parameters(_model(case.weights))


def operations(case: Case) -> int:
    """Two for each multiply-add of the convolutions."""
    return 2 * count_multiply_adds(_model(case.weights), (1, 3, *case.size))
