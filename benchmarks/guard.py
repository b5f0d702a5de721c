"""Ratios of our kernels over the best eager form, measured here, and whether they are still what they were.

python -m bcmfnet.benchmarks.guard [--seconds S]

Both are timed in turn in one run, so that a slow or busy machine slows them alike. Exits with 1 where a ratio is below
`SHARE` of what `results/` has recorded for the case, or where a kernel is missing or disagrees with the reference.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import torch

from bcmfnet.benchmarks import _results, harness
from bcmfnet.benchmarks.figures import MACHINES, RESULTS, Rows, measured

SHARE = 1 / 3
"""Recorded was a CPU with AVX-512; one with AVX2 alone, whose vectors are half as wide, reached 0.51 to 1.2 of it."""
THREADS = 1
CASES = {
    "upsample_argmax": ("1x19x128x256-1024x2048-float32-rough", "1x19x128x256-1024x2048-float32-rough-confidence"),
    "bcl": ("2x19x64x128-512x1024-smooth", "2x19x512x1024-512x1024-smooth"),
    "terms": ("ce+dice-2x19x64x128-512x1024",),
    "lmfm": ("lmfm-1x512x16x32-float32-channels_last",),
    "pyramid_pool": ("12x512x16x16-float32-contiguous_format-backward",),
    "upsample_add_relu": ("1x64x128x256-32x64-float32-channels_last",),
}
"""What is watched: benchmark -> cases that take seconds."""


def verdicts(rows: list[_results.Row], recorded: Rows) -> Iterator[tuple[str, bool]]:
    """A line for each row of our kernels, and whether its ratio is at or above its floor.

    Args:
        rows: as `harness.run_cases` gives them.
        recorded: rows of another day, which have a ratio for each of these cases.
    """
    for row in rows:
        if row["provider"] != "cpp":
            continue
        name = f"{row['benchmark']} {row['case']}"
        if "speedup" not in row:
            yield f"{name}: {row['status']}, {row['reason'] or 'the best eager form was not measured'}", False
            continue
        before = float(recorded[row["benchmark"], row["case"], "cpp", str(row["threads"])]["speedup"])
        fine = row["speedup"] >= SHARE * before
        verdict = "" if fine else ": BELOW ITS FLOOR"
        figures = f"{row['speedup']:.2f}x, floor {SHARE * before:.2f}x, recorded {before:.2f}x"
        yield f"{name}: {figures}{verdict}", fine


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.2, help="least time for each provider of a case")
    given = parser.parse_args(arguments)
    found = harness.find()
    work = [(name, found[name], case) for name in CASES for case in found[name].CASES if case.name in CASES[name]]
    rows = harness.run_cases(
        work, torch.device("cpu"), providers=("cpp", "eager_best"), threads=(THREADS,), seconds=given.seconds
    )
    lines = list(verdicts(rows, measured(RESULTS / MACHINES["no AMX"])))
    print(*(line for line, _ in lines), sep="\n")
    sys.exit(not lines or not all(fine for _, fine in lines) or _results.failed(rows))


if __name__ == "__main__":
    main()
