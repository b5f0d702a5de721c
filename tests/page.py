"""An HTML page as its elements, for tests of what it says; whatever is not well formed fails."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"br", "img", "input", "link", "meta"}


@dataclass
class Element:
    """An element with its attributes and what is in it."""

    tag: str
    attributes: dict[str, str | None]
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag: str | None = None, **attributes: str) -> list[Element]:
        """The elements below this one of a tag and of attributes, in the order of the page."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                fits = tag in (None, child.tag) and all(child.attributes.get(k) == v for k, v in attributes.items())
                found += [child] * fits + child.all(tag, **attributes)
        return found

    def rows(self) -> list[list[str]]:
        """Texts of the cells of a table."""
        return [[c.text for c in row.children if isinstance(c, Element)] for row in self.all("tr")]


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.page = Element("", {})
        self.open = [self.page]

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"<{tag}> with an attribute twice"
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        raise AssertionError(f"<{tag}/> does not end <{tag}>")

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag, f"</{tag}> ends another element"

    def handle_data(self, data):
        self.open[-1].children.append(data)

    def handle_decl(self, decl):
        assert decl == "DOCTYPE html"

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data}")


def parse(text: str) -> Element:
    """The page. Raises AssertionError where an element does not end, or another one ends."""
    parser = _Parser()
    parser.feed(text)
    parser.close()
    assert parser.open == [parser.page], f"{[element.tag for element in parser.open]} do not end"
    ids = [element.attributes["id"] for element in parser.page.all() if "id" in element.attributes]
    assert len(set(ids)) == len(ids), f"an id twice: {ids}"
    return parser.page
