"""Annotation files of polygons, COCO's and labelme's; what cannot be read in them is one DataError that names it."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from bcmfnet.data.files import list_images
from bcmfnet.data.polygons import Shape
from bcmfnet.errors import DataError, MissingDataError

MAX_ABS = 1e6  # of a coordinate, pixels
CIRCLE = np.linspace(0, 2 * np.pi, 128, endpoint=False)


class Annotated(NamedTuple):
    """An image and what was drawn on it, the lowest shape first; source is what says so, for messages."""

    source: str
    image: Path
    size: tuple[int, int] | None
    """(height, width) of the image as the annotation has it."""
    shapes: list[Shape]


def read_annotations(source: Path, images: Path | None = None) -> tuple[list[str], list[Annotated]]:
    """Labels, in the order that their ids should have, and the images of a COCO file or of labelme's, one or a folder.

    COCO's shapes are sorted by area, so that a smaller one lies over a larger one; labelme's are as they stand. COCO's
    labels are in the order of the categories' ids, labelme's in that of the alphabet.

    Args:
        images: folder of the images; without it they are looked for beside the annotation, as it names them.

    Raises:
        DataError: a file that is not that, a compressed RLE, a shape without an area (a line, a point).
    """
    if source.is_dir():
        paths = list_images(source, "*", (".json",))
        if not paths:
            raise DataError(f"{source}: no file that ends in .json")
        frames = [_read_labelme(path, _load(path), images) for path in paths]
        return _labels(frames), frames
    content = _load(source)
    if "shapes" in content:
        frames = [_read_labelme(source, content, images)]
        return _labels(frames), frames
    return _read_coco(source, content, images)


def _labels(frames: list[Annotated]) -> list[str]:
    return sorted({shape.label for frame in frames for shape in frame.shapes})


def _load(path: Path) -> dict[str, Any]:
    expected = "expected the annotations of COCO or of labelme, a JSON object"
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise MissingDataError(f"{path}: {expected}, found no file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {expected}: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: {expected}, got {reprlib.repr(content)}")
    return content


def _value(where: str, values: Any, key: str, expected: str, fits: Callable[[Any], bool]) -> Any:
    """The value of a key. Raises DataError where there is none that fits."""
    if not isinstance(values, dict):
        raise DataError(f"{where}: expected an object, got {reprlib.repr(values)}")
    if key not in values or not fits(values[key]):
        got = reprlib.repr(values[key]) if key in values else "nothing"
        raise DataError(f"{where}: {key}: expected {expected}, got {got}")
    return values[key]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_id(value: Any) -> bool:
    return type(value) in (int, str)


def _is_side(value: Any) -> TypeGuard[int]:
    return type(value) is int and value > 0


def _read_coco(path: Path, content: dict[str, Any], images: Path | None) -> tuple[list[str], list[Annotated]]:
    frames: dict[Any, Annotated] = {}
    sizes: dict[Any, tuple[int, int]] = {}
    for number, image in enumerate(_value(str(path), content, "images", "a list", _is_list)):
        where = f"{path}: image {number}"
        name = _value(where, image, "file_name", "the name of a file", _is_text)
        height, width = (_value(where, image, key, "a number of pixels", _is_side) for key in ("height", "width"))
        at = (path.parent if images is None else images) / PureWindowsPath(name).as_posix()
        key = _value(where, image, "id", "an id of its own", lambda v: _is_id(v) and v not in frames)
        sizes[key] = height, width
        frames[key] = Annotated(f"{path}: {name}", at, sizes[key], [])
    categories: dict[Any, str] = {}
    for number, category in enumerate(_value(str(path), content, "categories", "a list", _is_list)):
        where = f"{path}: category {number}"
        key = _value(where, category, "id", "an id of its own", lambda v: _is_id(v) and v not in categories)
        categories[key] = _value(where, category, "name", "text", _is_text)
    for number, annotation in enumerate(_value(str(path), content, "annotations", "a list", _is_list)):
        named = annotation.get("id", number) if isinstance(annotation, dict) else number
        where = f"{path}: annotation {reprlib.repr(named)}"
        image = _value(where, annotation, "image_id", "the id of an image", lambda v: _is_id(v) and v in frames)
        key = _value(where, annotation, "category_id", "the id of a category", lambda v: _is_id(v) and v in categories)
        area = _value(where, annotation, "segmentation", "polygons or an RLE", lambda v: bool(v))
        frames[image].shapes.append(_coco_shape(where, categories[key], area, sizes[image]))
    for frame in frames.values():
        frame.shapes.sort(key=lambda shape: -shape.area)
    ordered = sorted(categories, key=lambda key: (isinstance(key, str), key))
    return [categories[key] for key in ordered], list(frames.values())


def _coco_shape(where: str, label: str, area: Any, size: tuple[int, int]) -> Shape:
    where = f"{where}: segmentation"
    if isinstance(area, dict):
        _value(where, area, "size", f"{list(size)}, of its image", lambda v: v == list(size))
        if isinstance(area.get("counts"), str):
            raise DataError(f"{where}: expected polygons or an uncompressed RLE, got a compressed one")
        pixels = size[0] * size[1]
        runs = _value(where, area, "counts", f"lengths of runs, {pixels} in all", lambda v: _are_runs(v, pixels))
        return Shape(label, runs=np.array(runs, np.int64))
    if not isinstance(area, list):
        raise DataError(f"{where}: expected polygons or an RLE, got {reprlib.repr(area)}")
    pairs = ([flat[i : i + 2] for i in range(0, len(flat), 2)] if isinstance(flat, list) else flat for flat in area)
    return Shape(label, tuple(_points(where, points, 3) for points in pairs))


def _are_runs(value: Any, pixels: int) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value) and sum(value) == pixels


def _points(where: str, values: Any, least: int) -> np.ndarray:
    """Points (x, y), float64 [n, 2]. Raises DataError where there are fewer than `least` or something else."""
    fits = isinstance(values, list) and len(values) >= least and all(map(_is_point, values))
    if not fits:
        raise DataError(f"{where}: expected {least} points or more, each of two numbers, got {reprlib.repr(values)}")
    return np.array(values, np.float64)


def _is_point(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(v) in (int, float) and -MAX_ABS <= v <= MAX_ABS for v in value)
    )


def _read_labelme(path: Path, content: dict[str, Any], images: Path | None) -> Annotated:
    name = PureWindowsPath(_value(str(path), content, "imagePath", "the name of a file", _is_text))
    at = path.parent / name.as_posix() if images is None else images / name.name
    height, width = content.get("imageHeight"), content.get("imageWidth")
    size = (height, width) if _is_side(height) and _is_side(width) else None
    shapes = []
    for number, shape in enumerate(_value(str(path), content, "shapes", "a list", _is_list)):
        where = f"{path}: shape {number}"
        label = _value(where, shape, "label", "text", _is_text)
        shapes.append(Shape(label, (_labelme_corners(f"{where} ({label})", shape),)))
    return Annotated(str(path), at, size, shapes)


def _labelme_corners(where: str, shape: dict[str, Any]) -> np.ndarray:
    kind = shape.get("shape_type", "polygon")
    if kind not in ("polygon", "rectangle", "circle"):
        raise DataError(f"{where}: expected a polygon, a rectangle or a circle, got {reprlib.repr(kind)}")
    points = _points(where, shape.get("points"), 3 if kind == "polygon" else 2)
    if kind == "circle":  # its centre, and a point that it goes through
        radius = np.hypot(*(points[1] - points[0]))
        return points[0] + radius * np.stack([np.cos(CIRCLE), np.sin(CIRCLE)], 1)
    if len(points) == 2:  # opposite corners
        (left, top), (right, bottom) = points
        return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])
    return points
