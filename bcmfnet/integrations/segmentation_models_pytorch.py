"""Models of segmentation_models_pytorch: in training their logits stay at the resolution of their heads.

from bcmfnet.integrations.segmentation_models_pytorch import low_resolution
model = low_resolution(smp.FPN("resnet34", classes=19))                 # logits at 1/4
loss = SegmentationLoss(ce=1, dice=1, align_corners=True)(model(images), labels)
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class _InEvaluation(nn.Module):
    """A module that computes in evaluation alone."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else self.module(x)


def low_resolution(model: Model) -> Model:
    """Leave out the upsampling at the end of a model in training; in evaluation it is as before.

    The loss upsamples the logits itself, with align_corners=True as these models do. The model is changed, and
    returned; its state dict stays what it was.

    Args:
        model: of segmentation_models_pytorch, without an activation at its end. Those whose decoders end at the
            resolution of the images, such as Unet, have nothing to leave out and are returned as they are.

    Raises:
        TypeError: a model without a segmentation head of that library.
        ValueError: a model that ends in an activation: losses take logits.
    """
    head = getattr(model, "segmentation_head", None)
    if not (isinstance(head, nn.Sequential) and len(head) == 3):
        expected = "a model of segmentation_models_pytorch (segmentation_head)"
        raise TypeError(f"model: expected {expected}, got {type(model).__name__}")
    _, upsampling, activation = head
    if not isinstance(getattr(activation, "activation", activation), nn.Identity):
        name = type(getattr(activation, "activation", activation)).__name__
        raise ValueError(f"model: expected activation=None, whose output is logits, got {name}")
    if isinstance(upsampling, nn.Upsample):
        head[1] = _InEvaluation(upsampling).train(upsampling.training)
    return model
