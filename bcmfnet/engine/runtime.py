"""The device, its mixed precision, and what a run can be interrupted by."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import torch

from bcmfnet.data.workers import STOP_SIGNALS
from bcmfnet.engine.distributed import ALONE, Processes
from bcmfnet.errors import ConfigError

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str, processes: Processes = ALONE) -> torch.device:
    """Device of a name: `auto` is the GPU where there is one, of several processes each has its own.

    Raises ConfigError for one that is not here, and where the launcher started more processes than the caller can use.
    """
    started = os.environ.get("WORLD_SIZE", "1")
    if started != str(processes.count):
        raise ConfigError(f"WORLD_SIZE: expected one process, got {started}; start it without torchrun")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if processes.count > 1 and device.type == "cuda":
        if device.index is not None:
            raise ConfigError(f"device: expected auto, cpu or cuda with {processes.count} processes, got {name!r}")
        device = torch.device("cuda", processes.local_rank)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        expected = f"cuda:0 to cuda:{count - 1}" if count else "auto or cpu, there is no CUDA device here"
        raise ConfigError(f"device: expected {expected}, got {name!r}")
    return device


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the device has bfloat16 arithmetic of its own, so that mixed precision is faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def resolve_amp(name: str, device: torch.device) -> torch.dtype | None:
    """dtype of mixed precision, None for float32 throughout. `auto` is bf16 where the device computes in it."""
    if name == "off":
        return None
    if name == "auto":
        return torch.bfloat16 if computes_in_bf16(device) else None
    if name == "fp16" and device.type == "cpu":
        raise ConfigError("amp: expected bf16 or off on a CPU, got 'fp16'")
    return AMP_DTYPES[name]


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Mixed precision for the code inside; nothing where dtype is None."""
    return torch.autocast(device.type, dtype=dtype) if dtype is not None else contextlib.nullcontext()


@contextlib.contextmanager
def only_deterministic(wanted: bool) -> Iterator[None]:
    """Let torch use deterministic algorithms alone for the code inside, where that is wanted."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first called
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark


class Interrupted(Exception):
    """A run that was stopped by a signal after it had saved its state; `exit_code` is 130 or 143."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StopRequest:
    """True once a signal of STOP_SIGNALS has come; a second SIGINT interrupts at once.

    Of several processes each receives signals, but all have to stop at the same step: there it is true from the next
    `agree` on, which all of them call.
    """

    def __init__(self, processes: Processes = ALONE) -> None:
        self.signal: signal.Signals | None = None
        self.processes = processes
        self._received = 0
        self._held = self._pending = False

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        return 130 if self.signal is signal.SIGINT else 143

    def handle(self, number: int, frame: FrameType | None) -> None:
        if not self._received:
            self._received = number
            if self.processes.count == 1:
                self.signal = signal.Signals(number)
        elif number == signal.SIGINT:
            self._pending = True
            self._interrupt()

    def agree(self) -> None:
        """Take up what any of the processes has received."""
        if self.signal is None and (number := self.processes.largest(self._received)):
            self.signal = signal.Signals(number)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Put a KeyboardInterrupt off to the end of the code inside, which is done whole or not at all."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        self._interrupt()

    def _interrupt(self) -> None:
        if self._pending and not self._held:
            self._pending = False
            raise KeyboardInterrupt


@contextlib.contextmanager
def stop_on_signals(processes: Processes = ALONE) -> Iterator[StopRequest]:
    """Turn the first signal of STOP_SIGNALS into a request that the loop reads between two steps.

    Outside the main thread Python hands out no signals: there the request is never set. SIGHUP stays ignored where
    it is, since that is what nohup asks for.
    """
    request = StopRequest(processes)
    previous = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        if hasattr(signal, "SIGHUP") and previous.get(signal.SIGHUP) is signal.SIG_IGN:
            del previous[signal.SIGHUP]
    for number in previous:
        signal.signal(number, request.handle)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
