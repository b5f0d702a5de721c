"""Polygons cover the pixels whose centres they hold."""

import math

import numpy as np
import pytest

from bcmfnet.data.polygons import Shape, fill_polygon


def drawn(*polygons, size=(40, 50)):
    ids = np.zeros(size, np.uint8)
    for value, corners in enumerate(polygons, 1):
        fill_polygon(ids, np.array(corners, np.float64), value)
    return ids


def crossings(corners, x, y):
    """Of a ray to the right of (x, y) with the edges, from the definition."""
    count = 0
    for (x1, y1), (x2, y2) in zip(corners, [*corners[1:], corners[0]], strict=True):
        if (y1 > y) != (y2 > y):
            count += x < x1 + (y - y1) * (x2 - x1) / (y2 - y1)
    return count


@pytest.mark.parametrize("seed", range(6))
def test_pixels_are_those_whose_centre_is_inside(seed):
    """Also of polygons that cross themselves, and that lie partly outside of the image."""
    corners = np.random.default_rng(seed).uniform(-15, 60, (4 + 2 * seed, 2))
    expected = [[crossings(corners.tolist(), x + 0.5, y + 0.5) % 2 for x in range(50)] for y in range(40)]
    assert np.array_equal(drawn(corners), expected) and 0 < np.mean(expected) < 1


def test_a_rectangle_of_whole_pixels():
    ids = drawn([(2, 3), (7, 3), (7, 8), (2, 8)])
    assert ids[3:8, 2:7].all() and ids.sum() == 25
    assert np.array_equal(drawn([(2, 8), (7, 8), (7, 3), (2, 3)]), ids)


@pytest.mark.parametrize("seed", range(20))
def test_of_polygons_with_common_edges_each_pixel_is_in_one(seed):
    """A fan of triangles around a point, that of a pixel's centre too, tiles the image without a gap."""
    rng = np.random.default_rng(seed)
    angles = 2 * math.pi * (np.arange(9) + rng.uniform(0, 0.5, 9)) / 9
    rim = np.stack([25 + 60 * np.cos(angles), 20 + 60 * np.sin(angles)], 1)
    centre = rng.uniform(10, 30, 2) if seed % 2 else np.array([20.5, 10.5])
    fan = [np.array([centre, rim[i], rim[(i + 1) % 9]])[:: 1 if i % 2 else -1] for i in range(9)]
    assert (sum(drawn(triangle).astype(int) for triangle in fan) == 1).all()


@pytest.mark.parametrize("corners", [
    [(60, 3), (70, 3), (70, 8)], [(-9, 3), (-3, 3), (-3, 8)], [(2, -9), (7, -3), (9, -5)], [(2, 50), (7, 60), (9, 70)],
    [(3, 3), (3, 3), (3, 3)], [(3.1, 3.1), (3.2, 3.1), (3.2, 3.2)], [(1, 5), (9, 5), (4, 5)],
])  # fmt: skip
def test_polygons_outside_and_without_a_pixel(corners):
    assert not drawn(corners).any()


def test_areas_and_unions():
    square = np.array([(2, 3), (7, 3), (7, 8), (2, 8)], np.float64)
    shape = Shape("a", (square, square + 3))
    ids = np.zeros((40, 50), np.uint8)
    shape.draw(ids, 9)
    assert shape.area == 50 and (ids == 9).sum() == 25 + 25 - 4, "a union, where the even-odd rule would leave a hole"
    assert Shape("a", (square[::-1],)).area == 25


def test_runs_go_down_the_columns():
    runs = np.array([1, 2, 5, 3, 1])
    ids = np.zeros((4, 3), np.uint8)
    Shape("a", runs=runs).draw(ids, 7)
    assert (ids.T.ravel() == [0, 7, 7, 0, 0, 0, 0, 0, 7, 7, 7, 0]).all() and Shape("a", runs=runs).area == 5
