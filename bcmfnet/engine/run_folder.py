"""The folder of a run: its name, and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import reprlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bcmfnet.errors import CheckpointError, ConfigError
from bcmfnet.models.weights import checked


@contextlib.contextmanager
def run_folder(verb: str, output_dir: str | None, name: str, exist_ok: bool = False) -> Iterator[Path]:
    """Create the folder of a run; one that the code inside left empty when it failed is taken away again.

    output_dir is the folder itself; without it the folder is runs/VERB/NAME, numbered NAME-2, NAME-3, ... where
    that exists. Raises ConfigError when output_dir has something in it and exist_ok is not given, or when the folder
    cannot be made or written to.
    """
    try:
        folder = _create(verb, output_dir, name, exist_ok)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        at = output_dir or Path("runs", verb, name)
        raise ConfigError(f"output_dir: expected a folder to write to, got {at}: {error.strerror}") from None
    try:
        yield folder
    except BaseException:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise


def _create(verb: str, output_dir: str | None, name: str, exist_ok: bool) -> Path:
    if output_dir is not None:
        folder = Path(output_dir)
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"output_dir: expected a folder, got the file {folder}")
        if folder.is_dir() and any(folder.iterdir()) and not exist_ok:
            raise ConfigError(f"output_dir: {folder} exists and is not empty; choose another or give --exist-ok")
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    if Path(name).name != name:
        raise ConfigError(f"name: expected the name of a folder, got {name!r}")
    parent = Path("runs") / verb
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(exist_ok=exist_ok)
            return folder
        except FileExistsError:
            number += 1


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name and rename it, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


class MetricsLog:
    """metrics.jsonl, one JSON object a line, and results.csv, drawn from its evaluation rows."""

    def __init__(self, folder: Path, keep_until: int | None = None) -> None:
        """Start empty, or where keep_until is given go on from the rows up to that step."""
        self.path = folder / "metrics.jsonl"
        self.table = folder / "results.csv"
        self.rows: list[dict[str, Any]] = []
        if keep_until is not None and self.path.exists():
            self.rows = [row for row in read_rows(self.path) if row["step"] <= keep_until]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, row: dict[str, Any]) -> None:
        """Append a row; an evaluation row (it has a `miou`) also renews results.csv."""
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if "miou" in row:
            write_text(self.table, _csv(self.evaluations))

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "miou" in row]


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line that a killed process left unfinished is dropped.

    Raises CheckpointError for any other line that is not a row.
    """
    lines = path.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                return
            row = None
        where = f"{path}, line {number}"
        if not isinstance(row, dict):
            raise CheckpointError(f"{where}: expected a JSON object, got {reprlib.repr(line)}")
        checked(where, row, "step", "a number of steps", lambda v: type(v) is int and v >= 0)
        for key in row:
            if key == "iou":
                checked(
                    where, row, key, "IoU by class", lambda v: isinstance(v, dict) and all(map(_is_number, v.values()))
                )
            else:
                checked(where, {key: row[key]}, key, "a number", _is_number)
        yield row


def _is_number(value: object) -> bool:
    return value is None or type(value) in (int, float)


def _csv(rows: list[dict[str, Any]]) -> str:
    flat = [{key: value for key, value in row.items() if key != "iou"} | row.get("iou", {}) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(flat[-1]), lineterminator="\n", extrasaction="ignore", restval="")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()
