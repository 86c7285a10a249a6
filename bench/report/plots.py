"""Pictures of results, drawn by matplotlib, which is imported only here and only when a picture is drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from adax_triton.bench.harness.origin import origin

OURS_COLOUR, OTHER_COLOUR = "#2563eb", "#94a3b8"
LINE_COLOURS = ("#2563eb", "#f59e0b", "#0d9488", "#475569", "#dc2626")


def is_ours(name: str) -> bool:
    """Whether a provider or a case is of this package."""
    return name.startswith("adax_triton") or "AdaX" in name


def draw(result: dict[str, Any], kind: str, path: Path) -> None:
    """Draw a result into a PNG file.

    Args:
        result: of a benchmark.
        kind: one of `DRAWINGS`.
        path: of the file; its folder exists.

    Raises:
        ImportError: matplotlib is not installed; the message names the extra.
    """
    DRAWINGS[kind](result).savefig(path)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'adax-triton[bench]'") from error
    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _bars(axes: Any, names: list[str], lengths: list[float], label: Callable[[float], str], title: str) -> None:
    colours = [OURS_COLOUR if is_ours(name) else OTHER_COLOUR for name in names]
    bars = axes.barh(range(len(names)), lengths, color=colours, height=0.7)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.bar_label(bars, [label(length) for length in lengths], padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def roofline(result: dict[str, Any]) -> Any:
    """Return bars of every provider's share of the copy bandwidth, one panel per workload; ours in blue."""
    panels = []
    for workload in result["workloads"]:
        rows = {name: row for name, row in workload["providers"].items() if row.get("copy_share") and name != "copy"}
        panels.append((workload["name"], {name: row["copy_share"] for name, row in rows.items()}))
    heights = [max(1, len(shares)) for _, shares in panels]
    figure = _figure(9, 0.9 + sum(0.26 * height + 0.6 for height in heights))
    grid = figure.subplots(len(panels), squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, (name, shares) in zip(grid, panels, strict=True):
        _bars(axes, list(shares), list(shares.values()), lambda share: f"{share:.0%}", name)
        axes.axvline(1.0, color="black", linewidth=0.8)
    grid[-1].set_xlabel("bytes per second by formula, over those of a copy measured in the same run")
    figure.suptitle(origin(result), fontsize=9)
    return figure


def lines(result: dict[str, Any]) -> Any:
    """Return step time against elements, and against tensors, with slopes; our fitted formula is dashed."""
    figure = _figure(10, 5.2)
    panels = figure.subplots(1, 2)
    axes_names = (("elements", "numel", "elements of one tensor"), ("tensors", "tensors", "tensors"))
    for axes, (line, key, label) in zip(panels, axes_names, strict=True):
        present = {name: row for name, row in result["providers"].items() if "absent" not in row}
        for index, (name, row) in enumerate(present.items()):
            sizes, times = ([point[unit] for point in row[line]] for unit in (key, "median_ms"))
            colour = LINE_COLOURS[index % len(LINE_COLOURS)]
            slope = f"{name}, slope {row[f'{line}_slope']:.2f}, last {row[f'{line}_slope_last']:.2f}"
            axes.loglog(sizes, times, "o-", markersize=4, color=colour, label=slope)
            if all("model_error" in point for point in row[line]):
                formula = [point["median_ms"] * (1 + point["model_error"]) for point in row[line]]
                axes.loglog(sizes, formula, "--", color=colour, linewidth=1, label="by formula")
        small = f" of {result['tensor_size']:,} elements" if line == "tensors" else ""
        axes.set_xlabel(label + small)
        axes.set_ylabel("step, ms")
        axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0.0, 1.0))
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(origin(result), fontsize=9)
    return figure


def speeds(result: dict[str, Any]) -> Any:
    """Return bars of tokens per second by case; ours in blue."""
    rows = {name: row["tokens_per_s"] for name, row in result["cases"].items() if "tokens_per_s" in row}
    figure = _figure(9, 1.2 + 0.28 * len(rows))
    axes = figure.subplots()
    _bars(axes, list(rows), list(rows.values()), lambda speed: f"{speed:,.0f}", origin(result))
    axes.set_xlabel("tokens per second")
    return figure


DRAWINGS: dict[str, Callable[[dict[str, Any]], Any]] = {"step": roofline, "scale": lines, "train": speeds}
