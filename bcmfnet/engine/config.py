"""What a run is made of, as nested dataclasses that check themselves, and the presets that fill them in."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from bcmfnet.errors import ConfigError, unknown_name

LossMode = Literal["detect", "detect0", "paper", "paper0", "ohem", "plain"]


def _require(ok: bool, key: str, expected: str, got: object) -> None:
    if not ok:
        raise ConfigError(f"{key}: expected {expected}, got {got!r}")


@dataclass
class DataConfig:
    """Where the frames come from and how they are cut for training."""

    name: str = "synthetic"
    """Dataset: synthetic, camvid11-segnet, camvid11-ignore, cityscapes or folder."""
    root: str = ""
    """Folder of the dataset; generated data needs none."""
    train_split: str = "train"
    """Split to train on."""
    val_split: str = "val"
    """Split to evaluate on."""
    num_classes: int | None = None
    """Number of classes of a folder dataset; the other datasets know theirs."""
    length: int | None = None
    """Number of generated training frames, an eighth of it to validate on; synthetic only."""
    crop: tuple[int, int] = (256, 512)
    """Height and width of a training crop, pixels."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Range of the random scale."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.4
    """Strength of the brightness, contrast and saturation jitter; 0 is off."""
    batch_size: int = 8
    """Frames per training step and process, at least 2."""
    workers: int = 2
    """Loader processes; 0 loads in the main process."""

    def __post_init__(self) -> None:
        _require(min(self.crop) >= 64, "data.crop", "height and width >= 64", self.crop)
        _require(0 < self.scale[0] <= self.scale[1] < math.inf, "data.scale", "0 < low <= high < inf", self.scale)
        _require(0 <= self.flip <= 1, "data.flip", "a probability", self.flip)
        _require(0 <= self.jitter < 1, "data.jitter", "0 <= jitter < 1", self.jitter)
        _require(self.batch_size >= 2, "data.batch_size", "at least 2 (BN sees a 1x1 map)", self.batch_size)
        _require(self.workers >= 0, "data.workers", "at least 0", self.workers)
        _require(
            self.num_classes is None or 2 <= self.num_classes <= 254, "data.num_classes", "2 to 254", self.num_classes
        )
        _require(self.length is None or self.length >= 8, "data.length", "at least 8", self.length)

    def options(self, split: str) -> dict[str, int]:
        """What a dataset of that name takes besides its root and split."""
        options = {"num_classes": self.num_classes, "length": self.length}
        if self.length is not None and split != self.train_split:
            options["length"] = self.length // 8
        return {key: value for key, value in options.items() if value is not None}


@dataclass
class ModelConfig:
    """The network."""

    name: str = "bcmfnet"
    """Model: bcmfnet or ddrnet23_slim."""
    aux: bool = True
    """Train with the auxiliary head."""
    pretrained: str | None = None
    """Weights to start from: a file of ours, the folder of a run, or an official DDRNet-23-slim checkpoint."""


@dataclass
class LossConfig:
    """The Boundary Corrected Loss on both heads."""

    mode: LossMode = "detect"
    """Reading of the loss; plain is cross-entropy, ohem is OHEM (threshold and min_kept alone select)."""
    boundary_weight: float = 1.0
    """Weight of the boundary term (lambda)."""
    step: int = 1
    """Flip step, pixels."""
    nms: int = 1
    """Side of the suppression window, odd pixels; 1 is off, the paper's presets have 3."""
    threshold: float = 0.3567
    """Score from which a candidate is hard (tau), nats."""
    ratio: float = 0.0
    """Share of the candidates that is selected at least; the paper's presets have 1/16."""
    min_kept: int = 0
    """Number of candidates in a batch that is selected at least."""
    aux_weight: float = 0.4
    """Weight of the auxiliary head's loss."""

    def __post_init__(self) -> None:
        _require(self.step >= 1, "loss.step", "at least 1", self.step)
        _require(self.nms >= 1 and self.nms % 2 == 1, "loss.nms", "an odd number", self.nms)
        _require(0 <= self.ratio <= 1, "loss.ratio", "0 to 1", self.ratio)
        for key in ("boundary_weight", "threshold", "min_kept", "aux_weight"):
            _require(getattr(self, key) >= 0, f"loss.{key}", "at least 0", getattr(self, key))


