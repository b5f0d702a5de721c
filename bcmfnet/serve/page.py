"""The page to try a network, and the page of the endpoints; each is one document that loads nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from typing import Any

from bcmfnet.data.labels import LabelTable
from bcmfnet.serve.limits import Limits
from bcmfnet.serve.script import SCRIPT
from bcmfnet.viz.markup import Markup, element
from bcmfnet.viz.style import STYLE

OWN_STYLE = """
nav { margin-bottom: 1rem; }
label.drop:not([hidden]) {
  display: block; margin: 0 0 1rem; padding: 1.5rem; border: 2px dashed var(--rule); border-radius: 6px;
  background: var(--panel); color: var(--ink); font-size: 0.9375rem;
}
.drop.over { border-color: var(--accent); }
.drop input { display: block; max-width: 100%; margin-top: 0.75rem; font: inherit; }
.view { position: relative; overflow: hidden; border-radius: 3px; touch-action: pan-y; --at: 50%; }
.view canvas { display: block; width: 100%; height: auto; }
.view .over { position: absolute; inset: 0; height: 100%; clip-path: inset(0 0 0 var(--at)); }
.view::after {
  content: ""; position: absolute; inset: 0 auto 0 var(--at); width: 2px; margin-left: -1px; background: #fff;
  box-shadow: 0 0 2px #000; pointer-events: none;
}
.probe {
  position: absolute; width: 0.75rem; height: 0.75rem; margin: -0.375rem; border: 2px solid #fff; border-radius: 50%;
  box-shadow: 0 0 2px #000; pointer-events: none;
}
.result { display: grid; gap: 1rem 2rem; grid-template-columns: minmax(0, 1fr) 16rem; }
.result[hidden] { display: none; }
.result output { display: block; min-height: 1.5em; }
.legend.checks { display: block; }
.checks label:not([hidden]) { gap: 0.5rem; margin: 0; padding: 0.25rem 0; color: var(--ink); cursor: pointer; }
.checks input { flex: none; width: 1rem; height: 1rem; }
.checks .swatch { flex: none; margin: 0; }
.checks span:last-child { margin-left: auto; color: var(--quiet); white-space: nowrap; }
.endpoint th { padding: 0.25rem 1.5rem 0.25rem 0; vertical-align: top; white-space: nowrap; color: var(--quiet); }
.endpoint td { padding: 0.25rem 0; }
fieldset { margin: 0; padding: 0; border: 0; min-width: 0; }
legend { padding: 0; font-weight: 600; }
button {
  font: inherit; font-size: 0.875rem; color: var(--accent); background: none; padding: 0.25rem 0.625rem;
  border: 1px solid var(--rule); border-radius: 4px; cursor: pointer; margin: 0.25rem 0.5rem 0.25rem 0;
}
.failed { color: var(--line5); }
@media (max-width: 48rem) {
  .result { grid-template-columns: minmax(0, 1fr); }
  .legend.checks { columns: 10rem; column-gap: 1.5rem; }
  .legend.checks li { break-inside: avoid; }
}
"""


def policy() -> str:
    """The Content-Security-Policy of the pages: this script, the server itself, and pictures made on the page."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return (
        f"default-src 'none'; img-src blob: data:; connect-src 'self'; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def page_to_try(name: str, table: LabelTable, limits: Limits) -> str:
    """The page where an image is dropped, as an HTML document."""
    most = f"at most {limits.bytes / 2**20:g} MiB and {limits.pixels / 1e6:.1f} megapixels"
    header = element(
        "header",
        element("h1", "Segment an image"),
        element("p", f"{name} tells {table.num_classes} classes apart. The image goes to this server and is not kept."),
        element("nav", element("a", "Endpoints", href="docs"), element("a", "Health", href="health")),
    )
    choose = element(
        "label",
        f"Drop an image here, or choose one: {most}.",
        element("input", type="file", accept="image/*", id="file"),
        class_="drop",
        id="drop",
    )
    return _document("Segment an image", header, choose, _status(), _result(table), element("script", Markup(SCRIPT)))


def _status() -> Markup:
    return element("p", "No image yet.", id="status", role="status")


def _result(table: LabelTable) -> Markup:
    view = element(
        "div",
        element("canvas", id="before"),
        element("canvas", id="after", class_="over"),
        element("span", class_="probe", id="probe", hidden=True),
        class_="view",
        id="view",
        tabindex=0,
        role="application",
        aria_label="The image with its classes. Arrow keys move the place whose class is told.",
        aria_describedby="told",
    )
    slider = element(
        "label",
        "Classes",
        element("input", type="range", min=0, max=100, value=50, id="slider", aria_label="Share of the bare image"),
        "Image",
    )
    figure = element("figure", view, slider, element("output", id="told", aria_live="polite"))
    rows = [
        _check(number, name, color)
        for number, (name, color) in enumerate(zip(table.classes, table.colors, strict=True))
    ]
    classes = element(
        "fieldset",
        element("legend", "Classes"),
        element("button", "All", type="button", id="all"),
        element("button", "None", type="button", id="none"),
        element("ul", *rows, class_="legend checks"),
    )
    return element("main", figure, classes, class_="result", id="result", hidden=True)


def _check(number: int, name: str, color: tuple[int, int, int]) -> Markup:
    css = "#" + "".join(f"{channel:02x}" for channel in color)
    box = element("input", type="checkbox", checked=True, data_class=number, data_color=css)
    swatch = element("span", class_="swatch", style=f"background: {css}")
    return element("li", element("label", box, swatch, element("span", name), element("span")))


def page_of_api(schema: Mapping[str, Any]) -> str:
    """The endpoints of an OpenAPI schema as an HTML document."""
    info = schema["info"]
    header = element(
        "header",
        element("h1", f"{info['title']} {info['version']}"),
        element("p", info["description"]),
        element("nav", element("a", "Try it", href="."), element("a", "openapi.json", href="openapi.json")),
    )
    endpoints = [
        _endpoint(method, path, facts) for path, methods in schema["paths"].items() for method, facts in methods.items()
    ]
    return _document("Endpoints", header, element("main", *endpoints))


def _endpoint(method: str, path: str, facts: Mapping[str, Any]) -> Markup:
    rows = [(f"{p['name']}={str(p['schema'].get('default')).lower()}", _values(p)) for p in facts.get("parameters", ())]
    if body := facts.get("requestBody"):
        rows.append(("body", f"{body['description']}: {', '.join(body['content'])}"))
    rows += [(status, answer["description"]) for status, answer in facts["responses"].items()]
    table = element("table", *(element("tr", element("th", k, scope="row"), element("td", v)) for k, v in rows))
    return element(
        "section", element("h2", f"{method.upper()} {path}"), element("p", facts["summary"]), table, class_="endpoint"
    )


def _values(parameter: Mapping[str, Any]) -> str:
    values = parameter["schema"].get("enum") or [parameter["schema"]["type"]]
    return f"{parameter['description']} ({', '.join(values)})"


def _document(title: str, *content: Markup) -> str:
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("link", rel="icon", href="data:,"),
        element("title", title),
        element("style", Markup(STYLE + OWN_STYLE)),
    )
    return f"<!DOCTYPE html>\n{element('html', head, element('body', *content), lang='en')}\n"
