"""The result of `adax-triton bench step` as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

OURS = "adax_triton.AdaXW"
FUSED = "torch AdamW fused"
# The rows of the README, at most six.
SUMMARY_MODES = (
    "fp32",
    "bf16 + float32 + 24-bit masters",
    "bf16 + bfloat16 + 24-bit masters",
    "bf16 + 8bit_v16 + 24-bit masters",
    "bf16 + 8bit + 24-bit masters",
    "bf16 + 8bit",
)
# Of a row: key, title, form. A table has those that any of its rows has.
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "mode": ("mode", str),
    "median_ms": ("median ms", lambda value: f"{value:.3f}"),
    "p20_ms": ("p20", lambda value: f"{value:.3f}"),
    "p80_ms": ("p80", lambda value: f"{value:.3f}"),
    "bytes_per_element": ("bytes/element", lambda value: f"{value:.4g}"),
    "gb_per_s": ("GB/s", lambda value: f"{value:.1f}"),
    "copy_share": ("of copy", lambda value: f"{value:.0%}"),
    "host_us": ("host us", lambda value: f"{value:.0f}"),
    "launches": ("launches", str),
    "peak_bytes": ("peak MB", lambda value: f"{value / 1e6:,.0f}"),
    "first_step_s": ("first step s", lambda value: f"{value:.2f}"),
    "ours_over_this": ("AdaXW / this", lambda value: f"{value:.2f}"),
    "float32_over_this": ("fp32 / this", lambda value: f"{value:.2f}"),
}
LEGEND = (
    "GB/s: bytes by formula over the median; of copy: over those of a copy measured beside it in the same run; "
    "AdaXW / this: AdaXW's median in the same mode over this one, so below 1 where AdaXW is faster; fp32 / this: "
    "AdaXW's median in fp32 over this one."
)


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown: a table per workload, and below who is absent everywhere, with the reason."""
    named = result.get("bytes_per_element")
    lines = [f"{result['dtype']}" + ("" if named is None else f", {named:g} bytes per element") + f". {LEGEND}"]
    everywhere = absent_everywhere(result)
    for workload in result["workloads"]:
        rows = workload["providers"]
        rows = {name: _compared(row, rows.get(OURS, {})) for name, row in rows.items() if name not in everywhere}
        present = [key for key in COLUMNS if any(row.get(key) is not None for row in rows.values())]
        titles = [workload["name"], *(COLUMNS[key][0] for key in present)]
        lines += ["", markdown_row(titles), "|---" * len(titles) + "|"]
        for label, row in rows.items():
            name = label.removesuffix(f", {row.get('mode')}")
            cells = ["" if row.get(key) is None else COLUMNS[key][1](row[key]) for key in present]
            if "absent" in row:
                # Next to the mode, which tells the rows of one name apart.
                cells[present.index("median_ms") if "median_ms" in present else -1] = f"absent: {row['absent']}"
            lines.append(markdown_row([name, *cells]))
    if result.get("versions"):
        lines += ["", f"Versions: {', '.join(f'{name} {version}' for name, version in result['versions'].items())}."]
    if everywhere:
        reasons = "; ".join(f"{label}: {why}" for label, why in everywhere.items())
        lines += ["", f"Absent: {reasons}."]
    return "\n".join(lines)


def summary(result: dict[str, Any]) -> str:
    """Return our step of the largest flat tensor as Markdown, a row per mode, next to what others take."""
    workload = max((one for one in result["workloads"] if one["tensors"] == 1), key=lambda one: one["numel"])
    timed = {name: row for name, row in workload["providers"].items() if "median_ms" in row}
    fused = timed.get(FUSED)
    titles = [
        "weights and states",
        "bytes moved/weight",
        "ms",
        "of a copy's bandwidth",
        "times faster than torch's fused AdamW in fp32",
        "fastest other",
    ]
    lines = [f"One step of {workload['numel']:,} weights in one tensor.", "", markdown_row(titles)]
    lines.append("|---" * len(titles) + "|")
    for mode in SUMMARY_MODES:
        ours = next((row for name, row in timed.items() if name.startswith(OURS) and row.get("mode") == mode), None)
        if ours is None:
            continue
        others = [
            (row["median_ms"], name.removesuffix(f", {mode}"))
            for name, row in timed.items()
            if row.get("mode") == mode and not name.startswith("adax_triton")
        ]
        cells = [mode, f"{ours['bytes_per_element']:.4g}", f"{ours['median_ms']:.2f}", f"{ours['copy_share']:.0%}"]
        cells.append("" if fused is None else f"{fused['median_ms'] / ours['median_ms']:.2f}")
        cells.append("{1}: {0:.2f} ms".format(*min(others)) if others else "")
        lines.append(markdown_row(cells))
    return "\n".join(lines)


def absent_everywhere(result: dict[str, Any]) -> dict[str, str]:
    """Return who has no time in any workload, for one reason, by label."""
    reasons: dict[str, set[str | None]] = {}
    for workload in result["workloads"]:
        for label, row in workload["providers"].items():
            reasons.setdefault(label, set()).add(row.get("absent"))
    return {label: why for label, (why, *others) in reasons.items() if why is not None and not others}


def _compared(row: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Return a row of another mode than fp32 with its time beside that of `ours`, in fp32."""
    comparable = ours.get("mode") == "fp32" != row.get("mode", "fp32")
    if not comparable or "median_ms" not in row or "median_ms" not in ours:
        return row
    return row | {"float32_over_this": ours["median_ms"] / row["median_ms"]}


def markdown_row(cells: Sequence[str]) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
