"""Pictures of the study.

matplotlib is imported only when a picture is drawn.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

from .analysis import Results, difference, horizons, interval, memory
from .problems import PROBLEMS, STUDIED
from .rules import REFERENCE, RULES
from .run import POINTS
from .search import Cell

# Rules that the line pictures show, with their colours; all rules are in the table.
SHOWN = {
    "adax-1e-4": "#2563eb",
    "adax-10/T": "#7c3aed",
    "adafactor-0.8": "#0d9488",
    "adam-10/T": "#f59e0b",
    "adam-0.95": "#dc2626",
    "adam-0.999": "#475569",
}
OTHER_COLOUR = "#cbd5e1"


def pictures(results: Results) -> dict[str, Any]:
    """Return the figures by file name without suffix.

    Args:
        results: of `analysis.results`.
    """
    drawings: dict[str, Callable[[Any, Results, str], None]] = {
        "study-horizons": _horizons,
        "study-memory": _memory,
        "study-rates": _rates,
        "study-updates": _updates,
    }
    return {name: _panels(results, draw) for name, draw in drawings.items()}


def _panels(results: Results, draw: Callable[[Any, Results, str], None]) -> Any:
    """Draw one panel per problem and a common legend."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'adax-triton[bench]'") from error
    names = [name for name in STUDIED if horizons(results, name)]
    figure = Figure(figsize=(9.0, 5.4), dpi=120, layout="constrained")
    panels = list(figure.subplots(2, 3).flat)
    handles: dict[str, Any] = {}
    for axes, name in zip(panels, names, strict=False):
        draw(axes, results, name)
        axes.set_title(PROBLEMS[name].title, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    panels[-1].legend(handles.values(), handles, loc="center", frameon=False, fontsize=9)
    return figure


def _horizons(axes: Any, results: Results, problem: str) -> None:
    """Draw the difference from the reference by horizon, with intervals."""
    axes.axhline(0.0, color="black", linewidth=0.8)
    for rule, colour in SHOWN.items():
        points = {
            steps: difference(results[Cell(problem, rule, steps)], results[Cell(problem, REFERENCE, steps)])
            for steps in horizons(results, problem)
            if rule != REFERENCE and {Cell(problem, rule, steps), Cell(problem, REFERENCE, steps)} <= results.keys()
        }
        if points:
            means, widths = zip(*points.values(), strict=True)
            line = axes.errorbar(
                list(points), means, widths, fmt="o-", markersize=3, capsize=2, linewidth=1.2, color=colour
            )
            line.set_label(rule)
    axes.set_xscale("log", base=4)
    axes.set_xticks(horizons(results, problem), [f"{steps:,}" for steps in horizons(results, problem)])
    axes.minorticks_off()
    axes.set_xlabel("steps", fontsize=8)
    axes.set_ylabel(f"{PROBLEMS[problem].unit}, minus {REFERENCE}", fontsize=8)


def _memory(axes: Any, results: Results, problem: str) -> None:
    """Draw the loss at the longest horizon by the memory of v."""
    steps = horizons(results, problem)[-1]
    others = [rule for rule in RULES if rule not in SHOWN and not rule.endswith("uncorrected")]
    for rule, colour in {**SHOWN, **dict.fromkeys(others, OTHER_COLOUR)}.items():
        result = results.get(Cell(problem, rule, steps))
        if result is not None:
            width = interval([record["loss"] for record in result.records]).half_width
            label = rule if rule in SHOWN else "_" if rule != others[0] else "other rules"
            axes.errorbar(
                memory(rule, steps), result.loss, width, fmt="o", markersize=4, capsize=2, color=colour, label=label
            )
    axes.set_xscale("log")
    axes.set_xlim(1e-3, 1.3)
    axes.set_xlabel(f"mean age of v / {steps:,} steps", fontsize=8)
    axes.set_ylabel(PROBLEMS[problem].unit, fontsize=8)


def _rates(axes: Any, results: Results, problem: str) -> None:
    """Draw the loss of seed 0 by learning rate."""
    steps = horizons(results, problem)[-1]
    lowest, highest = math.inf, 0.0
    for rule, colour in SHOWN.items():
        result = results.get(Cell(problem, rule, steps))
        if result is not None:
            finite = {lr: loss for lr, loss in result.first_seed.items() if loss < math.inf}
            axes.plot(list(finite), list(finite.values()), ".-", linewidth=1.2, color=colour, label=rule)
            lowest = min(lowest, *finite.values())
            highest = max(highest, *result.by_lr.values())
    # Rates far from the best would flatten the curves.
    if lowest < highest < math.inf:
        axes.set_ylim(lowest - 0.05 * (highest - lowest), highest + 0.3 * (highest - lowest))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.1g}")
    axes.set_xlabel(f"learning rate, {steps:,} steps", fontsize=8)
    axes.set_ylabel(f"{PROBLEMS[problem].unit}, seed 0", fontsize=8)


def _updates(axes: Any, results: Results, problem: str) -> None:
    """Draw the mean size of the updates over time."""
    steps = horizons(results, problem)[-1]
    for rule, colour in SHOWN.items():
        result = results.get(Cell(problem, rule, steps))
        if result is not None:
            curves = zip(*(record["update"] for record in result.records), strict=True)
            sizes = [statistics.fmean(values) for values in curves]
            times = [(index + 1) / POINTS for index in range(len(sizes))]
            axes.plot(times, sizes, ".-", linewidth=1.2, color=colour, label=rule)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(which="minor", labelsize=7)
    axes.set_xlabel(f"share of {steps:,} steps", fontsize=8)
    axes.set_ylabel("update / learning rate (RMS)", fontsize=8)
