"""The documentation site: ``make docs`` builds it into build/docs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "extensions")]

from metalora import __version__  # noqa: E402

project = "metalora"
author = "The metalora developers"
project_copyright = author
release = __version__
extensions = ["mathml", "myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["extensions"]
default_role = "py:obj"  # what stands between single backticks in docstrings

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a page of the API begins with its module's documentation

autodoc_member_order = "groupwise"
autodoc_default_options = {"members": True}
toc_object_entries_show_parents = "hide"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"metalora {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_sphinx = False
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0072B2", "color-brand-content": "#0072B2"},
    "dark_css_variables": {"color-brand-primary": "#56B4E9", "color-brand-content": "#56B4E9"},
}

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)\s]+)\)")


def _name_files_of_the_clone(app, name, source):
    """Turns links that leave this folder into text: the site has no other files of the clone."""
    page = HERE / f"{name}.md"

    def replaced(link: re.Match[str]) -> str:
        path = (page.parent / link[2]).resolve()
        if HERE in path.parents:
            return link[0]
        return f"{link[1]} (`{path.relative_to(HERE.parent)}`)"

    source[0] = _LINK.sub(replaced, source[0])


def setup(app):
    app.connect("source-read", _name_files_of_the_clone)
