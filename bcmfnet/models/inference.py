"""The fastest way from a frame to a label map: what `model.for_inference` returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bcmfnet.models.cuda_graphs import CUDAGraphs
from bcmfnet.models.ddrnet import DualResolutionNet, check_images
from bcmfnet.models.engines import ENGINES, Engine, check_engine
from bcmfnet.models.folding import folded, fused, packed
from bcmfnet.ops import _options
from bcmfnet.ops.upsample_argmax import upsample_argmax

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MEMORY_FORMATS = (torch.channels_last, torch.contiguous_format)
OUTPUTS = ("labels", "logits")


class InferenceNetwork(nn.Module):
    """A trained network's copy that does nothing but inference; see `DualResolutionNet.for_inference`.

    It stays in evaluation mode and has no gradients. Its copies and pickles compile, capture and convert anew.
    """

    def __init__(
        self,
        model: DualResolutionNet,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        compile: bool,
        cuda_graph: bool | None,
        engine: str | None,
        output: str,
    ):
        super().__init__()
        device = next(model.parameters()).device
        _options.choice("dtype", dtype, DTYPES)
        _options.choice("memory_format", memory_format, MEMORY_FORMATS)
        compile = _options.boolean("compile", compile)
        cuda_graph = None if cuda_graph is None else _options.boolean("cuda_graph", cuda_graph)
        engine = _options.choice("engine", engine, (None, *ENGINES))
        output = _options.choice("output", output, OUTPUTS)
        _check_together(device, dtype, compile, cuda_graph, engine)
        self.compile_network, self.cuda_graph, self.engine, self.output = compile, cuda_graph, engine, output
        self.dtype, self.memory_format = dtype, memory_format
        if engine is not None:
            self.network = folded(model, torch.float32, torch.contiguous_format)
        else:
            self.network = packed(folded(model, dtype, memory_format), dtype)
            if not compile:
                fused(self.network)
        super().train(False)
        self._prepare()

    def _prepare(self) -> None:
        """Make what is no state: the compiled network or the engine's, and the CUDA graphs."""
        self._logits: Callable[[Tensor], Tensor] = self.network.forward
        if self.engine is not None:
            self._logits = Engine(self.engine, self.network, self.dtype)
        elif self.compile_network:
            self._logits = torch.compile(self.network.forward, dynamic=False)
        self._graphs = None
        if self.device.type == "cuda" and self.cuda_graph is not False:
            self._graphs = CUDAGraphs(self._compute, self.dtype, self.memory_format, at_once=self.cuda_graph is True)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @torch.no_grad()
    def forward(self, frames: Tensor) -> Tensor:
        """Normalised float frames [N, 3, H, W] to labels uint8 [N, H, W], or to logits at 1/8.

        Raises:
            ValueError: frames of another shape, dtype or device.
        """
        check_images(frames, "frames")
        if frames.device != self.device:
            raise ValueError(f"frames: expected them on {self.device}, got {frames.device}")
        return self._compute(frames) if self._graphs is None else self._graphs(frames)

    def _compute(self, frames: Tensor) -> Tensor:
        logits = self._logits(frames)
        return logits if self.output == "logits" else upsample_argmax(logits, frames.shape[-2:])

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
    device: torch.device, dtype: torch.dtype, compile: bool, cuda_graph: bool | None, engine: str | None
) -> None:
    if dtype == torch.float16 and device.type == "cpu":
        raise ValueError("dtype: expected torch.float32 or torch.bfloat16 on a CPU, got torch.float16, which is slower")
    if cuda_graph and device.type != "cuda":
        raise ValueError(f"cuda_graph: expected a model on a CUDA device, got one on {device}")
    if engine is not None:
        if compile:
            raise ValueError(f"compile: expected False with an engine, got True and engine={engine!r}")
        if device.type != "cpu":
            raise ValueError(f"engine: expected a model on the CPU, got one on {device}")
        check_engine(engine, dtype)
