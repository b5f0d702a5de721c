"""Draw the record of a training run, for benchmarks/results/, from its run folder.

python -m bcmfnet.benchmarks.record_run RUN OUT.json --command "bcmfnet train ..." --commit REV --note "..."

With --weights FILE.safetensors, also the weights that the run stands for, in half precision.
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

from bcmfnet.models import create_model, read_weights, save_weights


def record(run: Path, command: str, commit: str, note: str) -> dict[str, Any]:
    """What was run, on what, how long it took and what it reached; times are those of the training steps alone."""
    config = tomllib.loads((run / "config.toml").read_text())
    config["data"].pop("root", None)
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
        "command": command,
        "commit": commit,
        "note": note,
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


def write_half(run: Path, path: Path) -> None:
    """Write the weights that a run stands for, in half precision."""
    state, metadata = read_weights(run)
    model = create_model(metadata["model"], num_classes=metadata["num_classes"], aux=metadata["aux"])
    model.load_state_dict(state)
    save_weights(path, model, metadata, dtype=torch.float16)


def main() -> None:
    """Write the record of a run folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    for name in ("command", "commit", "note"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--weights", type=Path)
    arguments = parser.parse_args()
    result = record(arguments.run, arguments.command, arguments.commit, arguments.note)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.weights:
        write_half(arguments.run, arguments.weights)


if __name__ == "__main__":
    main()
