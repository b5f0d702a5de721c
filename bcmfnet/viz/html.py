"""The report of a run as one HTML file that loads nothing: from plain values to a string.

A page may neither load nor send anything: its policy allows pictures that are part of it, and this script alone.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import quote

from bcmfnet.viz import curves
from bcmfnet.viz.markup import Markup, element, join
from bcmfnet.viz.style import SCRIPT, STYLE

MATRIX_CLASSES, MATRIX_FILE = 32, "confusion_matrix.png"
"""A confusion matrix of more classes is left to its picture."""
WHITE_FROM = 0.77
"""Share from which white is better to read than black on the blue of a cell."""
WIPED, OVER = "Prediction", "Ground truth"
"""Titles of the tile with the slider, and of the one before it that the slider lays over it."""

RGB = tuple[int, int, int]
Rows = Sequence[Sequence[str]]


class Picture(NamedTuple):
    """A picture with its title: a JPEG, and its width and height in pixels."""

    title: str
    jpeg: bytes
    width: int
    height: int


class Frame(NamedTuple):
    """Pictures of one frame, with its name and a line about it."""

    name: str
    note: str
    pictures: Sequence[Picture]


class Selection(NamedTuple):
    """What a loss selects on a frame, and the colours of its scores and losses from 0 to so many nats."""

    frame: Frame
    colors: Sequence[RGB]
    nats: float


class File(NamedTuple):
    """A file beside the report: its path from there, as bytes since a name need not be text, and its size in bytes."""

    path: bytes
    size: int


@dataclass
class Report:
    """What a report shows. What is empty is left out, its heading with it.

    Attributes:
        title, lead: name of the run, and a sentence about it.
        scores: labels and values; the first one is the score in front.
        panels: the curves.
        classes: table of scores, header first, a row for each class, and the mean last; per cent.
        colors: colour of each class.
        summary: table of the scores of the whole set, header first.
        matrix: pixel counts [C][C], rows are ground truth, columns prediction.
        worst: the worst frames.
        selection: what the loss selects on a frame.
        tables: options by heading; values are plain, or sections of plain values.
        files: the files beside it, by what they are.
    """

    title: str
    lead: str
    scores: list[tuple[str, str]]
    classes: Rows
    colors: Sequence[RGB]
    summary: Rows
    matrix: Sequence[Sequence[int]]
    panels: Sequence[curves.Panel] = ()
    worst: Sequence[Frame] = ()
    selection: Selection | None = None
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    files: Mapping[str, Sequence[File]] = field(default_factory=dict)


def render(report: Report) -> str:
    """The report as an HTML document."""
    contents = {
        "Curves": _curves(report),
        "Classes": _scores(report),
        "Confusion matrix": _confusion(report),
        "Worst frames": _worst(report),
        "Loss": _selection(report),
        **{heading: _table_of_options(options) for heading, options in report.tables.items()},
        "Files": _files(report),
    }
    sections = {heading: content for heading, content in contents.items() if content}
    body = element(
        "body",
        _header(report, sections),
        element("main", *(_section(heading, content) for heading, content in sections.items())),
        element("script", Markup(SCRIPT)),
    )
    return f"<!DOCTYPE html>\n{element('html', _head(report), body, lang='en')}\n"


def _head(report: Report) -> Markup:
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    label, value = report.scores[0]
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{report.title}: {label} {value}"),
        element("style", Markup(STYLE)),
    )


def _header(report: Report, headings: Iterable[str]) -> Markup:
    scores = [element("div", element("dt", label), element("dd", value)) for label, value in report.scores]
    links = [element("a", heading, href=f"#{_anchor(heading)}") for heading in headings]
    return element(
        "header",
        element("h1", report.title),
        element("p", report.lead),
        element("dl", *scores, class_="scores"),
        element("nav", *links, aria_label="Sections"),
    )


def _section(heading: str, content: Markup) -> Markup:
    return element("section", element("h2", heading), content, id=_anchor(heading))


def _anchor(heading: str) -> str:
    return quote(heading.lower().replace(" ", "-"))


def _curves(report: Report) -> Markup | None:
    drawn = [curves.draw(panel) for panel in report.panels if any(panel.lines.values())]
    return element("div", *drawn, class_="curves") if drawn else None


def _scores(report: Report) -> Markup:
    colors = [*map(_swatch, report.colors), None]
    header, *rows = report.classes
    body = [_class_row(row, color) for row, color in zip(rows, colors, strict=True)]
    classes = element(
        "table",
        element("thead", _header_row(header)),
        element("tbody", *body[:-1]),
        element("tfoot", body[-1]),
        class_="numbers sortable",
    )
    head, *scores = report.summary
    summary = element(
        "table", element("thead", _header_row(head)), element("tbody", *map(_row, scores)), class_="numbers"
    )
    note = element("p", "Per cent, and frames a second; - for a class that neither prediction nor ground truth has.")
    return join([note, element("div", _scrolled("Scores by class", classes), summary, class_="beside")])


def _header_row(names: Iterable[str]) -> Markup:
    return element("tr", *(element("th", name, scope="col") for name in names))


def _row(cells: Sequence[str]) -> Markup:
    return element("tr", element("th", cells[0], scope="row"), *(element("td", cell) for cell in cells[1:]))


def _class_row(cells: Sequence[str], swatch: Markup | None) -> Markup:
    """A row of scores, with a bar below the first of them."""
    name, first, *others = cells
    bar = f"--share: {float(first) / 100:.3f}" if first != "-" else None
    return element(
        "tr",
        element("th", *([swatch] if swatch else []), name, scope="row"),
        element("td", first, class_="bar", style=bar),
        *(element("td", cell) for cell in others),
    )


def _swatch(color: RGB) -> Markup:
    return element("span", class_="swatch", style=f"background: {_css(color)}")


def _css(color: RGB) -> str:
    return "#" + "".join(f"{channel:02x}" for channel in color)


def _scrolled(label: str, content: Markup) -> Markup:
    """Content that is scrolled by itself where the screen is too narrow for it, by keyboard too."""
    return element("div", content, class_="scrolled", role="region", aria_label=label, tabindex="0")


def _confusion(report: Report) -> Markup:
    names = [row[0] for row in report.classes[1:-1]]
    if len(names) > MATRIX_CLASSES:
        return element("p", f"Of {len(names)} classes: ", element("a", MATRIX_FILE, href=MATRIX_FILE))
    columns = [element("th", element("span", name), scope="col") for name in names]
    rows = [
        element("tr", element("th", name, scope="row"), *_cells(name, names, counts))
        for name, counts in zip(names, report.matrix, strict=True)
    ]
    table = element(
        "table", element("thead", element("tr", element("td"), *columns)), element("tbody", *rows), class_="matrix"
    )
    note = "Rows are ground truth, columns prediction: per cent of the pixels of the row's class."
    return join([element("p", note), _scrolled("Confusion matrix", table)])


def _cells(truth: str, names: Sequence[str], counts: Sequence[int]) -> Iterable[Markup]:
    total = sum(counts)
    for name, count in zip(names, counts, strict=True):
        share = count / total if total else 0
        text = f"{100 * share:.0f}" if share >= 0.005 else ""
        style = f"--share: {share:.3f}" if text else None
        title = f"{truth} as {name}: {100 * share:.2f} %, {count:,} pixels"
        yield element("td", text, style=style, title=title, class_="high" if share >= WHITE_FROM else None)


def _worst(report: Report) -> Markup | None:
    if not report.worst:
        return None
    note = "Those with the lowest mIoU over the classes of their own ground truth, the worst first."
    named = [(row[0], _swatch(color)) for row, color in zip(report.classes[1:-1], report.colors, strict=True)]
    named += [(name, element("span", class_=f"swatch {name}")) for name in ("wrong", "ignored")]
    legend = element("ul", *(element("li", swatch, name) for name, swatch in named), class_="legend")
    return join([element("p", note), legend, *map(_frame, report.worst)])


def _frame(frame: Frame) -> Markup:
    tiles = [_tile(frame, picture) for picture in frame.pictures]
    heading = element("h3", frame.name, " ", element("small", frame.note))
    return element("article", heading, element("div", *tiles, class_="tiles"))


def _tile(frame: Frame, picture: Picture) -> Markup:
    caption, image = element("figcaption", picture.title), _image(frame, picture)
    if picture.title != WIPED:
        return element("figure", caption, image)
    slider = element(
        "input", type="range", min=0, max=100, value=0, aria_label=f"Share of the {OVER.lower()} over the prediction"
    )
    label = element("label", WIPED, slider, OVER, hidden=True)
    return element("figure", caption, element("div", image, class_="wipe"), label)


def _image(frame: Frame, picture: Picture) -> Markup:
    source = "data:image/jpeg;base64," + base64.b64encode(picture.jpeg).decode()
    alt = f"{picture.title} of {frame.name}"
    return element("img", src=source, alt=alt, width=picture.width, height=picture.height)


def _selection(report: Report) -> Markup | None:
    if report.selection is None:
        return None
    frame, colors, nats = report.selection
    scale = f"background: linear-gradient(to right, {', '.join(map(_css, colors))})"
    note = element(
        "p",
        "Score and loss of a pixel: 0 ",
        element("span", class_="scale", style=scale),
        f" {nats:g} nats and more. Selected pixels show their loss, enlarged; ignored ones are grey in the score.",
    )
    return join([note, _frame(frame)])


def _table_of_options(options: Mapping[str, Any]) -> Markup | None:
    """A table for the plain values, and one for each section."""
    plain = {key: value for key, value in options.items() if not isinstance(value, Mapping)}
    sections = {"": plain} | {key: value for key, value in options.items() if isinstance(value, Mapping)}
    tables = [_options(name, values) for name, values in sections.items() if values]
    return element("div", *tables, class_="options") if tables else None


def _options(name: str, values: Mapping[str, Any]) -> Markup:
    caption = [element("caption", name)] if name else []
    rows = [_row((key, _plain(value))) for key, value in values.items()]
    return element("table", *caption, element("tbody", *rows))


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    words = {"None": "none", "True": "yes", "False": "no"}
    return words.get(str(value), str(value)) or "none"


def _files(report: Report) -> Markup | None:
    entries = [
        join([element("dt", what), element("dd", *map(_link, files))]) for what, files in report.files.items() if files
    ]
    return element("dl", *entries, class_="files") if entries else None


def _link(file: File) -> Markup:
    size = f"{file.size / 1e6:,.1f} MB" if file.size >= 1e6 else f"{file.size / 1e3:,.1f} kB"
    link = element("a", file.path.decode(errors="replace"), href=quote(file.path))
    return element("span", link, " ", element("small", size))
