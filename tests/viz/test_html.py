"""The page of a report: what it says, that it is well formed and loads nothing, and that no text becomes markup."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from dataclasses import replace
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
from page import parse

from bcmfnet.viz import curves, html
from bcmfnet.viz.curves import Panel
from bcmfnet.viz.html import File, Frame, Picture, Report, Selection
from bcmfnet.viz.markup import element
from bcmfnet.viz.style import SCRIPT, STYLE

HOSTILE = (
    "<script>alert(1)</script>", '" onload="alert(1)', "</style><b>&amp;", "it's 50 % < 60 %", "\x00\x1b\udcff", "路面"
)  # fmt: skip


def frame(name):
    titles = ("Image", "Ground truth", "Prediction", "Errors")
    return Frame(name, f"mIoU of {name}", [Picture(title, title.encode(), 64, 48) for title in titles])


REPORT = Report(
    title="run",
    lead="trained on streets",
    scores=[("mIoU", "62.50 %"), ("steps", "40")],
    classes=[("class", "IoU", "F 1 px"), ("road", "75.00", "8.00"), ("car", "50.00", "-"), ("sky", "-", "-"),
             ("mean", "62.50", "8.00")],
    colors=[(128, 64, 128), (0, 0, 142), (70, 130, 180)],
    summary=[("score", "value"), ("mIoU", "62.50"), ("frames", "3")],
    matrix=[[1500, 500, 0], [0, 1, 999], [0, 0, 0]],
    panels=[Panel("Loss", {"all": [(10, 2.0), (20, 1.0)], "ce": []}), Panel("Validation", {"mIoU": []}, "%")],
    worst=[frame("a"), frame("b")],
    selection=Selection(Frame("a", "", [Picture("detect: score", b"jpeg", 8, 8)]), [(0, 0, 255), (255, 0, 0)], 8.0),
    tables={"Configuration": {"seed": 0, "data": {"crop": [64, 96], "root": "", "compile": False, "limit": None}}},
    files={"scores": [File(b"evaluation.json", 2048)], "log": [], "weights": [File(b"weights/best.pt", 22_500_000)]},
)  # fmt: skip


@pytest.fixture
def page():
    return parse(html.render(REPORT))


def section(page, heading):
    return next(s for s in page.all("section") if s.all("h2")[0].text == heading)


def test_the_page_says_what_the_report_has(page):
    assert [e.text for e in page.all("title") + page.all("h1")] == ["run: mIoU 62.50 %", "run"]
    assert [e.text for e in page.all("dl", **{"class": "scores"})[0].all("dd")] == ["62.50 %", "40"]
    classes, summary = section(page, "Classes").all("table")
    assert classes.rows() == list(map(list, REPORT.classes)) and summary.rows() == list(map(list, REPORT.summary))
    bars = [cell.attributes.get("style") for cell in classes.all("td", **{"class": "bar"})]
    assert bars == ["--share: 0.750", "--share: 0.500", None, "--share: 0.625"]
    (plain, data) = section(page, "Configuration").all("table")
    assert plain.rows() == [["seed", "0"]]
    assert data.rows() == [["crop", "64, 96"], ["root", "none"], ["compile", "no"], ["limit", "none"]]
    links = [(a.text, a.attributes["href"]) for a in section(page, "Files").all("a")]
    assert links == [("evaluation.json", "evaluation.json"), ("weights/best.pt", "weights/best.pt")]
    assert [e.text for e in section(page, "Files").all("small")] == ["2.0 kB", "22.5 MB"]


def test_every_section_is_linked_and_an_empty_one_is_left_out(page):
    headings = ["Curves", "Classes", "Confusion matrix", "Worst frames", "Loss", "Configuration", "Files"]
    links = page.all("nav")[0].all("a")
    assert [link.text for link in links] == headings == [h.text for h in page.all("h2")]
    assert [link.attributes["href"] for link in links] == ["#" + s.attributes["id"] for s in page.all("section")]
    bare = replace(REPORT, panels=[], worst=[], selection=None, tables={}, files={"log": []})
    assert [h.text for h in parse(html.render(bare)).all("h2")] == ["Classes", "Confusion matrix"]


def test_the_confusion_matrix_is_in_per_cent_of_the_ground_truth(page):
    (table,) = section(page, "Confusion matrix").all("table")
    assert table.rows() == [
        ["", "road", "car", "sky"], ["road", "75", "25", ""], ["car", "", "", "100"], ["sky", "", "", ""]
    ]  # fmt: skip
    cells = table.all("tbody")[0].all("td")
    assert cells[0].attributes == {"style": "--share: 0.750", "title": "road as road: 75.00 %, 1,500 pixels"}
    assert cells[4].attributes["title"] == "car as car: 0.10 %, 1 pixels" and "style" not in cells[4].attributes
    assert [cell.attributes.get("class") for cell in cells[:6]] == [None] * 5 + ["high"]


def test_a_matrix_of_many_classes_is_left_to_its_picture():
    names = [f"class{i}" for i in range(33)]
    rows = [("class", "IoU"), *((name, "0.00") for name in names), ("mean", "0.00")]
    report = replace(REPORT, classes=rows, colors=[(0, 0, 0)] * 33, matrix=np.eye(33, dtype=int).tolist())
    shown = section(parse(html.render(report)), "Confusion matrix")
    assert not shown.all("table") and shown.all("a")[0].attributes["href"] == "confusion_matrix.png"


def test_frames_are_pictures_within_the_page_and_a_slider(page):
    articles = section(page, "Worst frames").all("article")
    assert [article.all("h3")[0].text for article in articles] == ["a mIoU of a", "b mIoU of b"]
    images = articles[1].all("img")
    assert [base64.b64decode(i.attributes["src"].removeprefix("data:image/jpeg;base64,")) for i in images] == [
        b"Image", b"Ground truth", b"Prediction", b"Errors"
    ]  # fmt: skip
    assert images[0].attributes["alt"] == "Image of b"
    assert {(i.attributes["width"], i.attributes["height"]) for i in images} == {("64", "48")}
    (slider,) = articles[1].all("input")
    assert slider.attributes["type"] == "range" and slider.attributes["aria-label"]
    titles = [figure.all("figcaption")[0].text for figure in articles[1].all("figure")]
    assert titles.index(html.OVER) + 1 == titles.index(html.WIPED)  # the script takes the picture before it


def test_nothing_is_loaded_and_no_other_script_runs(page):
    """The policy names the one script by its digest, so that it must be the whole text of the element."""
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    (script,) = page.all("script")
    digest = base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode()
    assert policy.attributes["content"] == (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )
    assert script.attributes == {} and not page.all("link") and not page.all("base") and not page.all("iframe")
    assert all(e.attributes["src"].startswith("data:") for e in page.all() if "src" in e.attributes)
    styles = "".join(e.attributes.get("style", "") for e in page.all())
    assert not re.search(r"url\(|@import|https?:|//", STYLE + SCRIPT + styles)
    assert not [name for e in page.all() for name in e.attributes if name.startswith("on")]


def hostile(text):
    """The report with a text wherever a user has one."""
    rows = [(text, *row[1:]) if row[0] == "road" else row for row in REPORT.classes]
    return replace(
        REPORT, title=text, lead=text, classes=rows, worst=[frame(text)], tables={"Configuration": {text: text}},
        files={"log": [File(os.fsencode(text.replace("\x00", "")), 1)]},
    )  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_text_of_users_is_shown_as_text(text):
    shown = text.replace("\x00", "�").replace("\x1b", "�").replace("\udcff", "�")
    rendered = html.render(hostile(text))
    rendered.encode()
    page, plain = parse(rendered), parse(html.render(hostile("plain")))
    assert [(e.tag, sorted(e.attributes)) for e in page.all()] == [(e.tag, sorted(e.attributes)) for e in plain.all()]
    assert page.all("h1")[0].text == shown and page.all("header")[0].all("p")[0].text == shown
    assert section(page, "Classes").all("table")[0].rows()[1][0] == shown
    assert section(page, "Confusion matrix").all("table")[0].rows()[1][0] == shown
    assert section(page, "Worst frames").all("h3")[0].text == f"{shown} mIoU of {shown}"
    assert section(page, "Worst frames").all("img")[0].attributes["alt"] == f"Image of {shown}"
    assert section(page, "Configuration").all("table")[0].rows() == [[shown, shown]]
    (link,) = section(page, "Files").all("a")
    assert unquote_to_bytes(link.attributes["href"]) == os.fsencode(text.replace("\x00", ""))
    assert re.fullmatch(r"[\w%.~/-]+", link.attributes["href"], re.ASCII)


def test_markup_is_text_unless_it_is_marked():
    inner = element("b", "1 < 2")
    assert element("p", inner, "<b>", 3, class_="a", aria_label='"', hidden=True, title=None) == (
        '<p class="a" aria-label="&quot;" hidden=""><b>1 &lt; 2</b>&lt;b&gt;3</p>'
    )
    assert element("img", src="a&b") == '<img src="a&amp;b">'


def figure(panel):
    return parse(curves.draw(panel)).children[0]


def test_a_curve_goes_through_its_points_and_says_their_values():
    drawn = figure(Panel("Loss", {"all": [(0, 0.0), (50, 5.0), (100, 10.0)], "ce": [(100, 2.0)], "none": []}, "nats"))
    first, second = drawn.all("polyline")
    places = [tuple(map(float, place.split(","))) for place in first.attributes["points"].split()]
    middle = (curves.LEFT + curves.RIGHT) / 2, (curves.TOP + curves.BOTTOM) / 2
    assert places == [(curves.LEFT, curves.BOTTOM), middle, (curves.RIGHT, curves.TOP)]
    assert (first.attributes["data-steps"], first.attributes["data-values"]) == ("0 50 100", "0 5 10")
    assert second.attributes["data-values"] == "2"
    assert [output.text for output in drawn.all("output")] == ["100", "10", "2"]
    assert drawn.all("figcaption")[0].text == "Lossstep 100all 10 natsce 2 nats"
    assert drawn.all("svg")[0].attributes["aria-label"] == "Loss by step; at the end: all 10, ce 2 nats"
    assert len(drawn.all("circle")) == 4


def test_a_long_curve_is_thinned_to_means_and_has_no_marks():
    points = [(step, step % 3) for step in range(1, 601)]
    drawn = figure(Panel("Loss", {"all": points}))
    (line,) = drawn.all("polyline")
    assert line.attributes["data-steps"].split() == [str(step) for step in range(3, 601, 3)]
    assert set(line.attributes["data-values"].split()) == {"1"}
    assert not drawn.all("circle")
    assert len(curves.thinned(points[:601])) == 200 and curves.thinned(points[:200]) == points[:200]


@pytest.mark.parametrize(("low", "high", "expected"), [
    (0, 10, [0, 5, 10]), (0, 1, [0, 0.5, 1]), (0.2, 0.9, [0.2, 0.4, 0.6, 0.8, 1]), (2.57, 4.13, [2.5, 3, 3.5, 4, 4.5]),
    (-3, 17, [-5, 0, 5, 10, 15, 20]), (0, 7e-5, [0, 2e-5, 4e-5, 6e-5, 8e-5]), (0, 11000, [0, 5000, 10000, 15000]),
    (5, 5, [4.5, 5, 5.5]), (0, 0, [-0.1, -0.05, 0, 0.05, 0.1]),
])  # fmt: skip
def test_ticks_are_round_and_enclose_the_values(low, high, expected):
    assert curves.ticks(low, high) == pytest.approx(expected)
