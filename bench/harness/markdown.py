"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Return the lines of a Markdown table; `right` has the indices of right-aligned columns."""
    rule = "".join("|---:" if index in right else "|---" for index in range(len(titles)))
    first, *others = (f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in (titles, *rows))
    return [first, f"{rule}|", *others]
