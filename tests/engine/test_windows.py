"""Label maps of large images: those of the whole image, in bands, from windows that are read one at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bcmfnet.engine.config import TTAConfig
from bcmfnet.engine.tta import TTAPredictor
from bcmfnet.engine.windows import label_bands
from bcmfnet.errors import ConfigError

PIXELS = torch.randint(0, 256, (3, 200, 264), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Wide:
    """Logits that depend on the whole window, on where in it they are and which way round it is."""

    device = torch.device("cpu")
    weight = torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(1)) / 300

    def logits(self, images):
        logits = F.conv2d(images.float() - 128, self.weight, stride=8)
        place = torch.linspace(0, 1, logits[0, 0].numel()).view(logits.shape[2:])
        return logits + place + logits.mean((2, 3), keepdim=True)


class Image:
    """An image that tells what is read of it."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.pixels = PIXELS[:, :height, :width].permute(1, 2, 0).numpy()
        self.seen: list[tuple[slice, slice]] = []

    def read(self, rows, columns):
        self.seen.append((rows, columns))
        image = self.pixels[rows, columns]
        missing = (rows.stop - rows.start - image.shape[0], columns.stop - columns.start - image.shape[1])
        return np.pad(image, [(0, missing[0]), (0, missing[1]), (0, 0)], "edge")


CONFIGS = {
    "window": TTAConfig(window=(64, 72)),
    "far apart": TTAConfig(window=(64, 72), stride=(64, 72)),
    "often": TTAConfig(window=(72, 64), stride=(8, 24)),
    "one row": TTAConfig(window=(200, 64)),
    "one column": TTAConfig(window=(64, 264)),
    "the whole": TTAConfig(window=(200, 264)),
    "mirrored": TTAConfig(window=(64, 72), stride=(40, 32), flip=True),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_bands_are_the_label_map_of_the_whole_image(config):
    predictor, image = TTAPredictor(Wide(), config), Image(200, 264)
    bands = list(label_bands(predictor, image))
    labels, expected = torch.cat(bands), predictor(PIXELS[None])[0]
    assert labels.dtype == torch.uint8 and labels.shape == expected.shape and len(labels.unique()) > 2
    if config.flip:  # probabilities are summed in bands that start elsewhere
        assert (labels == expected).float().mean() > 0.9999
    else:
        assert torch.equal(labels, expected)
    windows = {(rows.stop - rows.start, columns.stop - columns.start) for rows, columns in image.seen}
    assert windows == {config.window}


@pytest.mark.parametrize("size", [(193, 257), (199, 264), (200, 263), (64, 70)], ids=str)
@pytest.mark.parametrize("flip", [False, True])
def test_an_image_of_odd_sides_is_continued_by_its_last_pixels(size, flip):
    height, width = size
    predictor = TTAPredictor(Wide(), TTAConfig(window=(64, 72), flip=flip))
    labels = torch.cat(list(label_bands(predictor, Image(*size))))
    whole = F.pad(PIXELS[None, :, :height, :width].float(), (0, -width % 8, 0, -height % 8), mode="replicate").byte()
    expected = predictor(whole)[0, :height, :width]
    assert labels.shape == size and (labels == expected).float().mean() > 0.9999


def test_without_a_window_one_is_chosen(monkeypatch):
    from bcmfnet.engine import windows

    image = Image(200, 264)
    labels = torch.cat(list(label_bands(Wide(), image)))
    assert {(rows.stop, columns.stop) for rows, columns in image.seen} == {(200, 264)}  # which is not larger than it
    assert torch.equal(labels, TTAPredictor(Wide(), TTAConfig(window=(200, 264)))(PIXELS[None])[0])
    monkeypatch.setattr(windows, "WINDOW", (128, 96))
    labels = torch.cat(list(label_bands(Wide(), Image(200, 264))))
    assert torch.equal(labels, TTAPredictor(Wide(), TTAConfig(window=(128, 96)))(PIXELS[None])[0])


def test_rows_that_are_done_are_let_go():
    """A band for each row of windows, and logits of a window's height alone."""
    image = Image(200, 264)
    read = []
    for band in label_bands(TTAPredictor(Wide(), TTAConfig(window=(64, 64), stride=(32, 64))), image):
        read.append((len(image.seen), len(band)))
    assert [count for count, _ in read] == [5 * (row + 1) for row in range(6)]
    assert [rows for _, rows in read] == [28, 32, 32, 32, 8, 68]


@pytest.mark.parametrize(("config", "line"), [
    (TTAConfig(scales=(1, 1.5)), "tta.scales: expected 1 alone for an image of 264x200, which is read in windows"),
    (TTAConfig(window=(208, 64)), r"tta.window: expected at most \(200, 264\), as the image has, got \(208, 64\)$"),
])  # fmt: skip
def test_what_a_large_image_has_not_is_one_line(config, line):
    with pytest.raises(ConfigError, match=f"^{line}"):
        next(label_bands(TTAPredictor(Wide(), config), Image(200, 264)))
