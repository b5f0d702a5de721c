"""The processes of a loader: shielded from signals, watched while a batch is waited for, and gone at its end."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing
import os
import queue
import signal
import sys
import threading
import traceback
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from bcmfnet.errors import DataError

log = logging.getLogger("bcmfnet.data")

STOP_SIGNALS = tuple(
    signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if name in signal.Signals.__members__
)
"""What asks a run to stop, as far as this system has it. The run's own process acts on them, its workers never."""

POLL = 0.2  # seconds from a request to stop, or the death of a worker, to its notice
WARN_AFTER = 30.0  # seconds without a batch
PATIENCE = 600.0  # seconds without a batch; a network file system that comes back takes minutes
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
ADVICE = "where memory is short try fewer --data.workers"
FULL_SHM = (
    "/dev/shm: expected room for the batches of {workers} loader processes, got a full file system; "
    "try --data.workers 0, or docker run --shm-size 1g or --ipc host"
)


def start_worker(worker: int) -> None:
    """Run in a new worker: one thread, no stop signals, and an end with the process that it works for."""
    cv2.setNumThreads(0)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():  # it ended before the line above
            os._exit(1)


class WorkerStream:
    """What a DataLoader with workers gives, received in a thread, so that a wait for a hung worker can be ended.

    The loader's timeout is how often the thread looks whether it is still wanted.
    """

    def __init__(self, loader: DataLoader, patience: float) -> None:
        self.patience = patience
        with _stop_signals_blocked(), _no_worker_left():
            try:
                # Kept here: the workers of a later loader drop what other threads than theirs hold, and an iterator
                # that is dropped ends the workers that it shares with the original.
                iterator = iter(loader)
                assert isinstance(iterator, _MultiProcessingDataLoaderIter)  # since the loader has workers
                self.iterator = iterator
                self._sigchld = _silence_sigchld()
            except OSError as error:
                got = error.strerror or error
                raise DataError(
                    f"data.workers: expected to start {loader.num_workers} loader processes, got {got}; "
                    "try --data.workers 0"
                ) from error
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):  # of torch's handler of SIGCHLD
                    raise
                if "Bus error" in str(error):
                    raise DataError(FULL_SHM.format(workers=loader.num_workers)) from error
                raise DataError(f"loader: {str(error).strip().rstrip('.')}; {ADVICE}") from error
        self.workers = self.iterator._workers
        self.results: queue.Queue[tuple[bool, Any]] = queue.Queue(1)
        self.ended = threading.Event()
        self._kill = weakref.finalize(self, _kill, os.getpid(), self.workers)
        self.thread = threading.Thread(target=_receive, args=(self.iterator, self.results, self.ended), daemon=True)
        self.thread.start()

    def next(self, should_stop: object, files: Sequence[str]) -> Any:
        """The next thing that the loader gives, which holds these files; None where should_stop becomes true first.

        Raises DataError for a worker that died, and when nothing came for `patience` seconds.
        """
        waited, warn_after = 0.0, min(WARN_AFTER, self.patience / 2)
        while not should_stop:
            try:
                given, value = self.results.get(timeout=POLL)
            except queue.Empty:
                self._check_workers()
                warned = waited >= warn_after
                waited += POLL  # a clock would count the time that this process itself was suspended
                if waited >= self.patience:
                    raise DataError(f"{self._silence(waited, files)}; data.workers 0 reads in this process") from None
                if waited >= warn_after and not warned:
                    log.warning("%s; still waiting", self._silence(waited, files))
                continue
            if given:
                return value
            self._check_workers()
            raise value
        return None

    def _silence(self, seconds: float, files: Sequence[str]) -> str:
        pids = ", ".join(str(worker.pid) for worker in self.workers)
        more = f" and {len(files) - 2} more" if len(files) > 2 else ""
        return f"loader: no batch for {seconds:.0f} s from processes {pids}, which read {', '.join(files[:2])}{more}"

    def _check_workers(self) -> None:
        for worker in self.workers:
            if not worker.is_alive() and worker.exitcode:
                if -worker.exitcode == getattr(signal, "SIGBUS", None):
                    raise DataError(FULL_SHM.format(workers=len(self.workers)))
                raise DataError(
                    f"loader: expected {len(self.workers)} processes, got one (pid {worker.pid}) ended by "
                    f"{_cause(worker.exitcode)}; {ADVICE}"
                )

    def close(self) -> None:
        """End the workers at once: they have nothing to keep, and one that hangs heeds nothing else."""
        self.ended.set()
        self._kill()
        with contextlib.suppress(queue.Empty):
            self.results.get_nowait()
        self.thread.join(5 * POLL)
        self.iterator._shutdown_workers()
        if self._sigchld is not None:
            signal.signal(signal.SIGCHLD, self._sigchld)


def _receive(iterator: Iterator[Any], results: queue.Queue[tuple[bool, Any]], ended: threading.Event) -> None:
    while not ended.is_set():
        try:
            result = True, next(iterator)
        except Exception as error:  # whatever it is, it belongs to the thread that waits
            if isinstance(error, RuntimeError) and "timed out" in str(error):
                continue
            result = False, error
        results.put(result)
        if not result[0]:
            return


def _kill(owner: int, workers: Sequence[multiprocessing.process.BaseProcess]) -> None:
    if os.getpid() != owner:  # a worker of a later loader, which holds a copy of all this
        return
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(5 * POLL)


def _cause(exitcode: int) -> str:
    return signal.Signals(-exitcode).name if exitcode < 0 else f"exit code {exitcode}"


@contextlib.contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Workers inherit the mask, so that none is ended by a signal before it has begun to ignore it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


@contextlib.contextmanager
def _no_worker_left() -> Iterator[None]:
    """End the workers that have begun where not all of them can.

    At its end a process waits for its children, and these heed no SIGTERM.
    """
    before = set(multiprocessing.active_children())
    try:
        yield
    except BaseException as error:
        handler = _silence_sigchld()
        _kill(os.getpid(), [child for child in multiprocessing.active_children() if child not in before])
        _forget_half_made(error)
        if handler is not None:
            signal.signal(signal.SIGCHLD, handler)
        raise


def _forget_half_made(error: BaseException) -> None:
    """Make torch forget the iterator that an error ended the making of.

    It would take a later one at the same address for this one, and its destructor would miss what was never made.
    """
    for cause in (error, error.__cause__):
        for frame, _ in traceback.walk_tb(cause.__traceback__ if cause else None):
            iterator = frame.f_locals.get("self")
            if isinstance(iterator, _MultiProcessingDataLoaderIter):
                iterator._shutdown = True
                with contextlib.suppress(ValueError):
                    signal_handling._remove_worker_pids(id(iterator))


def _silence_sigchld() -> Any:
    """Take torch's handler away, which raises wherever the main thread happens to be; the former handler."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGCHLD, signal.SIG_DFL)
