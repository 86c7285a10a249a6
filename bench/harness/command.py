"""Shared by all commands: argument types, Markdown tables and output files."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from .environment import origin

DEVICES = ("cuda", "cpu")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=default, help="default: %(default)s")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")


def publish(result: dict[str, Any], table: Callable[[dict[str, Any]], str], path: Path | None) -> None:
    """Print a result as a table; write JSON if `path` is given."""
    write(result, path)
    print(f"{origin(result)}\n\n{table(result)}")


def write(result: dict[str, Any], path: Path | None) -> None:
    """Write a result as JSON if a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


def count(text: str) -> int:
    """Parse a whole number, at least 1, such as 50 or 5e7."""
    number = seconds(text)
    if number < 1 or number != int(number):
        raise argparse.ArgumentTypeError(f"invalid count {text!r}: expected a whole number, at least 1")
    return int(number)


def seconds(text: str) -> float:
    """Parse a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"invalid number {text!r}: expected a finite one above 0")
    return number


def device(text: str) -> torch.device:
    """Parse a device of this machine; make a GPU the current one."""
    kind, _, index = text.partition(":")
    if kind not in DEVICES or not (index or "0").isdecimal():
        raise argparse.ArgumentTypeError(f"invalid device {text!r}: expected one of {', '.join(DEVICES)}")
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"invalid device {text!r}: PyTorch sees no GPU")
    found = torch.device("cuda", int(index) if index else torch.cuda.current_device())
    torch.cuda.set_device(found)  # timing events belong to the current device
    return found


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Return the lines of a Markdown table; `right` indexes right-aligned columns."""
    rule = "".join("|---:" if index in right else "|---" for index in range(len(titles)))
    first, *others = (f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in (titles, *rows))
    return [first, f"{rule}|", *others]


def split_at_markers(page: Path, begin: str, end: str) -> tuple[str, str, str]:
    """Return the text before, between and after two markers of a page.

    Raises ValueError without the markers.
    """
    text = page.read_text()
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{page}: expected {begin} and then {end}, once each")
    before, _, rest = text.partition(begin)
    between, _, after = rest.partition(end)
    return before, between, after
