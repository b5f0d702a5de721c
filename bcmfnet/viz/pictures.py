"""Label maps as pictures: colours, overlays, a legend, and a prediction beside its ground truth.

Images are RGB, uint8 [H, W, 3], everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from bcmfnet.data.labels import LabelTable

WHITE = (255, 255, 255)
INK = (60, 60, 60)
WRONG, RIGHT = (222, 45, 38), (49, 163, 84)
IGNORED = (150, 150, 150)
GAP = 6
TITLE_HEIGHT = 26
FONT, FONT_SCALE, CAP_HEIGHT = cv2.FONT_HERSHEY_SIMPLEX, 0.5, 10
EDGE_RADIUS = 3
"""Pixels whose distance to a pixel of another class is at most this are those of an edge."""
LEGEND_WIDTH = 240
NATS = 8.0
"""Scores and losses from here on have the last colour."""


def colorize(labels: np.ndarray, table: LabelTable) -> np.ndarray:
    """The table's colours for uint8 labels [H, W], black where a label is not in it; uint8 [H, W, 3]."""
    return table.color_array()[labels]


def overlay(image: np.ndarray, labels: np.ndarray, table: LabelTable, alpha: float = 0.55) -> np.ndarray:
    """The image with the labels' colours over it, uint8 [H, W, 3].

    Args:
        image: RGB, uint8 [H, W, 3].
        labels: class ids, uint8 [H, W]; the image shows as it is where a label is not in the table.
        table: its colours.
        alpha: opacity of the colours, 0 to 1.

    Raises:
        ValueError: sizes that differ.
    """
    _check_size("labels", labels, image)
    blended = cv2.addWeighted(colorize(labels, table), alpha, image, 1 - alpha, 0)
    return np.where((labels < len(table.classes))[..., None], blended, image)


def errors(image: np.ndarray, target: np.ndarray, prediction: np.ndarray, ignore_index: int) -> np.ndarray:
    """Wrong pixels in red on the dimmed grey image, ignored ones in flat grey, uint8 [H, W, 3]."""
    dimmed = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) // 2
    picture = np.repeat(dimmed[..., None], 3, axis=2)
    picture[prediction != target] = WRONG
    picture[target == ignore_index] = IGNORED
    return picture


def edge_band(target: np.ndarray, ignore_index: int, radius: int = EDGE_RADIUS) -> np.ndarray:
    """Whether a pixel of the ground truth has one of another class within `radius` pixels, bool [H, W].

    Ignored pixels are no class, and in no band.
    """
    ignored = target == ignore_index
    window = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    highest = cv2.dilate(np.where(ignored, np.uint8(0), target), window)
    lowest = cv2.erode(np.where(ignored, np.uint8(255), target), window)
    return (highest > lowest) & ~ignored


def edge_errors(image: np.ndarray, target: np.ndarray, prediction: np.ndarray, ignore_index: int) -> np.ndarray:
    """The pixels along the edges of the ground truth, right in green and wrong in red, on the faded image."""
    band, right = edge_band(target, ignore_index), prediction == target
    picture = _faded(image)
    picture[band & right] = RIGHT
    picture[band & ~right] = WRONG
    return picture


def comparison(
    image: np.ndarray, target: np.ndarray, prediction: np.ndarray, table: LabelTable, tile_width: int = 480
) -> np.ndarray:
    """Titled tiles, three in a row: image, ground truth, prediction; errors, errors along the edges, legend. RGB uint8.

    The title of the edges says which share of their pixels, `edge_band`, is right; the legend has the classes that are
    in one of the two maps.

    Args:
        image: RGB, uint8 [H, W, 3].
        target, prediction: class ids, uint8 [H, W].
        table: classes, colours and ignore_index.
        tile_width: wider images are shrunk to it, pixels.

    Raises:
        ValueError: sizes that differ.
    """
    _check_size("target", target, image)
    _check_size("prediction", prediction, image)
    band = edge_band(target, table.ignore_index)
    share = f": {100 * (prediction == target)[band].mean():.1f} % right" if band.any() else ""
    pictures = {
        "Image": image,
        "Ground truth": overlay(image, target, table),
        "Prediction": overlay(image, prediction, table),
        "Errors": errors(image, target, prediction, table.ignore_index),
        f"Within {EDGE_RADIUS} px of an edge{share}": edge_errors(image, target, prediction, table.ignore_index),
    }
    tiles = [_titled(title, _shrunk(picture, tile_width)) for title, picture in pictures.items()]
    shown = np.union1d(target, prediction)
    key = _titled("", legend(table, max(tiles[0].shape[1], LEGEND_WIDTH), shown=shown))
    return stacked([_spaced(tiles[:3], axis=1), _spaced([*tiles[3:], key], axis=1)])


