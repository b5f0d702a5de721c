"""Semantic segmentation models of transformers: their loss and their label maps, from low-resolution logits.

from bcmfnet.integrations.transformers import use_loss
model = use_loss(SegformerForSemanticSegmentation.from_pretrained(...), BoundaryCorrectedLoss())
loss = model(pixel_values, labels=labels).loss                          # as ever; Trainer and accelerate too
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from bcmfnet.nn import UpsampledCrossEntropy
from bcmfnet.ops import upsample_argmax

Model = TypeVar("Model", bound=nn.Module)
HEADS = ("decode_head", "segmentation_head", "head")
"""Names under which these models keep the head whose output their logits are, at its own resolution."""
AUXILIARY = "auxiliary_head"


def use_loss(
    model: Model, criterion: Callable[[Tensor, Tensor], Tensor] | None = None, *, auxiliary_weight: float | None = None
) -> Model:
    """Let a model compute its loss from the logits of its heads, which are never upsampled for it.

    Called with `labels`, the model returns `criterion(logits, labels)` as its loss, plus the weighted one of its
    auxiliary head where it has one; everything else is as before. The model itself is changed, by hooks, and returned.

    Args:
        model: `<Name>ForSemanticSegmentation` of transformers, of two labels and more.
        criterion: of logits [N, C, h, w] and labels int64 [N, H, W]: a loss of `bcmfnet.nn`. None is cross-entropy
            with the model's ignore index: the same loss as the model's own, up to rounding.
        auxiliary_weight: of the auxiliary head's loss; None is the model's own.

    Raises:
        TypeError: a model without such a head.
        ValueError: a model of one label, which is trained by another loss; one that computes a loss by this already.
    """
    config = getattr(model, "config", None)
    names = [name for name in HEADS if isinstance(getattr(model, name, None), nn.Module)]
    if config is None or not names:
        expected = "a ...ForSemanticSegmentation of transformers"
        raise TypeError(f"model: expected {expected}, got {type(model).__name__}, which has no {' or '.join(HEADS)}")
    if config.num_labels < 2:
        raise ValueError(f"model: expected two labels or more, got {config.num_labels}")
    if hasattr(model, "_bcmfnet_loss"):
        raise ValueError("model: expected one whose loss is its own, got one that use_loss has changed")
    if criterion is None:
        ignore = getattr(config, "semantic_loss_ignore_index", None)
        criterion = UpsampledCrossEntropy(config.loss_ignore_index if ignore is None else ignore)
    if auxiliary_weight is None:
        auxiliary_weight = getattr(config, "auxiliary_loss_weight", 0.0)
    loss = _Loss(criterion, auxiliary_weight)
    model._bcmfnet_loss = loss  # a module: moved with the model, and no part of its state dict
    model.register_forward_pre_hook(loss.take_labels, with_kwargs=True, prepend=True)
    getattr(model, names[0]).register_forward_hook(loss.take_logits)
    if getattr(model, AUXILIARY, None) is not None:
        getattr(model, AUXILIARY).register_forward_hook(loss.take_auxiliary)
    model.register_forward_hook(loss.give_loss, with_kwargs=True)
    return model


class _Loss(nn.Module):
    """What the hooks of a model share during a call."""

    def __init__(self, criterion: Callable[[Tensor, Tensor], Tensor], auxiliary_weight: float) -> None:
        super().__init__()
        self.criterion, self.auxiliary_weight = criterion, auxiliary_weight
        self.labels: Tensor | None = None
        self.logits: Tensor | None = None
        self.auxiliary: Tensor | None = None

    def take_labels(self, model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        self.labels = keywords.pop("labels", None)
        place = list(inspect.signature(model.forward).parameters).index("labels")
        if place < len(arguments):
            self.labels = arguments[place]
            arguments = (*arguments[:place], None, *arguments[place + 1 :])
        return arguments, keywords

    def take_logits(self, head: nn.Module, arguments: Any, logits: Tensor) -> None:
        self.logits = logits

    def take_auxiliary(self, head: nn.Module, arguments: Any, logits: Tensor) -> None:
        self.auxiliary = logits

    def give_loss(self, model: nn.Module, arguments: Any, keywords: Any, output: Any) -> Any:
        labels, logits, auxiliary = self.labels, self.logits, self.auxiliary
        self.labels = self.logits = self.auxiliary = None
        if labels is None or logits is None:
            return output
        loss = self.criterion(logits, labels)
        if auxiliary is not None and self.auxiliary_weight != 0:
            loss = loss + self.auxiliary_weight * self.criterion(auxiliary, labels)
        if isinstance(output, tuple):
            return (loss, *output)
        return type(output)(**{**output, "loss": loss})


def label_maps(outputs: Any, target_sizes: Sequence[tuple[int, int]] | Tensor | None = None) -> list[Tensor]:
    """Label maps of a model's outputs: what the processors' `post_process_semantic_segmentation` gives, off ties.

    Args:
        outputs: with `logits` [N, C, h, w].
        target_sizes: (height, width) of each map; None leaves them at the size of the logits.

    Returns:
        N maps [height, width], uint8 or from 257 classes on int16.

    Raises:
        ValueError: another number of sizes than of outputs.
    """
    logits = outputs.logits
    if target_sizes is None:
        return list(upsample_argmax(logits, logits.shape[-2:]))
    if len(target_sizes) != len(logits):
        raise ValueError(f"target_sizes: expected {len(logits)}, one for each map, got {len(target_sizes)}")
    sizes = [(int(height), int(width)) for height, width in target_sizes]
    return [upsample_argmax(one, size)[0] for one, size in zip(logits.split(1), sizes, strict=True)]
