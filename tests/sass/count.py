"""Counts what every kernel issues at the sizes that matter, and the time that no schedule on a GPU can be below.

`PYTHONPATH=tests python -m sass.count` writes benchmarks/results/instructions-sm90.csv; with `--check` it compares with
the committed file instead, and fails where a floor has grown by more than 5 %. Needs nvcc, as tests/sass does.
`--backend triton` does the same of what Triton compiles, in instructions-triton-sm90.csv: all that is compiled of one
kernel is one row, an autotuned kernel has its first configuration, and what torch clears is no launch.

Counts are of the compiled code, executed on the CPU: what a warp issues, predicated off or not, and the sectors of 32
bytes that an access touches. Times are floors, never measurements: of issue, at 4 warp instructions a clock and
multiprocessor; of the special function units, at 16 results; of memory, of the sectors that a kernel touches at all,
each read and written once. A kernel's floor is the largest.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial, reduce
from itertools import groupby, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sass import native, triton_driver
from sass.build import Count, Traffic
from torch import Tensor

from bcmfnet.benchmarks import bcl, lmfm, stem_conv, terms, upsample_add_relu, upsample_argmax
from bcmfnet.ops import backends

FOLDER = Path(__file__).parents[2] / "benchmarks/results"
RESULTS = {"cuda": FOLDER / "instructions-sm90.csv", "triton": FOLDER / "instructions-triton-sm90.csv"}
GROWTH = 1.05

# H100 SXM and H200: 132 multiprocessors of 4 schedulers, some 1.75 GHz under load.
ISSUED_PER_US = 132 * 4 * 1750
SPECIAL_PER_US = 132 * 1750 / 2  # warps: exponentials, reciprocals, roots, conversions
BYTES_PER_US = {"h200": 4.3e6, "h100": 3.0e6}
"""Of an H200 as a copy was measured, 0.9 of the 4.8 TB/s that its data sheet says; of an H100 as much of its 3.35."""

# Of a multiprocessor of sm_90, from the CUDA programming guide.
WARPS, BLOCKS, SHARED, REGISTERS_OF_SCHEDULER = 64, 32, 228 << 10, 16384

CLASSES = {
    "integer": ("integer",), "float": ("float",), "special": ("special",), "half": ("half",), "double": ("double",),
    "tensor": ("tensor",), "global_load": ("global load",), "global_store": ("global store",),
    "shared": ("shared",), "atomic": ("global atomic", "shared atomic"), "local": ("local",),
    "constant": ("constant",), "warp": ("warp",), "barrier": ("barrier",), "control": ("control",),
}  # fmt: skip
COLUMNS = (
    "case", "kernel", "launches", "blocks", "threads", "registers", "shared_bytes", "warps_of_64", "instructions",
    *CLASSES, "widths", "sectors_a_read", "sectors_a_write", "bytes_read", "bytes_written", "issue_us", "special_us",
    *(f"memory_us_{card}" for card in BYTES_PER_US), *(f"floor_us_{card}" for card in BYTES_PER_US), "scratch_bytes",
)  # fmt: skip

IMAGES = 8
"""Of a training step. One is executed: what blocks do for it they do for each, so that counts are multiplied."""


class Case(NamedTuple):
    name: str
    op: str
    run: Callable[[], Any]
    images: int = 1  # that the counts of one stand for


def cases() -> Iterator[Case]:
    device = torch.device("cpu")
    for shape, dtype, loss in product((bcl.FULL, bcl.LOW), (torch.float32, torch.bfloat16), bcl.LOSSES):
        case = bcl.Case(shape, (1024, 1024), "smooth", dtype, loss=loss)
        run = partial(_loss, bcl, case, bcl.boundary_corrected_loss, bcl.LOSSES[loss])
        yield Case(f"bcl-{case.name}", "bcl", run, IMAGES)
    for term in ("ce", "ce+dice"):
        case, options = terms.Case(term, bcl.LOW, (1024, 1024)), terms.TERMS[term] | {"ignore_index": terms.IGNORE}
        yield Case(f"terms-{case.name}", "bcl", partial(_loss, terms, case, terms.segmentation_loss, options), IMAGES)
    for context in lmfm.CONTEXTS:
        case = lmfm.Case(context, lmfm.FRAME, torch.float16)
        (x,) = lmfm.make_inputs(case, device)
        weights = lmfm._context(case).pyramid_weights(case.dtype)
        yield Case(f"lmfm-{case.name}", "lmfm", partial(lmfm.lmfm, x, weights))
    for dtype in (torch.float16, torch.float32):
        case = stem_conv.Case(stem_conv.STREET, dtype)
        affine = stem_conv.IMAGENET_MEAN, stem_conv.IMAGENET_STD
        run = partial(stem_conv.stem_conv, *stem_conv.make_inputs(case, device), *affine)
        yield Case(f"stem_conv-{case.name}", "stem_conv", run)
    for content in ("rough", "smooth"):
        case = upsample_argmax.Case((1, 19, 128, 256), (1024, 2048), content, torch.float16)
        (x,) = upsample_argmax.make_inputs(case, device)
        yield Case(
            f"upsample_argmax-{case.name}", "upsample_argmax", partial(upsample_argmax.upsample_argmax, x, case.size)
        )
    for sizes in upsample_add_relu.FUSIONS:
        case = upsample_add_relu.Case(*sizes, torch.float16)
        maps = upsample_add_relu.make_inputs(case, device)
        run = partial(upsample_add_relu.upsample_add_relu, *maps)
        yield Case(f"upsample_add_relu-{case.name}", "upsample_add_relu", run)
    for sizes in upsample_add_relu.FUSIONS:
        case = upsample_add_relu.Case(*sizes, torch.bfloat16, backward=True)
        run = partial(_fusion, *upsample_add_relu.make_inputs(case, device))
        yield Case(f"upsample_add_relu-{case.name}", "upsample_add_relu", run)


def _loss(benchmark: Any, case: Any, loss: Callable[..., Tensor], options: dict[str, Any]) -> None:
    """A loss of one image of a case, and its gradient; the inputs are made late, since they take long."""
    logits, target, *_ = benchmark.make_inputs(replace(case, shape=(1, *case.shape[1:])), torch.device("cpu"))
    torch.autograd.grad(loss(logits, target, **options), logits)


def _fusion(high: Tensor, low: Tensor, cotangent: Tensor) -> None:
    torch.autograd.grad(upsample_add_relu.upsample_add_relu(high, low), (high, low), cotangent)


def rows_of_name(name: str, backend: str = "cuda") -> list[dict[str, Any]]:
    """The rows of a case, in a process of its own."""
    return rows_of(next(case for case in cases() if case.name == name), backend)


def rows_of(case: Case, backend: str) -> list[dict[str, Any]]:
    """A row for each kernel in the order of their names, and one for all."""
    if backend == "triton":
        triton_driver.install()
        implementation = backends._table[case.op, "cuda"]["triton"].implementation
    else:
        implementation = native.native()
    backends.register(case.op, "cpu", backend, implementation)
    native.machine().scratch()
    asked = triton_driver.scratch() if backend == "triton" else nullcontext([])
    with asked as sizes, native.machine().counting() as counts, backends.use_backend(backend):
        case.run()
    rows = [row_of(case, count) for count in by_kernel(counts)]
    total = {"case": case.name, "kernel": "all"}
    for column in COLUMNS:
        if column in ("launches", "instructions", *CLASSES) or "bytes_" in column or "_us" in column:
            total[column] = round(sum(row[column] for row in rows), 3)
    total["scratch_bytes"] = case.images * (sum(sizes) if backend == "triton" else native.machine().scratch())
    return [*rows, total]


def by_kernel(counts: list[Count]) -> Iterator[Count]:
    """What Triton compiles of one kernel has one name up to a #: its counts are added up."""
    counts.sort(key=_kernel)
    for name, same in groupby(counts, _kernel):
        yield reduce(_both, same)._replace(kernel=name)


