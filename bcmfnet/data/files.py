"""Which files of a folder are images: one listing for datasets and for prediction."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from bcmfnet.data.io import IMAGE_ENDINGS


def list_images(folder: Path, pattern: str = "*", endings: Iterable[str] = IMAGE_ENDINGS) -> list[Path]:
    """Files below a folder that match a glob pattern and have one of the endings (in either case), sorted.

    Hidden files (macOS leaves ._NAME beside NAME), what is in hidden folders, and folders of such a name are not
    images. A link to nowhere or a FIFO is listed: whoever reads it says what is wrong, and no frame is lost in silence.
    `**` does not follow links to folders, which may lead in a circle.
    """
    ends = tuple(ending.lower() for ending in endings)
    return sorted(
        path
        for path in folder.glob(_as_pathlib_has_it(pattern))
        if path.name.lower().endswith(ends)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not os.path.isdir(path)
    )


def _as_pathlib_has_it(pattern: str) -> str:
    """The pattern with `**` only where it is a whole component, once in a row and not the last: `**` ends in files."""
    parts = [part if part == "**" else re.sub(r"\*+", "*", part) for part in pattern.split("/")]
    once = re.sub(r"(\*\*/)+", "**/", "/".join(parts))
    return f"{once}/*" if parts[-1] == "**" else once
