"""The tables of README and docs/, drawn from the files under results/.

python -m bcmfnet.benchmarks.figures [README.md docs/*.md]    # prints them, or draws them anew in files
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
MACHINES = {"no AMX": "amd-epyc.csv", "AMX": "intel-xeon-processor.csv"}
INSTRUCTIONS = RESULTS / "instructions-sm90.csv"
FLOORS_HEAD = "| call, us | launches | instructions issued | issue floor | memory floor |"
MISSING = "-"

Rows = dict[tuple[str, str, str, str], dict[str, str]]
"""Measured rows by benchmark, case, provider and threads."""


@dataclass(frozen=True)
class Table:
    """A benchmark's providers at one number of threads: for each label the provider of each column, if it has one."""

    benchmark: str
    threads: int
    columns: dict[str, str]
    """Heading -> case."""
    providers: dict[str, tuple[str | None, ...]]
    memory: bool = False
    """Say the peak memory beyond inputs and outputs, too."""


LOSSES = {
    "logits at 1/8": "2x19x64x128-512x1024-smooth",
    "full resolution": "2x19x512x1024-512x1024-smooth",
    "the paper's, 1/8": "2x19x64x128-512x1024-smooth-paper",
    "the paper's, full": "2x19x512x1024-512x1024-smooth-paper",
}
TERMS = {
    "cross-entropy + Dice": "ce+dice-2x19x64x128-512x1024",
    "focal": "focal-2x19x64x128-512x1024",
    "distillation": "distillation-2x19x64x128-512x1024",
    "150 classes, cross-entropy + Dice": "ce+dice-2x150x128x128-512x512",
}
SEGFORMER = "2x3x512x512-"
NETWORK, ARGMAX = "bcmfnet-1x3x1024x2048", "1x19x128x256-1024x2048-float32"
TABLES = [
    Table("network", 2, {"float32": NETWORK, "bfloat16": NETWORK}, {
        "`for_inference()`": ("ours", "ours_bf16"),
        '`for_inference(..., runtime="openvino")`': ("ours_openvino", "ours_openvino_bf16"),
        "OpenVINO, upsampling and argmax included": ("openvino", "openvino_bf16"),
        "ONNX Runtime, likewise": ("onnxruntime", None),
        "torch.compile": ("compile", None),
        "eager, the best form": ("eager_best", "eager_best_bf16"),
        "eager, as one writes it (bfloat16: autocast)": ("eager", "amp_bf16"),
    }),
    Table("upsample_argmax", 1, {"rough": f"{ARGMAX}-rough", "smooth": f"{ARGMAX}-smooth"}, {
        "`upsample_argmax`, C++": ("cpp", "cpp"),
        "torch.compile": ("compile", "compile"),
        "eager, the best form": ("eager_best", "eager_best"),
        "eager, interpolate and argmax": ("eager", "eager"),
    }),
    Table("bcl", 1, LOSSES, {
        "`boundary_corrected_loss`, C++": ("cpp",) * 4,
        "torch.compile": ("compile",) * 4,
        "eager, the best form": ("eager_best",) * 4,
        "eager, three cross-entropies and a sort": ("naive",) * 4,
        "plain cross-entropy": ("cross_entropy",) * 4,
    }),
    Table("terms", 1, TERMS, {
        "`SegmentationLoss`, C++": ("cpp",) * 4,
        "eager, the best form": ("eager_best",) * 4,
        "torch.compile of that": ("compile",) * 4,
        "eager, as toolkits write it": ("usual",) * 4,
    }, memory=True),
    Table("segformer", 1, {"float32": SEGFORMER + "float32", "bfloat16": SEGFORMER + "bfloat16"}, {
        "SegFormer-B0, its own loss": ("eager_best",) * 2,
        "with `use_loss(model)`": ("ours",) * 2,
        "with `use_loss(model, SegmentationLoss(ce=1, dice=1))`": ("ours_ce+dice",) * 2,
    }, memory=True),
]  # fmt: skip


def measured(path: Path) -> Rows:
    """The rows of a file that have a time."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["time_us_50"]]
    return {(row["benchmark"], row["case"], row["provider"], row["threads"]): row for row in rows}


def lines(table: Table, machines: dict[str, Rows]) -> Iterator[str]:
    """A table in Markdown: the columns of one machine after those of the other, of each that measured any of it."""
    cases = {(table.benchmark, case, str(table.threads)) for case in table.columns.values()}
    machines = {
        name: rows
        for name, rows in machines.items()
        if any((benchmark, case, threads) in cases for benchmark, case, _, threads in rows)
    }
    yield f"| {' | '.join(['', *(f'{name}, {heading}' for name in machines for heading in table.columns)])} |"
    yield "|---" * (1 + len(machines) * len(table.columns)) + "|"
    for label, providers in table.providers.items():
        keys = [
            (table.benchmark, case, provider, str(table.threads))
            for case, provider in zip(table.columns.values(), providers, strict=True)
        ]
        cells = (cell(rows.get(key), table.memory) for rows in machines.values() for key in keys)
        yield f"| {' | '.join([label, *cells])} |"


def cell(row: dict[str, str] | None, memory: bool = False) -> str:
    """Milliseconds, how many times faster than the best eager form where that was measured beside it, and memory."""
    if row is None:
        return MISSING
    time = f"{_number(float(row['time_us_50']) / 1000)} ms"
    beside = row["baseline"].startswith("eager_best") and row["speedup"] and row["provider"] != row["baseline"]
    time += f" ({float(row['speedup']):.2g}x)" if beside else ""
    return f"{time}, {_number(float(row['extra_bytes']) / 1e6)} MB" if memory and row["extra_bytes"] else time


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def floors() -> list[str]:
    """What no schedule on an H200 can be below, in Markdown: a row for each call whose instructions were counted."""
    with INSTRUCTIONS.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kernel"] == "all"]
    cells = (
        (row["case"], row["launches"], f"{float(row['instructions']) / 1e6:.1f} M", *(
            _number(float(row[column])) for column in ("issue_us", "memory_us_h200")
        ))
        for row in rows
    )  # fmt: skip
    return [FLOORS_HEAD, "|---" * 5 + "|", *(f"| {' | '.join(row)} |" for row in cells)]


def redrawn(text: str, table: Table, machines: dict[str, Rows]) -> str:
    """A text in Markdown, its paragraph that is such a table drawn anew."""
    first = f"\n| {next(iter(table.providers))} |"
    paragraphs = text.split("\n\n")
    return "\n\n".join("\n".join(lines(table, machines)) if first in old else old for old in paragraphs)


def main(*paths: str) -> None:
    """Print the tables, or draw them anew in the files."""
    machines = {name: measured(RESULTS / file) for name, file in MACHINES.items()}
    for table in TABLES:
        for path in map(Path, paths):
            path.write_text(redrawn(path.read_text(), table, machines))
        if not paths:
            print(table.benchmark, *lines(table, machines), sep="\n")
    for path in map(Path, paths):
        old = path.read_text().split("\n\n")
        path.write_text("\n\n".join("\n".join(floors()) if FLOORS_HEAD in part else part for part in old))
    if not paths:
        print(*floors(), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
