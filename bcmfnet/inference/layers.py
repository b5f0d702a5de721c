"""The layers of a network that was rewritten for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bcmfnet.data.transforms import normalize
from bcmfnet.nn.context import PyramidContext
from bcmfnet.ops import PyramidWeights, lmfm, stem_conv

Normalization = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and std of RGB in 0..1."""

STRIP_PIXELS = 2**18
"""Pixels of the image in a strip. At 1024x2048 the map between the stem's convolutions is 32 MiB in bfloat16, and fresh
memory of that size is mapped page by page on every call. One thread: bfloat16 27.5 ms whole, 10 in strips of 128 rows;
float32 57 and 26; strips of 16 rows cost a third more."""


class ConvAddReLU(nn.Module):
    """A convolution, the sum with another map, and a ReLU; the latter two are optional.

    On a CPU that oneDNN serves it is one pass, with weights that are put in oneDNN's order once for each size. On a
    GPU it is one of cuDNN's where there is a ReLU, unless cuDNN has refused it; without a ReLU a 1x1 is a matrix
    product, which adds its bias itself. Elsewhere the sum and the ReLU work in place on the convolution's result.
    """

    def __init__(self, conv: nn.Conv2d, relu: bool):
        super().__init__()
        self.conv = conv
        self.relu = relu
        self._reordered: tuple[torch.Size, Tensor] | None = None
        self._refused = False

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        if _onednn_serves(x) and not _is_one_pixel(other):
            return self._onednn(x, other)
        if self.relu and not self._refused and _cudnn_serves(x):
            try:
                return self._cudnn(x, other)
            except torch.OutOfMemoryError:
                raise
            except (AttributeError, RuntimeError):  # a torch without these ops, or no engine for these operands
                self._refused = True
        y = self._product(x) if self._is_product(x) else self.conv(x)
        if other is not None:
            y += other
        return y.relu_() if self.relu else y

    def _onednn(self, x: Tensor, other: Tensor | None) -> Tensor:
        conv, relu = self.conv, "relu" if self.relu else None
        geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
        reordered = self._reordered  # read once: another thread may put those of another size in its place
        if reordered is None or reordered[0] != x.shape:
            weight = torch.ops.aten.mkldnn_reorder_conv2d_weight(conv.weight.to_mkldnn(), *geometry, x.shape)
            self._reordered = reordered = (x.shape, weight)
        operands = (reordered[1], conv.bias, *geometry)
        convolution = torch.ops.mkldnn._convolution_pointwise
        if other is None:
            return convolution(x, *operands, relu or "none", [], "")
        return convolution.binary(x, other, *operands, "add", 1.0, relu, [], None)

    def _cudnn(self, x: Tensor, other: Tensor | None) -> Tensor:
        conv = self.conv
        geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
        if other is None:
            return torch.ops.aten.cudnn_convolution_relu(x, conv.weight, conv.bias, *geometry)
        return torch.ops.aten.cudnn_convolution_add_relu(x, conv.weight, other, 1.0, conv.bias, *geometry)

    def _is_product(self, x: Tensor) -> bool:
        conv = self.conv
        pointwise = conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.groups == 1 and conv.padding == (0, 0)
        biased = conv.bias is not None and not self.relu
        return pointwise and biased and _cudnn_serves(x) and x.is_contiguous(memory_format=torch.channels_last)

    def _product(self, x: Tensor) -> Tensor:
        pixels = x.permute(0, 2, 3, 1)
        assert self.conv.bias is not None
        y = torch.addmm(self.conv.bias, pixels.flatten(0, 2), self.conv.weight.flatten(1).t())
        return y.view(*pixels.shape[:3], -1).permute(0, 3, 1, 2)

    def _apply(self, *arguments: Any, **keywords: Any) -> nn.Module:
        self._reordered, self._refused = None, False
        return super()._apply(*arguments, **keywords)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reordered": None, "_refused": False}


def _is_one_pixel(other: Tensor | None) -> bool:
    """Whether a map of 1x1 is to be added, which torch 2.11 refuses to do in the convolution."""
    return other is not None and other.shape[2:].numel() == 1


def _cudnn_serves(x: Tensor) -> bool:
    """Whether cuDNN convolves such a map, and nothing traces an op that no other device has."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return x.device.type == "cuda" and torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled


def _onednn_serves(x: Tensor) -> bool:
    """Whether oneDNN convolves such a map faster than torch does without it, and nothing traces its packed weights."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Stem(nn.Module):
    """Images to the maps at 1/4 through two 3x3s of stride 2, in their dtype; on a CPU strip by strip.

    Args:
        memory_format: of the maps.
        normalization: mean and std of uint8 images; None: they are normalised.
        as_op: the first convolution is `stem_conv`, which reads images as they are.
    """

    def __init__(
        self,
        first: ConvAddReLU,
        second: ConvAddReLU,
        memory_format: torch.memory_format,
        normalization: Normalization | None,
        as_op: bool,
    ):
        super().__init__()
        self.first, self.second, self.memory_format = first, second, memory_format
        self.normalization, self.as_op = normalization, as_op

    def forward(self, images: Tensor) -> Tensor:
        batch, _, height, width = images.shape
        strip_by_strip = images.device.type == "cpu" and not torch.compiler.is_compiling()
        step = 4 * max(1, STRIP_PIXELS // (4 * batch * width)) if strip_by_strip else height
        strips = []
        for top in range(0, height, step):
            # Four rows more above give one row at 1/4, which is wrong where zeros stand for the image: it is dropped.
            strip = images[:, :, max(top - 4, 0) : top + step]
            strips.append(self.second(self._convolve(strip))[:, :, min(top, 1) :])
        return strips[0] if len(strips) == 1 else torch.cat(strips, dim=2)

    def _convolve(self, images: Tensor) -> Tensor:
        conv = self.first.conv
        if self.as_op:
            assert conv.bias is not None  # of the batch norm
            return stem_conv(images, conv.weight, conv.bias, *(self.normalization or ()))
        if self.normalization is not None:
            images = normalize(images, *self.normalization)
        return self.first(images.to(conv.weight.dtype, memory_format=self.memory_format))


class ContextOp(nn.Module):
    """A context module as one op, whose weights are put in its order once."""

    def __init__(self, context: PyramidContext, dtype: torch.dtype):
        super().__init__()
        self.names = PyramidWeights._fields[:6]
        *tensors, self.pools, self.kernels, self.receives = context.pyramid_weights(dtype)
        for name, tensor in zip(self.names, tensors, strict=True):
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        tensors = {name: getattr(self, name) for name in self.names}
        return lmfm(x, PyramidWeights(**tensors, pools=self.pools, kernels=self.kernels, receives=self.receives))
