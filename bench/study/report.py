"""Table and pictures of the study, and the section of a page that shows them.

    adax-triton bench study --page docs/study.md --out bench/results/study.jsonl

trains nothing. It rewrites the text between the markers of the page and the pictures next to it.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adax_triton.bench.harness.command import markdown_table
from adax_triton.bench.harness.environment import origin

from .analysis import Result, difference, interval, results
from .pictures import horizons, pictures
from .problems import PROBLEMS
from .rules import RULES
from .search import Cell

BEGIN, END = "<!-- study:begin -->", "<!-- study:end -->"
REFERENCE = "adam-0.999"


def cells_table(found: Mapping[Cell, Result]) -> str:
    """Return one line per cell: best learning rate, loss with its interval, and changes at other rates."""
    titles = ["problem", "rule", "steps", "states", "best rate", "loss", "at half the rate", "at twice the rate"]
    lines = []
    for cell, result in found.items():
        losses = interval([record["loss"] for record in result.records])
        changes = [f"{result.change(factor):+.4g}" for factor in (0.5, 2.0)]
        lines.append(
            [
                cell.problem,
                cell.rule,
                f"{cell.steps:,}",
                cell.states,
                f"{result.lr:.3g}",
                str(losses).lstrip("+"),
                *changes,
            ]
        )
    return "\n".join(markdown_table(titles, lines))


def table(found: Mapping[Cell, Result]) -> str:
    """Return the differences from the reference at each problem's longest horizon, as Markdown.

    A difference is bold if its interval excludes 0. The last column is the best learning rate divided by the
    reference's, the geometric mean over all problems and horizons.
    """
    names = [name for name in PROBLEMS if Cell(name, REFERENCE, max(horizons(found, name), default=0)) in found]
    last = {name: horizons(found, name)[-1] for name in names}
    titles = ["rule", *(f"{PROBLEMS[name].title}, {last[name]:,} steps" for name in names), "rate"]
    reference = [f"{found[Cell(name, REFERENCE, last[name])].loss:.4g}" for name in names]
    lines = [[f"{REFERENCE}, loss", *reference, "1"]]
    for rule in RULES:
        cells = [_difference(found, Cell(name, rule, last[name])) for name in names]
        if rule != REFERENCE and any(cells):
            lines.append([rule, *cells, f"{rate_factor(found, rule):.2g}"])
    return "\n".join(markdown_table(titles, lines))


def _difference(found: Mapping[Cell, Result], cell: Cell) -> str:
    if cell not in found:
        return ""
    value = difference(found[cell], found[cell._replace(rule=REFERENCE)])
    return f"**{value}**" if value.excludes_zero else str(value)


def rate_factor(found: Mapping[Cell, Result], rule: str, problem: str | None = None) -> float:
    """Return the best learning rate of a rule divided by the reference's, the geometric mean over cells.

    Args:
        found: of `analysis.results`.
        rule: name in `RULES`.
        problem: take its cells only. Default: all.
    """
    ratios = [
        math.log(result.lr / found[other].lr)
        for cell, result in found.items()
        if cell.rule == rule and cell.states == "float32" and problem in (None, cell.problem)
        if (other := cell._replace(rule=REFERENCE)) in found
    ]
    return math.exp(statistics.fmean(ratios)) if ratios else math.nan


def section(path: Path, records: list[dict[str, Any]], name: str) -> str:
    """Return the generated text of the page.

    Args:
        path: the file of the records, for the machine.
        records: its runs.
        name: of the file in the text.
    """
    environment = next(line for line in map(json.loads, path.read_text().splitlines()) if "environment" in line)
    hours = sum(record["seconds"] for record in records) / 3600
    source = f"From `{name}`: {origin(environment)}; {len(records):,} runs, {hours:.1f} core hours."
    return f"{source}\n\n{table(results(records))}\n"


def rewrite(page: Path, path: Path, records: list[dict[str, Any]]) -> None:
    """Rewrite the section of a page, and the pictures in its folder.

    Raises:
        ValueError: the page lacks the markers.
    """
    text = page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{page}: expected {BEGIN} and {END}, once each")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    page.write_text(f"{before}{BEGIN}\n{section(path, records, path.as_posix())}{after}")
    for name, figure in pictures(results(records), REFERENCE).items():
        figure.savefig(page.parent / f"{name}.png")
