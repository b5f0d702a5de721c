"""What the steps of a training are measured by, and what one that was broken off is taken back with."""

from __future__ import annotations

import math
import time
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from bcmfnet.errors import TrainingError

ADVICE = "try a lower --optim.lr, a longer --optim.warmup-steps or --amp off"


class Undo:
    """What a step changes before its update, to take it back where the step is not finished.

    That is the running statistics of batch norm and the random generator. Only the update changes weights, and one
    that was broken off half-way cannot be taken back.
    """

    def __init__(self, model: nn.Module) -> None:
        self.buffers = list(model.buffers())
        self.copies = [buffer.clone() for buffer in self.buffers]
        self.step = "finished"

    def keep(self) -> None:
        """A step begins."""
        torch._foreach_copy_(self.copies, self.buffers)
        self.rng = torch.get_rng_state()
        self.step = "begun"

    def seal(self) -> None:
        """Its update begins."""
        self.step = "sealed"

    def drop(self) -> None:
        """The step is finished."""
        self.step = "finished"

    def take_back(self) -> None:
        """Go back to the end of the last finished step. Raises TrainingError where there is no way back."""
        if self.step == "sealed":
            raise TrainingError("its successor's update was broken off half-way")
        if self.step == "begun":
            torch._foreach_copy_(self.buffers, self.copies)
            torch.set_rng_state(self.rng)
            self.step = "finished"


class Laps:
    """What the time of the steps since the last reading went to.

    On a GPU it is the GPU's own time, marked on its stream: what the loader takes there is what it kept waiting.
    """

    PARTS = ("loader", "copy", "forward", "loss", "backward", "optimizer")

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []

    def mark(self, part: str) -> None:
        """A part begins, and the one before it ends."""
        moment: Any = time.perf_counter()
        if self.on_gpu:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self.marks.append((part, moment))

    def read(self) -> dict[str, float]:
        """Seconds of each part; on a GPU it is waited for."""
        if self.on_gpu and self.marks:
            self.marks[-1][1].synchronize()
        seconds = dict.fromkeys(self.PARTS, 0.0)
        for (part, begin), (_, end) in pairwise(self.marks):
            if part in seconds:
                seconds[part] += begin.elapsed_time(end) / 1000 if self.on_gpu else end - begin
        self.marks.clear()
        return seconds


class Meter:
    """Figures of the steps since the last reading, kept on the device so that no step waits for them."""

    NAMES = ("loss", "ce", "selected", "threshold", "selected_loss")

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._reset()

    def _reset(self) -> None:
        self.figures: list[Tensor] = []
        self.steps: list[tuple[int, list[tuple[str, ...]]]] = []
        self.start = time.perf_counter()

    def add(self, step: int, figures: Tensor, files: list[tuple[str, ...]]) -> None:
        self.figures.append(figures)
        self.steps.append((step, files))

    def read(self, saved_step: int) -> tuple[dict[str, float], float]:
        """Mean figures and images per second since the last reading. Raises TrainingError for a loss not finite."""
        rows = torch.stack(self.figures).tolist()
        for (value, *_), (step, files) in zip(rows, self.steps, strict=True):
            if not math.isfinite(value):
                raise TrainingError(
                    f"loss: expected a finite number, got {value} at step {step}, on {', '.join(f[0] for f in files)}; "
                    f"{ADVICE}; {intact(saved_step)}"
                )
        rate = len(rows) * self.batch_size / (time.perf_counter() - self.start)
        self._reset()
        means = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        return dict(zip(self.NAMES, means, strict=False)), rate


def intact(saved_step: int) -> str:
    return f"the last checkpoint, of step {saved_step}, is intact"
