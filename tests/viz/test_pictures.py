"""Pictures of label maps: the colour of given pixels, and the sizes."""

from __future__ import annotations

import numpy as np
import pytest

from bcmfnet.data.labels import LabelTable, get_label_table
from bcmfnet.viz import colorize, comparison, legend, overlay
from bcmfnet.viz.pictures import GAP, IGNORED, TITLE_HEIGHT, WHITE, WRONG

TABLE = LabelTable("three", ("road", "car", "sky"), ((128, 64, 128), (0, 0, 142), (70, 130, 180)))
TARGET = np.array([[0, 1, 2], [255, 0, 1]], np.uint8)
IMAGE = np.full((2, 3, 3), (200, 100, 50), np.uint8)
GREY = 124 // 2  # OpenCV's luma of (200, 100, 50) is 124


def test_colorize_takes_the_colours_of_the_table():
    assert colorize(TARGET, TABLE)[0].tolist() == [[128, 64, 128], [0, 0, 142], [70, 130, 180]]
    assert colorize(TARGET, TABLE)[1, 0].tolist() == [0, 0, 0]


def test_overlay_blends_classes_and_leaves_ignored_pixels():
    blended = overlay(IMAGE, TARGET, TABLE)
    # 0.55 (128, 64, 128) + 0.45 (200, 100, 50) = (160.4, 80.2, 92.9)
    assert blended[0, 0].tolist() == [160, 80, 93]
    assert blended[1, 0].tolist() == [200, 100, 50]
    assert overlay(IMAGE, TARGET, TABLE, alpha=1)[0, 1].tolist() == [0, 0, 142]
    assert (IMAGE == (200, 100, 50)).all()


def tiles_of(picture, height, width):
    """The four tiles without their titles, after checking that all else is the white of a gap."""
    assert picture.shape == (TITLE_HEIGHT + height, 4 * width + 3 * GAP, 3)
    starts = [i * (width + GAP) for i in range(4)]
    for start in starts[1:]:
        assert (picture[:, start - GAP : start] == WHITE).all()
    return [picture[TITLE_HEIGHT:, start : start + width] for start in starts]


def test_comparison_shows_image_truth_prediction_errors():
    prediction = np.array([[0, 2, 2], [1, 0, 1]], np.uint8)
    image, truth, predicted, errors = tiles_of(comparison(IMAGE, TARGET, prediction, TABLE), 2, 3)
    np.testing.assert_array_equal(image, IMAGE)
    np.testing.assert_array_equal(truth, overlay(IMAGE, TARGET, TABLE))
    np.testing.assert_array_equal(predicted, overlay(IMAGE, prediction, TABLE))
    right = [GREY] * 3
    assert errors.tolist() == [[right, list(WRONG), right], [list(IGNORED), right, right]]


def test_comparison_has_titles_and_shrinks_wide_frames():
    image = np.zeros((512, 1024, 3), np.uint8)
    labels = np.zeros((512, 1024), np.uint8)
    picture = comparison(image, labels, labels, TABLE, tile_width=256)
    tiles_of(picture, 128, 256)
    for tile in range(4):
        title = picture[:TITLE_HEIGHT, tile * (256 + GAP) :][:, :256]
        assert title.min() < 128
        assert (title[[0, -1]] == 255).all(), "the title touches the edge of its strip"


def test_pictures_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"labels: expected the image's size \[2, 3\], got \[3, 2\]$"):
        overlay(IMAGE, TARGET.T, TABLE)
    with pytest.raises(ValueError, match=r"prediction: expected the image's size \[2, 3\], got \[3, 2\]$"):
        comparison(IMAGE, TARGET, TARGET.T, TABLE)


@pytest.mark.parametrize("name", ["camvid11", "cityscapes19"])
@pytest.mark.parametrize("width", [1200, 480, 60])  # several columns, some, and narrower than one
def test_legend_shows_every_colour_once(name, width):
    table = get_label_table(name)
    picture = legend(table, width=width, row_height=24)
    assert picture.shape[1] == width and picture.shape[0] % 24 == 0
    for color in table.colors:
        assert (picture == color).all(-1).sum() >= 12 * 12
