"""Elements of HTML and SVG in which no text can become markup."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape

VOID = {"br", "img", "input", "link", "meta"}
FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""Characters that a document must not have; file names may, where they are no UTF-8."""


class Markup(str):
    """Text that is markup already."""


def element(tag: str, /, *children: object, **attributes: object) -> Markup:
    """An element: children that are not Markup are shown as text, whatever is in them.

    A trailing underscore of an attribute is dropped, others are hyphens (`class_`, `aria_label`). True is an attribute
    without a value; one that is None or False is left out.
    """
    words = [tag]
    for key, value in attributes.items():
        if value is not None and value is not False:
            words.append(f'{key.rstrip("_").replace("_", "-")}="{"" if value is True else as_text(value)}"')
    if tag in VOID:
        return Markup(f"<{' '.join(words)}>")
    return Markup(f"<{' '.join(words)}>{join(children)}</{tag}>")


def join(children: Iterable[object]) -> Markup:
    """Markup of several children, one after another."""
    return Markup("".join(child if isinstance(child, Markup) else as_text(child) for child in children))


def as_text(value: object) -> str:
    """A value as text of a document or of an attribute."""
    return escape(FORBIDDEN.sub("\ufffd", str(value)))
