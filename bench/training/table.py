"""The result of `adax-triton bench train` as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "tokens/s": lambda row: f"{row['tokens_per_s']:,.0f}",
    "ms/step": lambda row: f"{row['median_ms']:.1f}",
    "p20 to p80": lambda row: f"{row['p20_ms']:.1f} to {row['p80_ms']:.1f}",
    "optimizer": lambda row: f"{row['optimizer_share']:.0%}",
    "peak MB": lambda row: f"{row['peak_bytes'] / 1e6:,.0f}",
    "host MB": lambda row: f"{row['host_peak_bytes'] / 1e6:,.0f}, {row['host_before_bytes'] / 1e6:,.0f} at the start",
    "states MB": lambda row: f"{row['state_bytes'] / 1e6:,.1f}",
    "loss": lambda row: f"{row['loss']:.4f}",
    "over plain's": lambda row: f"{row['loss_over_plain']:+.4f}" if "loss_over_plain" in row else "",
    "stepped by": lambda row: row["optimizer_class"].rpartition(".")[2],
}


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    shape = f"{result['layers']} layers of width {result['width']}"
    memory = "allocated on the GPU" if result["device"] == "cuda" else "the process's resident set, PyTorch included"
    lines = [
        f"{shape}, {result['ranks']} ranks of "
        f"{result['batch']} x {result['context']} tokens, {result['dtype']}, {result['steps']} steps after "
        f"{result['warmup']}, clipping at {result['clipping']:g}; loss: held out, after the last step; optimizer: its "
        f"share of the step, clipping to cleared gradients; peak: of one rank, {memory}; states: of one rank",
        "",
        "| " + " | ".join(["case", *COLUMNS]) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for name, row in result["cases"].items():
        absent = [f"absent: {row['absent']}".replace("|", "/"), *[""] * (len(COLUMNS) - 1)] if "absent" in row else None
        lines.append(f"| {' | '.join([name, *(absent or [cell(row) for cell in COLUMNS.values()])])} |")
    return "\n".join(lines)
