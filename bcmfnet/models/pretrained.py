"""Initial weights from a file of ours or an official DDRNet-23-slim checkpoint (ImageNet or Cityscapes)."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike

from torch import Tensor

from bcmfnet.errors import CheckpointError
from bcmfnet.models.ddrnet import DualResolutionNet
from bcmfnet.models.weights import check_same_tensors, read_weights, unwrapped

logger = logging.getLogger("bcmfnet.models")

MIN_BACKBONE_SHARE = 0.9

# Names in ydhongHIT/DDRNet and chenjun2hao/DDRNet.pytorch to ours; the first pattern that matches counts.
# In their context module every unit is a Sequential: [pool,] norm, relu, conv.
OFFICIAL_NAMES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"^conv1\.", "backbone.stem."),
        (r"^layer5_\.0\.", "backbone.high5."),
        (r"^layer5\.0\.", "backbone.layer5."),
        (r"^layer([34])_\.", r"backbone.high\1."),
        (r"^(layer[1-4]|down[34]|compression[34])\.", r"backbone.\1."),
        (r"^spp\.scale0\.0\.", "context.scale.0.norm."),
        (r"^spp\.scale0\.2\.", "context.scale.0.conv."),
        (r"^spp\.scale([1-4])\.1\.", r"context.scale.\1.norm."),
        (r"^spp\.scale([1-4])\.3\.", r"context.scale.\1.conv."),
        (r"^spp\.process([1-4])\.0\.", r"context.process.\1.norm."),
        (r"^spp\.process([1-4])\.2\.", r"context.process.\1.conv."),
        (r"^spp\.(compression|shortcut)\.0\.", r"context.\1.norm."),
        (r"^spp\.(compression|shortcut)\.2\.", r"context.\1.conv."),
        (r"^final_layer\.", "head."),
        (r"^seghead_extra\.", "aux_head."),
    ]
]


@dataclass(frozen=True)
class LoadReport:
    """What `load_pretrained` took from a file: keys loaded and keys in all, for each part of the model."""

    loaded: dict[str, int]
    total: dict[str, int]
    unused: tuple[str, ...]

    @property
    def share(self) -> float:
        return sum(self.loaded.values()) / sum(self.total.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {self.loaded[part]} of {total}" for part, total in self.total.items())
        return f"{self.share:.1%} of the keys loaded ({parts}), {len(self.unused)} keys of the file not used"


def load_pretrained(model: DualResolutionNet, path: str | PathLike) -> LoadReport:
    """Load what fits of a weights file into a model, and log the share of keys loaded.

    The context module takes the keys of the same name and shape. A head of another class count starts anew,
    with a warning. Keys that the model does not have, such as an auxiliary head's, are not used.

    Raises:
        CheckpointError: an unreadable file, less than 90 % of the backbone's keys, or another shape in the
            backbone or in a head.
    """
    own = _counted(model.state_dict())
    state = _counted(our_names(unwrapped(path, read_weights(path)[0])))
    _check_backbone(path, own, state)
    new_heads = _heads_of_other_classes(path, own, state)

    fitting = {}
    for key in [key for key in own if key in state]:
        part, same_shape = _part(key), own[key].shape == state[key].shape
        if part in new_heads or (part == "context" and not same_shape):
            continue
        fitting[key] = state[key]
    check_same_tensors(path, {key: own[key] for key in fitting}, fitting)
    model.load_state_dict(fitting, strict=False)

    unused = tuple(key for key in state if key not in fitting)
    report = LoadReport(_keys_by_part(fitting, own), _keys_by_part(own, own), unused)
    logger.info("%s: %s", path, report)
    return report


def our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official names translated to ours; others stay."""
    return {_our_name(key): tensor for key, tensor in state.items()}


def _our_name(key: str) -> str:
    for pattern, replacement in OFFICIAL_NAMES:
        if pattern.match(key):
            return pattern.sub(replacement, key)
    return key


def _counted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without batch norm's step counters: older files lack them and nothing here reads them."""
    return {key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")}


def _part(key: str) -> str:
    return key.partition(".")[0]


def _keys_by_part(keys: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, int]:
    parts = [_part(key) for key in keys]
    return {part: parts.count(part) for part in dict.fromkeys(map(_part, own))}


def _check_backbone(path: str | PathLike, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    wanted = {key for key in own if _part(key) == "backbone"}
    found = len(wanted & state.keys())
    if found < MIN_BACKBONE_SHARE * len(wanted):
        raise CheckpointError(
            f"{path}: has {found} of the {len(wanted)} backbone keys ({found / len(wanted):.1%}), "
            f"expected at least {MIN_BACKBONE_SHARE:.0%}: weights of another model?"
        )


def _heads_of_other_classes(path: str | PathLike, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Heads whose class count differs from the file's; warns once for all of them."""
    biases = [key for key in ("head.conv2.bias", "aux_head.conv2.bias") if key in own and key in state]
    other = [key for key in biases if own[key].shape != state[key].shape]
    if other:
        theirs, ours = state[other[0]].numel(), own[other[0]].numel()
        logger.warning("%s: has %d classes, the model %d: its heads start anew", path, theirs, ours)
    return [_part(key) for key in other]
