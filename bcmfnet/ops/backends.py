"""The table op x device x backend: who can serve a call, and who is chosen."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

BACKENDS = ("cpp", "cuda", "triton", "reference")
"""Native C++, CUDA C++, Triton, and plain PyTorch, which serves every op on every device."""


class Entry(NamedTuple):
    """What serves an op, and why it cannot in this installation (None: it can)."""

    implementation: Any
    unavailable: Callable[[], str | None]


_chosen: ContextVar[str | None] = ContextVar("bcmfnet_backend", default=None)
_requests: dict[object, str] = {}
"""What `use_backend` is asked for in any thread: one that has no choice of its own takes the last."""
_table: dict[tuple[str, str], dict[str, Entry]] = {}


def register(
    op: str, device: str, backend: str, implementation: Any, unavailable: Callable[[], str | None] = lambda: None
) -> None:
    """Let a backend serve an op on a device type; of those available, the one registered first is the default."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    _table.setdefault((op, device), {})[backend] = Entry(implementation, unavailable)


@cache
def no_triton() -> str | None:
    """Why Triton kernels cannot run on a GPU here."""
    if find_spec("triton") is None:
        return "triton is not installed"
    return "TRITON_INTERPRET is set" if _interpreted() else None


@cache
def no_interpreter() -> str | None:
    """Why Triton kernels cannot run on a CPU here: only the interpreter does that, and slowly."""
    if find_spec("triton") is None:
        return "triton is not installed"
    return None if _interpreted() else "only under TRITON_INTERPRET=1"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def implementation(op: str, device: str) -> Any:
    """What serves an op on a device type. Raises RuntimeError where the requested backend does not.

    The first call that is not served by the fastest backend, though nobody asked for another, warns.
    """
    backend, entry, reason = _chosen_entry(op, device)
    if reason not in ("use_backend", "BCMFNET_BACKEND", "the default"):
        _warn_once(device, backend, reason)
    return entry.implementation


def _entries(op: str, device: str) -> dict[str, Entry]:
    """Who may serve an op on a device type: where nothing was registered for it, plain PyTorch."""
    return _table.get((op, device)) or {"reference": _table[op, "cpu"]["reference"]}


@cache
def _warn_once(device: str, backend: str, reason: str) -> None:
    server = "plain PyTorch, several times slower" if backend == "reference" else backend
    warnings.warn(f"bcmfnet: ops on {device} are served by {server} ({reason}); see `bcmfnet env`", stacklevel=2)


def has_kernel(op: str, device: str) -> bool:
    """Whether more than plain PyTorch serves an op on a device type."""
    return choose(op, device)[0] != "reference"


def choose(op: str, device: str) -> tuple[str, str]:
    """Name of the backend that serves an op on a device type, and why it is that one."""
    backend, _, reason = _chosen_entry(op, device)
    return backend, reason


def _chosen_entry(op: str, device: str) -> tuple[str, Entry, str]:
    requested, source = _request()
    entries = _entries(op, device)
    reasons: dict[str | None, str] = {}
    for name, entry in entries.items():
        if requested in (None, name):
            reason = entry.unavailable()
            if reason is None:
                if requested or not reasons:
                    return name, entry, source if requested else "the default"
                return name, entry, "; ".join([f"{name}: {reason}" for name, reason in reasons.items()])
            reasons[name] = reason
    why = reasons.get(requested) or f"it is served by {', '.join(entries)}"
    raise RuntimeError(f"{op} on {device}: {source} asks for {requested!r}; {why}")


def _request() -> tuple[str | None, str]:
    if _requests:
        return _chosen.get() or next(reversed(_requests.values())), "use_backend"
    name = os.environ.get("BCMFNET_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"BCMFNET_BACKEND: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name, "BCMFNET_BACKEND"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve the ops called inside from one backend, also by threads that are inside no `use_backend` of their own.

    Raises ValueError for an unknown name.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    request, token = object(), _chosen.set(name)
    _requests[request] = name
    try:
        yield
    finally:
        _chosen.reset(token)
        del _requests[request]


def available(op: str, device: str) -> list[str]:
    """Backends that can serve an op on a device type in this installation, the default first."""
    return [name for name, entry in _entries(op, device).items() if entry.unavailable() is None]


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
