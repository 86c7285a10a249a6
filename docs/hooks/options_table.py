"""Write the tables of docs/options.md from the docstrings of the optimizers.

`python docs/hooks/options_table.py` rewrites the tables. `make docs` fails if they are stale.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import griffe
from mkdocs.exceptions import PluginError

sys.path.insert(0, str(Path(__file__).parent))
from api_reference import ROOT, copy_package, load

PAGE = ROOT / "docs" / "options.md"
CLASSES = ("AdaX", "AdaXW", "Adam", "AdamW")
_TABLES = re.compile(r"(?<=<!-- options:begin -->\n).*(?=<!-- options:end -->)", re.DOTALL)
_DEFAULT = re.compile(r"\s*Default: (.+?)\.?$")


def tables() -> str:
    """Return the table of defaults, then the table of meanings."""
    package = load()
    classes = {name: package[f"optimizers.{name}"] for name in CLASSES}
    entries = {name: _entries(found) for name, found in classes.items()}
    lines = [
        f"| argument | {' | '.join(f'`{name}`' for name in CLASSES)} |",
        f"|---|{'---|' * len(CLASSES)}",
    ]
    for argument in entries["AdaX"]:
        if argument != "params":
            cells = [_default(classes[name], entries[name], argument) for name in CLASSES]
            lines.append(f"| `{argument}` | {' | '.join(cells)} |")
    lines += ["", "| argument | type | meaning |", "|---|---|---|"]
    for argument, (kind, meaning) in entries["AdaX"].items():
        lines.append(f"| `{argument}` | {_code(kind)} | {_DEFAULT.sub('', meaning)} |")
    return "\n".join(lines) + "\n"


def _entries(found: griffe.Class) -> dict[str, tuple[str, str]]:
    """Return (type, text on one line) of each argument of a class."""
    assert found.docstring is not None
    (section,) = [part for part in found.docstring.parsed if part.kind is griffe.DocstringSectionKind.parameters]
    return {entry.name: (str(entry.annotation), " ".join(entry.description.split())) for entry in section.value}


def _default(found: griffe.Class, entries: dict[str, tuple[str, str]], argument: str) -> str:
    """Return a default as the docstring writes it.

    Raises PluginError if the signature has another one.
    """
    if argument not in entries:
        fixed = argument == "decoupled_weight_decay" and "_is_decoupled" in found.members
        return "always" if fixed else ""
    value = str(found.parameters[argument].default)
    written = _DEFAULT.search(entries[argument][1])
    if written is None:
        raise PluginError(f"{found.name} does not state the default of {argument}, which is {value}")
    text = written[1].partition(", ")[0] if value == "None" else written[1].strip("`")
    if ast.literal_eval(text) != ast.literal_eval(value):
        raise PluginError(f"{found.name} states the default {text} of {argument}, but the signature has {value}")
    return _code(text)


def _code(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`"


def updated(page: str) -> str:
    """Return the text of docs/options.md with tables of the present docstrings."""
    if not _TABLES.search(page):
        raise PluginError("docs/options.md has no <!-- options:begin --> and <!-- options:end -->")
    found = tables()
    return _TABLES.sub(lambda _: found, page)


def on_page_markdown(markdown: str, *, page: Any, **kwargs: Any) -> str:
    """Raise if the tables of docs/options.md are stale."""
    if page.file.src_uri == "options.md" and updated(markdown) != markdown:
        raise PluginError("the tables of docs/options.md are stale; run `make report`")
    return markdown


if __name__ == "__main__":
    copy_package()
    PAGE.write_text(updated(PAGE.read_text()))
