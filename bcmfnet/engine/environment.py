"""What this installation is made of: versions, devices, the native library, and which backend serves each op."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import torch

import bcmfnet
from bcmfnet.engine.runtime import computes_in_bf16
from bcmfnet.ops import _extension, backends

PACKAGES = ("torch", "triton", "numpy", "opencv-python-headless", "safetensors", "cyclopts", "matplotlib")


def describe_environment() -> dict[str, Any]:
    """Versions, devices, native build and backends, as plain values for JSON."""
    return {
        "bcmfnet": bcmfnet.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": _cpu(),
        "cuda": _cuda(),
        "native": _extension.describe(),
        "backends": _backends(),
    }


def _backends() -> list[dict[str, str]]:
    """`backends.describe`, in which nothing serves a device that is not here."""
    here = {"cpu"} | ({"cuda"} if torch.cuda.is_available() else set())
    absent = {"backend": "none", "reason": "no CUDA device"}
    return [row if row["device"] in here else row | absent for row in backends.describe()]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bf16": computes_in_bf16(torch.device("cpu")),
    }


def _cuda() -> dict[str, Any]:
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"torch_built_with": torch.version.cuda, "devices": devices}
