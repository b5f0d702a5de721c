"""Files that name the classes of a user's own dataset and give their colours."""

from __future__ import annotations

import csv
import json
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bcmfnet.data.labels import MAX_CLASSES, RGB, LabelTable
from bcmfnet.errors import ConfigError

VOID = "void"
"""Name, in any case, of what is ignored; it is no class."""
HEADER = ["name", "r", "g", "b"]
ColorIds = tuple[tuple[RGB, int], ...]


def read_colors(path: str | Path) -> tuple[LabelTable, ColorIds]:
    """The label table of a colour file, its classes in the order of the file, and the id of each colour.

    A .json file holds an object, {"road": [128, 64, 128], "void": [0, 0, 0]}, where a list of colours may stand for
    one; a .csv file has a row `name,r,g,b` for each colour, below a header of these words or none. A class that has
    several colours is shown in its first. What is named void is ignored.

    Raises:
        ConfigError: no such file, one that is not that, fewer than 2 or more than 254 classes, or a colour of two.
    """
    path = Path(path)
    rows = [(VOID if name.lower() == VOID else name, _color(color, name, path)) for name, color in _read(path)]
    owner: dict[RGB, str] = {}
    for name, color in rows:
        if owner.setdefault(color, name) != name:
            raise ConfigError(f"colors: expected one class for {color} in {path}, got {owner[color]!r} and {name!r}")
    shown: dict[str, RGB] = {}
    for color, name in owner.items():
        shown.setdefault(name, color)
    shown.pop(VOID, None)
    if not 2 <= len(shown) <= MAX_CLASSES:
        raise ConfigError(f"colors: expected 2 to {MAX_CLASSES} classes in {path}, got {len(shown)}")
    table = LabelTable("folder", tuple(shown), tuple(shown.values()))
    ids = {name: i for i, name in enumerate(shown)} | {VOID: table.ignore_index}
    return table, tuple((color, ids[name]) for color, name in owner.items())


def write_colors(path: Path, table: LabelTable) -> None:
    """Write a table as a JSON file that `read_colors` takes. Raises OSError."""
    rows = (f"  {json.dumps(name)}: {list(color)}" for name, color in zip(table.classes, table.colors, strict=True))
    path.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")


def _read(path: Path) -> list[tuple[str, Any]]:
    """Pairs of name and colour, as they stand in the file."""
    readers = {".json": _read_json, ".csv": _read_csv}
    if path.suffix.lower() not in readers:
        raise ConfigError(f"colors: expected a .json or .csv file, got {path}")
    try:
        return readers[path.suffix.lower()](path.read_text(encoding="utf-8-sig"), path)
    except OSError as error:
        raise ConfigError(f"colors: expected a file of names and colours at {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"colors: expected UTF-8 text in {path}: {error}") from None


def _read_json(text: str, path: Path) -> list[tuple[str, Any]]:
    expected = f'colors: expected a JSON object such as {{"road": [128, 64, 128]}} in {path}'
    try:
        values = json.loads(text, object_pairs_hook=tuple)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{expected}: {error}") from None
    if not isinstance(values, tuple):
        raise ConfigError(f"{expected}, got {reprlib.repr(values)}")
    rows = []
    for name, colors in values:
        several = isinstance(colors, list) and bool(colors) and all(isinstance(color, list) for color in colors)
        rows += [(name, color) for color in (colors if several else [colors])]
    return rows


def _read_csv(text: str, path: Path) -> list[tuple[str, Any]]:
    rows = [[word.strip() for word in row] for row in csv.reader(text.splitlines()) if any(map(str.strip, row))]
    if rows and [word.lower() for word in rows[0]] == HEADER:
        rows = rows[1:]
    for row in rows:
        if len(row) != len(HEADER):
            raise ConfigError(f"colors: expected rows of {','.join(HEADER)} in {path}, got {','.join(row)!r}")
    return [(name, [int(word) if word.isdecimal() else word for word in color]) for name, *color in rows]


def _color(value: Any, name: str, path: Path) -> RGB:
    fits = isinstance(value, list) and len(value) == 3 and all(type(v) is int and 0 <= v <= 255 for v in value)
    if not fits or not name:
        got = f"{reprlib.repr(value)} for {name!r}"
        raise ConfigError(f"colors: expected a name and three numbers from 0 to 255 in {path}, got {got}")
    return tuple(value)


def color_ids(table: LabelTable, void: Iterable[RGB]) -> ColorIds:
    """The id of each colour of a table, and ignore_index for the colours of `void`."""
    return (*((color, table.ignore_index) for color in void), *((color, i) for i, color in enumerate(table.colors)))