class LossMaps(NamedTuple):
    """What a loss makes of a frame, [H, W]: score and loss term of each pixel in nats, float; selected pixels, bool,
    None of a loss that selects none.

    The score from which pixels are selected, and the mean cross-entropy of those that are, stand in the title; nats.
    """

    score: np.ndarray
    term: np.ndarray
    selected: np.ndarray | None
    threshold: float | None = None
    cross_entropy: float | None = None


def loss_tiles(
    image: np.ndarray, target: np.ndarray, losses: Mapping[str, LossMaps], table: LabelTable, tile_width: int = 480
) -> dict[str, np.ndarray]:
    """Tiles by title: image, ground truth, and for each loss its score and its selected pixels, or where it selects
    none its term. RGB uint8.

    A selected pixel has the colour of its loss term, over the faded image, and is drawn one pixel of the tile larger
    to each side; ignored pixels are grey in a score.

    Args:
        image: RGB, uint8 [H, W, 3].
        target: class ids, uint8 [H, W].
        losses: maps of each loss, by its name.
        table: classes, colours and ignore_index.
        tile_width: wider images are shrunk to it, pixels.

    Raises:
        ValueError: sizes that differ.
    """
    _check_size("target", target, image)
    ignored = target == table.ignore_index
    reach = max(1, round(image.shape[1] / tile_width))
    pictures = {"Image": image, "Ground truth": overlay(image, target, table)}
    for name, maps in losses.items():
        for field, values in zip(maps._fields[:3], maps[:3], strict=True):
            if values is not None:
                _check_size(f"{name}: {field}", values, image)
        score = heat(maps.term if maps.selected is None else maps.score)
        score[ignored] = IGNORED
        if maps.selected is None:
            pictures[name] = score
            continue
        pictures[f"{name}: score"] = score
        share = maps.selected.sum() / max(1, np.count_nonzero(~ignored))
        pictures[f"{name}: {_selection(maps, share)}"] = _selected_pixels(image, maps.selected, maps.term, reach)
    return {title: _shrunk(picture, tile_width) for title, picture in pictures.items()}


def loss_maps(
    image: np.ndarray, target: np.ndarray, losses: Mapping[str, LossMaps], table: LabelTable, tile_width: int = 480
) -> np.ndarray:
    """The tiles of `loss_tiles` with their titles, four in a row, and the scale of their colours below; RGB uint8."""
    pictures = loss_tiles(image, target, losses, table, tile_width)
    tiles = [_titled(title, picture) for title, picture in pictures.items()]
    rows = [_spaced(tiles[i : i + 4], axis=1) for i in range(0, len(tiles), 4)]
    return stacked([*rows, _heat_scale()])


def _selection(maps: LossMaps, share: float) -> str:
    """What is selected, in words."""
    text = f"{100 * share:.1f} % selected"
    if maps.threshold is not None:
        text += f" from {maps.threshold:.2f} nats"
    return text if maps.cross_entropy is None else f"{text}, mean CE {maps.cross_entropy:.2f}"


def heat(nats: np.ndarray) -> np.ndarray:
    """Colours of scores [H, W], from 0 to NATS; uint8 [H, W, 3]."""
    levels = np.clip(np.nan_to_num(nats) * (255 / NATS), 0, 255).astype(np.uint8)
    return cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_PLASMA), cv2.COLOR_BGR2RGB)


def _selected_pixels(image: np.ndarray, selected: np.ndarray, term: np.ndarray, reach: int) -> np.ndarray:
    """The selected pixels, `reach` pixels larger to each side, on the image faded to a light grey."""
    picture = _faded(image)
    window = np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)
    widened = cv2.dilate(np.where(selected, term, -1.0).astype(np.float32), window)
    return np.where((widened >= 0)[..., None], heat(widened), picture)


