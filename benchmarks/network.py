"""From a normalised frame to its label map: `for_inference`, what one writes without it, and whole-network runtimes."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from bcmfnet.benchmarks.harness import Provider, Unavailable, compiled, in_tf32, through_runtime
from bcmfnet.benchmarks.lmfm import BestModules, Modules
from bcmfnet.benchmarks.upsample_argmax import best_labels
from bcmfnet.inference import for_inference
from bcmfnet.inference.runtimes import RUNTIMES
from bcmfnet.models import count_multiply_adds, count_parameters, create_model
from bcmfnet.reference.bilinear import upsample

BASELINE = "eager_best"

HALVES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
ERROR = {"float32": 5e-6, "bf16": 0.1, "fp16": 0.02, "tf32": 0.02}
"""Most that computing in a precision moves one logit against another, as a share of the largest logit. Measured, over
providers and cases: labels differ at leads of up to 1.3e-6 in float32 and 0.062 in bfloat16; float16 and TF32 have the
same number of bits, and were not measured."""
SHARE = {"float32": 1e-4, "bf16": 0.1, "fp16": 0.02, "tf32": 0.02}
"""Most labels that may differ for it. A network with initial weights is seldom sure: 3e-6 were measured, and 0.05."""


@dataclass(frozen=True)
class Case:
    """A network and the size of its frame."""

    model: str
    size: tuple[int, int]
    classes: int
    batch: int = 1

    @property
    def name(self) -> str:
        return f"{self.model}-{self.batch}x3x{self.size[0]}x{self.size[1]}"


CASES = [
    Case("bcmfnet", (1024, 2048), 19),  # Cityscapes: the goals are stated for it
    Case("bcmfnet", (360, 480), 11),  # CamVid: small maps, where what a layer costs besides arithmetic shows
    Case("ddrnet23_slim", (1024, 2048), 19),  # the network with the DAPPM in place of the LMFM
]


def make_inputs(case: Case, device: torch.device) -> tuple[Tensor]:
    """Frames float32 [N, 3, H, W]: noise on a grid 16 times coarser, bicubic between, and as much noise of a pixel."""
    generator = torch.Generator(device).manual_seed(0)
    height, width = case.size
    coarse = torch.randn(case.batch, 3, -(-height // 16), -(-width // 16), generator=generator, device=device)
    frames = interpolate(coarse, case.size, mode="bicubic", align_corners=False)
    return (frames + torch.randn(frames.shape, generator=generator, device=device),)


@lru_cache(1)
def _model(case: Case) -> nn.Module:
    torch.manual_seed(0)
    model = create_model(case.model, num_classes=case.classes)
    small = Case(case.model, (256, 256), case.classes, batch=4)
    return with_statistics(model, *make_inputs(small, torch.device("cpu")))


def with_statistics(model: nn.Module, frames: Tensor) -> nn.Module:
    """A network of initial weights, frozen, with the running statistics of frames: without them its maps explode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain mean over all batches
    with torch.no_grad():
        model(frames)
    return model.eval().requires_grad_(False)


