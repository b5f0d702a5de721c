"""The native library: loaded where it was built, and the reason where it was not."""

from __future__ import annotations

import ctypes
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bcmfnet.ops import _cpu

PACKAGE = Path(__file__).parents[1]


@cache
def load() -> str | None:
    """Load the native library once; None when it is there, else the reason why it is not.

    Raises ValueError for an unknown BCMFNET_CPU_LEVEL.
    """
    library = PACKAGE / "_C.so"
    if not library.exists():
        return _why_not_built()
    _cpu.level()  # an unknown name would be no limit
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"cannot be loaded: {error}"
    return None


@cache
def load_cuda() -> str | None:
    """Load the native library; None when its CUDA kernels run on every card here, else the reason why they do not."""
    if reason := load():
        return reason
    built = _build_info()["cuda"]
    if not built:
        return f"built without CUDA: {_record().get('cuda') or 'no reason is recorded'}"
    _, _, architectures = built.partition(" for ")
    for card in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(card)
        if not any(_runs_on(capability, architecture) for architecture in architectures.split()):
            name = torch.cuda.get_device_name(card)
            return f"built for {architectures}, not for {name} ({'.'.join(map(str, capability))})"
    return None


def _runs_on(capability: tuple[int, int], architecture: str) -> bool:
    """Whether code for an architecture, such as 8.0, 9.0a or 12.0+PTX, runs on a card.

    Machine code runs on later cards of its generation, PTX on all later ones, what ends on a letter on its own alone.
    """
    number, _, ptx = architecture.partition("+")
    major, minor = number.rstrip("af").split(".")
    built = int(major), int(minor)
    if number.endswith("a"):
        return capability == built
    return capability >= built and (capability[0] == built[0] or (bool(ptx) and not number.endswith("f")))


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
