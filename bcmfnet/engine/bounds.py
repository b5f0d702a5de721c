"""Bounds of numbers, written beside them: `workers: Annotated[int, Between(0, 1024)]`.

The dataclasses of a configuration check their fields by them, and the command line what was typed, before it is
converted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_type_hints

from bcmfnet.errors import ConfigError

ARTICLES = {int: ("an integer", "integers"), float: ("a number", "numbers")}


@dataclass(frozen=True)
class Between:
    """Numbers from low to high; `ends` has a round bracket where an end is not one of them."""

    low: float
    high: float
    ends: Literal["[]", "(]", "[)"] = "[]"

    def __contains__(self, value: float) -> bool:
        above = self.low < value if self.ends[0] == "(" else self.low <= value
        return above and (value < self.high if self.ends[1] == ")" else value <= self.high)

    def __str__(self) -> str:
        low = "above" if self.ends[0] == "(" else "from"
        return f"{low} {self.low} to {'below ' * (self.ends[1] == ')')}{self.high}"


def bounds_of(annotation: Any) -> Between | None:
    """The bounds in `Annotated[..., Between(...)]`, None where it has none."""
    return next((part for part in getattr(annotation, "__metadata__", ()) if isinstance(part, Between)), None)


def number_type(annotation: Any) -> type[int] | type[float] | None:
    """int or float for the annotation of a number, of an optional number or of a tuple of numbers."""
    if annotation in (int, float):
        return annotation
    return next((kind for kind in map(number_type, get_args(annotation)) if kind), None)


def check_numbers(
    key: str, kind: type[int] | type[float], bounds: Between | None, values: Sequence[Any], got: Any
) -> list[int | float]:
    """Numbers as ints or floats. Raises ConfigError with what was got where one is of another type or out of bounds."""
    try:
        numbers = [_number(kind, value) for value in values]
    except (ValueError, OverflowError):
        numbers = None
    if numbers is None or not all(bounds is None or number in bounds for number in numbers):
        expected = ARTICLES[kind][len(values) > 1] + (f" {bounds}" if bounds else "")
        raise ConfigError(f"{key}: expected {expected}, got {got!r}")
    return numbers


def _number(kind: type, value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real):
        raise ValueError
    return kind(value)


def check_fields(options: Any, section: str = "") -> None:
    """Check the numbers and the text of a dataclass; what counts as a number (of numpy, say) becomes int or float."""
    annotations = get_type_hints(type(options), include_extras=True)
    for field in fields(options):
        key, annotation, value = section + field.name, annotations[field.name], getattr(options, field.name)
        if isinstance(value, str):
            _check_text(key, value)
        kind = number_type(annotation)
        if kind is None or value is None:
            continue
        pair = isinstance(value, list | tuple)
        numbers = check_numbers(key, kind, bounds_of(annotation), value if pair else [value], value)
        setattr(options, field.name, tuple(numbers) if pair else numbers[0])


def _check_text(key: str, text: str) -> None:
    try:
        valid = "\0" not in as_utf8(text)
    except UnicodeError:
        valid = False
    if not valid:
        raise ConfigError(f"{key}: expected text in UTF-8 without a zero, got {text!r}")


def as_utf8(text: str) -> str:
    """Text of the command line or of a file's name, as read where the locale's encoding is UTF-8.

    Raises UnicodeError where it is not UTF-8.
    """
    return text.encode("utf-8", "surrogateescape").decode("utf-8")
