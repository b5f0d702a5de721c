"""Draw a table of training runs, for benchmarks/results/, from their run folders: a row for each, of the last weights.

python -m bcmfnet.benchmarks.compare_runs OUT.csv --commit REV RUN...
"""

from __future__ import annotations

import argparse
import csv
import json
import tomllib
from pathlib import Path
from typing import Any


def row(run: Path) -> dict[str, Any]:
    """What a run trained with, and what it reached on its validation split, in percent."""
    config = tomllib.loads((run / "config.toml").read_text())
    evaluation = json.loads((run / "evaluation.json").read_text())
    boundary = evaluation["boundary"]
    scores = {"miou": evaluation["miou"], "boundary_iou": boundary["boundary_iou"]["mean"]}
    scores |= {f"boundary_f_{pixels}px": value["mean"] for pixels, value in boundary["boundary_f"].items()}
    return {
        "run": run.name,
        "pretrained": Path(config["model"].get("pretrained", "")).name,
        **{key: config["loss"][key] for key in ("mode", "nms", "ratio", "min_kept")},
        "seed": config["seed"],
        "crop": "x".join(map(str, config["data"]["crop"])),
        "epochs": config["optim"]["epochs"],
        "lr": config["optim"]["lr"],
        **{key: round(100 * value, 2) for key, value in scores.items()},
    }


def main() -> None:
    """Write the table of run folders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--commit", required=True)
    arguments = parser.parse_args()
    rows = [row(run) | {"commit": arguments.commit} for run in arguments.runs]
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
