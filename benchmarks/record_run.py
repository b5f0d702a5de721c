"""Draw the record of a training, for benchmarks/results/, from its run folders: one, or several in their order.

python -m bcmfnet.benchmarks.record_run RUN ... --out OUT.json --command "bcmfnet train ..." --commit REV --note "..."

With --weights FILE.safetensors, also the weights that the last run stands for, in half precision.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import tomllib
from pathlib import Path
from typing import Any

import torch

from bcmfnet.data.class_weights import RULES
from bcmfnet.models import create_model, read_weights, save_weights


def record(run: Path) -> dict[str, Any]:
    """What was run, on what, how long it took and what it reached; times are those of the training steps alone."""
    config = tomllib.loads((run / "config.toml").read_text())
    for section, path in (("data", "root"), ("data", "colors"), ("model", "pretrained")):
        config[section].pop(path, None)
    if config["loss"].get("class_weights", "none") not in ("none", *RULES):  # a file: what it says
        config["loss"]["class_weights"] = json.loads((run / "class_weights.json").read_text())
    environment = json.loads((run / "env.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    with (run / "results.csv").open() as file:
        curve = [{"step": int(row["step"]), "miou": float(row["miou"])} for row in csv.DictReader(file)]
    previous, seconds = 0, 0.0
    for row in steps:
        seconds += (row["step"] - previous) * config["data"]["batch_size"] / row["images_per_s"]
        previous = row["step"]
    return {
        "packages": environment["packages"],
        "cpu": environment["cpu"],
        "config": config,
        "steps": steps[-1]["step"],
        "epochs": steps[-1]["epoch"],
        "train_seconds": round(seconds),
        "train_images_per_s": {
            "median": statistics.median(row["images_per_s"] for row in steps),
            "best": max(row["images_per_s"] for row in steps),
        },
        "curve": curve,
        "evaluation": json.loads((run / "evaluation.json").read_text()),
    }


def write_half(run: Path, path: Path, about: dict[str, Any]) -> None:
    """Write the weights that a run stands for in half precision, with what is to be said about them."""
    state, metadata = read_weights(run)
    model = create_model(metadata["model"], num_classes=metadata["num_classes"], aux=metadata["aux"])
    model.load_state_dict(state)
    save_weights(path, model, metadata | about, dtype=torch.float16)


def main() -> None:
    """Write the record of run folders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    for name in ("command", "commit", "note"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--weights", type=Path)
    given = parser.parse_args()
    *before, last = map(record, given.runs)
    total = sum(run["steps"] for run in (*before, last))
    about = {"command": given.command, "commit": given.commit, "total_steps": total}
    result = {**about, "note": given.note, **last, "before": before}
    given.out.write_text(json.dumps(result, indent=2) + "\n")
    if given.weights:
        write_half(given.runs[-1], given.weights, about)


if __name__ == "__main__":
    main()
