"""Tables of the step benchmark in Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from adax_triton.bench.harness.command import markdown_table
from adax_triton.bench.harness.providers import OURS

FUSED = "torch AdamW fused"
# Rows of the README.
SUMMARY_MODES = (
    "fp32",
    "bf16 + float32 + 24-bit masters",
    "bf16 + bfloat16 + 24-bit masters",
    "bf16 + 8bit_v16 + 24-bit masters",
    "bf16 + 8bit + 24-bit masters",
    "bf16 + 8bit",
)
SUMMARY_TITLES = (
    "weights and states",
    "bytes moved/weight",
    "ms",
    "share of a copy's bandwidth",
    "times faster than torch's fused AdamW in fp32",
    "fastest other",
)
# Columns: key of the row, then title and format. Empty columns are dropped.
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "mode": ("mode", str),
    "median_ms": ("median ms", "{:.3f}".format),
    "p20_ms": ("p20", "{:.3f}".format),
    "p80_ms": ("p80", "{:.3f}".format),
    "bytes_per_element": ("bytes/element", "{:.4g}".format),
    "gb_per_s": ("GB/s", "{:.1f}".format),
    "copy_share": ("of copy", "{:.0%}".format),
    "host_us": ("host us", "{:.0f}".format),
    "launches": ("launches", str),
    "peak_bytes": ("peak MB", lambda value: f"{value / 1e6:,.0f}"),
    "first_step_s": ("first step s", "{:.2f}".format),
    "ours_over_this": ("AdaXW / this", "{:.2f}".format),
    "float32_over_this": ("fp32 / this", "{:.2f}".format),
}
LEGEND = (
    "GB/s: bytes by formula / median time. of copy: GB/s relative to a copy in the same run. AdaXW / this: median of "
    "AdaXW in the same mode / median of this row; below 1 AdaXW is faster. fp32 / this: median of AdaXW in fp32 / "
    "median of this row."
)


def table(result: dict[str, Any]) -> str:
    """Return a table of each workload, then absent providers with the reason."""
    named = result.get("bytes_per_element")
    lines = [result["dtype"] + ("" if named is None else f", {named:g} bytes per element") + f". {LEGEND}"]
    everywhere = absent_everywhere(result)
    for workload in result["workloads"]:
        rows = workload["providers"]
        rows = {label: _with_ratio(row, rows.get(OURS, {})) for label, row in rows.items() if label not in everywhere}
        present = [key for key in COLUMNS if any(row.get(key) is not None for row in rows.values())]
        titles = [workload["name"], *(COLUMNS[key][0] for key in present)]
        lines += ["", *markdown_table(titles, [_cells(label, row, present) for label, row in rows.items()])]
    if result.get("versions"):
        lines += ["", f"Versions: {', '.join(f'{name} {version}' for name, version in result['versions'].items())}."]
    if everywhere:
        lines += ["", f"Absent: {'; '.join(f'{label}: {why}' for label, why in everywhere.items())}."]
    return "\n".join(lines)


def _cells(label: str, row: dict[str, Any], present: list[str]) -> list[str]:
    cells = {key: "" if row.get(key) is None else COLUMNS[key][1](row[key]) for key in present}
    if "absent" in row:
        cells["median_ms" if "median_ms" in present else present[-1]] = f"absent: {row['absent']}"
    return [label.removesuffix(f", {row.get('mode')}"), *cells.values()]


class SummaryRow(NamedTuple):
    """AdaXW in one mode, and the fastest other optimizer in it."""

    mode: str
    ours: dict[str, Any]  # the row of the result
    other: tuple[float, str] | None  # median ms and name


def summarize(result: dict[str, Any]) -> tuple[int, float | None, list[SummaryRow]]:
    """Select the step of the largest flat tensor.

    Returns its number of weights, the ms of torch's fused AdamW in fp32, and a row per mode.
    """
    workload = max((one for one in result["workloads"] if one["tensors"] == 1), key=lambda one: one["numel"])
    timed = {label: row for label, row in workload["providers"].items() if "median_ms" in row}
    rows = []
    for mode in SUMMARY_MODES:
        of_mode = {label: row for label, row in timed.items() if row.get("mode") == mode}
        ours = next((row for label, row in of_mode.items() if label.startswith(OURS)), None)
        others = [
            (row["median_ms"], label.removesuffix(f", {mode}"))
            for label, row in of_mode.items()
            if not label.startswith("adax_triton")
        ]
        if ours is not None:
            rows.append(SummaryRow(mode, ours, min(others, default=None)))
    return workload["numel"], timed[FUSED]["median_ms"] if FUSED in timed else None, rows


def summary(result: dict[str, Any]) -> str:
    """Return each mode's AdaXW step, next to other optimizers."""
    numel, fused_ms, rows = summarize(result)
    cells = [
        [
            *(mode, f"{ours['bytes_per_element']:.4g}", f"{ours['median_ms']:.2f}", f"{ours['copy_share']:.0%}"),
            "" if fused_ms is None else f"{fused_ms / ours['median_ms']:.2f}",
            "" if other is None else f"{other[1]}: {other[0]:.2f} ms",
        ]
        for mode, ours, other in rows
    ]
    return "\n".join([f"One step of {numel:,} weights in one tensor.", "", *markdown_table(SUMMARY_TITLES, cells)])


def absent_everywhere(result: dict[str, Any]) -> dict[str, str]:
    """Return {label: reason} of providers absent everywhere for the same reason."""
    reasons: dict[str, set[str | None]] = {}
    for workload in result["workloads"]:
        for label, row in workload["providers"].items():
            reasons.setdefault(label, set()).add(row.get("absent"))
    return {label: why for label, (why, *others) in reasons.items() if why is not None and not others}


def _with_ratio(row: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Add the ratio to our fp32 time to another mode's row."""
    comparable = ours.get("mode") == "fp32" != row.get("mode", "fp32")
    if not comparable or "median_ms" not in row or "median_ms" not in ours:
        return row
    return row | {"float32_over_this": ours["median_ms"] / row["median_ms"]}
