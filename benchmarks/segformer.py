"""A training step of SegFormer-B0 for ADE20K, with its own loss and with ours from its logits at 1/4.

Forward, loss and backward of the model of transformers, made from its configuration, in evaluation mode: dropout would
make the two differ. bfloat16 is autocast. The arithmetic of a GPU's memory is in NOTES.md.
"""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bcmfnet.benchmarks.harness import Provider, Unavailable

BASELINE = "eager_best"
LABELS = 150
ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Relative, of the loss."""


@dataclass(frozen=True)
class Case:
    """Images [N, 3, H, W], and labels of 150 classes of their size."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return "-".join(["x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")])


CASES = [Case((2, 3, 512, 512), dtype) for dtype in (torch.float32, torch.bfloat16)]


def make_inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Normal noise; labels in regions of 16 pixels, one pixel in twenty ignored."""
    generator = torch.Generator().manual_seed(0)
    n, _, height, width = case.shape
    images = torch.randn(case.shape, generator=generator)
    coarse = torch.randint(0, LABELS, (n, -(-height // 16), -(-width // 16)), generator=generator)
    labels = coarse.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :height, :width].contiguous()
    labels[torch.rand(labels.shape, generator=generator) < 0.05] = 255
    return images.to(device), labels.to(device)


def providers(case: Case, device: torch.device) -> dict[str, Provider | Unavailable]:
    """The model with its own loss, with our cross-entropy in its place, and with cross-entropy and Dice of one call."""
    try:
        model = _model(device)
    except ImportError as error:
        why = Unavailable(f"transformers cannot be imported: {error}")
        return {"eager_best": why, "ours": why, "ours_ce+dice": why}
    from bcmfnet.integrations.transformers import use_loss
    from bcmfnet.nn import SegmentationLoss

    def step(network: nn.Module) -> Provider:
        def call(images: Tensor, labels: Tensor) -> tuple[Tensor]:
            network.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=case.dtype == torch.bfloat16):
                loss = network(pixel_values=images, labels=labels).loss
            loss.backward()
            return (loss.detach(),)

        return call

    def ours(*criterion: nn.Module) -> Provider:
        return step(use_loss(copy.deepcopy(model), *criterion))

    both = SegmentationLoss(ce=1, dice=1, ignore_index=255)
    return {"eager_best": step(copy.deepcopy(model)), "ours": ours(), "ours_ce+dice": ours(both)}


def _model(device: torch.device) -> Any:
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    configuration = transformers.SegformerConfig(num_labels=LABELS)
    return transformers.SegformerForSemanticSegmentation(configuration).to(device).eval()


def expected(case: Case, images: Tensor, labels: Tensor) -> float:
    """The model's own loss in float32; NaN without the library, where nothing is compared."""
    try:
        model = _model(images.device)
    except ImportError:
        return float("nan")
    with torch.no_grad():
        return float(model(pixel_values=images, labels=labels).loss)


def disagreement(case: Case, provider: str, output: tuple[Tensor], expected: float) -> str | None:
    """The loss is the model's own; that with Dice is larger by at most 1."""
    loss = output[0].item()
    if provider == "ours_ce+dice":
        return None if expected < loss < expected + 1.02 else f"loss {loss:.6g} is not {expected:.6g} and a Dice loss"
    return None if abs(loss / expected - 1) <= ERROR[case.dtype] else f"loss {loss:.6g} is not {expected:.6g}"


def bytes_moved(case: Case) -> int:
    """Images and int64 labels, read once."""
    n, c, h, w = case.shape
    return n * h * w * (4 * c + 8)
