"""Converters of what is no tensor: one rule for each kind of value, whatever it is an option of.

Each takes the option's name and value, and returns what the kernels and torch take. Numbers of NumPy count as numbers;
a bool is no number, a float no integer, and a tensor neither: to read it would wait for the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

INTEGERS = (Integral, torch.SymInt)
LARGEST_FLOAT = torch.finfo(torch.float32).max


def integer(name: str, value: Any) -> int:
    """An integer. Raises TypeError for anything else."""
    if type(value) is int:  # nearly always
        return value
    if not _is_integer(value):
        raise TypeError(f"{name}: expected an integer, got {_shown(value)}")
    return _plain(value)


def pair(name: str, value: Any, axes: str = "(H, W)") -> tuple[int, int]:
    """Two integers, or one for both axes. Raises TypeError for anything else."""
    if type(value) is not tuple and _is_integer(value):
        return _plain(value), _plain(value)
    both = integers_of(value)
    if both is None or len(both) != 2:
        raise TypeError(f"{name}: expected an integer or {axes}, got {_shown(value)}")
    return both


def integers(name: str, value: Any) -> tuple[int, ...]:
    """The integers of a sequence. Raises TypeError for anything else."""
    found = integers_of(value)
    if found is None:
        raise TypeError(f"{name}: expected integers, got {_shown(value)}")
    return found


def integers_of(value: Any) -> tuple[int, ...] | None:
    """The integers of a sequence, None where it is none or has others."""
    if isinstance(value, tuple):
        for each in value:  # plain integers nearly always
            if type(each) is not int:
                break
        else:
            return tuple(value)
    elif not isinstance(value, Iterable) or isinstance(value, (str, bytes, Tensor)):
        return None
    value = tuple(value)
    return tuple(map(_plain, value)) if all(map(_is_integer, value)) else None


def number(name: str, value: Any) -> float:
    """A real number. Raises TypeError for anything else, ValueError for an integer that no float holds."""
    if type(value) is float or isinstance(value, torch.SymFloat):
        return value  # type: ignore[return-value]
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {_shown(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a number that a float holds, got a larger one") from None


def triple(name: str, value: Any) -> tuple[float, float, float]:
    """Three real numbers. Raises TypeError for anything else, ValueError for one that is not finite."""
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Tensor)) or len(given := tuple(value)) != 3:
        raise TypeError(f"{name}: expected three numbers, got {_shown(value)}")
    first, second, third = (number(name, each) for each in given)
    if not (abs(first) <= LARGEST_FLOAT and abs(second) <= LARGEST_FLOAT and abs(third) <= LARGEST_FLOAT):
        raise ValueError(f"{name}: expected three finite numbers, got {value!r}")
    return first, second, third


def normalization(mean: Any, std: Any) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of three channels. Raises TypeError or ValueError for what is neither."""
    mean, std = triple("mean", mean), triple("std", std)
    if not min(std) > 0:
        raise ValueError(f"std: expected three numbers above 0, got {std}")
    return mean, std


def coefficient(name: str, value: Any) -> float:
    """A number from 0 to the largest float32. Raises TypeError or ValueError for anything else."""
    factor = number(name, value)
    if not factor >= 0:
        raise ValueError(f"{name}: expected >= 0, got {value}")
    if factor > LARGEST_FLOAT:
        raise ValueError(f"{name}: expected a finite float32, got {factor}")
    return factor


def boolean(name: str, value: Any) -> bool:
    """True or False, of Python or NumPy. Raises TypeError for anything else."""
    if isinstance(value, bool) or _is_boolean_of_numpy(value):
        return bool(value)
    raise TypeError(f"{name}: expected True or False, got {_shown(value)}")


def choice(name: str, value: Any, choices: Iterable[Any]) -> Any:
    """The one of the choices that a value is. Raises ValueError for any other."""
    for known in choices:
        if isinstance(value, type(known)) and value == known:
            return known
    raise ValueError(f"{name}: expected one of {', '.join(map(str, choices))}, got {_shown(value)}")


def tensor(name: str, value: Any) -> Tensor:
    """A tensor. Raises TypeError for anything else."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    return value


def process_group(name: str, value: Any) -> Any:
    """A group of processes, or None. Raises TypeError for anything else."""
    if value is None or (dist.is_available() and isinstance(value, dist.ProcessGroup)):
        return value
    raise TypeError(f"{name}: expected a process group of torch.distributed or None, got {_shown(value)}")


def plain(value: Any) -> Any:
    """Values and what they hold as a configuration file has them: without numbers of NumPy."""
    if isinstance(value, dict):
        return {key: plain(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    if isinstance(value, bool) or _is_boolean_of_numpy(value):
        return bool(value)
    if _is_integer(value):
        return _plain(value)
    return float(value) if isinstance(value, Real) else value


def _is_boolean_of_numpy(value: Any) -> bool:
    return type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")


def _is_integer(value: Any) -> bool:
    if type(value) is int:
        return True
    if isinstance(value, Tensor):
        return torch.jit.is_tracing()  # whose sizes are tensors
    return isinstance(value, INTEGERS) and not isinstance(value, bool)


def _plain(value: Any) -> int:
    """An integer of NumPy as Python's; symbolic and dynamic ones stay what they are."""
    return value if isinstance(value, (int, torch.SymInt)) else int(value)  # type: ignore[return-value]


def _shown(value: Any) -> str:
    return "a tensor" if isinstance(value, Tensor) else repr(value)
