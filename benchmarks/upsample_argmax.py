"""Label map of low-resolution logits: our op, and the interpolate + argmax that it replaces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from bcmfnet.benchmarks.harness import Provider, Unavailable, compiled, op_backends, word
from bcmfnet.ops import backends, upsample_argmax
from bcmfnet.reference.bilinear import upsample

BASELINE = "eager_best"

SMOOTH_STEP = 8
SMOOTH_SCALE = 16.0
"""The winner of the median pixel then leads by 5 nats: a probability of 0.97 to 0.99."""

ROUNDING = 8 * torch.finfo(torch.float32).eps
"""Most that float32 moves one score against another, as a share of the largest logit: 8 roundings for each of the two.
Measured: labels differ at leads of up to 5e-9 of it."""
CONFIDENCE_ERROR = 3e-4
"""Half a unit in the last place of float16 under 1 is 2.4e-4."""


@dataclass(frozen=True)
class Case:
    """Logits of some shape, dtype, memory format and content, and the size of their label map.

    Content: "rough" is standard normal noise, where neighbours have nothing in common and two classes lead closely;
    "smooth" is what a trained network gives, wide regions in which one class leads: see `make_inputs`. A kernel that
    branches on the scores, or leaves classes out that cannot win, is fast on the one alone.
    """

    shape: tuple[int, int, int, int]
    size: tuple[int, int]
    content: str
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    confidence: bool = False

    @property
    def name(self) -> str:
        words = ["x".join(map(str, self.shape)), "x".join(map(str, self.size)), word(self.dtype), self.content]
        words += [word(self.memory_format)] * (self.memory_format != torch.contiguous_format)
        return "-".join(words + ["confidence"] * self.confidence)


def _cases() -> list[Case]:
    street = ((1, 19, 128, 256), (1024, 2048))
    shapes = [
        (*street, {}),  # Cityscapes, the network's own output: the goal is stated for it
        (*street, {"dtype": torch.bfloat16}),
        (*street, {"dtype": torch.float16}),
        (*street, {"memory_format": torch.channels_last}),
        (*street, {"confidence": True}),
        ((1, 11, 45, 60), (360, 480), {}),  # CamVid: small, so that what a call costs besides arithmetic shows
        ((8, 19, 64, 64), (512, 512), {}),  # a batch of evaluation crops
        ((1, 150, 64, 64), (512, 512), {}),  # ADE20K's classes: the class loop is the longest
    ]
    return [Case(shape, size, content, **more) for (shape, size, more), content in product(shapes, ("rough", "smooth"))]


CASES = _cases()


def make_inputs(case: Case, device: torch.device) -> tuple[Tensor]:
    """Logits [N, C, h, w]; smooth ones are noise on a grid 8 times coarser, bicubic between, times SMOOTH_SCALE."""
    generator = torch.Generator(device).manual_seed(0)
    n, c, h, w = case.shape
    if case.content == "smooth":
        coarse = torch.randn(n, c, -(-h // SMOOTH_STEP), -(-w // SMOOTH_STEP), generator=generator, device=device)
        logits = SMOOTH_SCALE * interpolate(coarse, (h, w), mode="bicubic", align_corners=False)
    else:
        logits = torch.randn(case.shape, generator=generator, device=device)
    return (logits.to(case.dtype, memory_format=case.memory_format),)


def providers(case: Case, device: torch.device) -> dict[str, Provider | Unavailable]:
    """Our backends; interpolate + argmax as users write it, eager and compiled, and its fastest eager form."""

    def ours(logits: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return upsample_argmax(logits, case.size, return_confidence=case.confidence)

    def eager(logits: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        scores = interpolate(logits, case.size, mode="bilinear", align_corners=False)
        if not case.confidence:
            return scores.argmax(1)
        confidence, labels = scores.softmax(1).max(1)
        return labels, confidence

    def eager_best(logits: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        labels, confidence = best_labels(logits, case.size, case.confidence)
        return (labels, confidence) if case.confidence else labels

    found = op_backends("upsample_argmax", device, ours)
    return found | {"eager_best": eager_best, "eager": eager, "compile": compiled(eager)}


def best_labels(logits: Tensor, size: Sequence[int], confidence: bool = False) -> tuple[Tensor, Tensor | None]:
    """The fastest form in eager PyTorch that was found on a CPU: a pixel's classes side by side, and `max`."""
    # Tried on one thread, 1x19x128x256 to 1024x2048 in float32, ms: channels_last max 163, argmax 198, topk 568;
    # contiguous max 258, argmax 467. inference_mode is no faster. bfloat16 as it is 272 to 300, as float32 325. With
    # confidence, channels_last: these lines 309, with logsumexp 550, softmax and max 1047; contiguous 451, 826, 665.
    logits = logits.contiguous(memory_format=torch.channels_last)
    scores = interpolate(logits, size, mode="bilinear", align_corners=False)
    best, labels = scores.max(1, keepdim=True)
    if not confidence:
        return labels.squeeze(1), None
    return labels.squeeze(1), scores.sub_(best).exp_().sum(1).reciprocal_()


class Expected(NamedTuple):
    """In float64: labels, the winner's lead over the second [N, H, W], its softmax, and the largest logit."""

    labels: Tensor
    lead: Tensor
    confidence: Tensor
    largest: float


def expected(case: Case, logits: Tensor) -> Expected:
    """Labels and how sure they are, from float64 scores at full resolution."""
    scores = upsample(logits.double(), torch.Size(case.size))
    best, labels = scores.max(1, keepdim=True)
    confidence = 1 / (scores - best).exp_().sum(1)
    lead = best - scores.scatter_(1, labels, -torch.inf).amax(1, keepdim=True)
    return Expected(labels.squeeze(1), lead.squeeze(1), confidence, logits.abs().max().item())


def disagreement(case: Case, provider: str, output: Tensor | tuple[Tensor, Tensor], expected: Expected) -> str | None:
    """Labels are equal wherever the winner leads by more than the tie band, and confidences agree everywhere.

    torch stores the interpolated scores in the dtype of the logits, so for half precision its tie band is wider by half
    a unit in the last place of each of two scores (measured: leads of up to 0.0034 of the largest logit in bfloat16).
    """
    labels, confidence = output if case.confidence else (output, None)
    half = case.dtype != torch.float32 and provider not in backends.BACKENDS
    band = (ROUNDING + half * torch.finfo(case.dtype).eps) * expected.largest
    wrong = (labels != expected.labels) & (expected.lead > band)
    if wrong.any():
        lead = expected.lead[wrong].max().item()
        return f"{wrong.sum().item()} of {wrong.numel()} labels differ where the winner leads by up to {lead:.2g}"
    if confidence is not None:
        error = (confidence.double() - expected.confidence).abs().max().item()
        if not error <= CONFIDENCE_ERROR:
            return f"confidence is off by up to {error:.2g}, over {CONFIDENCE_ERROR}"
    return None


def bytes_moved(case: Case) -> int:
    """Logits read once, labels and float16 confidences written once; full-resolution scores need not exist."""
    n, c, h, w = case.shape
    pixels = n * case.size[0] * case.size[1]
    label = 1 if c <= 256 else 2
    return n * c * h * w * case.dtype.itemsize + pixels * (label + 2 * case.confidence)


def operations(case: Case) -> int:
    """For each class: along a row of logits 3 a column (subtract, multiply, add) and 1 for the difference to the next
    row; for each pixel 3 (multiply, add, compare), and 3 more for its softmax (subtract, exp, add).
    """
    n, c, h, _ = case.shape
    height, width = case.size
    return n * c * width * (4 * h + (6 if case.confidence else 3) * height)
