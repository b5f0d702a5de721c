"""Whether an exported file gives the labels of the network that it was made from, and how fast."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from bcmfnet.export.files import ExportedFile, Run
from bcmfnet.inference import InferenceNetwork
from bcmfnet.ops import upsample_argmax
from bcmfnet.reference.bilinear import upsample

RUNS = 5
MOST_DIFFERING, MOST_DIFFERING_INT8 = 1e-3, 0.02
"""Share of the pixels; float16 moved 5e-5 of CamVid's, at near ties, int8 0.0047."""


@dataclass
class Check:
    """What became of the comparison."""

    images: int
    pixels: int
    differing: int
    """Pixels with another label."""
    largest_margin: float
    """Of the differing pixels: by how much the network's own label led over the second one, in logits."""
    seconds: float
    """Of an image, the median."""
    network_seconds: float
    """The same of the network, `for_inference` in float32."""
    most_differing: float = MOST_DIFFERING
    """Share of the pixels that may have another label."""
    peak_bytes: int | None = None
    """Most memory of a process that reads the file and runs it on an image; None where the system does not tell."""

    def holds(self) -> bool:
        """Whether as many labels are the network's own as rounding allows for."""
        return self.differing <= self.most_differing * self.pixels


@torch.inference_mode()
def check_exported(
    file: ExportedFile, network: InferenceNetwork, images: Sequence[Tensor], normalized: Sequence[Tensor]
) -> Check:
    """Compare a file with the network that it was made from.

    Args:
        file: what `read_exported` read.
        network: `for_inference` of the model with mean and std, on the CPU.
        images: uint8 [1, 3, H, W].
        normalized: the same as a file takes them that does not normalise, float32.
    """
    check = Check(len(images), 0, 0, 0.0, 0.0, 0.0)
    if file.metadata["dtype"] == "int8":
        check.most_differing = MOST_DIFFERING_INT8
    given = images if file.metadata["takes_uint8"] else normalized
    for image, frame in zip(given, images, strict=True):
        size = frame.shape[-2:]
        result, logits = file.run(image), network.logits(frame)
        labels = result if file.metadata["output"] == "labels" else upsample_argmax(result, size)
        wrong = labels != upsample_argmax(logits, size)
        check.pixels += wrong.numel()
        check.differing += int(wrong.sum())
        if wrong.any():
            best = upsample(logits.float(), size).topk(2, dim=1).values
            check.largest_margin = max(check.largest_margin, float((best[:, 0] - best[:, 1])[wrong].max()))
    times: tuple[list[float], list[float]] = ([], [])
    runs: tuple[Run, Run] = (file.run, network)
    for _ in range(RUNS):
        for seconds, run, image in zip(times, runs, (given[0], images[0]), strict=True):
            start = time.perf_counter()
            run(image)
            seconds.append(time.perf_counter() - start)
    check.seconds, check.network_seconds = map(median, times)
    return check


ONCE = """
import resource, sys, torch
from pathlib import Path
from bcmfnet.export import read_exported

file = read_exported(Path(sys.argv[1]))
file.run(torch.zeros(1, 3, *map(int, sys.argv[2:]), dtype=torch.uint8 if file.metadata["takes_uint8"] else None))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""
"""In a process of its own: this one has held the network and all that wrote the file."""


def peak_memory(file: ExportedFile, size: Sequence[int]) -> int | None:
    """Most bytes of a process that reads a file and runs it on an image of (height, width); None where it cannot."""
    command = [sys.executable, "-P", "-c", ONCE, file.path, *size]
    told = subprocess.run([*map(str, command)], capture_output=True, text=True)
    return None if told.returncode else int(told.stdout)
