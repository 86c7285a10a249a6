"""Pictures of results. matplotlib is imported only when a picture is drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from adax_triton.bench.harness.environment import origin
from adax_triton.bench.step.table import FUSED, summarize

OURS_COLOUR, OTHER_COLOUR = "#2563eb", "#94a3b8"
LINE_COLOURS = ("#2563eb", "#f59e0b", "#0d9488", "#475569", "#dc2626")


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'adax-triton[bench]'") from error
    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _bars(axes: Any, lengths: dict[str, float], label: Callable[[float], str], title: str) -> None:
    """Draw horizontal bars by name; bars of this package are blue."""
    is_ours = [name.startswith("adax_triton") or "AdaX" in name for name in lengths]
    colours = [OURS_COLOUR if ours else OTHER_COLOUR for ours in is_ours]
    bars = axes.barh(range(len(lengths)), list(lengths.values()), color=colours, height=0.7)
    axes.set_yticks(range(len(lengths)), list(lengths), fontsize=8)
    axes.bar_label(bars, [label(length) for length in lengths.values()], padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def bandwidths(result: dict[str, Any]) -> Any:
    """Return bars of each provider's bandwidth relative to a copy.

    Each workload has a panel.
    """
    panels = []
    for workload in result["workloads"]:
        rows = {name: row for name, row in workload["providers"].items() if row.get("copy_share") and name != "copy"}
        panels.append((workload["name"], {name: row["copy_share"] for name, row in rows.items()}))
    heights = [max(1, len(shares)) for _, shares in panels]
    figure = _figure(9, 0.9 + sum(0.26 * height + 0.6 for height in heights))
    grid = figure.subplots(len(panels), squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, (name, shares) in zip(grid, panels, strict=True):
        _bars(axes, shares, "{:.0%}".format, name)
        axes.axvline(1.0, color="black", linewidth=0.8)
    grid[-1].set_xlabel("bandwidth relative to a copy in the same run")
    figure.suptitle(origin(result), fontsize=9)
    return figure


def steps(result: dict[str, Any]) -> Any:
    """Return bars of the step times in a README's table."""
    numel, fused_ms, rows = summarize(result)
    bars = {} if fused_ms is None else {f"{FUSED}, fp32": fused_ms}
    for mode, ours, other in rows:
        if other is not None:
            bars[f"{other[1]}, {mode}"] = other[0]
        bars[f"AdaXW, {mode}"] = ours["median_ms"]
    figure = _figure(9, 0.7 + 0.28 * len(bars))
    title = f"One step of {numel:,} weights on one {result['environment']['device']}: milliseconds, less is better"
    _bars(figure.subplots(), bars, "{:.2f}".format, title)
    return figure


def lines(result: dict[str, Any]) -> Any:
    """Return step time against elements, and against tensors, with slopes."""
    figure = _figure(10, 5.2)
    present = {name: row for name, row in result["providers"].items() if "absent" not in row}
    small = f"tensors of {result['tensor_size']:,} elements"
    axes_names = (("elements", "numel", "elements of one tensor"), ("tensors", "tensors", small))
    for axes, (line, key, label) in zip(figure.subplots(1, 2), axes_names, strict=True):
        for index, (name, row) in enumerate(present.items()):
            sizes, times = ([point[unit] for point in row[line]] for unit in (key, "median_ms"))
            slope = f"{name}, slope {row[f'{line}_slope']:.2f}, last {row[f'{line}_slope_last']:.2f}"
            axes.loglog(sizes, times, "o-", markersize=4, color=LINE_COLOURS[index % len(LINE_COLOURS)], label=slope)
        axes.set_xlabel(label)
        axes.set_ylabel("step, ms")
        axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0.0, 1.0))
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(origin(result), fontsize=9)
    return figure


def speeds(result: dict[str, Any]) -> Any:
    """Return bars of tokens per second by case."""
    rows = {name: row["tokens_per_s"] for name, row in result["cases"].items() if "tokens_per_s" in row}
    figure = _figure(9, 1.2 + 0.28 * len(rows))
    axes = figure.subplots()
    _bars(axes, rows, "{:,.0f}".format, origin(result))
    axes.set_xlabel("tokens per second")
    return figure


DRAWINGS: dict[str, Callable[[dict[str, Any]], Any]] = {"step": bandwidths, "scale": lines, "train": speeds}
