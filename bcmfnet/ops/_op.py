"""The contract of an op: what is decided once for all of them.

An op has a schema, `outputs`, and a kernel of every backend. `outputs` allocates the results, and on fake tensors fakes
them. A kernel is called with the inputs and the outputs, and writes into the latter. Every backend has it by one name:
it is the private op `_<kernel>` of the native library, a launcher in `bcmfnet.kernels.<op>`, and the reference.

float64 is served by the reference, which runs outside of autocast. Without an output element no kernel is called.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from bcmfnet.ops import _direct, _extension, backends
from bcmfnet.ops._library import NAMESPACE, OPS

LIBRARY = torch.library.Library(NAMESPACE, "DEF")
EVERY_DEVICE = "CompositeExplicitAutograd"
"""Dispatch key under which ops are registered: of a device type without kernels plain PyTorch serves them."""

Kernel = Callable[..., Any]
Results = Tensor | tuple[Any, ...]
"""Tensors; one that a call has no use for is None, but for the first."""
Unpack = Callable[..., tuple[Any, ...]]


def native(library: str = NAMESPACE) -> Callable[[str], Kernel]:
    """Kernels of a native library by name; `library` is the namespace of its private ops."""
    return cache(lambda kernel: getattr(getattr(torch.ops, library), f"_{kernel}").default)


def _call(kernel: Kernel, *arguments: Any) -> None:
    kernel(*arguments)


class Op:
    """An op by its stem, registered for every backend, the fastest first."""

    def __init__(self, stem: str) -> None:
        self.stem = stem
        self._in_python: dict[str, tuple[Kernel, Unpack]] = {}  # the reference of a kernel, and `unpack`
        self.reference, triton = cache(self._find_reference), cache(self._find_triton)
        backends.register(stem, "cpu", "cpp", native(), _extension.load)
        backends.register(stem, "cpu", "reference", self.reference)
        backends.register(stem, "cpu", "triton", triton, backends.no_interpreter)
        backends.register(stem, "cuda", "cuda", native(), _extension.load_cuda)
        backends.register(stem, "cuda", "triton", triton, backends.no_triton)
        backends.register(stem, "cuda", "reference", self.reference)

    def define(
        self,
        schema: str,
        *,
        outputs: Callable[..., Results],
        reference: Kernel,
        kernel: str | None = None,
        run: Callable[..., None] = _call,
        unpack: Unpack = lambda *arguments: arguments,
        setup_context: Callable[..., None] | None = None,
        differentiate: Callable[..., Any] | None = None,
    ) -> Callable[..., Any]:
        """Define a torch op of a schema, and return a function that calls it.

        Args:
            outputs: allocates the results of some inputs; the first of them says whether there is anything to write.
            reference: the kernel in plain PyTorch.
            kernel: name of the kernel, where it is not that of the torch op.
            run: calls the kernel, its first argument, with the inputs and outputs, where the kernel takes others.
            unpack: arguments of the native kernel as the reference and Triton take them.
            setup_context, differentiate: as in `torch.library.register_autograd`.
        """
        name = schema.partition("(")[0]
        key = kernel or name
        self._in_python[key] = reference, unpack

        def serve(*inputs: Any) -> Results:
            results = outputs(*inputs)
            written = (results,) if isinstance(results, Tensor) else results
            if written[0].numel():
                run(self.kernel(key, inputs[0]), *inputs, *written)
            return results

        LIBRARY.define(schema)
        LIBRARY.impl(name, serve, EVERY_DEVICE)
        torch.library.register_fake(f"{NAMESPACE}::{name}", outputs, lib=LIBRARY)
        overload, direct = getattr(OPS, name).default, serve
        if differentiate is not None:
            torch.library.register_autograd(overload, differentiate, setup_context=setup_context, lib=LIBRARY)
            direct = _direct.differentiable(serve, setup_context, differentiate)
        return lambda *inputs: (direct if _direct.only_autograd_looks_at(inputs) else overload)(*inputs)

    def kernel(self, name: str, tensor: Tensor) -> Kernel:
        """A kernel of the backend that serves a tensor. Raises as `backends.implementation` does."""
        kernels = backends.implementation(self.stem, tensor.device.type)
        return (self.reference if tensor.dtype == torch.float64 else kernels)(name)

    def _find_reference(self, name: str) -> Kernel:
        reference, unpack = self._in_python[name]

        def write(*arguments: Any) -> Any:
            device = arguments[0].device.type
            with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
                return reference(*unpack(*arguments))

        return write

    def _find_triton(self, name: str) -> Kernel:
        """The launcher: it has the kernel's name, or one without the stem."""
        module, (_, unpack) = import_module(f"bcmfnet.kernels.{self.stem}"), self._in_python[name]
        step = name.removeprefix(self.stem).strip("_") or "forward"
        launch = getattr(module, name, None) or getattr(module, step)
        return lambda *arguments: launch(*unpack(*arguments))
