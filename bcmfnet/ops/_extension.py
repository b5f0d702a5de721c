"""The native library: loaded where it was built, and the reason where it was not."""

from __future__ import annotations

import ctypes
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).parents[1]


@cache
def load() -> str | None:
    """Load the native library once; None when it is there, else the reason why it is not."""
    library = PACKAGE / "_C.so"
    if not library.exists():
        return _why_not_built()
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"cannot be loaded: {error}"
    return None


@cache
def load_cuda() -> str | None:
    """Load the native library; None when it has CUDA kernels, else the reason why they are not there."""
    reason = load()
    if reason or _build_info()["cuda"]:
        return reason
    return f"built without CUDA: {_record().get('cuda') or 'no reason is recorded'}"


def _why_not_built() -> str:
    reason = _record().get("reason")
    return f"not built: {reason}" if reason else "not built: this is a source tree that was not installed"


def _record() -> dict[str, Any]:
    """What setup.py wrote down: why there is no library, or why CUDA kernels are missing in it."""
    record = PACKAGE / "_build.json"
    return json.loads(record.read_text()) if record.exists() else {}


def describe() -> dict[str, Any]:
    """Whether the library is there, the reason if it is not, what it was built with and without, for `bcmfnet env`."""
    reason = load()
    if reason is not None:
        return {"loaded": False, "reason": reason, "build": None}
    return {"loaded": True, "reason": None, "build": _build_info() | {"without": _record().get("cuda")}}


def _build_info() -> dict[str, Any]:
    build_info = ctypes.CDLL(str(PACKAGE / "_C.so")).bcmfnet_build_info
    build_info.restype = ctypes.c_char_p
    return json.loads(build_info())
