"""Sphinx: `sphinx-build -W docs build/docs` from the root of the project."""

import json

from myst_parser.parsers.sphinx_ import MystParser

from bcmfnet import __version__

project, author, release = "bcmfnet", "the bcmfnet authors", __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"bcmfnet {release}"
myst_heading_anchors = 3
autodoc_typehints = "none"  # signatures of twenty options are read in the text
autodoc_member_order = "bysource"
napoleon_use_rtype = False


class Notebook(MystParser):
    """A notebook as a page: its text and its code, without what running it shows."""

    supported = ("notebook",)

    def parse(self, inputstring, document):
        cells = json.loads(inputstring)["cells"]
        texts = {"markdown": "{}", "code": "```python\n{}\n```"}
        parts = [texts[cell["cell_type"]].format("".join(cell["source"])) for cell in cells]
        super().parse("\n\n".join(parts), document)


def setup(app):
    app.add_source_suffix(".ipynb", "notebook")
    app.add_source_parser(Notebook)
