"""Rows of measurements: their columns, the CSV file of a machine, and the table for a reader."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from bcmfnet.benchmarks import _machine
from bcmfnet.benchmarks._timing import QUANTILES
from bcmfnet.errors import ConfigError

Row = dict[str, Any]

METRICS = ("time", "cpu", "graph", "launch")
KEY = ("machine", "benchmark", "case", "provider", "threads")
COLUMNS = (
    "benchmark",
    "case",
    "provider",
    "threads",
    "status",
    "reason",
    *(f"{metric}_us_{share}" for metric in METRICS for share in QUANTILES),
    "rounds",
    "baseline",
    "speedup",
    "extra_bytes",
    "bytes_moved",
    "gb_per_s",
    "copy_gb_per_s",
    "copy_share",
    "operations",
    "gop_per_s",
    "machine",
    "capability",
    "commit",
    "date",
    "python",
    "torch",
    "triton",
    "compiler",
    "cuda",
)
"""time: wall time on a CPU, between device events on a GPU; cpu: process time; graph: in a CUDA graph; launch: host."""

SHOWN = {
    "provider": ("provider", str),
    "threads": ("threads", str),
    "time": ("time_us_50", lambda us: _time(us)),
    "20 %": ("time_us_20", lambda us: _time(us)),
    "80 %": ("time_us_80", lambda us: _time(us)),
    "CPU time": ("cpu_us_50", lambda us: _time(us)),
    "in a graph": ("graph_us_50", lambda us: _time(us)),
    "launch": ("launch_us_50", lambda us: _time(us)),
    "speedup": ("speedup", lambda ratio: f"{ratio:.2f}x"),
    "extra memory": ("extra_bytes", lambda size: f"{size / 1e6:.1f} MB"),
    "GB/s": ("gb_per_s", lambda rate: f"{rate:.3g}"),
    "of copy": ("copy_share", lambda share: f"{100 * share:.0f} %"),
    "Gop/s": ("gop_per_s", lambda rate: f"{rate:.3g}"),
}


def update(path: Path, rows: Iterable[Row]) -> None:
    """Write rows to a CSV file: those of the same machine, benchmark, case, provider and threads are replaced."""
    old = _read(path) if path.exists() else []
    merged = {tuple(row.get(name, "") for name in KEY): row for row in [*old, *map(_as_text, rows)]}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged.values())
    temporary.replace(path)


def _read(path: Path) -> list[Row]:
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            columns, rows = reader.fieldnames or KEY, list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"output: expected a CSV file of measurements at {path}: {error}") from None
    if not set(KEY) <= set(columns):
        raise ConfigError(f"output: expected a CSV file with the columns {', '.join(KEY)}, got {path} with {columns}")
    return rows


def check_output(path: Path) -> None:
    """Raise ConfigError where `update` could not write to a path; for the start of measurements that take long."""
    folder = path if path.is_dir() else path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"output: expected a file to write, got {path}: {error.strerror}") from None
    if path.is_file():
        _read(path)


def file_for(output: Path, rows: list[Row]) -> Path:
    """The file that is meant by a path: in a folder, the one of the rows' machine."""
    return output / f"{_machine.slug(rows[0]['machine'])}.csv" if output.is_dir() else output


def failed(rows: list[Row]) -> bool:
    """Whether a provider that could run disagrees with the reference, or raised an error."""
    return any(row["status"] in ("disagrees", "failed") for row in rows)


def tables(rows: list[Row]) -> list[tuple[str, list[list[str]]]]:
    """A heading and a table for each case: a line for each measured provider, without columns that are all empty."""
    result = []
    for (benchmark, case), group in groupby(rows, key=lambda row: (row["benchmark"], row["case"])):
        measured = [row for row in group if row["status"] == "ok"]
        if measured:
            names = [
                name for name, (column, _) in SHOWN.items() if any(row.get(column) is not None for row in measured)
            ]
            result.append((f"{benchmark} {case}", [names, *([_cell(row, name) for name in names] for row in measured)]))
    return result


def remarks(rows: list[Row]) -> list[str]:
    """A line for each thing that was not measured and why; its cases are named where they are not all."""
    every = {(row["benchmark"], row["case"]) for row in rows}
    found: dict[tuple[str, str, str], set[tuple[str, str]]] = {}
    for row in rows:
        if row.get("reason"):
            cases = found.setdefault((row["provider"], row["status"], row["reason"]), set())
            cases.add((row["benchmark"], row["case"]))
    lines = []
    for (provider, status, reason), cases in found.items():
        where = "" if cases == every else f" in {', '.join(' '.join(case) for case in sorted(cases))}"
        lines.append(f"{provider}{'' if status == 'ok' else f' {status}'}{where}: {reason}")
    return lines


def _as_text(row: Row) -> dict[str, str]:
    return {name: _number(row.get(name)) for name in COLUMNS}


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _cell(row: Row, name: str) -> str:
    column, show = SHOWN[name]
    return "" if row.get(column) is None else show(row[column])


def _time(microseconds: float) -> str:
    if microseconds < 1000:
        return f"{microseconds:.3g} us"
    return f"{microseconds / 1000:.3g} ms" if microseconds < 1e6 else f"{microseconds / 1e6:.3g} s"
