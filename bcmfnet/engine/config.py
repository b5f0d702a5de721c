"""What a run is made of, as nested dataclasses that check themselves, and the presets that fill them in."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypedDict

from bcmfnet.engine.bounds import Between, as_utf8, check_fields
from bcmfnet.errors import ConfigError, unknown_name

LossMode = Literal["detect", "detect0", "paper", "paper0", "ohem", "plain"]
CLASS_WEIGHTS = ("none", "enet", "median")
"""Values of loss.class_weights that are no file."""
PATH = "path"
"""Annotation of an option that is the path of a file or folder."""
OptionalPath = Annotated[str | None, PATH]
MAX_WORKERS, MAX_STEPS, MAX_EPOCHS, MAX_SIDE = 1024, 10**9, 10**6, 2**14
Workers = Annotated[int, Between(0, MAX_WORKERS)]


def _require(ok: bool, key: str, expected: str, got: object) -> None:
    if not ok:
        raise ConfigError(f"{key}: expected {expected}, got {got!r}")


@dataclass
class DataConfig:
    """Where the frames come from and how they are cut for training."""

    name: str = "synthetic"
    """Dataset: synthetic, camvid11-segnet, camvid11-ignore, cityscapes, folder, or prepared by `data prepare`."""
    root: Annotated[str, PATH] = ""
    """Folder of the dataset; generated data needs none."""
    train_split: str = "train"
    """Split to train on."""
    val_split: str = "val"
    """Split to evaluate on."""
    num_classes: Annotated[int | None, Between(2, 254)] = None
    """Number of classes of a folder dataset; the other datasets know theirs."""
    colors: OptionalPath = None
    """JSON or CSV file with the classes of a folder dataset and their colours; needed where its masks are colours."""
    length: Annotated[int | None, Between(8, 10**7)] = None
    """Number of generated training frames, an eighth of it to validate on; synthetic only."""
    crop: Annotated[tuple[int, int], Between(64, MAX_SIDE)] = (256, 512)
    """Height and width of a training crop, pixels."""
    crops: tuple[str, ...] = ()
    """Smaller crops to begin with, HxW@SHARE: 192x256@0.6 until 60 % of the run."""
    scale: Annotated[tuple[float, float], Between(0.01, 100)] = (0.5, 2.0)
    """Range of the random scale."""
    flip: Annotated[float, Between(0, 1)] = 0.5
    """Probability of a horizontal flip."""
    jitter: Annotated[float, Between(0, 1, "[)")] = 0.4
    """Strength of the brightness, contrast and saturation jitter; 0 is off."""
    balance: Annotated[float, Between(0, 1)] = 0.0
    """Probability that a crop is laid around a pixel of a class drawn evenly from those of its frame."""
    strict: bool = False
    """End at a frame that cannot be read, instead of taking another one in its place with a warning."""
    batch_size: Annotated[int, Between(2, 2**16)] = 8
    """Frames per training step and process; batch normalisation needs two."""
    workers: Workers = 2
    """Loader processes; 0 loads in the main process."""

    def __post_init__(self) -> None:
        check_fields(self, "data.")
        _require(self.scale[0] <= self.scale[1], "data.scale", "the lower one first", self.scale)
        shares = [share for share, _ in self.stages()]
        growing = shares == sorted(set(shares)) and shares[0] > 0
        _require(growing, "data.crops", "shares that grow from above 0 to below 1", self.crops)

    def stages(self) -> tuple[tuple[float, tuple[int, int]], ...]:
        """The crops of a run in their order, each with the share of the run at which it ends; the last is `crop`."""
        stages = []
        for text in self.crops:
            found = re.fullmatch(r"(\d{1,6})x(\d{1,6})@(0?\.\d+)", text)
            if found is None:
                raise ConfigError(f"data.crops: expected HxW@SHARE such as 192x256@0.6, got {text!r}")
            height, width, share = int(found[1]), int(found[2]), float(found[3])
            fits = all(side in Between(64, MAX_SIDE) for side in (height, width))
            _require(fits, "data.crops", f"height and width from 64 to {MAX_SIDE}", text)
            stages.append((share, (height, width)))
        return (*stages, (1.0, self.crop))

    def options(self, split: str) -> dict[str, Any]:
        """What a dataset of that name takes besides its root and split."""
        options = {"num_classes": self.num_classes, "colors": self.colors, "length": self.length}
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
    pretrained: OptionalPath = None
    """Weights to start from: a file of ours, the folder of a run, camvid11, or an official DDRNet-23-slim file."""
    freeze: bool = False
    """Train the context module and the heads alone; the backbone keeps its weights and its statistics."""

    def __post_init__(self) -> None:
        check_fields(self, "model.")


@dataclass
class LossConfig:
    """A weighted sum of terms on both heads; by default the Boundary Corrected Loss."""

    mode: LossMode = "detect"
    """Reading of the boundary term; plain has none, ohem is OHEM (threshold and min_kept alone select)."""
    ce: Annotated[float, Between(0, 10**6)] = 1.0
    """Weight of the cross-entropy of every pixel."""
    boundary: Annotated[float, Between(0, 10**6)] = 1.0
    """Weight of the boundary term (lambda)."""
    focal: Annotated[float, Between(0, 10**6)] = 0.0
    """Weight of the focal loss."""
    dice: Annotated[float, Between(0, 10**6)] = 0.0
    """Weight of the Dice loss."""
    jaccard: Annotated[float, Between(0, 10**6)] = 0.0
    """Weight of the Jaccard (IoU) loss."""
    tversky: Annotated[float, Between(0, 10**6)] = 0.0
    """Weight of the Tversky loss."""
    distillation: Annotated[float, Between(0, 10**6)] = 0.0
    """Weight of the distillation loss, which needs loss.teacher."""
    teacher: OptionalPath = None
    """Weights of the network to distil: a file of ours, the folder of a run or a name such as camvid11."""
    aux: Annotated[float, Between(0, 10**6)] = 0.4
    """Weight of the auxiliary head's loss."""
    label_smoothing: Annotated[float, Between(0, 1, "[)")] = 0.0
    """Share of the cross-entropy's target that all classes have alike."""
    focal_gamma: Annotated[float, Between(0, 100)] = 2.0
    """Exponent of the focal loss."""
    tversky_alpha: Annotated[float, Between(0, 10**6)] = 0.5
    """What a false positive weighs in the Tversky loss."""
    tversky_beta: Annotated[float, Between(0, 10**6)] = 0.5
    """What a false negative weighs in the Tversky loss."""
    overlap_smooth: Annotated[float, Between(0, 10**6)] = 0.0
    """Added to both sides of the fractions of Dice, Jaccard and Tversky."""
    overlap_log: bool = False
    """Take -log(score) in place of 1 - score of Dice, Jaccard and Tversky."""
    overlap_absent: Literal["skip", "zero", "count"] = "skip"
    """A class that no pixel of the batch has is left out of their mean, counts as 0 or as any other."""
    overlap_per_image: bool = False
    """Dice, Jaccard and Tversky of each image instead of the batch."""
    temperature: Annotated[float, Between(0, 10**6, "(]")] = 1.0
    """Temperature of the distillation loss."""
    distillation_where: Literal["valid", "all"] = "valid"
    """Pixels that are distilled: those with a label, or all."""
    boundary_term: Literal["ce", "focal"] = "ce"
    """What the boundary term sums up over its pixels: cross-entropy or the focal loss."""
    step: Annotated[int, Between(1, MAX_SIDE)] = 1
    """Flip step, pixels."""
    nms: Annotated[int, Between(1, 2 * MAX_SIDE + 1)] = 1
    """Side of the suppression window, odd pixels; 1 is off, the paper's presets have 3."""
    threshold: Annotated[float, Between(0, 10**6)] = 0.3567
    """Score from which a candidate is hard (tau), nats."""
    ratio: Annotated[float, Between(0, 1)] = 0.0
    """Share of the candidates that is selected at least; the paper's presets have 1/16."""
    min_kept: Annotated[int, Between(0, 2**31 - 1)] = 0
    """Number of candidates in a batch that is selected at least."""
    max_kept: Annotated[int | None, Between(0, 2**31 - 1)] = None
    """Number of candidates in a batch that is selected at most; None is no limit."""
    alpha: Annotated[float, Between(0, 10**6)] = 1.0
    """Weight of the cross-entropy against the labels of flipped rows."""
    beta: Annotated[float, Between(0, 10**6)] = 1.0
    """Weight of the cross-entropy against the labels of flipped columns."""
    flip: Literal["swap", "mirror"] = "swap"
    """What a flip does: swap the rows of each pair, or mirror the map."""
    norm: Literal["selected", "valid"] = "selected"
    """What the boundary term is divided by: the number of selected, or of valid, pixels."""
    per_image: bool = False
    """Select within each image instead of over the batch."""
    inplace_grad: bool = False
    """Write the gradient over the logits: less memory."""
    validate: bool = False
    """Check the labels of each batch and wait for the answer, also on a GPU."""
    sync: bool = False
    """Select and divide over the batches of all processes, not each over its own."""
    jitter: bool = True
    """Move the pairs of the flips from step to step, so that every edge is seen in time."""
    class_weights: str = "none"
    """Weights of the classes, of mean 1 over the pixels: none, enet, median or a JSON file."""
    class_weights_until: Annotated[float | None, Between(0, 1, "(]")] = None
    """Share of the run at which no class weight is left, after a linear way to 1; None keeps them."""

    def __post_init__(self) -> None:
        check_fields(self, "loss.")
        _require(self.nms % 2 == 1, "loss.nms", "an odd number", self.nms)
        taught = (self.distillation != 0) == (self.teacher is not None)
        both = f"distillation {self.distillation:g}, teacher {self.teacher}"
        _require(taught, "loss.distillation, loss.teacher", "both or neither of them", both)


