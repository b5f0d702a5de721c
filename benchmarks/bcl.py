"""The Boundary Corrected Loss, value and gradient: our op, what one writes without it, and two losses that it joins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bcmfnet.benchmarks.harness import Provider, Unavailable, compiled, op_backends
from bcmfnet.ops import backends, boundary_corrected_loss
from bcmfnet.reference import bcl as reference

BASELINE = "eager_best"

IGNORE, TAU = 255, 0.3567
"""The op's defaults, which the other providers compute too."""

LOSSES = {"detect": {}, "paper": {"mode": "paper", "nms": 3, "ratio": 1 / 16}}
"""Options of a loss: the default one, and the paper's."""

MIN_KEPT = 100_000
"""Of OHEM."""

LOSS_ERROR, GRADIENT_ERROR = 1e-4, 2e-2
"""Relative, of our backends: a score within a rounding of the next step of the grid may select another pixel."""
OFF_GRID_ERROR = 2e-2
"""Relative, of a loss that selects by raw scores."""


@dataclass(frozen=True)
class Case:
    """Logits [N, C, h, w], at full resolution where they have the target's size; rough or smooth.

    Rough logits are normal noise: every tenth pixel is a local maximum of the score. Smooth ones are bicubic between
    noise 32 pixels apart, as a trained network's: one in a hundred is. Without `backward` only the value is asked for.
    """

    shape: tuple[int, int, int, int]
    size: tuple[int, int]
    content: str
    dtype: torch.dtype = torch.float32
    backward: bool = True
    loss: str = "detect"
    device: str | None = None
    """Type of the device that the case is for; any where there is none."""

    @property
    def name(self) -> str:
        words = ["x".join(map(str, self.shape)), "x".join(map(str, self.size)), self.content]
        words += [str(self.dtype).removeprefix("torch.")] * (self.dtype != torch.float32)
        words += [self.loss] * (self.loss != "detect")
        return "-".join(words + ["forward"] * (not self.backward))


CONTENTS = ("rough", "smooth")
SHAPES = [
    ((2, 19, 512, 1024), (512, 1024)),  # Cityscapes crops at full resolution: the goals are stated for them
    ((2, 19, 64, 128), (512, 1024)),  # and from the network's 1/8
    ((4, 11, 360, 480), (360, 480)),  # CamVid
    ((4, 11, 45, 60), (360, 480)),
]
FULL, LOW = (8, 19, 1024, 1024), (8, 19, 128, 128)  # a training step of Cityscapes on one GPU
LARGE = [(FULL, {}), (FULL, {"backward": False}), (FULL, {"dtype": torch.bfloat16}), (LOW, {})]
LARGE += [(FULL, {"dtype": torch.bfloat16, "backward": False}), (LOW, {"dtype": torch.bfloat16})]


def _cases() -> list[Case]:
    cases = [Case(shape, size, content) for (shape, size), content in product(SHAPES, CONTENTS)]
    cases += [Case(shape, size, content, loss="paper") for (shape, size), content in product(SHAPES[:2], CONTENTS)]
    for (shape, more), content in product(LARGE, CONTENTS):
        cases.append(Case(shape, (1024, 1024), content, device="cuda", **more))
    return cases


CASES = _cases()


def make_inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits that need a gradient; labels, uint8 up to 256 classes: regions some 32 pixels wide, with one pixel in
    twenty ignored, and class 255 where there is one.
    """
    generator = torch.Generator(device).manual_seed(0)
    n, c, h, w = case.shape
    height, width = case.size

    def regions(size: tuple[int, int]) -> Tensor:
        coarse = torch.randn(n, c, -(-height // 32), -(-width // 32), generator=generator, device=device)
        return F.interpolate(coarse, size, mode="bicubic", align_corners=False)

    target = regions(case.size).argmax(1).to(torch.uint8 if c <= 256 else torch.int16)
    target[torch.rand(target.shape, generator=generator, device=device) < 0.05] = IGNORE
    noise = torch.randn(case.shape, generator=generator, device=device) if case.content != "smooth" else None
    logits = 4 * regions((h, w)) if noise is None else noise
    return logits.to(case.dtype).requires_grad_(case.backward), target


def providers(case: Case, device: torch.device) -> dict[str, Provider | Unavailable]:
    """Our backends; the loss in its fastest eager form, from three cross-entropies, from one log-softmax, and that
    compiled; OHEM; cross-entropy.
    """

    def ours(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        return _with_gradient(boundary_corrected_loss(logits, target, ignore_index=IGNORE, **LOSSES[case.loss]), logits)

    def written(loss: Provider) -> Provider:
        def call(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
            return _with_gradient(loss(_upsampled(logits, case.size), target.long()), logits)

        return call

    def of_the_case(loss: Callable[..., Tensor]) -> Provider:
        return lambda logits, target: loss(logits, target, **LOSSES[case.loss])

    best, naive, careful = map(of_the_case, (_best, _naive, _careful))
    found = op_backends("bcl", device, ours) | {"eager_best": written(best)}
    found |= {"naive": written(naive), "careful": written(careful)}
    careful = compiled(careful, fullgraph=False)  # with a ratio its threshold comes to the host
    found["compile"] = careful if isinstance(careful, Unavailable) else written(careful)
    return found | {"ohem": written(_ohem), "cross_entropy": written(_cross_entropy)}


def _with_gradient(loss: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
    return (loss.detach(), *torch.autograd.grad(loss, logits)) if logits.requires_grad else (loss,)


def _upsampled(logits: Tensor, size: tuple[int, int]) -> Tensor:
    if logits.shape[2:] == size:
        return logits
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, ignore_index=IGNORE)


def _ohem(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy over the MIN_KEPT hardest pixels, or over those from TAU on where they are more: by a sort."""
    ce = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")[target != IGNORE]
    threshold = ce.detach().sort(descending=True).values[min(MIN_KEPT, len(ce)) - 1]
    return ce[ce >= threshold.clamp(max=TAU)].mean()


