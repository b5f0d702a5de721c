"""One test for every backend that can run here, and outputs that show what a kernel left unwritten."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cuda_on_cpu.native import native
from sass import triton_driver
from sass.native import native as machine_code

from bcmfnet.ops import backends

KERNELS = [("cuda", "cuda"), ("cuda", "triton")]
SERVED = [
    ("cpu", "cpp"),
    ("cpu", "cuda"),  # the CUDA sources, executed by tests/cuda_on_cpu
    pytest.param(("cpu", "sass"), marks=pytest.mark.exhaustive),  # what nvcc makes of them, executed by tests/sass
    ("cpu", "triton"),  # interpreted or, with TRITON_INTERPRET=0, what Triton compiles, executed by tests/sass
    ("cpu", "reference"),
    *(pytest.param(pair, marks=pytest.mark.gpu) for pair in [*KERNELS, ("cuda", "reference")]),
]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What hardly depends on the backend is exhaustive but for the first one."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("any_backend") and item.callspec.params["device"] != SERVED[0]:
            item.add_marker("exhaustive")


@pytest.fixture(params=SERVED, ids="-".join)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A device whose op, of the test's module or of its example, is served by one backend."""
    yield from serve(op_of(request), *request.param, monkeypatch)


@pytest.fixture(params=KERNELS, ids="-".join)
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The kernels on a GPU alone."""
    yield from serve(op_of(request), *request.param, monkeypatch)


def op_of(request: pytest.FixtureRequest) -> str:
    return getattr(request.module, "OP", None) or request.getfixturevalue("example").op


def serve(op: str, device: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(backends, "_table", {key: dict(row) for key, row in backends._table.items()})
    backend, executed = ("cuda", machine_code) if backend == "sass" else (backend, native)
    if backend not in backends._table[op, "cpu" if backend == "cpp" else "cuda"]:
        pytest.skip(f"{op} has no {backend} kernel")
    if (device, backend) == ("cpu", "cuda"):
        backends.register(op, device, backend, executed())
    if (device, backend) == ("cpu", "triton") and backends.no_interpreter() and not torch.cuda.is_available():
        triton_driver.install()
        backends.register(op, device, backend, backends._table[op, "cuda"]["triton"].implementation)
    reason = backends._table[op, device][backend].unavailable()
    if reason is not None:
        pytest.skip(f"{backend} on {device}: {reason}")
    with backends.use_backend(backend):
        yield device


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty, torch.empty_like and new_empty return NaN, or the largest integer."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


def filled(empty: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def fill(*args: Any, **options: Any) -> torch.Tensor:
        result = empty(*args, **options)
        return result.fill_(float("nan") if result.is_floating_point() else torch.iinfo(result.dtype).max)

    return fill


@pytest.fixture
def at_level() -> Callable[[str, str, str], None]:
    """Run code that tests an op in C++, at a level of instruction sets of this processor.

    A level that it lacks is not chosen: that repeats a lower one.
    """

    def run(level: str, op: str, code: str) -> None:
        if "cpp" not in backends.available(op, "cpu"):
            pytest.skip(backends.choose(op, "cpu")[1])
        paths = os.pathsep.join([os.path.dirname(__file__), *sys.path])
        environment = {**os.environ, "BCMFNET_CPU_LEVEL": level, "PYTHONPATH": paths}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    return run