@dataclass
class OptimConfig:
    """The optimiser and its schedule: linear warm-up, then polynomial decay to zero."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Optimiser."""
    lr: float = 0.01
    """Learning rate at the end of the warm-up."""
    momentum: float = 0.9
    """Momentum (SGD), or the first beta (AdamW)."""
    weight_decay: float = 5e-4
    """Weight decay."""
    decay_1d: bool = True
    """Decay biases and normalisation parameters too, as the published recipes do."""
    power: float = 0.9
    """Power of the polynomial decay."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    epochs: float | None = None
    """Length of the run in epochs; this or steps."""
    steps: int | None = None
    """Length of the run in optimiser steps; this or epochs."""

    def __post_init__(self) -> None:
        _require(0 < self.lr < math.inf, "optim.lr", "more than 0", self.lr)
        _require(0 <= self.momentum < 1, "optim.momentum", "0 <= momentum < 1", self.momentum)
        _require(0 <= self.weight_decay < math.inf, "optim.weight_decay", "at least 0", self.weight_decay)
        _require(0 <= self.power < math.inf, "optim.power", "at least 0", self.power)
        _require(self.warmup_steps >= 0, "optim.warmup_steps", "at least 0", self.warmup_steps)
        _require(self.steps is None or self.steps >= 1, "optim.steps", "at least 1", self.steps)
        _require(self.epochs is None or 0 < self.epochs < math.inf, "optim.epochs", "more than 0", self.epochs)


@dataclass
class TrainConfig:
    """Everything that a training run depends on."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    seed: int = 0
    """Seed of the weights, the order of the frames and their augmentation."""
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """Mixed precision; auto is bf16 where the device computes in it, else off."""
    device: str = "auto"
    """cpu, cuda or cuda:N; auto is the GPU where there is one."""
    compile: bool = False
    """Compile the model with torch.compile."""
    val_every: float = 1.0
    """Epochs between evaluations; the last step is always evaluated."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl."""

    def __post_init__(self) -> None:
        _require(self.seed >= 0, "seed", "at least 0", self.seed)
        _require(0 < self.val_every < math.inf, "val_every", "more than 0", self.val_every)
        _require(self.log_every >= 1, "log_every", "at least 1", self.log_every)
        _require(
            not (self.optim.steps and self.optim.epochs),
            "optim.steps, optim.epochs",
            "one of the two",
            (self.optim.steps, self.optim.epochs),
        )

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values; what is unset (None) is left out."""
        return _without_none(dataclasses.asdict(self))


def _without_none(tree: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in tree.items()
        if value is not None
    }


_CITYSCAPES = {"name": "cityscapes", "crop": [1024, 1024], "batch_size": 8, "workers": 8}

PAPER_LOSS = {"mode": "paper", "nms": 3, "ratio": 1 / 16}
"""The paper's reading: non-maximum suppression, and a share of what it leaves."""

PRESETS: dict[str, dict[str, Any]] = {
    "synthetic": {
        "data": {"name": "synthetic", "crop": [256, 512]},
        "optim": {"name": "adamw", "lr": 2e-3, "weight_decay": 0.01, "warmup_steps": 10, "steps": 150},
        "val_every": 0.5,
    },
    "camvid": {
        "data": {"name": "camvid11-segnet", "crop": [360, 480], "batch_size": 8},
        "optim": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.01, "warmup_steps": 100, "epochs": 200},
        "val_every": 5,
    },
    "cityscapes": {"data": _CITYSCAPES, "optim": {"lr": 0.01, "warmup_steps": 500, "steps": 120_000}, "val_every": 5},
    "paper": {
        "data": _CITYSCAPES,
        "loss": PAPER_LOSS,
        "optim": {"lr": 0.1, "warmup_steps": 1000, "steps": 120_000},
        "val_every": 5,
    },
    "paper-camvid": {
        "data": {"name": "camvid11-ignore", "crop": [720, 960], "batch_size": 16, "workers": 8},
        "loss": PAPER_LOSS,
        "optim": {"lr": 0.1, "warmup_steps": 1000, "steps": 20_000},
        "val_every": 5,
    },
}
"""Values laid over the defaults of TrainConfig; a configuration file and flags go on top.

`paper` is section 3.2 of the paper (SGD 0.9 / 5e-4, learning rate 0.1, which is ten times every peer's: hence the
warm-up); the paper states no schedule, so the length is the peers'. `paper-camvid` is the same at 960x720 x 16.
"""


def preset(name: str) -> dict[str, Any]:
    """Values of a preset. Raises ConfigError with the choices when there is none of that name."""
    if name not in PRESETS:
        raise ConfigError(unknown_name("preset", name, PRESETS))
    return PRESETS[name]


def to_toml(values: dict[str, Any]) -> str:
    """TOML text of a nested dict of plain values: scalars first, then one table for each section."""
    scalars = {key: value for key, value in values.items() if not isinstance(value, dict)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in scalars.items()]
    for section, table in values.items():
        if isinstance(table, dict):
            lines += ["", f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(lines).strip() + "\n"
