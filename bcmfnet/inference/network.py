"""The fastest way from a frame to a label map: a copy of a trained network that does nothing but inference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bcmfnet.data.transforms import normalize
from bcmfnet.inference.cuda_graphs import CUDAGraphs
from bcmfnet.inference.folding import folded, fused, with_context_op
from bcmfnet.inference.quantization import check_quantization
from bcmfnet.inference.runtimes import RUNTIMES, Runtime, check_runtime
from bcmfnet.models.ddrnet import DualResolutionNet, check_images
from bcmfnet.ops import _options, upsample_argmax

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MEMORY_FORMATS = (torch.channels_last, torch.contiguous_format)
OUTPUTS = ("labels", "logits")


def for_inference(
    model: DualResolutionNet,
    *,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
    compile: bool = False,
    cuda_graph: bool | None = None,
    runtime: str | None = None,
    output: str = "labels",
    quantized: Sequence[Tensor] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> InferenceNetwork:
    """A copy that goes from images to label maps as fast as it can; the model is left as it is.

    Batch norms are folded into the convolutions before them, which also do the sums and ReLUs that follow. The
    copy takes images as the model does, float32 [N, 3, H, W] of any size >= 64, normalised as in training, or with
    `mean` and `std` as cameras give them, and gives uint8 [N, H, W] labels of their size. It is for the device that the
    model is on.

    Args:
        dtype: of weights and maps: float32, bfloat16, or on a GPU float16. With float32 labels differ from the
            model's at rounding ties alone.
        memory_format: of the maps: channels_last or contiguous_format.
        compile: pass the folded network through torch.compile, anew for each size.
        cuda_graph: replay each size from a CUDA graph; the last four sizes are kept. None: on a GPU from the
            second frame of a size on. True: from the first, and cuDNN times its algorithms for each new size, which
            takes seconds; what it has chosen without timing, it keeps. The result is never written over by a later
            call.
        runtime: what computes the convolutions on a CPU: None, "onnxruntime" (float32) or "openvino" (float32,
            bfloat16). A runtime converts the network for each size and number of threads, which takes seconds.
        output: "labels", or "logits" at 1/8 [N, classes, ceil(H / 8), ceil(W / 8)], float32 from a runtime, else
            in `dtype`.
        quantized: images as the copy takes them, [1, 3, H, W], some tens of them from what it will be used
            on: with runtime="openvino" NNCF quantises the network to int8, by the ranges that its maps have on these.
            Labels then differ from the model's by more than rounding. `dtype` is that of what stays in floating point.
        mean, std: three numbers each, of RGB in 0..1 (a weights file of ours has those of its training): the copy takes
            uint8 images, which its first convolution normalises as it reads them.

    Raises:
        TypeError, ValueError: an unknown value, or values that do not go together.
        ImportError: a runtime, or NNCF, that is not installed.
    """
    return InferenceNetwork(model, dtype, memory_format, compile, cuda_graph, runtime, output, quantized, mean, std)


class InferenceNetwork(nn.Module):
    """What `for_inference` returns.

    It stays in evaluation mode and has no gradients. Its copies and pickles compile, capture and convert anew.
    """

    def __init__(
        self,
        model: DualResolutionNet,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        compile: bool,
        cuda_graph: bool | None,
        runtime: str | None,
        output: str,
        quantized: Sequence[Tensor] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        super().__init__()
        device = next(model.parameters()).device
        _options.choice("dtype", dtype, DTYPES)
        _options.choice("memory_format", memory_format, MEMORY_FORMATS)
        compile = _options.boolean("compile", compile)
        cuda_graph = None if cuda_graph is None else _options.boolean("cuda_graph", cuda_graph)
        runtime = _options.choice("runtime", runtime, (None, *RUNTIMES))
        output = _options.choice("output", output, OUTPUTS)
        _check_together(device, dtype, compile, cuda_graph, runtime)
        given = mean is not None or std is not None
        self.normalization = _options.normalization(mean, std) if given else None
        if quantized is not None:
            _check_quantized(runtime, quantized, as_bytes=given)
        self.compile_network, self.cuda_graph, self.runtime, self.output = compile, cuda_graph, runtime, output
        self.dtype, self.memory_format, self.quantized = dtype, memory_format, quantized
        if runtime is not None:
            self.network = folded(model, torch.float32, torch.contiguous_format)
        else:
            self.network = with_context_op(folded(model, dtype, memory_format), dtype)
            if not compile:
                fused(self.network, self.normalization)
        super().train(False)
        self._prepare()

    def _prepare(self) -> None:
        """Make what is no state: the compiled network or the runtime's, and the CUDA graphs."""
        self._logits: Callable[[Tensor], Tensor] = self.network.forward
        if self.runtime is not None:
            quantized = None if self.quantized is None else [self._normalized(images) for images in self.quantized]
            run = Runtime(self.runtime, self.network, self.dtype, quantized)
            self._logits = lambda images: run(self._normalized(images))
        elif self.compile_network:
            self._logits = torch.compile(lambda images: self.network(self._normalized(images)), dynamic=False)
        self._graphs = None
        if self.device.type == "cuda" and self.cuda_graph is not False:
            dtype = self.dtype if self.normalization is None else torch.uint8
            self._graphs = CUDAGraphs(self._compute, dtype, self.memory_format, at_once=self.cuda_graph is True)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W], float or with `mean` and `std` uint8, to labels uint8 [N, H, W], or to logits at 1/8.

        Raises:
            ValueError: images of another shape, dtype or device.
        """
        self._check(images)
        return self._compute(images) if self._graphs is None else self._graphs(images)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """The logits of such images, at 1/8, whatever the output is; not from a CUDA graph."""
        self._check(images)
        return self._logits(images)

    def _check(self, images: Tensor) -> None:
        check_images(images, as_bytes=self.normalization is not None)
        if images.device != self.device:
            raise ValueError(f"images: expected them on {self.device}, got {images.device}")

    def _normalized(self, images: Tensor) -> Tensor:
        """Images as a network that is not fused takes them."""
        return images if self.normalization is None else normalize(images, *self.normalization)

    def _compute(self, images: Tensor) -> Tensor:
        logits = self._logits(images)
        return logits if self.output == "logits" else upsample_argmax(logits, images.shape[-2:])

    def train(self, mode: bool = True) -> InferenceNetwork:
        """Nothing: its batch norms are constants."""
        return self

    def _apply(self, *arguments: Any, **keywords: Any) -> nn.Module:
        super()._apply(*arguments, **keywords)
        self._prepare()
        return self

    def __getstate__(self) -> dict[str, Any]:
        made = ("_logits", "_graphs")
        return {name: value for name, value in super().__getstate__().items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()


def _check_together(
    device: torch.device, dtype: torch.dtype, compile: bool, cuda_graph: bool | None, runtime: str | None
) -> None:
    if dtype == torch.float16 and device.type == "cpu":
        raise ValueError("dtype: expected torch.float32 or torch.bfloat16 on a CPU, got torch.float16, which is slower")
    if cuda_graph and device.type != "cuda":
        raise ValueError(f"cuda_graph: expected a model on a CUDA device, got one on {device}")
    if runtime is not None:
        if compile:
            raise ValueError(f"compile: expected False with a runtime, got True and runtime={runtime!r}")
        if device.type != "cpu":
            raise ValueError(f"runtime: expected a model on the CPU, got one on {device}")
        check_runtime(runtime, dtype)


def _check_quantized(runtime: str | None, images: Sequence[Tensor], as_bytes: bool) -> None:
    if runtime != "openvino":
        raise ValueError(f"runtime: expected 'openvino' with quantized, got {runtime!r}")
    if not isinstance(images, Sequence) or len(images) == 0:
        raise TypeError(f"quantized: expected a list of images, got {images!r}")
    for image in images:
        check_images(image, "quantized", as_bytes)
        if len(image) != 1:
            raise ValueError(f"quantized: expected images [1, 3, H, W], got one of {list(image.shape)}")
    check_quantization("quantized")
