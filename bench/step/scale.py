"""Measure how step time grows with elements and with tensors.

`bench step` times one flat tensor of growing size, and a growing number of small tensors. The result has the slope of
each line in a log-log plot.
`--model FILE` measures nothing: it prints the step time and the memory of a GPU under ZeRO, for models up to 1T
parameters, by formula from a GPU result of `bench step` (`zero_model.py`).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from adax_triton.bench.harness.command import add_device, add_json, count, markdown_table, publish
from adax_triton.bench.harness.environment import origin
from adax_triton.bench.harness.providers import OURS, PROVIDERS, Provider
from adax_triton.bench.harness.workloads import flat, many_small_tensors

from .command import run as run_steps
from .measure import COPY
from .table import FUSED
from .zero_model import model

SIZES = {
    "cuda": (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000, 500_000_000),
    "cpu": (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 50_000_000),
}
TENSORS = (1, 4, 16, 64, 256, 1024, 4096)
TENSOR_SIZE = 1024  # elements of each small tensor
BUDGET_S = 600.0
LAST_POINTS = 3  # points of the second slope
AXES = {"elements": "numel", "tensors": "tensors"}  # line: key of its x axis
_POINT = ("median_ms", "p20_ms", "p80_ms", "host_us")


def run(
    device: torch.device, sizes: Sequence[int], tensors: Sequence[int], rounds: int, providers: list[Provider]
) -> dict[str, Any]:
    """Measure both lines of fp32 providers and of a copy.

    AdaXW is the first provider. The result is JSON-friendly.
    """
    workloads = {f"elements {size}": flat(size) for size in sorted(set(sizes))}
    workloads |= {f"tensors {number}": many_small_tensors(number, TENSOR_SIZE) for number in sorted(set(tensors))}
    *_, measured = run_steps(workloads, device, providers, rounds, BUDGET_S)
    return lines_of(measured)


def lines_of(measured: dict[str, Any]) -> dict[str, Any]:
    """Return a result of `bench step` as lines.

    A workload is named after its line.
    """
    timed = [workload for workload in measured["workloads"] if COPY in workload["providers"]]
    rows: dict[str, Any] = {}
    for label in {label: None for workload in timed for label in workload["providers"]}:
        rows[label] = {"elements": [], "tensors": []}
        for workload in timed:
            row = workload["providers"][label]
            if "absent" in row:
                rows[label] = {"absent": row["absent"]}
                break
            point = {key: row[key] for key in _POINT if row[key] is not None}
            line = rows[label][workload["name"].partition(" ")[0]]
            line.append({"numel": workload["numel"], "tensors": workload["tensors"], **point})
        else:
            rows[label] |= _slopes(rows[label])
    largest = rows[COPY]["elements"][-1]
    return {
        "benchmark": "scale",
        **{key: measured[key] for key in ("environment", "rounds", "dtype", "bytes_per_element")},
        "tensor_size": TENSOR_SIZE,
        "too_large": [workload["numel"] for workload in measured["workloads"] if workload not in timed],
        "copy_bytes_per_s": 8 * largest["numel"] / (largest["median_ms"] / 1e3),
        "providers": rows,
    }


def _slopes(row: dict[str, Any]) -> dict[str, float]:
    slopes = {}
    for line, axis in AXES.items():
        sizes, times = ([point[key] for point in row[line]] for key in (axis, "median_ms"))
        slopes[f"{line}_slope"] = slope(sizes, times)
        slopes[f"{line}_slope_last"] = slope(sizes[-LAST_POINTS:], times[-LAST_POINTS:])
    return slopes


def slope(sizes: Sequence[float], times: Sequence[float]) -> float:
    """Return exponent b of times ~ sizes^b, by least squares of logarithms."""
    if len(set(sizes)) < 2:
        raise ValueError(f"sizes, tensors: expected at least two different ones that fit in memory, got {list(sizes)}")
    return statistics.linear_regression([math.log(size) for size in sizes], [math.log(t) for t in times]).slope


def table(result: dict[str, Any]) -> str:
    """Return a table of each line: median ms of points, and slopes."""
    lines = [
        f"{result['dtype']}, {result['rounds']} rounds, median ms of steps on cold caches; copy "
        f"{result['copy_bytes_per_s'] / 1e9:.0f} GB/s"
    ]
    if result["too_large"]:
        lines.append(f"Left out, more than the free memory: {', '.join(f'{size:,}' for size in result['too_large'])}.")
    present = {label: row for label, row in result["providers"].items() if "absent" not in row}
    for line, axis in AXES.items():
        what = "elements of one tensor" if line == "elements" else f"tensors of {result['tensor_size']:,} elements"
        titles = [what, *(f"{point[axis]:,}" for point in present[COPY][line]), "slope", f"of the last {LAST_POINTS}"]
        rows = []
        for label, row in present.items():
            times = [f"{point['median_ms']:.3g}" for point in row[line]]
            rows.append([label, *times, f"{row[f'{line}_slope']:.2f}", f"{row[f'{line}_slope_last']:.2f}"])
            if all("host_us" in point for point in row[line]):
                rows.append(["host time, us", *(f"{point['host_us']:.0f}" for point in row[line]), "", ""])
        lines += ["", *markdown_table(titles, rows)]
    absent = {label: row["absent"] for label, row in result["providers"].items() if "absent" in row}
    return "\n".join([*lines, *(f"\n{label}: absent: {why}" for label, why in absent.items())])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `adax-triton bench scale`."""
    add_device(parser)
    parser.add_argument("--sizes", type=count, nargs="+", help="elements of the flat tensor; default: from 1e3")
    parser.add_argument("--tensors", type=count, nargs="+", default=TENSORS, help="numbers of small tensors")
    parser.add_argument("--rounds", type=count, default=15, help="timed steps of each point; default: %(default)s")
    parser.add_argument("--model", type=Path, metavar="FILE", help="a GPU result of `bench step`: print the ZeRO model")
    add_json(parser)


def main(arguments: argparse.Namespace) -> int:
    """Measure and print, or print the model; return the exit code.

    The code is 1 if AdaXW was not timed, 2 for invalid arguments.
    """
    device = arguments.device
    providers = [provider for provider in PROVIDERS if provider.label in (OURS, FUSED)]
    try:
        if arguments.model is not None:
            given = json.loads(arguments.model.read_text())
            print(f"{origin(given)}\n\n{model(given)}")
            return 0
        result = run(device, arguments.sizes or SIZES[device.type], arguments.tensors, arguments.rounds, providers)
    except (ValueError, OSError) as error:
        print(f"adax-triton bench scale: {error}", file=sys.stderr)
        return 2
    publish(result, table, arguments.json)
    return 1 if "absent" in result["providers"][OURS] else 0
