"""Fit free logits at 1/8 to real labels with each reading of the loss, and draw a table of where they end.

python -m bcmfnet.benchmarks.readings OUT.csv --data.name camvid11-segnet --data.root DIR --commit REV

Every logit of a few frames is a parameter of its own: no network, nothing to generalise. That is a proxy for what a
loss pulls towards at this resolution, not for what a network trained with it reaches.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bcmfnet.data import build_dataset
from bcmfnet.metrics import ConfusionMatrix
from bcmfnet.nn import BoundaryCorrectedLoss, OhemCrossEntropy, UpsampledCrossEntropy
from bcmfnet.ops import upsample_argmax
from bcmfnet.reference import bcl as reference

STRIDE = 8
LEARNING_RATE = 0.1
"""Of Adam; the logits start at zero."""
OHEM_SHARE = 16
"""OHEM keeps at least one pixel in so many."""
SELECTIONS = [(1, 0.0), (3, 0.0), (1, 1 / 16), (3, 1 / 16)]
"""nms and ratio of `detect`: the default, and the paper's selection."""


@dataclass
class Frames:
    """Labels uint8 [N, H, W] and their classes."""

    target: Tensor
    classes: tuple[str, ...]
    ignore_index: int


def load_frames(dataset: Any, count: int, first: int) -> Frames:
    """Labels of `count` frames spread evenly over a dataset, from the frame `first` on."""
    numbers = [(first + i * len(dataset) // count) % len(dataset) for i in range(count)]
    target = torch.stack([torch.from_numpy(dataset.read(number)[1]) for number in numbers])
    return Frames(target, dataset.table.classes, dataset.table.ignore_index)


def readings(frames: Frames) -> dict[str, BoundaryCorrectedLoss]:
    """The losses by name."""
    ignore = frames.ignore_index
    losses: dict[str, BoundaryCorrectedLoss] = {
        "cross-entropy": UpsampledCrossEntropy(ignore),
        "ohem": OhemCrossEntropy(min_kept=frames.target.numel() // OHEM_SHARE, ignore_index=ignore),
    }
    for nms, ratio in SELECTIONS:
        losses[f"detect, nms {nms}, ratio {ratio:.4g}"] = BoundaryCorrectedLoss(
            nms=nms, ratio=ratio, ignore_index=ignore
        )
    nms, ratio = SELECTIONS[-1]
    losses["paper"] = BoundaryCorrectedLoss(mode="paper", nms=nms, ratio=ratio, ignore_index=ignore)
    return losses


def fit(criterion: BoundaryCorrectedLoss, frames: Frames, steps: list[int]) -> Iterator[Tensor]:
    """Logits [N, C, ceil(H / 8), ceil(W / 8)] after each number of steps, ascending."""
    batch, *size = frames.target.shape
    logits = torch.zeros(batch, len(frames.classes), *(-(-side // STRIDE) for side in size), requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=LEARNING_RATE)
    for step in range(1, steps[-1] + 1):
        optimizer.zero_grad()
        criterion(logits, frames.target).backward()
        optimizer.step()
        if step in steps:
            yield logits.detach()


def figures(criterion: BoundaryCorrectedLoss, frames: Frames, logits: Tensor, thin: str) -> dict[str, float]:
    """mIoU, IoU of the thin class and share selected in percent; threshold and mean cross-entropies in nats."""
    confusion = ConfusionMatrix(len(frames.classes), frames.ignore_index)
    confusion.update(upsample_argmax(logits, tuple(frames.target.shape[1:])), frames.target)
    iou = 100 * confusion.iou()
    _, stats, maps = reference.loss(logits, frames.target, criterion.checked_options)
    found = {"miou": np.nanmean(iou), f"iou_{thin}": iou[frames.classes.index(thin)], "ce": stats.ce.item()}
    if criterion.checked_options.boundary_weight > 0:
        selection = stats.selection()
        found["selected"] = 100 * selection["selected"].item()
        found["threshold"] = selection["threshold"].item()
        found["selected_ce"] = maps.ce[maps.selected].mean().item()
    return {name: round(float(value), 4) for name, value in found.items()}


def measure(dataset: Any, count: int, firsts: list[int], steps: list[int], thin: str) -> Iterator[dict[str, Any]]:
    """A row for each set of frames, reading and number of steps."""
    for first in firsts:
        frames = load_frames(dataset, count, first)
        for name, criterion in readings(frames).items():
            for number, logits in zip(steps, fit(criterion, frames, steps), strict=True):
                row = {"frames": count, "first": first, "reading": name, "steps": number}
                yield row | figures(criterion, frames, logits, thin)


def main() -> None:
    """Write the table of a dataset, and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--data.name", dest="name", default="synthetic")
    parser.add_argument("--data.root", dest="root", default="", help="folder of the dataset; generated data needs none")
    parser.add_argument("--data.split", dest="split", default="train")
    parser.add_argument("--frames", type=int, default=4, help="frames of a set")
    parser.add_argument("--first", type=int, nargs="+", default=[0, 7], help="first frame of each set")
    parser.add_argument("--steps", type=int, nargs="+", default=[300, 1000], help="steps to read the logits after")
    parser.add_argument("--thin", default="pole", help="class whose IoU is told")
    parser.add_argument("--commit", required=True)
    given = parser.parse_args()
    dataset = build_dataset(given.name, given.root, given.split)
    if given.thin not in dataset.table.classes:
        parser.error(f"--thin: expected one of {', '.join(dataset.table.classes)}, got {given.thin}")
    common = {"dataset": given.name, "split": given.split, "commit": given.commit, "torch": torch.__version__}
    rows = []
    for row in measure(dataset, given.frames, given.first, sorted(given.steps), given.thin):
        print(*row.values(), sep="  ", flush=True)
        rows.append(row | common)
    with given.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
