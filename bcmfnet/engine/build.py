"""What a run is built from: datasets, the batches of its steps, network, loss and class weights."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bcmfnet.data import Batch, Dataset, TrainTransform, build_dataset, check_split_leak, train_loader
from bcmfnet.data.class_weights import class_weights, is_rule, mean_of_one, read_class_weights
from bcmfnet.data.labels import LabelTable
from bcmfnet.data.verification import check_before_training, count_pixels
from bcmfnet.engine.config import DataConfig, LossConfig, ModelConfig, TrainConfig
from bcmfnet.engine.distributed import ALONE, Processes
from bcmfnet.engine.optim import Schedule
from bcmfnet.errors import ConfigError
from bcmfnet.models import create_model, model_from_weights
from bcmfnet.models.ddrnet import DualResolutionNet
from bcmfnet.nn import SegmentationLoss


def build_datasets(data: DataConfig) -> tuple[Any, Any]:
    """The training and the validation set of a configuration.

    Raises DataError when they share a frame, or have what no training can use.
    """
    splits = (data.train_split, data.val_split)
    train_set, val_set = (build_dataset(data.name, data.root, split, **data.options(split)) for split in splits)
    check_split_leak(train_set, val_set)
    check_before_training((train_set, val_set))
    check_crops(data, train_set)
    return train_set, val_set


def check_crops(data: DataConfig, dataset: Dataset) -> None:
    """Raise ConfigError for a crop that is larger than any frame gets at the largest scale, so padded in every step."""
    height, width = map(max, zip(*map(dataset.frame_size, range(len(dataset))), strict=True))
    largest = int(height * data.scale[1]), int(width * data.scale[1])
    for _, crop in data.stages():
        if crop[0] > largest[0] or crop[1] > largest[1]:
            key, frame = "data.crop" if crop == data.crop else "data.crops", f"the largest frame of {data.train_split}"
            bound = f"{frame}, {height}x{width}, at the largest data.scale, {data.scale[1]:g}"
            raise ConfigError(f"{key}: expected at most {_size(largest)} ({bound}), got {_size(crop)}")


def _size(size: tuple[int, int]) -> str:
    return "x".join(map(str, size))


def step_batches(
    config: TrainConfig, plan: Schedule, train_set: Dataset, step: int, processes: Processes, should_stop: object
) -> Generator[list[Batch]]:
    """The batches that this process has of each step from `step` on; ends early where should_stop becomes true."""
    data, accumulate = config.data, config.optim.accumulate
    while step < plan.steps:
        crop, change = plan.crop(step)
        transform = TrainTransform(
            crop=crop, scale=data.scale, flip=data.flip, jitter=data.jitter, balance=data.balance,
            ignore_index=train_set.table.ignore_index,
        )  # fmt: skip
        loader = train_loader(
            train_set, transform, batch_size=data.batch_size, seed=config.seed, workers=data.workers,
            start=divmod(step, plan.steps_per_epoch), rank=processes.rank, world_size=processes.count,
            accumulate=accumulate, strict=data.strict, should_stop=should_stop,
        )  # fmt: skip
        with contextlib.closing(iter(loader)) as stream:
            while step < change:
                batches = list(islice(stream, accumulate))
                if len(batches) < accumulate:
                    return
                yield batches
                step += 1


def build_model(config: ModelConfig, table: LabelTable, trained: bool) -> DualResolutionNet:
    """The network of a configuration, pretrained unless the weights of a trained one follow."""
    pretrained = None if trained else config.pretrained
    model = create_model(config.name, num_classes=table.num_classes, aux=config.aux, pretrained=pretrained)
    model.backbone.requires_grad_(not config.freeze)
    return model


def build_loss(config: LossConfig, ignore_index: int, processes: Processes = ALONE) -> SegmentationLoss:
    """The loss of a configuration: `plain` has no boundary term, `ohem` is OHEM as mmseg and HRNet users know it."""
    group = processes.group if config.sync else None
    others = {"jitter", "sync", "class_weights", "class_weights_until", "teacher"}  # which the trainer sees to
    options = {key: value for key, value in vars(config).items() if key not in others}
    options["distillation_temperature"] = options.pop("temperature")  # whose flag would not fit a line of --help
    if config.mode == "plain":
        options |= {"mode": "detect", "boundary": 0.0}
    if config.mode == "ohem":
        options |= {"ce": 0.0, "nms": 1, "ratio": 0.0}
    return SegmentationLoss(**options, ignore_index=ignore_index, process_group=group)


def build_teacher(config: LossConfig, table: LabelTable, device: torch.device) -> nn.Module | None:
    """The network whose logits are distilled, which is not trained. Raises ConfigError for one of other classes."""
    if config.teacher is None:
        return None
    teacher, metadata = model_from_weights(config.teacher, device)
    classes = metadata["num_classes"]
    if classes != table.num_classes:
        raise ConfigError(f"loss.teacher: expected a network of {table.num_classes} classes, got one of {classes}")
    return teacher.requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it


def build_class_weights(config: LossConfig, train_set: Any, kept: Path | None) -> dict[str, float] | None:
    """Weight of each class; None where the loss has none. A file of those that a run began with comes first."""
    source, table = config.class_weights, train_set.table
    if source == "none":
        return None
    if kept is not None and kept.exists():
        weights = read_class_weights(kept, table.classes)
    else:
        pixels = count_pixels(train_set)[:, : table.num_classes]
        weights = class_weights(source, pixels) if is_rule(source) else read_class_weights(Path(source), table.classes)
        weights = mean_of_one(weights, pixels)
    return dict(zip(table.classes, weights.tolist(), strict=True))