@dataclass
class OptimConfig:
    """The optimiser and its schedule: linear warm-up, then decay to zero."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Optimiser."""
    lr: Annotated[float, Between(0, 1000, "(]")] = 0.01
    """Learning rate at the end of the warm-up."""
    backbone_lr: Annotated[float, Between(0, 1000, "(]")] = 1.0
    """Learning rate of the backbone as a multiple of lr: below 1 to fine-tune pretrained weights."""
    momentum: Annotated[float, Between(0, 1, "[)")] = 0.9
    """Momentum (SGD), or the first beta (AdamW)."""
    weight_decay: Annotated[float, Between(0, 1000)] = 5e-4
    """Weight decay."""
    decay_1d: bool = True
    """Decay biases and normalisation parameters too, as the published recipes do."""
    schedule: Literal["poly", "cosine", "onecycle"] = "poly"
    """Learning rate over the run, t from 0 to 1: poly, (1 - t) ** power; cosine; onecycle, up until 0.3, then down."""
    power: Annotated[float, Between(0, 100)] = 0.9
    """Power of the polynomial decay."""
    warmup_steps: Annotated[int, Between(0, MAX_STEPS)] = 0
    """Steps of linear warm-up."""
    accumulate: Annotated[int, Between(1, 2**16)] = 1
    """Batches, on each process, whose gradients are averaged for a step."""
    clip: Annotated[float | None, Between(0, 10**6, "(]")] = None
    """Norm of all gradients above which they are scaled down to it; None is off."""
    ema: Annotated[float | None, Between(0, 1, "[)")] = None
    """Decay of a moving average of the weights, which then is what is evaluated and saved; None is off."""
    epochs: Annotated[float | None, Between(0, MAX_EPOCHS, "(]")] = None
    """Length of the run in epochs; this or steps."""
    steps: Annotated[int | None, Between(1, MAX_STEPS)] = None
    """Length of the run in optimiser steps; this or epochs."""

    def __post_init__(self) -> None:
        check_fields(self, "optim.")


