"""Frames a second, step by step: the network alone, with upsampling, with argmax, and from a decoded frame to its
label map; with weights that were trained, and with initial ones.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from bcmfnet.benchmarks import network
from bcmfnet.benchmarks.harness import Provider, Unavailable
from bcmfnet.benchmarks.network import HALVES, BestLabels, EagerLabels, baseline
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
"""Where a pass ends; `frame` ends at the labels too, and begins at the decoded frame."""
WEIGHTS = ("random", "trained")
CLASSES = 11
TRAINED = Path("camvid11")
"""The weights that come along."""


@dataclass(frozen=True)
class Case:
    """Weights, the size of the frame, and how much of the way is timed."""

    weights: str
    size: tuple[int, int]
    step: str

    @property
    def name(self) -> str:
        return f"{self.weights}-1x3x{self.size[0]}x{self.size[1]}-{self.step}"


SIZES = [(1024, 2048), (360, 480)]
CASES = [Case(weights, size, step) for size in SIZES for weights in WEIGHTS for step in STEPS]


def make_inputs(case: Case, device: torch.device) -> tuple[Tensor]:
    """A drawn street: RGB uint8 [1, H, W, 3] as decoders give it, or normalised float32 [1, 3, H, W]."""
    image, _ = SyntheticStreets(1, case.size).read(0)
    frame = torch.from_numpy(image)[None].to(device)
    return (frame,) if case.step == "frame" else (normalize(frame.permute(0, 3, 1, 2)),)


@lru_cache(len(WEIGHTS))
def _model(weights: str) -> nn.Module:
    if weights == "random":
        return network._model(network.Case("bcmfnet", (1024, 2048), CLASSES))
    return model_from_weights(TRAINED)[0].eval().requires_grad_(False)


def providers(case: Case, device: torch.device) -> dict[str, Provider | Unavailable]:
    """Eager as one writes it; its fastest form, and `for_inference`, in each precision."""
    model = copy.deepcopy(_model(case.weights)).to(device)
    usual = EagerLabels(model).model
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))

    def eager(x: Tensor) -> Tensor:
        if case.step == "frame":
            x = (x.permute(0, 3, 1, 2).float() / 255 - mean) / std
        logits = usual(x).logits
        if case.step == "logits":
            return logits
        scores = interpolate(logits, case.size, mode="bilinear", align_corners=False)
        return scores if case.step == "upsampled" else scores.argmax(1)

    found: dict[str, Provider | Unavailable] = {"eager": eager}
    for dtype in (torch.float32, torch.bfloat16, *([torch.float16] if device.type == "cuda" else [])):
        ending = "" if dtype == torch.float32 else f"_{HALVES[dtype]}"
        found[f"eager_best{ending}"] = _best(case, model, dtype)
        found[f"ours{ending}"] = _ours(case, model, dtype)
    return found


def _best(case: Case, model: nn.Module, dtype: torch.dtype) -> Provider:
    best = BestLabels(model, dtype).model

    def call(x: Tensor) -> Tensor:
        logits = best(_normalized(case, x).to(dtype, memory_format=torch.channels_last)).logits
        if case.step == "logits":
            return logits
        if case.step == "upsampled":
            return interpolate(logits, case.size, mode="bilinear", align_corners=False)
        return best_labels(logits, case.size)[0]

    return call


def _ours(case: Case, model: nn.Module, dtype: torch.dtype) -> Provider | Unavailable:
    if case.step == "upsampled":
        return Unavailable("upsampling and argmax are one op")
    frozen = for_inference(model, dtype=dtype, output="logits" if case.step == "logits" else "labels")
    return lambda x: frozen(_normalized(case, x))


def _normalized(case: Case, x: Tensor) -> Tensor:
    return normalize(x.permute(0, 3, 1, 2), memory_format=torch.channels_last) if case.step == "frame" else x


def expected(case: Case, x: Tensor) -> Tensor | network.Expected:
    """Logits or scores in float64; for labels, what `network` compares with."""
    with torch.no_grad():
        exact = copy.deepcopy(_model(case.weights)).to(x.device).double()
        logits = exact(_normalized(case, x).double()).logits
        if case.step == "logits":
            return logits
        scores = upsample(logits, torch.Size(case.size))
        if case.step == "upsampled":
            return scores
        best = scores.topk(2, dim=1)
    return network.Expected(best.indices[:, 0], best.values[:, 0] - best.values[:, 1], logits.abs().max().item())


def disagreement(case: Case, provider: str, output: Tensor, expected: Tensor | network.Expected) -> str | None:
    """Labels agree as those of `network` do, logits and scores within what a precision moves them by."""
    if isinstance(expected, network.Expected):
        return network.disagreement(case, provider, output, expected)
    error = ((output.double() - expected).abs().max() / expected.abs().max()).item()
    most = network.ERROR[network._precision(provider)]
    return None if error <= most else f"{case.step} are off by {error:.2g} of the largest, over {most}"


def bytes_moved(case: Case) -> int:
    """Frame and float32 weights read once, the step's result written once."""
    pixels = case.size[0] * case.size[1]
    result = {"logits": 4 * CLASSES * pixels // 64, "upsampled": 4 * CLASSES * pixels}.get(case.step, pixels)
    return (3 if case.step == "frame" else 12) * pixels + 4 * count_parameters(_model(case.weights)) + result


def operations(case: Case) -> int:
    """Two for each multiply-add of the convolutions."""
    return 2 * count_multiply_adds(_model(case.weights), (1, 3, *case.size))
