"""Formulas as MathML, which every browser draws by itself: no script, and no other server."""

from __future__ import annotations

from docutils.nodes import SkipNode
from latex2mathml.converter import convert


def inline(self, node):
    """Writes a formula within a line."""
    self.body.append(convert(node.astext()))
    raise SkipNode


def block(self, node):
    """Writes a formula that has lines of its own."""
    self.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
