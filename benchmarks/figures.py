"""The tables of README and docs/, drawn from the files under results/.

python -m bcmfnet.benchmarks.figures [README.md docs/*.md]    # prints them, or draws them anew in files
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
AVX2 = "amd-epyc-avx2.csv"
"""Another AMD EPYC, with AVX2 alone."""
MACHINES = {"no AMX": "amd-epyc.csv", "AMX": "intel-xeon-processor.csv"}
INSTRUCTIONS = RESULTS / "instructions-sm90.csv"
TRITON_INSTRUCTIONS = RESULTS / "instructions-triton-sm90.csv"
FLOORS_HEAD = "| call, us | launches | instructions issued | issue floor | memory floor | scratch, MB | {} |".format(
    "Triton: launches | issue floor | memory floor | scratch, MB"
)
SCALING_HEAD = "| varied | this library | eager, the best form | eager, three cross-entropies and a sort |"
STEPS_HEAD = (
    "| two threads | network alone | + upsampling | + argmax | from a decoded frame | + argmax, initial weights |"
)
EXPORTS = RESULTS / "intel-xeon-processor-exports.csv"
EXPORTS_HEAD = "| {} | labels that differ | by at most, logits | size | an image | over `for_inference` | peak memory |"
PAPER_HEADS = {
    "cityscapes": "| Table 2, Cityscapes | FPS here | 95 % of frames within | published: FPS | GPU | mIoU |",
    "camvid": "| Table 3, CamVid | FPS here | 95 % of frames within | published: FPS | GPU | mIoU |",
}
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
    triton = counted(TRITON_INSTRUCTIONS)
    found = [FLOORS_HEAD, "|---" * (FLOORS_HEAD.count("|") - 1) + "|"]
    for case, row in counted(INSTRUCTIONS).items():
        cells = [case, row["launches"], f"{float(row['instructions']) / 1e6:.1f} M", *_floors(row)]
        cells += [triton[case]["launches"], *_floors(triton[case])] if case in triton else [MISSING] * 4
        found.append(f"| {' | '.join(cells)} |")
    return found


def counted(path: Path) -> dict[str, dict[str, str]]:
    """What all kernels of each call issue and touch together, by the call."""
    with path.open(newline="") as file:
        return {row["case"]: row for row in csv.DictReader(file) if row["kernel"] == "all"}


def _floors(row: dict[str, str]) -> list[str]:
    """Of issue and of memory; and scratch."""
    floors = [_number(float(row[column])) for column in ("issue_us", "memory_us_h200")]
    return [*floors, _number(float(row["scratch_bytes"]) / 1e6)]


def scaling() -> list[str]:
    """What the loss costs from the smallest to the largest of each axis, and the powers n^k that it grows with."""
    from bcmfnet.benchmarks.scaling import AXES, exponent

    rows = measured(RESULTS / MACHINES["AMX"])
    found = [SCALING_HEAD, "|---" * 4 + "|"]
    for axis, cases in AXES.items():
        here = {value: case.name for value, case in cases.items() if ("scaling", case.name, "cpp", "1") in rows}
        if len(here) < 2:
            continue
        cells = []
        for provider in ("cpp", "eager_best", "naive"):
            costs = [rows["scaling", name, provider, "1"] for name in here.values()]
            parts = []
            for column, unit, name in (("time_us_50", 1e3, "ms"), ("extra_bytes", 1e6, "MB")):
                values = [float(row[column]) / unit for row in costs]
                span = f"{_number(values[0])} to {_number(values[-1])} {name}"
                parts.append(f"{span} (n^{exponent(list(here), values):.2f})")
            cells.append(", ".join(parts))
        values = list(here)
        found.append(f"| {axis}: {values[0]:.3g} to {values[-1]:.4g} | {' | '.join(cells)} |")
    return found


def steps() -> list[str]:
    """Frames a second at each step of the way, with the median and the 95 % quantile of the milliseconds."""
    rows = measured(RESULTS / MACHINES["AMX"])
    found = [STEPS_HEAD, "|---" * 6 + "|"]
    names = {"ours": "`for_inference()`", "eager_best": "eager, the best form", "eager": "eager, as one writes it"}
    columns = [("trained", step) for step in ("logits", "upsampled", "labels", "frame")] + [("random", "labels")]
    sizes = sorted({case.partition("-")[2] for benchmark, case, *_ in rows if benchmark == "fps"})
    for size, ending, (provider, name) in product(sizes, ("", "_bf16"), names.items()):
        keys = [("fps", f"{weights}-{size}", f"{provider}_{step}{ending}", "2") for weights, step in columns]
        if any(key in rows for key in keys):
            cells = [_rate(rows[key]) if key in rows else MISSING for key in keys]
            found.append(f"| {name}, {size}, {'bfloat16' if ending else 'float32'} | {' | '.join(cells)} |")
    return found


def _rate(row: dict[str, str]) -> str:
    median, late = (float(row[column]) / 1e3 for column in ("time_us_50", "time_us_95"))
    return f"{1e3 / median:.3g} FPS ({_number(median)}, {_number(late)} ms)"


def paper_table(table: str) -> list[str]:
    """Speeds of one of the paper's tables as they were measured, beside what is published."""
    from bcmfnet.benchmarks.tables import INFERENCE, published

    found = [PAPER_HEADS[table], "|---" * 6 + "|"]
    for (benchmark, case, provider, _), row in measured(RESULTS / AVX2).items():
        if benchmark == "tables" and case.startswith(table):
            known = published(table, provider.removesuffix(INFERENCE))
            title = f"{known.title}, `for_inference()`" if provider.endswith(INFERENCE) else known.title
            rate = f"{1e6 / float(row['time_us_50']):.3g}"
            late = f"{_number(float(row['time_us_95']) / 1e3)} ms"
            cells = [title, rate, late, *(str(v or MISSING) for v in (known.fps, known.gpu, known.miou))]
            found.append(f"| {' | '.join(cells)} |")
    return found


def exports(size: str) -> list[str]:
    """What `bcmfnet export` printed of the file of each format at a size."""
    with EXPORTS.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["size"] == size]
    found = [EXPORTS_HEAD.format(size), "|---" * 7 + "|"]
    for row in rows:
        seconds, beside = float(row["seconds"]), float(row["network_seconds"])
        cells = [
            f"{row['format']}, {row['dtype']}",
            f"{row['differing']} ({100 * int(row['differing']) / int(row['pixels']):.2g} %)",
            f"{float(row['largest_margin']):.2g}",
            f"{int(row['bytes']) / 1e6:.1f} MB",
            f"{_number(1e3 * seconds)} ms",
            f"{beside / seconds:.2f}",
            f"{int(row['peak_bytes']) / 1e6:,.0f} MB",
        ]
        found.append(f"| {' | '.join(cells)} |")
    return found


DRAWN = {FLOORS_HEAD: floors, SCALING_HEAD: scaling, STEPS_HEAD: steps}
DRAWN |= {head: partial(paper_table, table) for table, head in PAPER_HEADS.items()}
DRAWN |= {EXPORTS_HEAD.format(size): partial(exports, size) for size in ("360x480", "1024x2048")}
"""First line of a table -> what draws it."""


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
        parts = path.read_text().split("\n\n")
        drawn = {head: draw for head, draw in DRAWN.items() if any(head in part for part in parts)}
        for head, draw in drawn.items():
            parts = ["\n".join(draw()) if head in part else part for part in parts]
        path.write_text("\n\n".join(parts))
    if not paths:
        for draw in DRAWN.values():
            print(*draw(), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
