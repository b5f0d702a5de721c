"""Terms of a loss from low-resolution logits, value and gradient: our op, torch's sequence of ops, and smp's losses."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bcmfnet.benchmarks.harness import Provider, Unavailable, compiled, op_backends
from bcmfnet.ops import backends, segmentation_loss
from bcmfnet.ops._loss_options import term_options
from bcmfnet.reference import bcl as reference

BASELINE = "eager_best"
IGNORE = 255
LOSS_ERROR, GRADIENT_ERROR = 1e-4, 1e-3
"""Relative."""

TERMS: dict[str, dict[str, Any]] = {
    "ce": {},
    "smoothing": {"label_smoothing": 0.1},
    "focal": {"ce": 0.0, "focal": 1.0},
    "dice": {"ce": 0.0, "dice": 1.0},
    "ce+dice": {"dice": 1.0},
    "distillation": {"ce": 0.0, "distillation": 1.0, "distillation_temperature": 2.0},
    "binary": {"binary": True},
    "aligned": {"align_corners": True},
}
"""Options of what is computed."""


@dataclass(frozen=True)
class Case:
    """Logits [N, C, h, w] of normal noise, and a target (H, W)."""

    term: str
    shape: tuple[int, int, int, int]
    size: tuple[int, int]

    @property
    def name(self) -> str:
        return "-".join([self.term, "x".join(map(str, self.shape)), "x".join(map(str, self.size))])


CITYSCAPES, ADE = ((2, 19, 64, 128), (512, 1024)), ((2, 150, 128, 128), (512, 512))
CASES = [Case(term, *(((2, 1, 64, 128), (512, 1024)) if term == "binary" else CITYSCAPES)) for term in TERMS]
CASES += [Case(term, *ADE) for term in ("ce", "ce+dice")]  # a SegFormer's, from 1/4


def make_inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Logits that need a gradient, labels in regions of 16 pixels with one in twenty ignored, a teacher's logits."""
    generator = torch.Generator(device).manual_seed(0)
    n, c, *_ = case.shape
    height, width = case.size
    logits, teacher = (2 * torch.randn(case.shape, generator=generator, device=device) for _ in range(2))
    cells = (n, -(-height // 16), -(-width // 16))
    coarse = torch.randint(0, max(c, 2), cells, generator=generator, device=device)
    target = coarse.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :height, :width].contiguous()
    target[torch.rand(target.shape, generator=generator, device=device) < 0.05] = IGNORE
    return logits.requires_grad_(), target, teacher


def providers(case: Case, device: torch.device) -> dict[str, Provider | Unavailable]:
    """Our backends, and our cross-entropy alone; torch's ops as they are usually written, in the fastest form found,
    and that compiled; segmentation_models_pytorch where it is installed."""
    options = TERMS[case.term] | {"ignore_index": IGNORE}

    def ours(logits: Tensor, target: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
        with_teacher = {"teacher": teacher} if "distillation" in options else {}
        return _with_gradient(segmentation_loss(logits, target, **options, **with_teacher), logits)

    def cross_entropy(logits: Tensor, target: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
        alone = {name: options[name] for name in ("binary", "ignore_index") if name in options}
        return _with_gradient(segmentation_loss(logits, target, **alone), logits)

    def written(loss: Any) -> Provider:
        def call(logits: Tensor, target: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
            return _with_gradient(loss(_upsampled(logits, case), target, teacher, case), logits)

        return call

    found = op_backends("bcl", device, ours) | {"ours_ce": cross_entropy}
    found |= {"usual": written(_usual), "eager_best": written(_best)}
    best = compiled(_best)
    found["compile"] = best if isinstance(best, Unavailable) else written(best)
    if "dice" in case.term:
        found["smp"] = _smp(case, written)
    return found


def _with_gradient(loss: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
    return (loss.detach(), *torch.autograd.grad(loss, logits))


def _upsampled(logits: Tensor, case: Case) -> Tensor:
    return F.interpolate(logits, case.size, mode="bilinear", align_corners=case.term == "aligned")


def _usual(z: Tensor, target: Tensor, teacher: Tensor, case: Case) -> Tensor:
    """As the toolkits write it: one-hot labels and a product of maps for Dice, a kl_div of two softmaxes."""
    if case.term == "binary":
        valid = target != IGNORE
        return F.binary_cross_entropy_with_logits(z[:, 0][valid], target[valid].float())
    if case.term == "distillation":
        full = _upsampled(teacher, case)
        divergence = F.kl_div((z / 2).log_softmax(1), (full / 2).softmax(1), reduction="none").sum(1)
        return 4 * divergence[target != IGNORE].mean()
    loss = z.new_zeros(())
    if case.term == "focal":
        ce = F.cross_entropy(z, target, ignore_index=IGNORE, reduction="none")
        loss = ((1 - torch.exp(-ce)) ** 2 * ce)[target != IGNORE].mean()
    if case.term in ("ce", "ce+dice", "smoothing", "aligned"):
        smoothing = TERMS[case.term].get("label_smoothing", 0.0)
        loss = F.cross_entropy(z, target, ignore_index=IGNORE, label_smoothing=smoothing)
    if "dice" in case.term:
        valid = (target != IGNORE)[:, None]
        p = z.softmax(1) * valid
        hot = F.one_hot(target * valid[:, 0], z.shape[1]).movedim(3, 1) * valid
        loss = loss + (1 - 2 * (p * hot).sum((0, 2, 3)) / (p.sum((0, 2, 3)) + hot.sum((0, 2, 3)))).mean()
    return loss


def _best(z: Tensor, target: Tensor, teacher: Tensor, case: Case) -> Tensor:
    """One log-softmax for all terms, labels by gather and bincount in place of one-hot maps."""
    valid = target != IGNORE
    count = valid.sum()
    if case.term == "binary":
        values = F.binary_cross_entropy_with_logits(z[:, 0], (target == 1).to(z), reduction="none")
        return (values * valid).sum() / count
    if case.term == "distillation":
        full = _upsampled(teacher, case)
        divergence = F.kl_div((z / 2).log_softmax(1), (full / 2).log_softmax(1), reduction="none", log_target=True)
        return 4 * (divergence.sum(1) * valid).sum() / count
    if case.term in ("ce", "smoothing", "aligned"):
        return _usual(z, target, teacher, case)
    log_p = z.log_softmax(1)
    ce = F.nll_loss(log_p, target, ignore_index=IGNORE, reduction="none")
    if case.term == "focal":
        return ((1 - torch.exp(-ce)) ** 2 * ce).sum() / count
    known = target * valid
    predicted = torch.einsum("nchw,nhw->c", log_p.exp(), valid.to(z))
    hits = z.new_zeros(z.shape[1]).index_add(0, known.flatten(), (torch.exp(-ce) * valid).flatten())
    labelled = torch.bincount(target[valid], minlength=z.shape[1])
    dice = (1 - 2 * hits / (predicted + labelled)).mean()
    return dice if case.term == "dice" else dice + ce.sum() / count


def _smp(case: Case, written: Any) -> Provider | Unavailable:
    try:
        losses = importlib.import_module("segmentation_models_pytorch.losses")
    except ImportError as error:
        return Unavailable(f"segmentation_models_pytorch cannot be imported: {error}")
    dice = losses.DiceLoss("multiclass", ignore_index=IGNORE)

    def loss(z: Tensor, target: Tensor, teacher: Tensor, case: Case) -> Tensor:
        ce = F.cross_entropy(z, target, ignore_index=IGNORE) if case.term == "ce+dice" else 0
        return dice(z, target) + ce

    return written(loss)


def expected(case: Case, logits: Tensor, target: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    """Value and gradient of the definition in float64, and of the cross-entropy alone."""
    exact = logits.detach().double().requires_grad_()
    options = TERMS[case.term] | {"ignore_index": IGNORE}
    loss, stats, _ = reference.loss(exact, target, term_options(**options), teacher=teacher)
    return (*_with_gradient(loss, exact), stats.ce)


def disagreement(case: Case, provider: str, output: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str | None:
    """All compute the same loss, our own with the same gradient."""
    loss = output[0].item()
    value = (expected[2] if provider == "ours_ce" and case.term != "aligned" else expected[0]).item()
    if provider == "ours_ce" and case.term in ("smoothing", "aligned"):
        return None  # another loss: beside it for its time
    if not abs(loss / value - 1) <= LOSS_ERROR:
        return f"loss {loss:.6g} is not {value:.6g}"
    if provider in backends.BACKENDS:
        error = ((output[1].double() - expected[1]).norm() / expected[1].norm()).item()
        if not error <= GRADIENT_ERROR:
            return f"gradient is off by {error:.2g} of its norm"
    return None


def bytes_moved(case: Case) -> int:
    """Logits read once and their gradient written once, int64 labels read once; a teacher read once."""
    n, c, h, w = case.shape
    return (2 + (case.term == "distillation")) * 4 * n * c * h * w + 8 * n * case.size[0] * case.size[1]
