"""Where the time of a training step goes, and what more processes cost it.

python -m bcmfnet.benchmarks.steps [--processes N ...] [--amp off bf16] [--sync] [--size H W] [--frames N] [--steps N]

Each process is one thread, loads its frames itself and trains on as many of them as one alone: weak scaling. All ways
are run in turn, `--rounds` times; printed are medians over the steps of all rounds, without those that a run begins
with.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from statistics import median

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
    options = parser.parse_args(arguments)
    ways = list(product(options.processes, options.amp))
    found: dict[Way, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way in ways:
            found[way] += run(way, options)
    machine = _machine.describe(torch.device("cpu"))
    height, width = options.size
    text = f"{options.frames} frames of {height}x{width} a process, one thread each"
    print(f"{machine['machine']} ({machine['capability']}), {text}\n")
    print(f"| processes | precision | s a step | frames/s | efficiency | {' | '.join(PARTS)} |")
    print("|---" * (5 + len(PARTS)) + "|")
    for (processes, amp), rows in found.items():
        seconds = median(row["seconds"] for row in rows)
        alone = median(row["seconds"] for row in found[options.processes[0], amp])
        parts = [median(row[f"{part}_s"] / row["seconds"] for row in rows) for part in PARTS]
        figures = [f"{seconds:.2f}", f"{processes * options.frames / seconds:.1f}", f"{alone / seconds:.0%}"]
        print(f"| {processes} | {amp} | {' | '.join(figures)} | {' | '.join(f'{part:.1%}' for part in parts)} |")


if __name__ == "__main__":
    main()
