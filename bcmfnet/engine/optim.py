"""The optimiser of a run and its steps: how many, how fast, and when to evaluate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from bcmfnet.engine.config import OptimConfig, TrainConfig
from bcmfnet.errors import ConfigError


@dataclass(frozen=True)
class Schedule:
    """The steps of a run: how many, when to evaluate, and the learning rate of each."""

    optim: OptimConfig
    steps_per_epoch: int
    steps: int
    evaluate_every: int
    crops: tuple[tuple[float, tuple[int, int]], ...]
    """Crops (height, width) in their order, each with the share of the run at which it ends."""
    weights_until: float | None

    @classmethod
    def of(cls, config: TrainConfig, frames: int, processes: int = 1) -> Schedule:
        parts = processes * config.optim.accumulate
        steps_per_epoch = frames // (config.data.batch_size * parts)
        if steps_per_epoch < 1:
            got = config.data.batch_size if parts == 1 else f"{config.data.batch_size} {parts} times a step"
            raise ConfigError(f"data.batch_size: expected at most the {frames} frames of the set, got {got}")
        if config.optim.steps is not None:
            steps = config.optim.steps
        elif config.optim.epochs is not None:
            steps = max(1, round(config.optim.epochs * steps_per_epoch))
        else:
            raise ConfigError("optim.steps, optim.epochs: expected one of the two, got neither")
        evaluate_every = max(1, round(config.val_every * steps_per_epoch))
        until = config.loss.class_weights_until
        return cls(config.optim, steps_per_epoch, steps, evaluate_every, config.data.stages(), until)

    def lr(self, step: int) -> float:
        """Learning rate of a step (from 0): linear warm-up, then decay to zero at the end."""
        warmup = min(1.0, (step + 1) / (self.optim.warmup_steps + 1))
        if self.optim.schedule == "onecycle":
            decay = _one_cycle(step / self.steps)
        elif self.optim.schedule == "cosine":
            decay = (1 + math.cos(math.pi * step / self.steps)) / 2
        else:
            decay = (1 - step / self.steps) ** self.optim.power
        return self.optim.lr * warmup * decay

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation is due once a number of steps is done."""
        return step % self.evaluate_every == 0 or step == self.steps

    def pauses(self, step: int) -> bool:
        """Whether the state is saved once a number of steps is done: before an evaluation and before another crop."""
        return self.evaluates(step) or self.crop(step)[0] != self.crop(step - 1)[0]

    def crop(self, step: int) -> tuple[tuple[int, int], int]:
        """(height, width) of the crops of a step (from 0), and the step before which that changes."""
        for share, crop in self.crops:
            end = math.ceil(share * self.steps)
            if step < end:
                return crop, end
        raise ValueError(f"step: expected 0 to {self.steps - 1}, got {step}")

    def class_weights_left(self, step: int) -> float:
        """Share of the class weights that a step (from 0) has: from 1 to 0 by loss.class_weights_until of the run."""
        if self.weights_until is None:
            return 1.0
        return max(0.0, 1 - step / (self.weights_until * self.steps))


def _one_cycle(t: float) -> float:
    """From 1/25 up to 1 at t = 0.3, then down to 1/250,000, each way along a cosine (Smith and Topin 2019).

    The numbers are the defaults of torch's OneCycleLR.
    """
    peak, start, end = 0.3, 1 / 25, 1 / 25e4
    low, way = (start, 1 - t / peak) if t < peak else (end, (t - peak) / (1 - peak))
    return low + (1 - low) * (1 + math.cos(math.pi * way)) / 2


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser of a configuration; 1-D parameters go without decay where decay_1d is off.

    Each group has the `factor` of the learning rate that its parameters have: backbone_lr, or 1.
    """
    parameters: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays, factor = parameter.ndim > 1 or optim.decay_1d, optim.backbone_lr
            key = decays, factor if name.startswith("backbone.") else 1.0
            parameters.setdefault(key, []).append(parameter)
    groups = [
        {"params": params, "weight_decay": optim.weight_decay * decays, "factor": factor, "lr": factor * optim.lr}
        for (decays, factor), params in parameters.items()
    ]
    # one kernel in place of several for each tensor
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in model.parameters())
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.momentum, 0.999), fused=fused)
    return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, fused=fused)
