"""The table op x backend: who can serve an op on a device, and who is chosen."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

BACKENDS = ("cpp", "cuda", "triton", "reference")
"""Native C++, CUDA C++, Triton, and plain PyTorch, which serves every op on every device."""

_chosen: ContextVar[str | None] = ContextVar("bcmfnet_backend", default=None)
_table: dict[tuple[str, str], dict[str, Any]] = {}


def register(op: str, device: str, backend: str, implementation: Any) -> None:
    """Let a backend serve an op on a device type; of several, the one registered first is the default."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    _table.setdefault((op, device), {})[backend] = implementation


def implementation(op: str, device: str) -> Any:
    """What serves an op on a device type. Raises RuntimeError where the requested backend does not."""
    return _table[op, device][choose(op, device)[0]]


def choose(op: str, device: str) -> tuple[str, str]:
    """Name of the backend that serves an op on a device type, and why it is that one."""
    serving = _table[op, device]
    requested, source = _request()
    if requested is None:
        name = next(iter(serving))
        return name, "the only one" if len(serving) == 1 else f"the fastest of {', '.join(serving)}"
    if requested not in serving:
        raise RuntimeError(f"{op} on {device}: {source} asks for {requested!r}; it is served by {', '.join(serving)}")
    return requested, source


def _request() -> tuple[str | None, str]:
    if _chosen.get() is not None:
        return _chosen.get(), "use_backend"
    name = os.environ.get("BCMFNET_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"BCMFNET_BACKEND: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name, "BCMFNET_BACKEND"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve the ops called inside from one backend. Raises ValueError for an unknown name."""
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def describe() -> list[dict[str, str]]:
    """A row for each op and device: which backend serves it and why, for `bcmfnet env`."""
    rows = []
    for op, device in sorted(_table):
        try:
            backend, reason = choose(op, device)
        except (RuntimeError, ValueError) as error:
            backend, reason = "none", str(error)
        rows.append({"op": op, "device": device, "backend": backend, "reason": reason})
    return rows
