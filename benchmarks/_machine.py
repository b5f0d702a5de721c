"""Where and with what a row was measured."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import date
from importlib import metadata
from pathlib import Path

import torch

from bcmfnet.ops import _cpu, _extension

FOLDER = Path(__file__).resolve().parent


def describe(device: torch.device) -> dict[str, str | None]:
    """Machine, its vector or CUDA capability, commit, date and versions, by column."""
    build = _extension.describe()["build"] or {}
    return {
        "machine": _model_name() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "capability": _capability(device),
        "commit": os.environ.get("BCMFNET_COMMIT") or commit(FOLDER),  # a copy of the sources is told its commit
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "compiler": build.get("compiler"),
        "cuda": torch.version.cuda,
    }


def slug(machine: str) -> str:
    """Name of a machine as a file name: NVIDIA H200 -> nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", machine.lower())).strip("-")


def commit(folder: Path) -> str | None:
    """Commit of the checkout that a folder lies directly in, "+dirty" where sources differ; None outside of one.

    An installed copy may lie inside some other project's checkout, whose commit would say nothing.
    """
    if _git(folder, "rev-parse", "--show-toplevel") != str(folder.parent):
        return None
    dirty = _git(folder.parent, "status", "--porcelain", "--", ".", f":!{folder.name}/results")
    return f"{_git(folder, 'rev-parse', 'HEAD')}{'+dirty' if dirty else ''}"


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _model_name() -> str:
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model.group(1) if model else platform.processor() or platform.machine()


def _capability(device: torch.device) -> str:
    """Vectors of a CPU and what it has for bfloat16, AVX512+AVX512_BF16+AMX; architecture of a GPU, sm_90."""
    if device.type == "cpu":
        extensions = [name.upper() for name in ("avx512_bf16", "amx") if name in _cpu.features()]
        return "+".join([torch.backends.cpu.get_cpu_capability(), *extensions])
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
