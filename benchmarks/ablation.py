"""Table 4 of the paper, and the readings of the loss, on CamVid: train each row with each seed, one row of CSV a run.

python -m bcmfnet.benchmarks.ablation OUT.csv RUNS --data.root DIR --commit REV

Every run has the recipe of the preset camvid and RECIPE. A row is appended when its run ends; runs that have one are
left out, and one that was stopped goes on from its folder in RUNS, so the command may be stopped and given again.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from bcmfnet.engine.checkpoint import LAST
from bcmfnet.engine.config import PAPER_LOSS, TrainConfig, preset
from bcmfnet.engine.run_folder import owned
from bcmfnet.engine.train import TrainResult, train

RECIPE: dict[str, dict[str, Any]] = {
    "data": {"crop": (192, 256), "crops": (), "workers": 1},
    "optim": {"steps": 1500, "epochs": None},
}
OHEM_KEPT = 8 * 192 * 256 // 16
"""Pixels that OHEM keeps at least: one in sixteen of a batch."""
ROWS: dict[str, dict[str, dict[str, Any]]] = {
    "BASE, cross-entropy": {"model": {"name": "ddrnet23_slim"}, "loss": {"mode": "plain"}},
    "LMFM, cross-entropy": {"loss": {"mode": "plain"}},
    "LMFM, OHEM": {"loss": {"mode": "ohem", "min_kept": OHEM_KEPT}},
    "LMFM, detect": {"loss": {}},
    "LMFM, detect, nms 3, ratio 1/16": {"loss": PAPER_LOSS | {"mode": "detect"}},
    "LMFM, detect, nms 3": {"loss": {"nms": 3}},
    "LMFM, paper": {"loss": PAPER_LOSS},
}


def configuration(root: str, name: str, seed: int) -> TrainConfig:
    """The configuration of a run: the preset, the recipe of the table and what its row changes."""
    config = dataclasses.replace(TrainConfig(), val_every=10**6, seed=seed, select="last")
    layers = [preset("camvid"), {"data": {"root": root}}, RECIPE, ROWS[name]]
    for field in ("data", "model", "loss", "optim"):
        values = {key: value for layer in layers for key, value in layer.get(field, {}).items()}
        setattr(config, field, dataclasses.replace(getattr(config, field), **values))
    return config


def row(name: str, seed: int, result: TrainResult, seconds: float) -> dict[str, Any]:
    """The row of a run that has ended; scores in per cent."""
    scores = result.evaluation.to_dict()
    boundary = scores["boundary"]
    shown = {
        "miou": scores["miou"],
        "boundary_iou": boundary["boundary_iou"]["mean"],
        **{f"boundary_f_{radius}px": value["mean"] for radius, value in boundary["boundary_f"].items()},
        **{f"trimap_{radius}px": value for radius, value in boundary["trimap_iou"].items()},
        **{f"iou_{name}": value for name, value in scores["iou"].items()},
    }
    figures = {key: round(100 * value, 2) for key, value in shown.items()}
    return {"run": name, "seed": seed, "steps": result.steps, **figures, "seconds": round(seconds)}


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


def main() -> None:
    """Train what is missing in a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, help="folder for the folders of the runs")
    parser.add_argument("--data.root", dest="root", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), help="rows of the table")
    parser.add_argument("--commit", required=True)
    given = parser.parse_args()
    common = {"commit": given.commit, "torch": torch.__version__, "threads": torch.get_num_threads()}
    for seed in given.seeds:
        for name in given.only:
            if (name, seed) in measured(given.out):
                continue
            folder = given.runs / f"{name.replace(', ', '-').replace('/', '_').replace(' ', '')}-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            begin = time.perf_counter()
            with owned(folder, "runs"):
                result = train(configuration(given.root, name, seed), folder, resume=(folder / LAST).exists())
            append(given.out, row(name, seed, result, time.perf_counter() - begin) | common)
            print(name, seed, f"{100 * result.evaluation.miou:.2f} %", flush=True)


if __name__ == "__main__":
    main()