@dataclass
class TrainConfig:
    """Everything that a training run depends on."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    seed: Annotated[int, Between(0, 2**63 - 1)] = 0
    """Seed of the weights, the order of the frames and their augmentation."""
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """Mixed precision; auto is bf16 where the device computes in it, else off. fp16 skips steps that overflow."""
    device: str = "auto"
    """cpu, cuda or cuda:N; auto is the GPU where there is one."""
    compile: bool = False
    """Compile the model with torch.compile."""
    cuda_graph: bool = False
    """Replay the passes forward and back from a CUDA graph, one for each crop; needs loss.jitter off."""
    deterministic: bool = False
    """Use deterministic algorithms alone: equal runs have equal weights, bit for bit, at the same number of threads."""
    val_every: Annotated[float, Between(0, MAX_EPOCHS, "(]")] = 1.0
    """Epochs between evaluations; the last step is always evaluated."""
    select: Literal["best", "last"] = "best"
    """Evaluated weights that the run stands for, weights/best.safetensors: of the best evaluation, or of the last."""
    patience: Annotated[int | None, Between(1, MAX_STEPS)] = None
    """Evaluations without a better one after which the run ends; None is off."""
    log_every: Annotated[int, Between(1, MAX_STEPS)] = 10
    """Steps between rows of metrics.jsonl."""
    save_every_minutes: Annotated[float, Between(0, 10**6)] = 10.0
    """Minutes after which the state is saved, also between evaluations; what a run that is killed can lose."""
    tensorboard: bool = False
    """Write the figures of metrics.jsonl for TensorBoard too, into the folder tensorboard of the run."""
    keep: Annotated[int, Between(1, 1000)] = 2
    """Checkpoints that are kept; where the last one is damaged, the one before it is resumed."""

    def __post_init__(self) -> None:
        check_fields(self)
        both = self.optim.steps, self.optim.epochs
        _require(not all(both), "optim.steps, optim.epochs", "one of the two", both)
        moving = self.cuda_graph and self.loss.jitter
        _require(not moving, "cuda_graph", "loss.jitter off, which changes from step to step", self.cuda_graph)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values; what is unset (None) is left out."""
        return _without_none(dataclasses.asdict(self))

    def with_absolute_paths(self) -> TrainConfig:
        """The same configuration for any working folder."""
        from bcmfnet.models.weights import list_weights

        data = dataclasses.replace(self.data, root=_absolute(self.data.root), colors=_absolute(self.data.colors))
        model = dataclasses.replace(self.model, pretrained=_absolute(self.model.pretrained, list_weights()))
        loss = dataclasses.replace(
            self.loss,
            class_weights=_absolute(self.loss.class_weights, CLASS_WEIGHTS),
            teacher=_absolute(self.loss.teacher, list_weights()),
        )
        return dataclasses.replace(self, data=data, model=model, loss=loss)


