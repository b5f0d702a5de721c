"""Class weights against their papers' formulas, and files of weights that are none."""

import json
import math

import numpy as np
import pytest

from bcmfnet.data import SyntheticStreets, verification
from bcmfnet.data.class_weights import class_weights, mean_of_one, read_class_weights
from bcmfnet.errors import ConfigError

# Three frames of 100 pixels; class 1 is in one of them, so that its share of all is a third of that in its frame.
PIXELS = np.array([[90, 0, 10], [60, 30, 10], [80, 0, 20]])
CLASSES = ("road", "pole", "sign")


def scaled(weights, pixels=PIXELS):
    """The oracle of the scale: the mean over a list of all pixels is 1."""
    of_pixels = np.concatenate([np.full(n, w) for w, n in zip(weights, pixels.sum(0), strict=True)])
    return np.array(weights) / of_pixels.mean()


def test_enet():
    expected = [1 / math.log(1.02 + share) for share in (230 / 300, 30 / 300, 40 / 300)]
    np.testing.assert_allclose(mean_of_one(class_weights("enet", PIXELS), PIXELS), scaled(expected), rtol=1e-12)


def test_median_frequency():
    """Frequencies within the frames that have the class: 230 / 300, 30 / 100 and 40 / 300; the median is the second."""
    expected = [0.3 / (230 / 300), 1.0, 0.3 / (40 / 300)]
    np.testing.assert_allclose(mean_of_one(class_weights("median", PIXELS), PIXELS), scaled(expected), rtol=1e-12)


@pytest.mark.parametrize("rule", ["enet", "median"])
def test_a_class_without_pixels_has_the_largest_weight_of_the_others(rule):
    with_absent = np.insert(PIXELS, 1, 0, axis=1)
    weights = class_weights(rule, with_absent)
    np.testing.assert_allclose(np.delete(weights, 1), class_weights(rule, PIXELS), rtol=1e-12)
    assert weights[1] == weights.max()


@pytest.mark.parametrize("rule", ["enet", "median"])
def test_weights_of_no_pixel_are_refused(rule):
    with pytest.raises(ConfigError, match=f"class_weights: expected frames with labelled pixels for {rule}, got none"):
        class_weights(rule, np.zeros_like(PIXELS))


def test_mean_of_one_keeps_ratios_and_is_idempotent():
    once = mean_of_one(np.array([1.0, 0.0, 5.0]), PIXELS)
    np.testing.assert_allclose(once, scaled([1, 0, 5]), rtol=1e-12)
    np.testing.assert_allclose(mean_of_one(once, PIXELS), once, rtol=1e-12)


def test_weights_that_leave_no_pixel_are_refused():
    absent = np.array([[10, 0, 0], [20, 0, 0]])
    with pytest.raises(ConfigError, match="class_weights: expected a weight above 0 for a class that the frames have"):
        mean_of_one(np.array([0.0, 1.0, 1.0]), absent)


@pytest.mark.parametrize("text", ['{"sign": 3, "road": 1, "pole": 2.5}', "[1, 2.5, 3]", "\ufeff[1, 2.5, 3]"])
def test_file(tmp_path, text):
    (tmp_path / "weights.json").write_text(text, encoding="utf-8")
    assert read_class_weights(tmp_path / "weights.json", CLASSES).tolist() == [1, 2.5, 3]


EXPECTED = "expected a JSON object with a weight for each of road, pole, sign"


@pytest.mark.parametrize(("text", "message"), [
    ("[1, 2]", EXPECTED + ", or a list of 3, in {file}, got 2 of them"),
    ("3", EXPECTED + ", or a list of 3, in {file}, got int"),
    ('{"road": 1, "pole": 1}', "in {file}, got 'sign' in one of the two alone"),
    ("[1, -2, 3]", "expected a number from 0 to 1000000000 for pole in {file}, got -2"),
    ("[1, NaN, 3]", "expected a number from 0 to 1000000000 for pole in {file}, got nan"),
    ("[1, Infinity, 3]", "expected a number from 0 to 1000000000 for pole in {file}, got inf"),
    ("[1, true, 3]", "expected a number from 0 to 1000000000 for pole in {file}, got True"),
    ('[1, "2", 3]', "expected a number from 0 to 1000000000 for pole in {file}, got '2'"),
    pytest.param(f"[1, {10**400}, 3]", "from 0 to 1000000000 for pole in {file}, got 1000", id="more than a float"),
    pytest.param("[" * 100_000, "in {file}: ", id="deep nest"),
    ("[0, 0, 0]", "expected a weight above 0 in {file}, got 0 for every class"),
    ("[1, 2", "in {file}: Expecting"),
])  # fmt: skip
def test_file_that_has_no_weights(tmp_path, text, message):
    path = tmp_path / "weights.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_class_weights(path, CLASSES)
    assert str(error.value).startswith("class_weights: ") and message.format(file=path) in str(error.value)


def test_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError) as error:
        read_class_weights(tmp_path / "enett", CLASSES)
    assert str(error.value) == (
        f"class_weights: expected none, enet, median or a file, got {tmp_path / 'enett'}: No such file or directory"
    )


def test_what_a_run_writes_can_be_read(tmp_path):
    weights = class_weights("enet", PIXELS)
    (tmp_path / "weights.json").write_text(json.dumps(dict(zip(CLASSES, weights.tolist(), strict=True))))
    assert read_class_weights(tmp_path / "weights.json", CLASSES).tolist() == weights.tolist()


def test_of_drawn_frames_every_nth_is_counted(monkeypatch):
    monkeypatch.setattr(verification, "DRAWN_FRAMES", 10)
    streets = SyntheticStreets(25, size=(64, 96))
    expected = [np.bincount(streets.read(i)[1].ravel(), minlength=256) for i in range(0, 25, 3)]
    np.testing.assert_array_equal(verification.count_pixels(streets), expected)
