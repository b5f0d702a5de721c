"""The optimiser of a run and its steps: how many, how fast, and when to evaluate."""

from __future__ import annotations

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

    @classmethod
    def of(cls, config: TrainConfig, frames: int) -> Schedule:
        steps_per_epoch = frames // config.data.batch_size
        if steps_per_epoch < 1:
            got = config.data.batch_size
            raise ConfigError(f"data.batch_size: expected at most the {frames} frames of the set, got {got}")
        if config.optim.steps is None and config.optim.epochs is None:
            raise ConfigError("optim.steps, optim.epochs: expected one of the two, got neither")
        steps = config.optim.steps or max(1, round(config.optim.epochs * steps_per_epoch))
        return cls(config.optim, steps_per_epoch, steps, max(1, round(config.val_every * steps_per_epoch)))

    def lr(self, step: int) -> float:
        """Learning rate of a step (from 0): linear warm-up, then polynomial decay to zero at the end."""
        warmup = min(1.0, (step + 1) / (self.optim.warmup_steps + 1))
        return self.optim.lr * warmup * (1 - step / self.steps) ** self.optim.power

    def next_evaluation(self, step: int) -> int:
        return min(self.steps, (step // self.evaluate_every + 1) * self.evaluate_every)


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser of a configuration; 1-D parameters go without decay where decay_1d is off."""
    weights = [p for p in model.parameters() if p.requires_grad and (p.ndim > 1 or optim.decay_1d)]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1 and not optim.decay_1d]
    groups = [{"params": weights, "weight_decay": optim.weight_decay}]
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.momentum, 0.999))
    return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum)
