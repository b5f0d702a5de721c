"""What is exported: images to label maps as one graph of standard operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcmfnet.inference.folding import folded
from bcmfnet.models.ddrnet import DualResolutionNet
from bcmfnet.reference.stem_conv import affine

OUTPUTS = ("labels", "logits")


class DeployedGraph(nn.Module):
    """A trained network folded for inference, between the normalisation of images and the choice of labels.

    Args:
        model: on the CPU; it is left as it is.
        dtype: of weights and maps, float32 or float16. Labels are chosen in float32.
        output: "labels", uint8 [N, H, W], or "logits" at 1/8, float32 [N, C, ceil(H / 8), ceil(W / 8)].
        mean, std: of RGB in 0..1, to take uint8 images; without them images are float32 and normalised already.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        model: DualResolutionNet,
        dtype: torch.dtype = torch.float32,
        output: str = "labels",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.network = folded(model, dtype, torch.contiguous_format)
        self.pools = model.context.pools
        self.output = output
        self.takes_uint8 = False
        if mean is not None and std is not None:
            self.takes_uint8 = True
            for name, values in zip(("scale", "shift"), affine(mean, std), strict=True):
                self.register_buffer(name, torch.tensor(values).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """RGB [N, 3, H, W], uint8 or normalised float32, to the output."""
        size = images.shape[-2:]
        if self.takes_uint8:
            images = images.float() * self.scale + self.shift
        logits = self.network(images).float()
        if self.output == "logits":
            return logits
        upsampled = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return upsampled.argmax(1).to(torch.uint8)