class EagerLabels(nn.Module):
    """Frames to labels as one writes it, by torch's ops alone, all of it at full resolution."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = copy.deepcopy(model)
        self.model.context = Modules(self.model.context)

    def forward(self, frames: Tensor) -> Tensor:
        logits = self.model(frames).logits
        return interpolate(logits, frames.shape[-2:], mode="bilinear", align_corners=False).argmax(1)


class BestLabels(EagerLabels):
    """The fastest form of it in eager PyTorch that was found on a CPU: channels_last throughout, in the dtype of the
    weights, and `max` in place of `argmax`.
    """

    # Tried at 1x3x1024x2048 on one thread of a CPU with AVX512-BF16 and no AMX, ms: float32 channels_last, max 1199,
    # contiguous, max 1392, logits made contiguous, argmax 1457, all contiguous, argmax 1639; bfloat16 weights 648,
    # contiguous ones 805, autocast 653, with argmax on contiguous logits 1022. inference_mode changes nothing.
    # Folding batch norms is not counted as eager PyTorch: it makes another model, as `for_inference` does.
    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__(model)
        self.model.context = BestModules(self.model.context.context)
        self.to(dtype=dtype, memory_format=torch.channels_last)
        self.dtype = dtype

    def forward(self, frames: Tensor) -> Tensor:
        frames = frames.to(self.dtype, memory_format=torch.channels_last)
        return best_labels(self.model(frames).logits, frames.shape[-2:])[0]


def providers(case: Case, device: torch.device) -> dict[str, Provider | Unavailable]:
    """What one writes: eager, channels_last, mixed precision, compiled; the fastest eager form; runtimes that do all;
    `for_inference`.

    Names tell the precision, float32 where they do not; `ours_<runtime>` leaves the convolutions to a runtime.
    """
    model = _model(case).to(device)
    eager = EagerLabels(model)
    last = EagerLabels(model).to(memory_format=torch.channels_last)
    half = torch.bfloat16 if device.type == "cpu" else torch.float16

    def channels_last(frames: Tensor) -> Tensor:
        return last(frames.contiguous(memory_format=torch.channels_last))

    def amp(frames: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=half):
            return channels_last(frames)

    found: dict[str, Provider | Unavailable] = {"eager": eager, "channels_last": channels_last}
    found[_named("amp", half)] = amp
    found["compile"] = compiled(eager)
    if device.type == "cuda":
        found["compile_max"] = compiled(eager, "max-autotune-no-cudagraphs")
        found["eager_best_tf32"] = in_tf32(BestLabels(model, torch.float32))
        found["ours_tf32"] = in_tf32(for_inference(model))
    no_compiler = found["compile"] if isinstance(found["compile"], Unavailable) else None
    for dtype in (torch.float32, torch.bfloat16, *([torch.float16] if device.type == "cuda" else [])):
        found[_named("eager_best", dtype)] = BestLabels(model, dtype)
        found[_named("ours", dtype)] = for_inference(model, dtype=dtype)
        found[_named("ours_compile", dtype)] = no_compiler or for_inference(model, dtype=dtype, compile=True)
    for runtime, facts in RUNTIMES.items():
        for dtype in facts.dtypes:
            whole = through_runtime(runtime, eager, dtype, device)
            reason = whole if isinstance(whole, Unavailable) else None
            found[_named(runtime, dtype)] = whole
            found[_named(f"ours_{runtime}", dtype)] = reason or for_inference(model, dtype=dtype, runtime=runtime)
    return found


def _named(name: str, dtype: torch.dtype) -> str:
    return name if dtype == torch.float32 else f"{name}_{HALVES[dtype]}"


def baseline(provider: str) -> str:
    """The best eager form in the provider's precision: what half of it gains by itself is no gain of its own."""
    precision = _precision(provider)
    return BASELINE if precision == "float32" else f"{BASELINE}_{precision}"


def _precision(provider: str) -> str:
    return next((precision for precision in ERROR if provider.endswith(precision)), "float32")


class Expected(NamedTuple):
    """In float64: labels, the winner's lead over the second [N, H, W], and the largest logit."""

    labels: Tensor
    lead: Tensor
    largest: float


def expected(case: Case, frames: Tensor) -> Expected:
    """Labels and how sure they are, from the network in float64 and its scores at full resolution."""
    with torch.no_grad():
        logits = copy.deepcopy(_model(case)).to(frames.device).double()(frames.double()).logits
        best = upsample(logits, frames.shape[-2:]).topk(2, dim=1)
    return Expected(best.indices[:, 0], best.values[:, 0] - best.values[:, 1], logits.abs().max().item())


def disagreement(case: Case, provider: str, output: Tensor, expected: Expected) -> str | None:
    """Few labels differ, and none where the winner leads by more than the error of the provider's precision."""
    precision = _precision(provider)
    wrong = output != expected.labels
    lead = expected.lead[wrong].max().item() / expected.largest if wrong.any() else 0.0
    if lead <= ERROR[precision] and wrong.float().mean() <= SHARE[precision]:
        return None
    share = f"{wrong.sum().item()} of {wrong.numel()} labels differ"
    return f"{share}, where the winner leads by up to {lead:.2g} of the largest logit"


def bytes_moved(case: Case) -> int:
    """Frame and float32 weights read once, labels written once; no map in between needs to be in memory."""
    pixels = case.batch * case.size[0] * case.size[1]
    return 4 * 3 * pixels + 4 * count_parameters(_model(case)) + pixels


def operations(case: Case) -> int:
    """Two for each multiply-add of the convolutions."""
    return 2 * count_multiply_adds(_model(case), (case.batch, 3, *case.size))
