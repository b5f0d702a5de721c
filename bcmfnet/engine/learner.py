"""What learns: network, loss and optimiser, step by step, and where the time of a step goes."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bcmfnet.data import IMAGENET_MEAN, IMAGENET_STD, Batch, normalize
from bcmfnet.data.labels import LabelTable
from bcmfnet.engine.build import build_loss, build_teacher
from bcmfnet.engine.captured import CapturedGradients
from bcmfnet.engine.checkpoint import TrainState
from bcmfnet.engine.config import TrainConfig
from bcmfnet.engine.distributed import Processes
from bcmfnet.engine.ema import MovingAverage
from bcmfnet.engine.inference import LabelPredictor
from bcmfnet.engine.optim import Schedule, build_optimizer
from bcmfnet.engine.runtime import autocast
from bcmfnet.errors import ConfigError, TrainingError
from bcmfnet.models.ddrnet import DualResolutionNet
from bcmfnet.reference.bcl import BclOptions


def figures_of(options: BclOptions) -> tuple[str, ...]:
    """What to tell of a loss beside itself, fields of its stats: each term, where there is more than one, and what the
    boundary term selects."""
    weights = {
        "ce": options.ce_weight, "focal": options.focal_weight, "dice": options.dice_weight,
        "jaccard": options.jaccard_weight, "tversky": options.tversky_weight,
        "distillation": options.distillation_weight,
    }  # fmt: skip
    terms = tuple(name for name, weight in weights.items() if weight != 0)
    if options.boundary_weight == 0:
        return terms if len(terms) > 1 else ()
    return (*dict.fromkeys(("ce", *terms)), "selected", "threshold", "selected_loss")


class Laps:
    """What the time of the steps since the last reading went to.

    On a GPU it is the GPU's own time, marked on its stream: what the loader takes there is what it kept waiting.
    """

    PARTS = ("loader", "copy", "forward", "loss", "backward", "optimizer")

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []

    def mark(self, part: str) -> None:
        """A part begins, and the one before it ends; in a CUDA graph parts have no times of their own."""
        if self.on_gpu and torch.cuda.is_current_stream_capturing():
            return
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


@dataclass
class Learner:
    """A network with its loss, optimiser and moving average. A step is a `backward` and an `update`."""

    config: TrainConfig
    plan: Schedule
    model: DualResolutionNet
    table: LabelTable
    class_weights: dict[str, float] | None
    device: torch.device
    amp: torch.dtype | None
    processes: Processes

    def __post_init__(self) -> None:
        if self.config.cuda_graph and (self.device.type != "cuda" or self.processes.count > 1):
            got = f"{self.device.type}, {self.processes.count} process{'es' * (self.processes.count > 1)}"
            raise ConfigError(f"cuda_graph: expected a CUDA device and one process, got {got}")
        self.laps = Laps(self.device)
        self.criterion = build_loss(self.config.loss, self.table.ignore_index, self.processes).to(self.device)
        self.teacher = build_teacher(self.config.loss, self.table, self.device)
        self.figures = ("loss", *figures_of(self.criterion.checked_options))
        """What a step tells of its loss."""
        if self.class_weights is not None:
            self.weight = torch.tensor(list(self.class_weights.values()), dtype=torch.float32, device=self.device)
            self.criterion.weight = self.faded_weight = self.weight.clone()
        self.optimizer = build_optimizer(self.model, self.config.optim)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp is torch.float16)
        self.one = torch.ones((), device=self.device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        """Steps since the last row that the loss scale had to skip."""
        ema = self.config.optim.ema
        self.average = MovingAverage(self.model, ema) if ema is not None else None
        self.averaged = self.average.model if self.average else None
        self.result = self.averaged or self.model
        """The network that is evaluated and saved."""
        self.buffers = list(self.model.buffers())
        self.buffers_before = [buffer.clone() for buffer in self.buffers]
        self.unfinished = ""
        """Which part of a step has begun: none, backward or update."""
        self.parallel = self.processes.parallel(self.model)
        self.forward = torch.compile(self.parallel) if self.config.compile else self.parallel
        self.captured = CapturedGradients(self._add_gradients, self.model)
        if self.config.model.freeze:
            self.model.backbone.eval()  # its batch norms keep their statistics

    def backward(self, step: int, batches: list[Batch]) -> Tensor:
        """Compute the gradients of a step (from 0), and of its batches the mean loss and what it selects."""
        self.laps.mark("optimizer")
        for group in self.optimizer.param_groups:
            group["lr"] = group["factor"] * self.plan.lr(step)
        if self.class_weights is not None:
            self.faded_weight.copy_(1 + self.plan.class_weights_left(step) * (self.weight - 1))
        torch._foreach_copy_(self.buffers_before, self.buffers)
        self.rng = torch.get_rng_state()
        self.unfinished = "backward"
        self.optimizer.zero_grad(set_to_none=not self.config.cuda_graph)
        figures = []
        for batch in batches:
            with self._averaging(last=batch is batches[-1]):
                figures.append(self.add_gradients(step, batch))
        self.laps.mark("optimizer")
        if self.config.optim.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip)
        return self.processes.mean(torch.stack(figures).mean(0))

    def _averaging(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Where several processes are to average the gradients of a step: once, with those of its last batch."""
        if last or not isinstance(self.parallel, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.parallel.no_sync()

    def add_gradients(self, step: int, batch: Batch) -> Tensor:
        """Add the gradients of a batch; its `figures`, float32 on the device."""
        self.laps.mark("copy")
        images, labels = (x.to(self.device, non_blocking=True) for x in (batch.images, batch.labels))
        self.laps.mark("forward")
        if self.config.cuda_graph:
            return self.captured(images, labels)
        return self._add_gradients(images, labels, jitter=step if self.config.loss.jitter else None)

    def _add_gradients(self, images: Tensor, labels: Tensor, jitter: int | None = None) -> Tensor:
        images = normalize(images, IMAGENET_MEAN, IMAGENET_STD, torch.channels_last)
        with autocast(self.device, self.amp):
            output = self.forward(images)
            with torch.no_grad():
                teacher = None if self.teacher is None else self.teacher(images).logits
        self.laps.mark("loss")
        loss, stats = self.criterion(output, labels, teacher=teacher, jitter=jitter, return_stats=True)
        self.laps.mark("backward")
        self.scaler.scale(loss / self.config.optim.accumulate).backward()
        told = stats._asdict() | stats.selection()
        return torch.stack([loss.detach(), *(told[name] for name in self.figures[1:])])

    def update(self, state: TrainState) -> None:
        """Update the weights by the gradients, and count the step.

        Under a loss scale, gradients that are not finite leave the weights as they are and lower the scale; the step
        counts as one that is done.
        """
        self.unfinished = "update"
        scale = self.scaler.scale(self.one)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.skipped += self.scaler.scale(self.one) < scale
        if self.average:
            self.average.update(state.step + 1)
        state.step += 1
        self.unfinished = ""
        self.laps.mark("rest")

    def take_back(self) -> None:
        """Go back to the end of the last finished step, where another has begun.

        Before its update that changes batch norm's running statistics and the random generator alone. Raises
        TrainingError where the update was broken off half-way, which cannot be taken back.
        """
        if self.unfinished == "update":
            raise TrainingError("its successor's update was broken off half-way")
        if self.unfinished == "backward":
            torch._foreach_copy_(self.buffers, self.buffers_before)
            torch.set_rng_state(self.rng)
            self.unfinished = ""

    def predictor(self, model: DualResolutionNet) -> LabelPredictor:
        """Of a network of the run's kind, in its device and precision."""
        return LabelPredictor(model, IMAGENET_MEAN, IMAGENET_STD, self.device, self.amp)
