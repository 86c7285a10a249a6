"""Render GitHub's ```math blocks and inline $`...`$ as MathML.

Browsers draw MathML without a script, so the site loads nothing from elsewhere.
"""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert

_FENCE = re.compile(r"^( *)(`{3,}|~{3,})(.*)$")
_INLINE = re.compile(r"\$`([^`\n]+)`\$")


def to_mathml(latex: str, display: str = "inline") -> str:
    """Return one line of MathML.

    Args:
        latex: an equation; several lines end with two backslashes and align at `&`.
        display: `"inline"` or `"block"`. Default: `"inline"`.
    """
    lines = latex.strip().replace("{aligned}", "{align*}")
    if r"\\" in lines and r"\begin" not in lines:
        lines = rf"\begin{{align*}}{lines}\end{{align*}}"
    return convert(" ".join(lines.split()), display=display)


def inline_equation(latex: str) -> str:
    """Return an equation within a line of Markdown."""
    # Without the span, Markdown would take an equation at the start of a line for a block of its own.
    return f"<span>{to_mathml(latex)}</span>"


def display_block(latex: str) -> str:
    """Return a display equation in a box that scrolls sideways."""
    return f'<div class="math" tabindex="0">{to_mathml(latex, "block")}</div>'


def with_mathml(markdown: str) -> str:
    """Replace the equations of a page with MathML.

    Other code blocks stay as they are.
    """
    out: list[str] = []
    indent = fence = ""
    latex: list[str] | None = None
    for line in markdown.split("\n"):
        found = _FENCE.match(line)
        if fence:
            if found and found[2].startswith(fence) and not found[3].strip():
                out += [line] if latex is None else [f"{indent}{display_block(' '.join(latex))}", ""]
                fence, latex = "", None
            elif latex is None:
                out.append(line)
            else:
                latex.append(line)
        elif found:
            indent, fence = found[1], found[2]
            if found[3].strip() == "math":
                latex = []
                out.append("")
            else:
                out.append(line)
        else:
            out.append(_INLINE.sub(lambda equation: inline_equation(equation[1]), line))
    return "\n".join(out)


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Replace the equations of a page before mkdocs renders it."""
    return with_mathml(markdown)
