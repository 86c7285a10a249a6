"""The result of `adax-triton bench scale` as Markdown."""

from __future__ import annotations

import itertools
from typing import Any

from adax_triton.bench.harness.providers import OURS

from .scale_model import WORLD_SIZES

LAST_POINTS = 3  # of a line: those of its second slope


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    lines = [
        f"{result['dtype']}, {result['rounds']} rounds, median ms of steps on cold caches; copy "
        f"{result['copy_bytes_per_s'] / 1e9:.0f} GB/s"
    ]
    if result["too_large"]:
        lines.append(f"Left out, more than the free memory: {', '.join(f'{size:,}' for size in result['too_large'])}.")
    for line, axis in (("elements", "numel"), ("tensors", "tensors")):
        what = "elements of one tensor" if line == "elements" else f"tensors of {result['tensor_size']:,} elements"
        present = {name: row for name, row in result["providers"].items() if "absent" not in row}
        sizes = [f"{point[axis]:,}" for point in present["copy"][line]]
        titles = [what, *sizes, "slope", f"of the last {LAST_POINTS}"]
        lines += ["", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
        for name, row in present.items():
            times = [f"{point['median_ms']:.3g}" for point in row[line]]
            slopes = [f"{row[f'{line}_slope']:.2f}", f"{row[f'{line}_slope_last']:.2f}"]
            lines.append(f"| {' | '.join([name, *times, *slopes])} |")
            if all("host_us" in point for point in row[line]):
                hosts = [f"{point['host_us']:.0f}" for point in row[line]]
                lines.append(f"| {' | '.join(['its host, us', *hosts, '', ''])} |")
            if "fit" in result and name == OURS:
                errors = [f"{point['model_error']:+.0%}" for point in row[line]]
                lines.append(f"| {' | '.join(['formula over measured', *errors, '', ''])} |")
    lines += [f"\n{name}: absent: {row['absent']}" for name, row in result["providers"].items() if "absent" in row]
    return "\n".join([*lines, *(_paper_lines(result) if "paper" in result else [])])


def _paper_lines(result: dict[str, Any]) -> list[str]:
    fit, paper = result["fit"], result["paper"]
    origin = "measured here" if paper["bandwidth_is_measured"] else "given, the step with its measured share of it"
    lines = [
        "",
        f"Formula: {1e6 * fit['call_s']:.1f} us a call, {1e6 * fit['tensor_s']:.2f} us a tensor, "
        f"{fit['bytes_per_s'] / 1e9:.1f} GB/s. Below, by formula and not measured: copy "
        f"{paper['copy_bytes_per_s'] / 1e9:.0f} GB/s ({origin}), {paper['states']} states; without communication. "
        "The first figure is with DeepSpeed's own passes around a step, the second with those fused.",
    ]
    worlds = [f"{world:,} GPUs" for world in WORLD_SIZES]
    for key, unit, scale in (("ms", "step, ms", 1.0), ("memory", "memory of a GPU, GB", 1e-9)):
        titles = [f"{unit}: unfused / fused", "stage", *worlds]
        lines += ["", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
        for (stage, parameters), found in itertools.groupby(
            paper["rows"], lambda row: (row["stage"], row["parameters"])
        ):
            if key == "ms" and stage == 2:  # as stage 1
                continue
            cells = [
                f"{_figure(row[f'unfused_{key}'] * scale)} / {_figure(row[f'fused_{key}'] * scale)}" for row in found
            ]
            stages = "1, 2" if key == "ms" and stage == 1 else str(stage)
            lines.append(f"| {' | '.join([_parameters(parameters), stages, *cells])} |")
    unfused, fused = ({row["stage"]: row[f"bytes_{how}"] for row in paper["rows"]} for how in ("unfused", "fused"))
    lines += ["", f"Bytes per owned parameter and step, by stage: unfused {unfused}; fused {fused}."]
    if paper["network_gb_per_s"] is not None:
        most = max(WORLD_SIZES)
        rows = [row for row in paper["rows"] if row["stage"] == 1 and row["world"] == most]
        gathers = ", ".join(f"{_parameters(row['parameters'])}: {_figure(row['gather_ms'])} ms" for row in rows)
        lines.append(f"Then the weights are gathered, {most:,} GPUs, {paper['network_gb_per_s']:g} GB/s: {gathers}.")
    return lines


def _parameters(count: float) -> str:
    return f"{count / 1e12:g}T" if count >= 1e12 else f"{count / 1e9:g}B"


def _figure(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"
