"""Table 4 of the paper, and the readings of the loss, on CamVid: train each row with each seed, one row of CSV a run.

python -m bcmfnet.benchmarks.ablation OUT.csv RUNS --data.root DIR --commit REV

Every run is `bcmfnet train` with the preset camvid and RECIPE. A row is appended when its run ends; runs that have one
are left out, and one that was stopped goes on from its folder in RUNS, so the command may be stopped and given again.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

RECIPE = "--preset camvid --data.crop 192 256 --optim.steps 1500 --val-every 1000".split()
OHEM_KEPT = 8 * 192 * 256 // 16
"""Pixels that OHEM keeps at least: one in sixteen of a batch."""
ROWS = {
    "BASE, cross-entropy": "--model.name ddrnet23_slim --loss.mode plain",
    "LMFM, cross-entropy": "--loss.mode plain",
    "LMFM, OHEM": f"--loss.mode ohem --loss.min-kept {OHEM_KEPT}",
    "LMFM, detect": "--loss.mode detect",
    "LMFM, detect, nms 3, ratio 1/16": "--loss.mode detect --loss.nms 3 --loss.ratio 0.0625",
    "LMFM, detect, nms 3": "--loss.mode detect --loss.nms 3",
    "LMFM, paper": "--loss.mode paper --loss.nms 3 --loss.ratio 0.0625",
}
COLUMNS = {
    "mIoU": "miou",
    "boundary IoU": "boundary_iou",
    "boundary F, 3 px": "boundary_f_3px",
    "pole IoU": "iou_pole",
    "sign IoU": "iou_sign",
    "pedestrian IoU": "iou_pedestrian",
}
"""Of the table: heading -> column of the file."""


def train(folder: Path, root: str, name: str, seed: int) -> None:
    """Train a row of the table with a seed in a folder, or go on where that was stopped."""
    if (folder / "checkpoints" / "last.pt").exists():
        arguments: Sequence[str] = ["--resume", str(folder)]
    else:
        own = ["--seed", str(seed), "--data.root", root, "--output-dir", str(folder), "--exist-ok"]
        arguments = [*RECIPE, *ROWS[name].split(), *own]
    subprocess.run([sys.executable, "-m", "bcmfnet", "train", *arguments], check=True)


def row(folder: Path, name: str, seed: int) -> dict[str, Any]:
    """The row of a run that has ended; scores in per cent, the speed in the median."""
    scores = json.loads((folder / "evaluation.json").read_text())
    boundary = scores["boundary"]
    shown = {
        "miou": scores["miou"],
        "boundary_iou": boundary["boundary_iou"]["mean"],
        **{f"boundary_f_{radius}px": value["mean"] for radius, value in boundary["boundary_f"].items()},
        **{f"trimap_{radius}px": value for radius, value in boundary["trimap_iou"].items()},
        **{f"iou_{label}": value for label, value in scores["iou"].items()},
    }
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = sorted(values["images_per_s"] for values in metrics if "loss" in values)
    torch = json.loads((folder / "env.json").read_text())["packages"]["torch"]
    figures = {key: round(100 * value, 2) for key, value in shown.items()}
    run = {"run": name, "seed": seed, "steps": metrics[-1]["step"]}
    return run | figures | {"images_per_s": round(rates[len(rates) // 2], 1), "torch": torch}


def measured(path: Path) -> set[tuple[str, int]]:
    """Name and seed of the runs that a file has."""
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {(row["run"], int(row["seed"])) for row in csv.DictReader(file)}


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a file, and the header to one that is not there."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def lines(path: Path) -> Iterator[str]:
    """A file as a table in Markdown: for each row of the table mean and range of its seeds, in per cent."""
    with path.open(newline="") as file:
        runs = list(csv.DictReader(file))
    yield f"| {' | '.join(['network, loss', 'seeds', *COLUMNS])} |"
    yield "|---" * (2 + len(COLUMNS)) + "|"
    for name in ROWS:
        seeds = [run for run in runs if run["run"] == name]
        if seeds:
            cells = (spread([float(run[column]) for run in seeds]) for column in COLUMNS.values())
            yield f"| {' | '.join([name, str(len(seeds)), *cells])} |"


def spread(values: Sequence[float]) -> str:
    """Mean of some values, and where there are several the least and the largest."""
    mean = f"{sum(values) / len(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


def main() -> None:
    """Train what is missing in a table, and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, help="folder for the folders of the runs")
    parser.add_argument("--data.root", dest="root", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), help="rows of the table")
    parser.add_argument("--commit", required=True)
    given = parser.parse_args()
    for seed in given.seeds:
        for name in given.only:
            if (name, seed) in measured(given.out):
                continue
            folder = given.runs / f"{list(ROWS).index(name)}-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            train(folder, given.root, name, seed)
            append(given.out, row(folder, name, seed) | {"commit": given.commit})
    print(*lines(given.out), sep="\n")


if __name__ == "__main__":
    main()
