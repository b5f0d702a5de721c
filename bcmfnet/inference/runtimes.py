"""Optional runtimes for the convolutions on a CPU: ONNX Runtime and OpenVINO, imported when they are asked for."""

from __future__ import annotations

import ctypes
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bcmfnet.inference.quantization import quantized

SIZES = 4
"""Sizes of which the converted network is kept; to convert it takes seconds."""

Pass = Callable[[Tensor], Tensor]


class RuntimeFacts(NamedTuple):
    """What a runtime computes in, and the packages that it and its conversion need."""

    dtypes: tuple[torch.dtype, ...]
    packages: tuple[str, ...]


RUNTIMES = {
    "onnxruntime": RuntimeFacts((torch.float32,), ("onnxruntime", "onnx", "onnxscript")),
    "openvino": RuntimeFacts((torch.float32, torch.bfloat16), ("openvino",)),
}


def check_runtime(name: str, dtype: torch.dtype) -> None:
    """Raise ValueError for a dtype that the runtime lacks, ImportError where it is not installed."""
    dtypes, packages = RUNTIMES[name]
    if dtype not in dtypes:
        raise ValueError(f"dtype: expected {' or '.join(map(str, dtypes))} with runtime={name!r}, got {dtype}")
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ImportError(f"runtime: {name!r} needs {', '.join(missing)}: pip install {' '.join(missing)}")


class Runtime:
    """A network's pass through a runtime; it converts the network once for each size and number of threads.

    With images for the ranges of its maps, which OpenVINO alone takes, the network is quantised, once for all sizes.
    """

    def __init__(self, name: str, network: nn.Module, dtype: torch.dtype, images: Sequence[Tensor] | None = None):
        convert = {"onnxruntime": _onnxruntime, "openvino": _openvino}[name]
        if images is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # as below
                convert = _quantized_openvino(network, images)

        def converted(shape: torch.Size, threads: int) -> Pass:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # tracing warns that sizes become constants, which is what is wanted
                return convert(network, torch.zeros(shape), dtype, threads)

        self._pass = lru_cache(SIZES)(converted)

    def __call__(self, images: Tensor) -> Tensor:
        return self._pass(images.shape, torch.get_num_threads())(images.detach().float().contiguous())


def _onnxruntime(network: nn.Module, images: Tensor, dtype: torch.dtype, threads: int) -> Pass:
    program = torch.onnx.export(network, (images,), dynamo=True, verbose=False)
    assert program is not None  # torch.onnx.export gives one with dynamo
    return run_onnx(program.model_proto.SerializeToString(), threads)[1]


def run_onnx(model: bytes | str, threads: int) -> tuple[dict[str, str], Pass]:
    """The metadata of an ONNX model, or of the file at a path, and its pass."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    metadata = session.get_modelmeta().custom_metadata_map
    return metadata, lambda images: torch.from_numpy(session.run(None, {entry.name: images.numpy()})[0])


def _openvino(network: nn.Module, images: Tensor, dtype: torch.dtype, threads: int) -> Pass:
    import openvino

    return run_openvino(openvino.convert_model(network, example_input=images, input=list(images.shape)), dtype, threads)


def _quantized_openvino(network: nn.Module, images: Sequence[Tensor]) -> Callable[..., Pass]:
    """What converts the network once more for a size, in int8."""
    import openvino

    model = quantized(openvino.convert_model(network, example_input=images[0], input=[-1, 3, -1, -1]), images)

    def convert(network: nn.Module, images: Tensor, dtype: torch.dtype, threads: int) -> Pass:
        of_size = model.clone()
        of_size.reshape(list(images.shape))
        return run_openvino(of_size, dtype, threads)

    return convert


def run_openvino(model: Any, dtype: torch.dtype, threads: int) -> Pass:
    """The pass of an openvino.Model, computed in a dtype."""
    import openvino

    options = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
    }
    with keeping_the_signal_stack():
        request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()

    def run(images: Tensor) -> Tensor:
        request.infer({0: images.numpy()}, share_inputs=True)
        return torch.from_numpy(request.get_output_tensor(0).data).clone()  # the next call writes over it

    return run


class SignalStack(ctypes.Structure):
    """The memory that a thread's signal handlers run on: `stack_t` of sigaltstack(2) on Linux."""

    _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

    @classmethod
    def current(cls) -> SignalStack:
        stack = cls()
        ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack))
        return stack


@contextmanager
def keeping_the_signal_stack() -> Iterator[None]:
    """Give the thread its signal stack back.

    Each network that OpenVINO compiles gives the thread one of its own, and on its end the one from before. Networks
    that end in another order leave one that is gone: the next Ctrl-C, or the end of a child process, is then a
    segmentation fault.
    """
    if sys.platform != "linux":
        yield
        return
    before = SignalStack.current()
    try:
        yield
    finally:
        ctypes.CDLL(None).sigaltstack(ctypes.byref(before), None)
