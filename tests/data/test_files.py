"""The one listing of images, that datasets and prediction share."""

import os

import pytest

from bcmfnet.data.files import list_images


@pytest.fixture
def tree(tmp_path):
    for name in ("b.PNG", "a.jpg", "sub/c.png", "sub/deep/d.tiff", "notes.txt", "png", "._a.jpg", ".hidden.png",
                 ".thumbs/e.png", "sub/.cache/f.png", "dir.png/g.png"):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def names(found, root):
    return [str(path.relative_to(root)) for path in found]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*", ["a.jpg", "b.PNG"]),
        ("*/*", ["dir.png/g.png", "sub/c.png"]),
        ("**/*.png", ["dir.png/g.png", "sub/c.png"]),
        ("**", ["a.jpg", "b.PNG", "dir.png/g.png", "sub/c.png", "sub/deep/d.tiff"]),
        ("sub/**/**/*", ["sub/c.png", "sub/deep/d.tiff"]),
        ("a**", ["a.jpg"]),
        ("[ab].*", ["a.jpg", "b.PNG"]),
    ],
)
def test_images_of_a_pattern(tree, pattern, expected):
    assert names(list_images(tree, pattern), tree) == expected


def test_endings_of_ones_own(tree):
    assert names(list_images(tree, endings=("_x.png", ".TXT")), tree) == ["notes.txt"]


def test_what_is_no_regular_file_is_listed_for_its_reader_to_name(tree):
    (tree / "dangling.png").symlink_to("nowhere.png")
    (tree / "loop.png").symlink_to("loop.png")
    (tree / "folder.png").symlink_to("sub")
    os.mkfifo(tree / "fifo.png")
    assert names(list_images(tree), tree) == ["a.jpg", "b.PNG", "dangling.png", "fifo.png", "loop.png"]


def test_links_that_lead_in_circles_are_not_followed(tree):
    """Six links upwards in each of two folders: followed, they are 6^40 paths."""
    for number in range(6):
        (tree / "sub" / f"up{number}").symlink_to("..")
        (tree / "sub" / "deep" / f"up{number}").symlink_to("../..")
    assert names(list_images(tree, "**/c.png"), tree) == ["sub/c.png"]
