"""Tables of the study, and the page that shows them.

    adax-triton bench study --page docs/study.md --out bench/results/study.jsonl

trains nothing. It rewrites the text between the markers of the page and the pictures next to it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from adax_triton.bench.harness.command import markdown_table, split_at_markers
from adax_triton.bench.harness.environment import origin

from .analysis import Results, difference, horizons, interval, results
from .pictures import pictures
from .problems import PROBLEMS, STUDIED
from .records import read
from .rules import REFERENCE, RULES
from .search import Cell

BEGIN, END = "<!-- study:begin -->", "<!-- study:end -->"
NETWORKS = ("gpt", "words", "images")
SENSITIVITY = (
    f"The next table has the differences of the area under the curve from `{REFERENCE}`, which is the mean validation "
    "loss\nof the run, and what half and twice the best rate cost."
)


def cells_table(plan: Iterable[Cell], found: Results) -> str:
    """Return one line per cell, as Markdown."""
    titles = ["problem", "rule", "steps", "states", "best rate", "loss", "at half the rate", "at twice the rate"]
    lines = []
    for cell in plan:
        row = [cell.problem, cell.rule, f"{cell.steps:,}", cell.states]
        if cell in found:
            result = found[cell]
            losses = interval([record["loss"] for record in result.records])
            edge = "" if result.is_inside else ", not inside the grid"
            row += [f"{result.lr:.3g}{edge}", str(losses).lstrip("+")]
            row += [f"{result.change(factor):+.4g}" for factor in (0.5, 2.0)]
        else:
            row += ["diverged", "", "", ""]
        lines.append(row)
    return "\n".join(markdown_table(titles, lines))


def table(found: Results) -> str:
    """Return the differences from the reference at the longest horizons, as Markdown.

    A difference is bold if its interval excludes 0. The last column is `rate_factor`.
    """
    longest = _longest(found, STUDIED).items()
    last = {name: steps for name, steps in longest if Cell(name, REFERENCE, steps) in found}
    heads = [f"{PROBLEMS[name].title}, {steps:,} steps, {PROBLEMS[name].unit}" for name, steps in last.items()]
    titles = ["rule", *heads, "rate"]
    reference = [f"{found[Cell(name, REFERENCE, steps)].loss:.4g}" for name, steps in last.items()]
    lines = [[f"`{REFERENCE}`, loss", *reference, "1"]]
    for rule in RULES:
        row = [_difference(found, Cell(name, rule, steps)) for name, steps in last.items()]
        if rule != REFERENCE and any(row):
            lines.append([f"`{rule}`", *row, f"{rate_factor(found, rule):.2g}"])
    return "\n".join(markdown_table(titles, lines))


def sensitivity_table(found: Results, problems: Iterable[str]) -> str:
    """Return areas and the cost of another learning rate, as Markdown.

    Args:
        found: of `analysis.results`.
        problems: names in `PROBLEMS`; each has three columns, for its longest horizon.
    """
    last = _longest(found, problems)
    titles = ["rule"]
    for name in last:
        title = PROBLEMS[name].title
        titles += [f"{title}: area", f"{title}: at half the rate", f"{title}: at twice the rate"]
    lines = []
    for rule in RULES:
        row: list[str] = []
        for name, steps in last.items():
            cell = Cell(name, rule, steps)
            changes = [f"{found[cell].change(factor):+.2g}" for factor in (0.5, 2.0)] if cell in found else ["", ""]
            row += ["" if rule == REFERENCE else _difference(found, cell, "area"), *changes]
        if any(row):
            lines.append([f"`{rule}`", *row])
    return "\n".join(markdown_table(titles, lines))


def _longest(found: Results, problems: Iterable[str]) -> dict[str, int]:
    """Return the longest horizon of each problem that has results."""
    steps = {name: horizons(found, name) for name in problems}
    return {name: several[-1] for name, several in steps.items() if several}


def _difference(found: Results, cell: Cell, field: str = "loss") -> str:
    reference = cell._replace(rule=REFERENCE)
    if cell not in found or reference not in found:
        return ""
    value = difference(found[cell], found[reference], field)
    return f"**{value}**" if value.excludes_zero else str(value)


def rate_factor(found: Results, rule: str) -> float:
    """Return the best learning rate of a rule relative to the reference's.

    Args:
        found: of `analysis.results`.
        rule: name in `RULES`.

    Returns:
        The geometric mean over the horizons of the networks.
    """
    ratios = []
    for cell, result in found.items():
        reference = found.get(cell._replace(rule=REFERENCE))
        if (cell.rule, cell.states) == (rule, "float32") and cell.problem in NETWORKS and reference is not None:
            ratios.append(math.log(result.lr / reference.lr))
    return math.exp(statistics.fmean(ratios)) if ratios else math.nan


def section(records: Collection[Mapping[str, Any]], environment: dict[str, Any], found: Results, name: str) -> str:
    """Return the generated text of the page.

    Args:
        records: all runs.
        environment: of the last start.
        found: results of `records`.
        name: of their file.
    """
    hours = sum(record["seconds"] for record in records) / 3600
    machine = origin({"environment": environment})
    source = f"From `{name}`: {machine}; {len(records):,} runs, {hours:.1f} hours of one core."
    return "\n\n".join([source, table(found), SENSITIVITY, sensitivity_table(found, ("gpt", "words"))]) + "\n"


def rewrite(page: Path, path: Path, seeds: int) -> None:
    """Rewrite the section of a page, and the pictures in its folder.

    Args:
        page: Markdown with both markers.
        path: the file of the records.
        seeds: number of seeds.

    Raises:
        ValueError: the page lacks the markers, or the file has no runs, or no cell with all seeds.
    """
    before, _, after = split_at_markers(page, BEGIN, END)
    runs, starts = read(path)
    found = results(runs.values(), seeds)
    if not found or not starts:
        raise ValueError(f"{path}: expected runs of {seeds} seeds; got {len(runs)} runs")
    shown = section(runs.values(), starts[-1], found, path.as_posix())
    for name, figure in pictures(found).items():
        figure.savefig(page.parent / f"{name}.png")
    page.write_text(f"{before}{BEGIN}\n{shown}{END}{after}")
