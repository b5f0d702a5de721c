"""Models by name, to a weights file and from one."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from numbers import Integral
from os import PathLike
from typing import SupportsInt, TypeGuard, Unpack

import torch
from torch import Tensor, nn

from bcmfnet.errors import CheckpointError, ConfigError
from bcmfnet.models.bcmfnet import BCMFNet
from bcmfnet.models.ddrnet import DDRNet23Slim, DualResolutionNet
from bcmfnet.models.pretrained import load_pretrained
from bcmfnet.models.weights import (
    check_same_tensors,
    check_values,
    checked,
    read_weights,
    unwrapped,
    unwrapped_model,
    write_weights,
)
from bcmfnet.nn.context import ContextOptions
from bcmfnet.ops import _options

MODELS: dict[str, type[DDRNet23Slim]] = {"bcmfnet": BCMFNet, "ddrnet23_slim": DDRNet23Slim}
MAX_CLASSES = 256


def list_models() -> list[str]:
    """Names that `create_model` knows."""
    return sorted(MODELS)


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    aux: bool = False,
    pretrained: str | PathLike[str] | None = None,
    **options: Unpack[ContextOptions],
) -> DualResolutionNet:
    """Build a model by name, in training mode, on the CPU (or the current `torch.device` context).

    Args:
        name: one of `list_models()`.
        num_classes: 1..256; without it as many as pretrained weights of ours have.
        aux: with the auxiliary head, which answers in training mode only.
        pretrained: path of weights of ours, of a run's folder or of an official DDRNet-23-slim checkpoint, or a name
            of `list_weights`, see `load_pretrained`; nothing is downloaded.
        options: keywords of the context module (`LMFM` for bcmfnet, `DAPPM` for ddrnet23_slim).

    Raises:
        ConfigError: unknown name, option or class count, `pretrained` not a path.
        TypeError, ValueError: an unknown option value.
        CheckpointError: a pretrained file that cannot be read or does not fit.
    """
    if name not in MODELS:
        choices = " or ".join(list_models())
        raise ConfigError(f"model: expected {choices}, got {name!r}{_suggestion(name, MODELS)}")
    if not isinstance(pretrained, str | PathLike | None):
        raise ConfigError(
            f"pretrained: expected the path of a weights file, none can be downloaded; got {pretrained!r}"
        )
    if num_classes is None and pretrained is not None:
        num_classes = read_weights(pretrained)[1].get("num_classes")
    if not _is_class_count(num_classes):
        raise ConfigError(f"num_classes: expected an integer in 1..{MAX_CLASSES}, got {num_classes!r}")
    model_class = MODELS[name]
    known = model_options(model_class)
    for option in options:
        if option not in known:
            choices = ", ".join(known)
            raise ConfigError(f"model option {option!r}: {name} has {choices}{_suggestion(option, known)}")
    aux, num_classes, options = _options.boolean("aux", aux), int(num_classes), _options.plain(options)
    model = model_class(num_classes, aux, **options)
    model.recipe = {"model": name, "num_classes": num_classes, "aux": aux, "options": options}
    if pretrained is not None:
        load_pretrained(model, pretrained)
    return model


def save_weights(
    path: str | PathLike, model: nn.Module, metadata: Mapping | None = None, *, dtype: torch.dtype | None = None
) -> None:
    """Write a model's state dict as safetensors; a former file stays until the new one is complete.

    The model within DataParallel, DistributedDataParallel, AveragedModel, torch.compile and wrappers that keep it as
    `model` or `module` is what is saved.

    Args:
        metadata: JSON values to keep beside the weights, e.g. label_table, mean, std. A model that
            `create_model` did not build needs `model` and `num_classes` in it.
        dtype: in which the kernels of convolutions are written, float16 for a file of half the size; what reads it
            gives float32 back. Without it each as it is.

    Raises:
        CheckpointError: the file cannot be written. ValueError: incomplete metadata, tensors that are not those of the
            model which the metadata describes, or a value that no trained network has.
    """
    model = unwrapped_model(model)
    has_aux = getattr(model, "aux_head", None) is not None
    metadata = {"aux": has_aux, **getattr(model, "recipe", {}), **(metadata or {})}
    if not {"model", "num_classes"} <= metadata.keys():
        raise ValueError("metadata: expected at least 'model' and 'num_classes' to rebuild the model from")
    with torch.device("meta"):
        own = _described("metadata", metadata, aux=metadata["aux"]).state_dict()
    state = unwrapped("model", model.state_dict())
    _check_names(metadata["model"], own, state)
    check_same_tensors("model", own, state)
    if dtype is not None:
        state |= {key: tensor.to(dtype) for key, tensor in state.items() if tensor.ndim > 1}
    check_values("model", state)
    write_weights(path, state, metadata)


def _check_names(name: str, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the tensors to save are named as those of the model `name`."""
    lacking, more = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if not (lacking or more):
        return
    first = f".{next(iter(own))}"
    holders = [key.removesuffix(first) for key in state if key.endswith(first)]
    inner = [holder for holder in holders if {f"{holder}.{key}" for key in own} <= state.keys()]
    advice = f"model.{inner[0]}" if inner else "what create_model made, not for_inference's copy, and without masks"
    counts = [f"{len(keys)} {word} ({keys[0]})" for keys, word in ((lacking, "missing"), (more, "more")) if keys]
    raise ValueError(f"model: expected the {len(own)} tensors of {name}, got {' and '.join(counts)}; save {advice}")


def model_from_weights(path: str | PathLike, device: str | torch.device = "cpu") -> tuple[DualResolutionNet, dict]:
    """The model that a file of `save_weights` describes, in eval mode, without auxiliary head; its metadata.

    Raises:
        CheckpointError: an unreadable file, one without our metadata, or tensors that are not the model's.
    """
    state, metadata = read_weights(path)
    if not metadata:
        found = f"{len(state)} tensors ({next(iter(state))!r}, ...) without a model's name"
        advice = "to start from them: --model.pretrained, create_model(..., pretrained=path)"
        raise CheckpointError(f"{path}: expected weights that save_weights or a training wrote, got {found}; {advice}")
    model = _described(path, metadata)
    state = {key: tensor for key, tensor in state.items() if not key.startswith("aux_head.")}
    check_same_tensors(path, model.state_dict(), state)
    model.load_state_dict(state)
    return model.to(device).eval(), metadata


def _described(path: str | PathLike, metadata: Mapping, aux: bool = False) -> DualResolutionNet:
    """The model, with initial weights, that metadata describe. Raises CheckpointError, which starts with `path`."""
    name = checked(path, metadata, "model", " or ".join(list_models()), lambda value: value in list_models())
    num_classes = checked(path, metadata, "num_classes", f"an integer in 1..{MAX_CLASSES}", _is_class_count)
    options = checked(
        path, {"options": {}} | dict(metadata), "options", "keywords of the model", lambda v: isinstance(v, dict)
    )
    try:
        return create_model(name, num_classes=num_classes, aux=aux, **options)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: options: {error}") from error


def _is_class_count(value: object) -> TypeGuard[SupportsInt]:
    return isinstance(value, Integral) and not isinstance(value, bool) and 1 <= int(value) <= MAX_CLASSES


def model_options(model_class: type[DDRNet23Slim]) -> list[str]:
    """Keywords that a model hands to its context module."""
    parameters = inspect.signature(model_class.context_class).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]


def _suggestion(word: str, choices) -> str:
    close = difflib.get_close_matches(str(word), choices, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
