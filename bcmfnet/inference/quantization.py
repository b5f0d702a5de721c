"""Networks of runtimes in int8: NNCF's post-training quantisation, which takes the ranges of the maps from images."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from torch import Tensor


def check_quantization(name: str) -> None:
    """Raise ImportError, which starts with a name, where NNCF is not installed."""
    if find_spec("nncf") is None:
        raise ImportError(f"{name}: int8 needs nncf: pip install nncf")


def quantized(model: Any, images: Sequence[Tensor], name: str | None = None, left: Sequence[str] = ()) -> Any:
    """A model whose convolutions multiply int8 by int8.

    Args:
        model: an openvino.Model or an onnx.ModelProto.
        images: what the model takes, [1, 3, H, W] each: like those that it will be used on.
        name: of an ONNX model's input.
        left: names of nodes that stay as they are.
    """
    os.environ.setdefault("NNCF_CI", "1")  # it would report its use to its makers
    with contextlib.redirect_stdout(sys.stderr):
        import nncf

        nncf.set_log_level(logging.ERROR)
        arrays = [image.contiguous().numpy() for image in images]
        given = nncf.Dataset(arrays if name is None else [{name: array} for array in arrays])
        scope = nncf.IgnoredScope(names=list(left))
        return nncf.quantize(model, given, subset_size=len(arrays), ignored_scope=scope)
