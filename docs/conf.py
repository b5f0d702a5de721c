"""Sphinx: `sphinx-build -W docs build/docs` from the root of the project."""

from bcmfnet import __version__

project, author, release = "bcmfnet", "the bcmfnet authors", __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"bcmfnet {release}"
myst_heading_anchors = 3
autodoc_typehints = "none"  # signatures of twenty options are read in the text
autodoc_member_order = "bysource"
napoleon_use_rtype = False