def _kernel(count: Count) -> str:
    return count.kernel.partition("#")[0]


def _both(a: Count, b: Count) -> Count:
    """The sums of two counts, and the larger sizes."""
    return Count(
        a.kernel, *(x + y for x, y in zip(a[1:4], b[1:4], strict=True)), *map(max, a[4:7], b[4:7]),
        *(Traffic(*map(sum, zip(*pair, strict=True))) for pair in ((a.reads, b.reads), (a.writes, b.writes))),
        {kind: a.instructions.get(kind, 0) + b.instructions.get(kind, 0) for kind in a.instructions | b.instructions},
    )  # fmt: skip


def row_of(case: Case, count: Count) -> dict[str, Any]:
    images = case.images if count.blocks > count.launches else 1  # a single block adds up what the others leave
    classes = {name: images * sum(n for kind, n in count.instructions.items() if kind.startswith(kinds))
               for name, kinds in CLASSES.items()}  # fmt: skip
    classes["shared"] -= images * count.instructions.get("shared atomic 4", 0)
    instructions = images * sum(count.instructions.values())
    read, written = (32 * images * traffic.unique for traffic in (count.reads, count.writes))
    row = {
        "case": case.name, "kernel": count.kernel, "launches": count.launches, "blocks": images * count.blocks,
        "threads": count.threads, "registers": count.registers, "shared_bytes": count.shared,
        "warps_of_64": resident_warps(count), "instructions": instructions, **classes,
        "widths": " ".join(f"{kind.replace(' ', '_')}:{images * n}" for kind, n in count.instructions.items()
                           if kind.startswith(("global", "shared"))),
        "sectors_a_read": _ratio(count.reads), "sectors_a_write": _ratio(count.writes),
        "bytes_read": read, "bytes_written": written, "issue_us": round(instructions / ISSUED_PER_US, 3),
        "special_us": round(classes["special"] / SPECIAL_PER_US, 3), "scratch_bytes": 0,
    }  # fmt: skip
    for card, rate in BYTES_PER_US.items():
        row[f"memory_us_{card}"] = round((read + written) / rate, 3)
        row[f"floor_us_{card}"] = max(row["issue_us"], row["special_us"], row[f"memory_us_{card}"])
    return row


