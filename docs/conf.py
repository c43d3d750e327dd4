"""Sphinx configuration. Nothing here needs torch: the modules that are documented import without it."""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS.parent / "lint"), str(DOCS / "_ext")]

from quantcheck_lint.docs import write_pages  # noqa: E402  # found through the path above

write_pages(str(DOCS / "lint" / "rules"))

project = "pytest-quantcheck"
author = "The pytest-quantcheck developers"
project_copyright = author

extensions = ["myst_parser", "sphinx.ext.autodoc", "scheme_pages"]
exclude_patterns = ["_build", "_ext", "examples"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

# Docstrings say `name` as Markdown does.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_type_aliases = {"Subject": "Subject"}
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_display_short_literal_types = True
python_maximum_signature_line_length = 88

smartquotes = False

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = "pytest-quantcheck"
html_static_path = ["_static"]
html_css_files = ["quantcheck.css"]
html_show_sourcelink = False
html_copy_source = False


def is_field(member):
    return (getattr(member, "__doc__", None) or "").startswith("Alias for field number")


def setup(app):
    # The fields of a named tuple are in its signature; what Python says of each is "Alias for field number 0".
    app.connect("autodoc-skip-member", lambda app, what, name, obj, skip, options: is_field(obj) or None)
