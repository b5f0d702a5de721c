"""Pictures of label maps: the colour of given pixels, and the sizes."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from bcmfnet.data.labels import LabelTable, get_label_table, make_label_table
from bcmfnet.viz import LossMaps, colorize, comparison, legend, loss_maps, overlay, pictures, with_legend
from bcmfnet.viz.pictures import GAP, IGNORED, NATS, RIGHT, TITLE_HEIGHT, WRONG

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
    """The six tiles without their titles: two rows of three."""
    row = TITLE_HEIGHT + height + GAP
    return [
        picture[top : top + height, left : left + width]
        for top in (TITLE_HEIGHT, row + TITLE_HEIGHT)
        for left in (0, width + GAP, 2 * (width + GAP))
    ]


def test_comparison_shows_image_truth_prediction_errors_edges():
    prediction = np.array([[0, 2, 2], [1, 0, 1]], np.uint8)
    image, truth, predicted, errors, edges, _ = tiles_of(comparison(IMAGE, TARGET, prediction, TABLE), 2, 3)
    np.testing.assert_array_equal(image, IMAGE)
    np.testing.assert_array_equal(truth, overlay(IMAGE, TARGET, TABLE))
    np.testing.assert_array_equal(predicted, overlay(IMAGE, prediction, TABLE))
    right, faded = [GREY] * 3, [170 + 124 // 3] * 3
    assert errors.tolist() == [[right, list(WRONG), right], [list(IGNORED), right, right]]
    assert edges.tolist() == [[list(RIGHT), list(WRONG), list(RIGHT)], [faded, list(RIGHT), list(RIGHT)]]


@pytest.mark.parametrize("ignore_index", [255, 0])
def test_the_band_of_an_edge_by_the_distance_to_another_class(ignore_index):
    rng = np.random.default_rng(0)
    target = cv2.resize(rng.integers(1, 4, (6, 7), np.uint8), (70, 60), interpolation=cv2.INTER_NEAREST)
    target[20:30, 30:45] = ignore_index
    rows, cols = np.indices(target.shape)
    for radius in (1, 3):
        expected = np.zeros(target.shape, bool)
        for row, col in np.argwhere(target != ignore_index):
            near = np.maximum(abs(rows - row), abs(cols - col)) <= radius
            disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1)).astype(bool)
            near[near] = disk[rows[near] - row + radius, cols[near] - col + radius]
            others = (target != target[row, col]) & (target != ignore_index)
            expected[row, col] = (near & others).any()
        np.testing.assert_array_equal(pictures.edge_band(target, ignore_index, radius), expected)
        assert 0.1 < expected.mean() < 0.9


def test_comparison_has_titles_and_a_legend_and_shrinks_wide_frames(monkeypatch):
    titles = []
    original = pictures._titled
    monkeypatch.setattr(pictures, "_titled", lambda title, image: titles.append(title) or original(title, image))
    image = np.zeros((512, 1024, 3), np.uint8)
    labels = np.zeros((512, 1024), np.uint8)
    labels[:, 512:] = 2
    prediction = labels.copy()
    prediction[:256, 512:] = 0
    picture = comparison(image, labels, prediction, TABLE, tile_width=256)
    assert picture.shape == (2 * (TITLE_HEIGHT + 128) + GAP, 3 * 256 + 2 * GAP, 3)
    assert titles[:4] == ["Image", "Ground truth", "Prediction", "Errors"]
    assert titles[4] == "Within 3 px of an edge: 75.0 % right"
    key = tiles_of(picture, 128, 256)[5]
    present = [(key == color).all(-1).any() for color in TABLE.colors]
    assert present == [True, False, True]
    title = picture[:TITLE_HEIGHT, :256]
    assert title.min() < 128
    assert (title[[0, -1]] == 255).all(), "the title touches the edge of its strip"


@pytest.mark.parametrize(("size", "classes"), [((64, 64), 2), ((64, 1000), 19), ((64, 64), 60)])
def test_a_picture_with_its_legend(size, classes):
    """The picture is where it was, and every class of the labels is below it, however small the frame."""
    table = make_label_table("many", classes)
    labels = np.resize(np.arange(classes, dtype=np.uint8), size)
    image = np.full((*size, 3), 7, np.uint8)
    picture = with_legend(image, labels, table)
    np.testing.assert_array_equal(picture[: size[0], : size[1]], image)
    for color in table.colors:
        assert (picture[size[0] :] == color).all(-1).any()


def test_pictures_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"labels: expected the image's size \[2, 3\], got \[3, 2\]$"):
        overlay(IMAGE, TARGET.T, TABLE)
    with pytest.raises(ValueError, match=r"prediction: expected the image's size \[2, 3\], got \[3, 2\]$"):
        comparison(IMAGE, TARGET, TARGET.T, TABLE)


COLDEST, HOTTEST = (13, 8, 135), (240, 249, 33)  # the ends of matplotlib's plasma


def is_colour(pixels, colour):
    return (abs(pixels.astype(int) - colour) <= 2).all(-1)


def loss_tiles(image, target, losses, **options):
    """Rows of four tiles without their titles."""
    picture = loss_maps(image, target, losses, TABLE, **options)
    width = min(image.shape[1], options.get("tile_width", 480))
    height = round(image.shape[0] * width / image.shape[1])
    step = TITLE_HEIGHT + height + GAP
    assert picture.shape[0] == -(-(2 + 2 * len(losses)) // 4) * step + TITLE_HEIGHT
    return [
        [picture[top + TITLE_HEIGHT :, left:][:height, :width] for left in range(0, 4 * (width + GAP), width + GAP)]
        for top in range(0, picture.shape[0] - TITLE_HEIGHT, step)
    ]


def test_loss_maps_show_score_and_selected_pixels_on_one_scale():
    """A score above the scale has its last colour; NaN and 0 the first one; the largest selected term is on top."""
    image, target = np.full((7, 12, 3), 90, np.uint8), np.zeros((7, 12), np.uint8)
    target[0, 0] = 255
    score, term, selected = np.zeros((7, 12)), np.zeros((7, 12)), np.zeros((7, 12), bool)
    score[2, 3], score[2, 5], score[2, 7] = NATS, 2 * NATS, np.nan
    term[3, 4], term[3, 6], term[5, 10] = NATS, NATS / 2, NATS
    selected[3, 4] = selected[3, 6] = True
    maps = LossMaps(score, term, selected)
    first, second = loss_tiles(image, target, {"a": maps, "b": maps})
    np.testing.assert_array_equal(first[0], image)
    np.testing.assert_array_equal(first[1], overlay(image, target, TABLE))
    for shown in (first[2], second[0]):
        assert shown[0, 0].tolist() == list(IGNORED)
        assert is_colour(shown[[2, 2], [3, 5]], HOTTEST).all()
        assert is_colour(shown, HOTTEST).sum() == 2
        assert is_colour(shown, COLDEST).sum() == shown[..., 0].size - 3
    for shown in (first[3], second[1]):
        drawn = (shown != 170 + 90 // 3).any(-1)
        assert drawn[2:5, 3:8].all() and drawn.sum() == 15
        assert is_colour(shown[2:5, 3:6], HOTTEST).all()
        assert len(np.unique(shown[2:5, 6:8].reshape(-1, 3), axis=0)) == 1


def test_selected_pixels_survive_the_shrinking_of_a_wide_frame():
    image, target = np.zeros((64, 256, 3), np.uint8), np.zeros((64, 256), np.uint8)
    selected = np.zeros((64, 256), bool)
    selected[33, 101] = True
    term = np.full((64, 256), NATS)
    shown = loss_tiles(image, target, {"a": LossMaps(term, term, selected)}, tile_width=64)[0][3]
    assert is_colour(shown, HOTTEST).any() and is_colour(shown, (170, 170, 170)).any()


@pytest.mark.parametrize(("figures", "words"), [
    ({}, "25.0 % selected"),
    ({"threshold": 0.3567}, "25.0 % selected from 0.36 nats"),
    ({"threshold": 0.3567, "cross_entropy": 1.234}, "25.0 % selected from 0.36 nats, mean CE 1.23"),
    ({"threshold": 64.0, "cross_entropy": None}, "25.0 % selected from 64.00 nats"),
])  # fmt: skip
def test_the_title_says_what_is_selected(monkeypatch, figures, words):
    """One of four valid pixels; two are ignored."""
    titles = []
    original = pictures._titled
    monkeypatch.setattr(pictures, "_titled", lambda title, image: titles.append(title) or original(title, image))
    target = np.array([[0, 1, 2], [255, 255, 1]], np.uint8)
    score = np.ones((2, 3))
    loss_maps(IMAGE, target, {"a": LossMaps(score, score, np.eye(2, 3, dtype=bool) & (target == 0), **figures)}, TABLE)
    assert titles == ["Image", "Ground truth", "a: score", f"a: {words}"]


def test_the_longest_title_fits_its_tile():
    title = "detect0: 100.0 % selected from 64.00 nats, mean CE 12.34"
    assert pictures._text_size(title)[0] <= 480


def test_loss_maps_name_what_has_another_size():
    maps = LossMaps(np.zeros((2, 3)), np.zeros((3, 2)), np.zeros((2, 3), bool))
    with pytest.raises(ValueError, match=r"^detect: term: expected the image's size \[2, 3\], got \[3, 2\]$"):
        loss_maps(IMAGE, TARGET, {"detect": maps}, TABLE)


@pytest.mark.parametrize("name", ["camvid11", "cityscapes19"])
@pytest.mark.parametrize("width", [1200, 480, 60])  # several columns, some, and narrower than one
def test_legend_shows_every_colour_once(name, width):
    table = get_label_table(name)
    picture = legend(table, width=width, row_height=24)
    assert picture.shape[1] == width and picture.shape[0] % 24 == 0
    for color in table.colors:
        assert (picture == color).all(-1).sum() >= 12 * 12