def _ratio(traffic: Any) -> float:
    return round(traffic.sectors / max(traffic.requests, 1), 2)


def resident_warps(count: Count) -> int:
    """Warps of a kernel that a multiprocessor holds at once."""
    warps = -(-count.threads // 32)
    of_a_warp = -(-count.registers // 8) * 8 * 32
    by_registers = 4 * (REGISTERS_OF_SCHEDULER // of_a_warp) // warps
    by_shared = SHARED // (-(-count.shared // 128) * 128)
    return warps * min(by_registers, by_shared, WARPS // warps, BLOCKS)


def grown(rows: list[dict[str, Any]], committed: list[dict[str, str]]) -> list[str]:
    """The floors that are more than 5 % over the committed ones, of kernels that both have and of each case."""
    before = {(row["case"], row["kernel"]): row for row in committed}
    result = []
    for row in rows:
        old = before.get((row["case"], row["kernel"]))
        for column in ("issue_us", "memory_us_h200", "scratch_bytes") if old else ():
            if row[column] > GROWTH * float(old[column]) + 0.01:
                result.append(f"{row['case']}: {row['kernel']}: {column}: expected {old[column]}, got {row[column]}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the committed file")
    parser.add_argument("--backend", choices=RESULTS, default="cuda", help="whose kernels")
    parser.add_argument("--only", default="", help="cases whose name has this part; then nothing is written")
    options = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "0"  # read when a kernel is imported, by the processes below
    rows, results = [], RESULTS[options.backend]
    names = [case.name for case in cases() if options.only in case.name]
    native.machine()  # is built once
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for name, found in zip(names, pool.map(partial(rows_of_name, backend=options.backend), names), strict=True):
            rows += found
            print(name)
            for row in found:
                floors = f"{row['issue_us']:9.2f} us issue {row['memory_us_h200']:8.2f} us memory"
                print(f"  {floors}  {row['kernel']}", flush=True)
    if options.check:
        with results.open() as file:
            problems = grown(rows, list(csv.DictReader(file)))
        sys.exit("\n".join(problems) or None)
    if not options.only:
        with results.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
