"""Segmentation models of torchvision: in training their logits stay at the resolution of their heads.

from bcmfnet.integrations.torchvision import low_resolution
model = low_resolution(deeplabv3_resnet50(num_classes=19, aux_loss=True))
output = model(images)                                                  # "out" and "aux", at 1/8
loss = criterion(output["out"], labels) + 0.5 * criterion(output["aux"], labels)
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class _LowResolution(nn.Module):
    """What a model's class is joined with."""

    backbone: nn.Module
    classifier: nn.Module

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if not self.training:
            return super().forward(images)
        features = self.backbone(images)
        output = OrderedDict(out=self.classifier(features.get("out", features)))
        if (auxiliary := getattr(self, "aux_classifier", None)) is not None:
            output["aux"] = auxiliary(features["aux"])
        return output


def low_resolution(model: Model) -> Model:
    """Leave out the upsampling of a model's logits in training; in evaluation it is as before.

    The loss upsamples them itself. The model is changed, and returned.

    Args:
        model: FCN, DeepLabV3 or LRASPP of torchvision, which return a dict.

    Raises:
        TypeError: a model that is not made of `backbone` and `classifier`.
    """
    if not all(isinstance(getattr(model, name, None), nn.Module) for name in ("backbone", "classifier")):
        expected = "a segmentation model of torchvision (backbone, classifier)"
        raise TypeError(f"model: expected {expected}, got {type(model).__name__}")
    if not isinstance(model, _LowResolution):
        kind = type(model)
        model.__class__ = type(kind.__name__, (_LowResolution, kind), {"__module__": __name__})
    return model