def _faded(image: np.ndarray) -> np.ndarray:
    """The image in light greys, uint8 [H, W, 3]."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return np.repeat((170 + grey // 3)[..., None], 3, axis=2)


def _heat_scale(width: int = 240) -> np.ndarray:
    """The colours from 0 to NATS, and what else there is to say of the tiles."""
    text = f"{NATS:g} nats and more; selected pixels show their loss, enlarged; ignored ones are grey in a score"
    strip = np.full((TITLE_HEIGHT, 20 + width + _text_size(text)[0] + 10, 3), WHITE, np.uint8)
    strip[8:-8, 20 : 20 + width] = heat(np.linspace(0, NATS, width)[None])
    _write(strip, "0", x=4)
    _write(strip, text, x=26 + width)
    return strip


def jpeg(image: np.ndarray, limit: int, side: int, quality: int = 85) -> tuple[bytes, int, int]:
    """The image as a JPEG of at most `limit` bytes, and its width and height.

    Sides longer than `side` pixels are shrunk to it, and what is too large then is halved until it fits.
    """
    width = round(image.shape[1] * min(1, side / max(image.shape[:2])))
    while True:
        image = _shrunk(image, max(1, width))
        encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), (cv2.IMWRITE_JPEG_QUALITY, quality))[1]
        if encoded.size <= limit or image.shape[1] == 1:
            return encoded.tobytes(), image.shape[1], image.shape[0]
        width = image.shape[1] // 2


def legend(
    table: LabelTable, width: int = 480, row_height: int = 26, shown: Sequence[int] | np.ndarray | None = None
) -> np.ndarray:
    """Class names beside their colours, in as many columns as fit the width; RGB uint8 [rows, width, 3].

    Only the classes among the ids `shown`, where these are given.
    """
    ids = [i for i in range(table.num_classes) if shown is None or i in shown]
    swatch, pad = row_height // 2, 8
    column = swatch + 3 * pad + max((_text_size(table.classes[i])[0] for i in ids), default=0)
    columns = max(1, min(len(ids), width // column))
    rows = -(-len(ids) // columns)
    picture = np.full((rows * row_height, width, 3), WHITE, np.uint8)
    for place, i in enumerate(ids):
        y, x = place // columns * row_height, place % columns * (width // columns)
        top = y + (row_height - swatch) // 2
        picture[top : top + swatch, x : x + swatch] = table.colors[i]
        _write(picture[y : y + row_height], table.classes[i], x + swatch + pad)
    return picture


def with_legend(picture: np.ndarray, labels: np.ndarray, table: LabelTable) -> np.ndarray:
    """A picture of labels with the legend of their classes below; RGB uint8."""
    return stacked([picture, legend(table, max(picture.shape[1], LEGEND_WIDTH), shown=np.unique(labels))])


def stacked(images: Sequence[np.ndarray]) -> np.ndarray:
    """Images below each other on white, each at the left."""
    width = max(image.shape[1] for image in images)
    return _spaced([_padded(image, image.shape[0], width) for image in images], axis=0)


def _check_size(name: str, labels: np.ndarray, image: np.ndarray) -> None:
    size = image.shape[:2]
    if labels.shape != size:
        raise ValueError(f"{name}: expected the image's size {list(size)}, got {list(labels.shape)}")


def _shrunk(image: np.ndarray, width: int) -> np.ndarray:
    if image.shape[1] <= width:
        return image
    height = max(1, round(image.shape[0] * width / image.shape[1]))
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def _titled(title: str, image: np.ndarray) -> np.ndarray:
    strip = np.full((TITLE_HEIGHT, image.shape[1], 3), WHITE, np.uint8)
    _write(strip, title, x=2)
    return np.concatenate([strip, image])


def _write(strip: np.ndarray, text: str, x: int) -> None:
    """Write a line of text at x, vertically in the middle of the strip."""
    baseline = (strip.shape[0] + CAP_HEIGHT) // 2
    cv2.putText(strip, text, (x, baseline), FONT, FONT_SCALE, INK, 1, cv2.LINE_AA)


def _text_size(text: str) -> tuple[int, int]:
    (width, height), _ = cv2.getTextSize(text, FONT, FONT_SCALE, 1)
    return width, height


def _spaced(images: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """Join images along an axis with a white gap between them; beside each other they are as high as the highest."""
    if axis == 1:
        height = max(image.shape[0] for image in images)
        images = [_padded(image, height, image.shape[1]) for image in images]
    gap_shape = list(images[0].shape)
    gap_shape[axis] = GAP
    gap = np.full(gap_shape, 255, np.uint8)
    return np.concatenate([piece for image in images for piece in (gap, image)][1:], axis=axis)


def _padded(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The image at the top left of a white picture."""
    picture = np.full((height, width, 3), WHITE, np.uint8)
    picture[: image.shape[0], : image.shape[1]] = image
    return picture
