"""Where the time of a training step goes, and what more processes cost it.

python -m bcmfnet.benchmarks.steps [--processes N ...] [--amp off bf16] [--sync] [--size H W] [--frames N] [--steps N]
    [--output FILE.csv]

Each process is one thread, loads its frames itself and trains on as many of them as one alone: weak scaling. All ways
are run in turn, `--rounds` times; told are medians over the steps of all rounds, without those that a run begins
with.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bcmfnet.benchmarks import _machine

PARTS = ("loader", "copy", "forward", "loss", "backward", "optimizer")
DRAWN = 256, 512
"""Height and width of a generated frame."""
WARM_UP = 4
Way = tuple[int, str]


def run(way: Way, options: argparse.Namespace) -> list[dict[str, float]]:
    """What a training writes of its steps, each with its seconds."""
    processes, amp = way
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    scale = max(1, *(side / drawn for side, drawn in zip(options.size, DRAWN, strict=True)))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *(launcher if processes > 1 else ()), "-m", "bcmfnet", "train", "--amp", amp]
        command += ["--output-dir", folder, "--log-every", "1", "--optim.steps", str(WARM_UP + options.steps)]
        command += ["--data.length", "64", "--data.workers", "0", "--data.batch-size", str(options.frames)]
        command += ["--data.crop", *map(str, options.size), "--data.scale", str(scale), str(scale)]
        if options.sync and processes > 1:
            command.append("--loss.sync")
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row][WARM_UP:]
    return [row | {"seconds": processes * options.frames / row["images_per_s"]} for row in steps]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--amp", nargs="+", choices=("off", "bf16"), default=["off", "bf16"])
    parser.add_argument("--sync", action="store_true", help="the loss over the batches of all processes")
    parser.add_argument("--size", type=int, nargs=2, default=(360, 480))
    parser.add_argument("--frames", type=int, default=8, help="of each process in a step")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="CSV file to write the rows to as well")
    options = parser.parse_args(arguments)
    ways = list(product(options.processes, options.amp))
    found: dict[Way, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way in ways:
            found[way] += run(way, options)
    rows = [summary(way, steps, options) for way, steps in found.items()]
    if options.output is not None:
        write(options.output, rows)
    print(*lines(rows), sep="\n")


def summary(way: Way, steps: list[dict[str, float]], options: argparse.Namespace) -> dict[str, Any]:
    """A row: medians of the seconds of a step and of the share that each part has in it."""
    machine = _machine.describe(torch.device("cpu"))
    return {
        "processes": way[0],
        "precision": way[1],
        "sync": options.sync,
        "frames": options.frames,
        "size": "x".join(map(str, options.size)),
        "steps": len(steps),
        "seconds": median(step["seconds"] for step in steps),
        **{part: median(step[f"{part}_s"] / step["seconds"] for step in steps) for part in PARTS},
        **{name: machine[name] for name in ("machine", "capability", "commit", "date", "torch")},
    }


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Rows in Markdown; efficiency is over the first number of processes of the same precision."""
    yield f"| processes | precision | s a step | frames/s | efficiency | {' | '.join(PARTS)} |"
    yield "|---" * (5 + len(PARTS)) + "|"
    for row in rows:
        seconds = float(row["seconds"])
        alone = next(float(other["seconds"]) for other in rows if other["precision"] == row["precision"])
        frames = int(row["processes"]) * int(row["frames"]) / seconds
        figures = [f"{seconds:.2f}", f"{frames:.1f}", f"{alone / seconds:.0%}"]
        figures += [f"{float(row[part]):.1%}" for part in PARTS]
        yield f"| {row['processes']} | {row['precision']} | {' | '.join(figures)} |"


if __name__ == "__main__":
    main()
