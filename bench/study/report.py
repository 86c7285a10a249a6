"""Tables of the study, and the page that shows them.

    adax-triton bench study --page docs/study.md --out bench/results/study.jsonl

trains nothing. It rewrites the text between the markers of the page and the pictures next to it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path

from adax_triton.bench.harness.command import markdown_table, split_at_markers
from adax_triton.bench.harness.environment import origin

from .analysis import Result, difference, interval, results
from .pictures import horizons, pictures
from .problems import PROBLEMS, STUDIED
from .records import environments, read
from .rules import RULES
from .search import Cell

BEGIN, END = "<!-- study:begin -->", "<!-- study:end -->"
REFERENCE = "adam-0.999"
NETWORKS = ("gpt", "words", "images")
SENSITIVITY = (
    f"The next table has the differences of the area under the curve from `{REFERENCE}`, which is the mean validation "
    "loss\nof the run, and what half and twice the best rate cost."
)


def cells_table(plan: Iterable[Cell], found: Mapping[Cell, Result]) -> str:
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


def table(found: Mapping[Cell, Result]) -> str:
    """Return the differences from the reference at the longest horizons, as Markdown.

    A difference is bold if its interval excludes 0. The last column is `rate_factor`.
    """
    last = {name: max(horizons(found, name), default=0) for name in STUDIED}
    names = [name for name in STUDIED if Cell(name, REFERENCE, last[name]) in found]
    heads = [f"{PROBLEMS[name].title}, {last[name]:,} steps, {PROBLEMS[name].unit}" for name in names]
    titles = ["rule", *heads, "rate"]
    reference = [f"{found[Cell(name, REFERENCE, last[name])].loss:.4g}" for name in names]
    lines = [[f"`{REFERENCE}`, loss", *reference, "1"]]
    for rule in RULES:
        row = [_difference(found, Cell(name, rule, last[name])) for name in names]
        if rule != REFERENCE and any(row):
            lines.append([f"`{rule}`", *row, f"{rate_factor(found, rule):.2g}"])
    return "\n".join(markdown_table(titles, lines))


def sensitivity_table(found: Mapping[Cell, Result], problems: Iterable[str]) -> str:
    """Return areas and the cost of another learning rate, as Markdown.

    Args:
        found: of `analysis.results`.
        problems: names in `PROBLEMS`; each has three columns, for its longest horizon.
    """
    last = {name: max(horizons(found, name)) for name in problems if horizons(found, name)}
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


def _difference(found: Mapping[Cell, Result], cell: Cell, field: str = "loss") -> str:
    reference = cell._replace(rule=REFERENCE)
    if cell not in found or reference not in found:
        return ""
    value = difference(found[cell], found[reference], field)
    return f"**{value}**" if value.excludes_zero else str(value)


def rate_factor(found: Mapping[Cell, Result], rule: str) -> float:
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


def section(path: Path, seeds: int, name: str) -> str:
    """Return the generated text of the page.

    Args:
        path: the file of the records.
        seeds: number of seeds.
        name: of the file in the text.

    Raises:
        ValueError: the file has no runs, or no cell with all seeds.
    """
    records, starts = read(path), environments(path)
    found = results(records, seeds)
    if not found or not starts:
        raise ValueError(f"{path}: expected runs of {seeds} seeds; got {len(records)} runs")
    hours = sum(record["seconds"] for record in records) / 3600
    machine = origin({"environment": starts[-1]})
    source = f"From `{name}`: {machine}; {len(records):,} runs, {hours:.1f} hours of one core."
    return "\n\n".join([source, table(found), SENSITIVITY, sensitivity_table(found, ("gpt", "words"))]) + "\n"


def rewrite(page: Path, path: Path, seeds: int) -> None:
    """Rewrite the section of a page, and the pictures in its folder.

    Args:
        page: Markdown with both markers.
        path, seeds: see `section`.

    Raises:
        ValueError: the page lacks the markers, or the file has no results.
    """
    before, _, after = split_at_markers(page, BEGIN, END)
    shown = section(path, seeds, path.as_posix())
    for name, figure in pictures(results(read(path), seeds), REFERENCE).items():
        figure.savefig(page.parent / f"{name}.png")
    page.write_text(f"{before}{BEGIN}\n{shown}{END}{after}")