def _naive(logits: Tensor, target: Tensor, ratio: float = 0.0, **options: Any) -> Tensor:
    """Three cross-entropies; non-maximum suppression by pooling and a sort of what is left where options ask for it."""
    rows, columns = _flipped(target)
    ce, ce_rows, ce_columns = (
        F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none") for labels in (target, rows, columns)
    )
    return _combined(ce, ce_rows + ce_columns, target, _kth_largest_by_sort, ratio, **options)


def _careful(logits: Tensor, target: Tensor, ratio: float = 0.0, **options: Any) -> Tensor:
    """One log-softmax for the three terms; a partial sort where there is a ratio."""
    log_p = F.log_softmax(logits, 1)
    ce, ce_rows, ce_columns = (_picked(log_p, labels) for labels in (target, *_flipped(target)))
    return _combined(ce, ce_rows + ce_columns, target, _kth_largest, ratio, **options)


def _best(logits: Tensor, target: Tensor, ratio: float = 0.0, **options: Any) -> Tensor:
    """One log-softmax, of which what only selects keeps no graph: the fastest form found on a CPU."""
    # Tried on one thread, 4x11x360x480, ms of CPU time: this one 76, all three terms with a graph (`_careful`) 84,
    # three cross-entropies, two without a graph 98, with one (`_naive`) 110, logsumexp and gather for the two 112; the
    # same on channels_last logits 100, 140, 167, 188, 137. From 1/8, 4x11x45x60: this one 119, upsampled
    # channels_last 121 (made contiguous after 120), `_careful` 132, 146, 136.
    log_p = F.log_softmax(logits, 1)
    ce = F.nll_loss(log_p, target, ignore_index=IGNORE, reduction="none")
    with torch.set_grad_enabled(torch.is_grad_enabled() and options.get("mode") == "paper"):
        flipped = sum(F.nll_loss(log_p, labels, ignore_index=IGNORE, reduction="none") for labels in _flipped(target))
    return _combined(ce, flipped, target, _kth_largest, ratio, **options)


def _kth_largest(scores: Tensor, k: int) -> Tensor:
    return scores.topk(k).values[k - 1]


def _kth_largest_by_sort(scores: Tensor, k: int) -> Tensor:
    return scores.sort(descending=True).values[k - 1]


def _flipped(target: Tensor) -> tuple[Tensor, Tensor]:
    flips = (reference.flip_index(target.shape[dim], 1, "swap").to(target.device) for dim in (1, 2))
    rows, columns = (target.index_select(dim, index) for dim, index in zip((1, 2), flips, strict=True))
    return rows, columns


def _picked(log_p: Tensor, labels: Tensor) -> Tensor:
    counts = labels != IGNORE
    return -log_p.gather(1, (labels * counts).unsqueeze(1)).squeeze(1) * counts


def _combined(
    ce: Tensor,
    flipped: Tensor,
    target: Tensor,
    kth_largest: Callable[[Tensor, int], Tensor],
    ratio: float,
    nms: int = 1,
    mode: str = "detect",
) -> Tensor:
    valid = target != IGNORE
    score = (flipped * valid).detach()
    selected = score >= TAU
    if nms > 1:
        candidates = (F.max_pool2d(score[:, None], nms, 1, nms // 2)[:, 0] == score) & (score > 0)
        scores = score[candidates]
        kept = int(ratio * scores.numel())
        threshold = min(TAU, kth_largest(scores, kept).item()) if kept else TAU
        selected = candidates & (score >= threshold)
    term = flipped if mode == "paper" else ce
    return ce.sum() / valid.sum() + (term * selected).sum() / selected.sum().clamp(min=1)


class Expected(NamedTuple):
    """From float64: the loss and its gradient; OHEM and the cross-entropy."""

    loss: float
    gradient: Tensor | None
    ohem: float
    cross_entropy: float


def expected(case: Case, logits: Tensor, target: Tensor) -> Expected:
    """Value and gradient of the definition."""
    exact = logits.detach().double().requires_grad_(case.backward)
    loss, stats, _ = reference.loss(exact, target, reference.make_options(ignore_index=IGNORE, **LOSSES[case.loss]))
    gradient = torch.autograd.grad(loss, exact)[0] if case.backward else None
    with torch.no_grad():
        ohem = _ohem(_upsampled(exact, case.size), target.long())
    return Expected(loss.item(), gradient, ohem.item(), stats.ce.item())


def disagreement(case: Case, provider: str, output: tuple[Tensor, ...], expected: Expected) -> str | None:
    """Our backends agree in loss and gradient; the others in the loss, as far as decisions off the grid allow."""
    ours = provider in backends.BACKENDS
    loss, value = output[0].item(), getattr(expected, provider if provider in Expected._fields else "loss")
    if not abs(loss / value - 1) <= (LOSS_ERROR if ours else OFF_GRID_ERROR):
        return f"loss {loss:.6g} is not {value:.6g}"
    if ours and case.backward:
        error = ((output[1].double() - expected.gradient).norm() / expected.gradient.norm()).item()
        if not error <= GRADIENT_ERROR:
            return f"gradient is off by {error:.2g} of its norm"
    return None


def bytes_moved(case: Case) -> int:
    """Logits and uint8 labels read once, the gradient written once."""
    n, c, h, w = case.shape
    return (1 + case.backward) * case.dtype.itemsize * n * c * h * w + n * case.size[0] * case.size[1]