def _absolute(path: Any, names: Collection[str] = ()) -> Any:
    """A path from the root, None and names as they are."""
    return path if not path or path in names else os.path.abspath(os.path.expanduser(path))


def _without_none(tree: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in tree.items()
        if value is not None
    }


LOGIT_STRIDE = 8
"""Pixels of a frame to a step of the networks' logits."""


@dataclass
class TTAConfig:
    """Test-time augmentation: the views of a frame that a prediction is the mean of; off by default."""

    scales: Annotated[tuple[float, ...], Between(0.1, 4)] = (1.0,)
    """Scales of the frame, over which softmax probabilities are averaged."""
    flip: bool = False
    """Average over the mirrored frame as well, at each scale."""
    window: Annotated[tuple[int, int] | None, Between(64, MAX_SIDE)] = None
    """Height and width of windows that slide over the scaled frame, multiples of 8 pixels; None is the whole frame."""
    stride: Annotated[tuple[int, int] | None, Between(LOGIT_STRIDE, MAX_SIDE)] = None
    """Rows and columns from a window to the next, multiples of 8 pixels; None is two thirds of the window."""

    def __post_init__(self) -> None:
        check_fields(self, "tta.")
        _require(len(self.scales) > 0, "tta.scales", "a scale", self.scales)
        for key, value in (("window", self.window), ("stride", self.stride)):
            aligned = value is None or not any(side % LOGIT_STRIDE for side in value)
            _require(aligned, f"tta.{key}", f"multiples of {LOGIT_STRIDE}", value)
        if self.window is None:
            _require(self.stride is None, "tta.stride", "none without a window", self.stride)
        elif self.stride is not None:
            inside = all(step <= side for step, side in zip(self.stride, self.window, strict=True))
            _require(inside, "tta.stride", f"at most the window's {self.window}", self.stride)

    def steps(self) -> tuple[int, int] | None:
        """Rows and columns from a window to the next; None without windows."""
        if self.window is None or self.stride is not None:
            return self.stride
        rows, columns = (2 * side // (3 * LOGIT_STRIDE) * LOGIT_STRIDE for side in self.window)
        return rows, columns

    def changes(self) -> dict[str, dict[str, Any]]:
        """What an evaluation's JSON has of it: plain values under `tta`, nothing where all is off."""
        return {} if self == TTAConfig() else {"tta": _without_none(dataclasses.asdict(self))}


@dataclass
class StreamConfig:
    """What is made of a stream, and how one is read that does not say of itself what it is."""

    videos: Literal["both", "labels", "overlay"] = "both"
    """Label ids, exact, as NAME_labelIds.mkv, an overlay as NAME_overlay.mp4, or both."""
    clip: bool = False
    """Take the images of the folder SOURCE, in the order of their names, as the frames of a stream."""
    size: Annotated[tuple[int, int] | None, Between(64, MAX_SIDE)] = None
    """Height and width of the raw frames on standard input."""
    format: str = "rgb24"
    """Pixel format of the raw frames, as FFmpeg names it: rgb24, bgr24, gray, yuv420p, nv12, ..."""
    fps: Annotated[float, Between(0.01, 1000)] = 25.0
    """Frames a second of raw frames and of a clip."""
    timeout: Annotated[float, Between(0.1, 3600)] = 10.0
    """Seconds after which a URL that gives nothing is taken for broken."""

    def __post_init__(self) -> None:
        check_fields(self, "stream.")


_CITYSCAPES = {"name": "cityscapes", "crop": [1024, 1024], "batch_size": 8, "workers": 8}


class _PaperLoss(TypedDict):
    mode: Literal["paper"]
    nms: int
    ratio: float


PAPER_LOSS: _PaperLoss = {"mode": "paper", "nms": 3, "ratio": 1 / 16}
"""The paper's reading: non-maximum suppression, and a share of what it leaves."""
_PAPER = PAPER_LOSS | {"jitter": False}

PRESETS: dict[str, dict[str, Any]] = {
    "synthetic": {
        "data": {
            "name": "synthetic",
            "crop": [256, 512],
            "crops": ["128x256@0.75"],
            # Drawn frames never end: to scale and colour them anew costs a run this short 10 points.
            "scale": [1.0, 1.0],
            "jitter": 0.0,
            "balance": 0.5,
            "batch_size": 4,
        },
        "loss": {"class_weights": "enet"},
        "optim": {
            "name": "adamw",
            "lr": 4e-3,
            "weight_decay": 0.01,
            "schedule": "cosine",
            "warmup_steps": 20,
            "steps": 600,
        },
    },
    "camvid": {
        "data": {"name": "camvid11-segnet", "crop": [360, 480], "crops": ["192x256@0.7"], "workers": 1},
        "loss": {"class_weights": "enet"},
        "optim": {
            "name": "adamw",
            "lr": 2e-3,
            "weight_decay": 0.05,
            "schedule": "cosine",
            "warmup_steps": 200,
            "ema": 0.999,
            "steps": 11_000,
        },
        "val_every": 20,
        "select": "last",
    },
    "cityscapes": {"data": _CITYSCAPES, "optim": {"lr": 0.01, "warmup_steps": 500, "steps": 120_000}, "val_every": 5},
    "paper": {
        "data": _CITYSCAPES,
        "loss": _PAPER,
        "optim": {"lr": 0.1, "warmup_steps": 1000, "steps": 120_000},
        "val_every": 5,
    },
    "paper-camvid": {
        "data": {"name": "camvid11-ignore", "crop": [720, 960], "batch_size": 16, "workers": 8},
        "loss": _PAPER,
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
    """TOML text, all of it ASCII, of a nested dict of plain values: scalars first, then a table for each section."""
    scalars = {key: value for key, value in values.items() if not isinstance(value, dict)}
    lines = [f"{key} = {_toml_value(value)}" for key, value in scalars.items()]
    for section, table in values.items():
        if isinstance(table, dict):
            lines += ["", f"[{section}]", *(f"{key} = {_toml_value(value)}" for key, value in table.items())]
    return "\n".join(lines).strip() + "\n"


def _toml_value(value: Any) -> str:
    return f'"{"".join(map(_toml_character, as_utf8(value)))}"' if isinstance(value, str) else json.dumps(value)


def _toml_character(character: str) -> str:
    """JSON has no escape of eight digits, and leaves DEL as it is."""
    if " " <= character <= "~":
        return f"\\{character}" if character in '"\\' else character
    return f"\\u{ord(character):04x}" if character <= "\uffff" else f"\\U{ord(character):08x}"
