"""What the formats of the kernels hold: every limit, why it is there, and its check. What exceeds one is refused.

The kernels assert the class counts where they pack labels (csrc/bcl/bcl.h); plain PyTorch has no limit of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

MAX_SIDE = 2**17
"""Pixels of a side: coordinates and flips are int32, and a CUDA grid has 65535 blocks along its second and third axis,
of which Triton's upsample_argmax takes one for every 4 rows of a cell."""
MAX_PIXELS = 2**31 - 1
"""Pixels of a batch: the selection counts them in int32, and a CUDA grid has as many blocks along its first axis."""
MAX_CHANNELS = 2**17
"""Channels of a map: Triton's upsample_add_relu takes a block for every 4 along a grid's third axis."""
MIN_INTEGER, MAX_INTEGER = -(2**63), 2**63 - 1
"""Integers of a schema are int64."""
MAX_STEP = MAX_SIDE
MAX_WINDOW = 2 * MAX_SIDE + 1
"""Flips and windows beyond these would reach no other pixel."""
MAX_POOLS = 6
"""Pools of a pyramid: the kernels hold their windows in arrays of so many."""
MAX_LOSS_CLASSES = 4096
"""Classes of the loss in C++ and CUDA C++: three labels + 1 of 13 bits each in 64 bits."""
MAX_LABEL_MAP_CLASSES = 2**15
"""Classes of upsample_argmax: its labels are int16 above 256 classes."""
DEFAULT_IGNORE_INDEX = 255
"""Label that does not count, unless another is passed. It is a class from 256 classes on."""


def check_extent(name: str, shape: Sequence[int]) -> None:
    """Raise ValueError where a map [N, ..., H, W] has more pixels, or a longer side, than the kernels count."""
    batch, height, width = shape[0], shape[-2], shape[-1]
    if max(height, width) > MAX_SIDE:
        raise ValueError(f"{name}: expected at most {MAX_SIDE} pixels on a side, got {list(shape)}")
    if batch * height * width > MAX_PIXELS:
        raise ValueError(f"{name}: expected at most {MAX_PIXELS} pixels in a batch, got {list(shape)}")


def check_channels(name: str, shape: Sequence[int]) -> None:
    """Raise ValueError where a map [N, C, H, W] has more channels than a grid of blocks reaches."""
    if shape[1] > MAX_CHANNELS:
        raise ValueError(f"{name}: expected at most {MAX_CHANNELS} channels, got {list(shape)}")


def check_at_least(name: str, value: int, limit: int) -> None:
    if value < limit:
        raise ValueError(f"{name}: expected at least {limit}, got {value}")


def check_at_most(name: str, value: int, limit: int) -> None:
    if value > limit:
        raise ValueError(f"{name}: expected at most {limit}, got {value}")


def check_loss_classes(classes: int) -> None:
    """Raise ValueError where labels do not fit the words that the C++ and the CUDA C++ kernels pack them in."""
    if classes > MAX_LOSS_CLASSES:
        raise ValueError(
            f"logits: expected at most {MAX_LOSS_CLASSES} classes, got {classes}; "
            "use_backend('reference') of bcmfnet.ops.backends computes any number"
        )


def check_label_type(dtype: torch.dtype, classes: int) -> None:
    """Raise TypeError where labels of a type reach not every class."""
    largest = torch.iinfo(dtype).max
    if classes > largest + 1:
        name = str(dtype).removeprefix("torch.")
        raise TypeError(
            f"target: expected a type that holds the labels of {classes} classes, got {name} up to {largest}"
        )


def check_default_ignore_index(ignore_index: int | None, classes: int) -> None:
    """Raise ValueError where no label to ignore was passed (None) and the default would hide a class."""
    if ignore_index is None and classes > DEFAULT_IGNORE_INDEX:
        raise ValueError(
            f"ignore_index: expected it to be passed with {classes} classes, one of which is the default "
            f"{DEFAULT_IGNORE_INDEX}; -1, for instance, is none"
        )
