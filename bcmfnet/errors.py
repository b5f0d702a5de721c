"""Errors that a user can act on: each message is one line that names what was given and what was expected.

A message about an option starts with its key, `optim.lr: expected more than 0, got -1.0`; the command line puts there
what was typed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SHOWN_NAMES = 12


class ConfigError(ValueError):
    """A command line, preset or configuration that cannot be used (exit code 2)."""


class DataError(ValueError):
    """A dataset, image or label file that cannot be used. Names of files are shown printable."""

    def __str__(self) -> str:
        return printable(super().__str__())


class CheckpointError(ValueError):
    """A weights file or checkpoint that cannot be read, or that belongs to another model."""


class MissingFileError(CheckpointError, ConfigError):
    """A weights file or checkpoint that is not where it was said to be (exit code 2)."""


class MissingDataError(DataError, ConfigError):
    """A dataset's folder or list that is not where it was said to be (exit code 2)."""


class MissingPackageError(ImportError):
    """A package that is optional to install and needed for what was asked."""


class TrainingError(RuntimeError):
    """A training run that cannot go on, with the step and what to try."""


def printable(text: object) -> str:
    r"""The text with control characters, and bytes of a file name that are no text, as escapes such as \x1b."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def unknown_name(key: str, name: str, known: Iterable[str]) -> str:
    """One line for a name that nothing has: `dataset: expected one of ..., got 'camvit'; did you mean 'camvid'?`."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    rest = f" or another {len(known) - SHOWN_NAMES}" if len(known) > SHOWN_NAMES else ""
    return f"{key}: expected one of {', '.join(known[:SHOWN_NAMES])}{rest}, got {name!r}{hint}"
