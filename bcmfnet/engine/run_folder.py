"""The folder of a run: its name, who owns it, and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import json
import logging
import os
import platform
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bcmfnet.errors import CheckpointError, ConfigError, MissingPackageError
from bcmfnet.models.weights import checked, replace_file

if TYPE_CHECKING:
    from bcmfnet.engine.checkpoint import TrainState

fcntl = importlib.import_module("fcntl") if importlib.util.find_spec("fcntl") else None  # Windows has none
log = logging.getLogger("bcmfnet.run_folder")
LOCK = ".lock"
UNFINISHED = re.compile(r"\..+\.\d+\.tmp")
"""Names that `replace_file` gives to what it has not finished."""
_held: set[int] = set()


@contextlib.contextmanager
def run_folder(
    verb: str, output_dir: str | None, name: str | None, exist_ok: bool = False, default_name: str | None = None
) -> Iterator[Path]:
    """Create and own the folder of a run; one that the code inside left empty when it failed is taken away again.

    output_dir is the folder itself; without it the folder is runs/VERB/NAME, numbered NAME-2, NAME-3, ... where
    that exists; without a name default_name, or the verb, stands for it. Raises ConfigError when both are given, when
    output_dir has something in it and exist_ok is not given, when another process owns it, or when it cannot be made
    or written to.
    """
    if name is not None:
        _check_name(name, output_dir)
    name = name or default_name or verb
    key, at = ("name", Path("runs", verb, name)) if output_dir is None else ("output_dir", Path(output_dir))
    try:
        folder = _numbered(at, exist_ok) if output_dir is None else _created(at, exist_ok)
    except OSError as error:
        raise ConfigError(f"{key}: expected a folder to write to, got {at}: {error.strerror}") from None
    try:
        with owned(folder, key):
            if output_dir is not None and not exist_ok:
                _check_empty(folder)  # again: the former owner may have come and gone before it was ours
            yield folder
    except BaseException:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise


def _check_name(name: str, output_dir: str | None) -> None:
    if not name.isprintable() or name == ".." or not name or Path(name).name != name:
        raise ConfigError(f"name: expected the name of a folder, got {name!r}")
    if output_dir is not None:
        raise ConfigError(f"name: expected it or --output-dir, since both name the folder, got {name!r}")


def _created(folder: Path, exist_ok: bool) -> Path:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir: expected a folder, got the file {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    if not exist_ok:
        _check_empty(folder)
    return folder


def _check_empty(folder: Path) -> None:
    if any(path.name != LOCK for path in folder.iterdir()):
        raise ConfigError(f"output_dir: {folder} exists and is not empty; choose another or give --exist-ok")


def _numbered(first: Path, exist_ok: bool) -> Path:
    first.parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = first if number == 1 else first.with_name(f"{first.name}-{number}")
        try:
            folder.mkdir(exist_ok=exist_ok)
            return folder
        except FileExistsError:
            number += 1


@contextlib.contextmanager
def owned(folder: Path, key: str) -> Iterator[Path]:
    """Own a folder, and give it back, for the time of the code inside, or until this process dies; what a killed owner
    left unfinished is swept.

    key is the option that named the folder. Raises ConfigError where another process, or another thread of this one,
    owns it, and where it cannot be written to. Where the system has no file locks (Windows, some network file
    systems), a warning says so.
    """
    path = folder / LOCK
    try:
        descriptor = _lock(path, key)
    except OSError as error:
        raise ConfigError(f"{key}: expected a folder to write to, got {folder}: {error.strerror}") from None
    _held.add(descriptor)
    try:
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
        _sweep(folder)
        yield folder
    finally:
        if descriptor in _held:  # not so in a child
            _held.remove(descriptor)
            with contextlib.suppress(OSError):
                path.unlink()  # before it is unlocked: who opened it meanwhile sees that it is gone, and opens another
            os.close(descriptor)


def _lock(path: Path, key: str) -> int:
    """Descriptor of the locked file at path. A lock dies with its process, even by SIGKILL."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _flock(descriptor):
                owner = os.read(descriptor, 300).decode(errors="replace") or "another process"
                raise ConfigError(
                    f"{key}: expected a folder that nobody writes to, got {path.parent}, owned by {owner}"
                )
            if _is_at(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _flock(descriptor: int) -> bool:
    """Whether a file could be locked, or cannot be on this system."""
    try:
        if fcntl is None:
            raise OSError(0, "this system has none")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.warning("no file lock (%s): a second run in the same folder would not be noticed", error.strerror)
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _release_in_child() -> None:
    """A lock belongs to an open file: loader processes that outlive a killed parent must not hold it."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)


def _sweep(folder: Path) -> None:
    for place in (folder, folder / "checkpoints", folder / "weights"):
        for path in place.glob(".*.tmp"):
            if UNFINISHED.fullmatch(path.name):
                path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 under a temporary name and rename it, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def require_tensorboard() -> Any:
    """The class that writes for TensorBoard. Raises MissingPackageError where that is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingPackageError("tensorboard: needed for --tensorboard; pip install tensorboard") from None
    return SummaryWriter


class MetricsLog:
    """metrics.jsonl, one JSON object a line, and results.csv, drawn from its evaluation rows.

    With tensorboard the figures of new rows also go into the folder's tensorboard, as scalars.
    """

    def __init__(self, folder: Path, state: TrainState | None = None, *, tensorboard: bool = False) -> None:
        """Start empty, or go on from the rows up to a state: those that come again after it are dropped."""
        self.writer = None
        if tensorboard:
            step = state.step + 1 if state is not None else 0
            self.writer = require_tensorboard()(str(folder / "tensorboard"), purge_step=step)
        self.path = folder / "metrics.jsonl"
        self.table = folder / "results.csv"
        self.rows: list[dict[str, Any]] = []
        if state is not None:
            rows = read_rows(self.path)
            self.rows = [row for row in rows if row["step"] <= (state.evaluated if "miou" in row else state.step)]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._write_table()

    def add(self, row: dict[str, Any]) -> None:
        """Append a row; an evaluation row (it has a `miou`) also renews results.csv."""
        self.rows.append(row)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:  # which names no file where the disk is full
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        if "miou" in row:
            self._write_table()
        if self.writer is not None:
            scores = {f"iou/{name}": value for name, value in row.get("iou", {}).items()}
            for key, value in (row | scores).items():
                if key not in ("step", "iou") and value is not None:
                    self.writer.add_scalar(key, value, row["step"])
            self.writer.flush()

    def _write_table(self) -> None:
        if self.evaluations:
            write_text(self.table, _csv(self.evaluations))
        else:
            self.table.unlink(missing_ok=True)

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "miou" in row]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; lines that are damaged are left out, with a warning.

    A last line that a killed process left unfinished is left out in silence. No file is as good as an empty one.
    """
    try:
        *lines, _ = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        log.warning("%s: expected the rows of the run's earlier steps, found no file", path)
        return []
    rows, damaged = [], []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(_row(f"{path}, line {number}", line))
        except CheckpointError as error:
            damaged.append(str(error))
    if damaged:
        log.warning("%s; left out with what else is damaged, %d of %d lines", damaged[0], len(damaged), len(lines))
    return rows


def _row(where: str, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise CheckpointError(f"{where}: expected a JSON object, got {reprlib.repr(line.decode(errors='replace'))}")
    checked(where, row, "step", "a number of steps", lambda v: type(v) is int and v >= 0)
    for key in row:
        if key == "iou":
            checked(where, row, key, "IoU by class", lambda v: isinstance(v, dict) and all(map(_is_number, v.values())))
        else:
            checked(where, {key: row[key]}, key, "a number", _is_number)
    return row


def _is_number(value: object) -> bool:
    return value is None or type(value) in (int, float)


def _csv(rows: list[dict[str, Any]]) -> str:
    flat = [{key: value for key, value in row.items() if key != "iou"} | row.get("iou", {}) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(flat[-1]), lineterminator="\n", extrasaction="ignore", restval="")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()
