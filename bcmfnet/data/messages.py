"""What image decoders print by themselves, kept so that it can be said of the file that it is about.

libpng and libjpeg write to file descriptor 2 and name no file; OpenCV gives no way to hear them.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import TextIO


class DecoderMessages:
    """While entered, Python's own standard error has a descriptor of its own, so that `kept` takes nothing of it."""

    def __enter__(self) -> DecoderMessages:
        self._python: TextIO | None = sys.stderr
        self._read = 0
        self._keeping, self._lock = 0, threading.Lock()
        try:
            self._shown: int | None = os.dup(2)
        except OSError:  # standard error is closed: nobody hears the decoders anyway
            self._shown = None
            return self
        self._file = tempfile.TemporaryFile()
        if _writes_to(self._python, 2):
            own = os.dup(2)
            sys.stderr = open(own, "w", 1, self._python.encoding, self._python.errors, closefd=True)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._shown is None:
            return
        if sys.stderr is not self._python:
            sys.stderr.close()
            sys.stderr = self._python
        os.close(self._shown)
        self._file.close()

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Keep what is written to descriptor 2 while any thread is in the code inside, by whatever thread."""
        if self._shown is None:
            yield
            return
        self._enter(self._file.fileno(), 1)
        try:
            yield
        finally:
            self._enter(self._shown, -1)

    def _enter(self, descriptor: int, step: int) -> None:
        """Count a thread that comes or goes; the first one and the last change where descriptor 2 leads."""
        with self._lock:
            self._keeping += step
            if self._keeping == (step > 0):
                os.dup2(descriptor, 2)

    @property
    def size(self) -> int:
        """Bytes kept so far."""
        return os.fstat(self._file.fileno()).st_size if self._shown is not None else 0

    def new(self) -> list[str]:
        """Lines kept since the last call, each once."""
        if self.size == self._read:
            return []
        self._file.seek(self._read)
        text = self._file.read()
        self._read += len(text)
        return list(dict.fromkeys(text.decode(errors="replace").splitlines()))


def _writes_to(stream: TextIO | None, descriptor: int) -> bool:
    try:
        return stream is not None and stream.fileno() == descriptor
    except (OSError, ValueError):
        return False
