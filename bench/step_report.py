"""`adax-triton bench step`: runs the step benchmark over several workloads, and leaves a table and a JSON file."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from .environment import describe
from .providers import PROVIDERS
from .step import BYTES_PER_ELEMENT, measure
from .workloads import Shapes, flat, gpt2

DEFAULT_SIZES = {"cuda": (1_000_000, 30_000_000, 300_000_000), "cpu": (1_000_000, 10_000_000, 50_000_000)}
OURS = "adax_triton.AdaXW"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's options."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument(
        "--sizes", type=_numel, nargs="*", help="elements of the flat tensors, such as 5e7; default: three sizes"
    )
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each provider; default: %(default)s")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="providers whose name contains one of these")
    parser.add_argument("--no-model", action="store_true", help="leave out the 148 tensors of GPT-2 small")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's")
    parser.add_argument("--json", type=Path, help="write the result here")


def main(arguments: argparse.Namespace) -> int:
    """Run what the options ask for; return an exit code, 1 where one of our own optimizers got no time."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    sizes = DEFAULT_SIZES[device.type] if arguments.sizes is None else arguments.sizes
    workloads = {f"flat {size:,}": flat(size) for size in sizes}
    if not arguments.no_model:
        workloads["GPT-2 small, 148 tensors"] = gpt2()
    result = run(workloads, device, arguments.rounds, arguments.only)
    print(table(result))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    failed = [
        (name, row["absent"])
        for workload in result["workloads"]
        for name, row in workload["providers"].items()
        if name.startswith("adax_triton") and "absent" in row
    ]
    for name, why in failed:
        print(f"{name}: {why}", file=sys.stderr)
    return 1 if failed else 0


def run(workloads: dict[str, Shapes], device: torch.device, rounds: int, only: list[str] | None) -> dict[str, Any]:
    """Measure every workload and return the result, JSON-friendly.

    Raises:
        ValueError: no provider's name contains any of `only`.
    """
    chosen = [
        provider
        for provider in PROVIDERS
        if device.type in provider.device_types and (not only or any(part in provider.name for part in only))
    ]
    if not chosen:
        raise ValueError(f"only: no provider of {[provider.name for provider in PROVIDERS]} matches {only}")
    result: dict[str, Any] = {
        "environment": describe(device),
        "rounds": rounds,
        "dtype": "float32",
        "bytes_per_element": BYTES_PER_ELEMENT,
        "workloads": [],
    }
    for name, shapes in workloads.items():
        for done, rows in measure(chosen, shapes, device, rounds):
            print(f"\r{name}: round {done}/{rounds} ", end="" if rows is None else "\n", file=sys.stderr, flush=True)
        assert rows is not None
        _add_ratios(rows)
        numel = sum(torch.Size(shape).numel() for shape in shapes)
        result["workloads"].append({"name": name, "numel": numel, "tensors": len(shapes), "providers": rows})
    return result


def _add_ratios(rows: dict[str, Any]) -> None:
    ours = rows.get(OURS, {}).get("median_ms")
    for row in rows.values():
        if ours and "median_ms" in row:
            row["ours_over_this"] = ours / row["median_ms"]


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    environment = result["environment"]
    lines = [
        f"{environment['device']}, torch {environment['torch']}, triton {environment['triton']}, "
        f"commit {environment['commit']}, {environment['date']}; "
        f"{result['dtype']}, {result['bytes_per_element']} bytes per element",
    ]
    for workload in result["workloads"]:
        lines += [
            "",
            f"| {workload['name']} | median ms | p20 | p80 | GB/s | of copy | first step s | AdaXW / this |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name, row in workload["providers"].items():
            lines.append(_table_row(name, row))
    return "\n".join(lines)


def _table_row(name: str, row: dict[str, Any]) -> str:
    if "absent" in row:
        return f"| {name} | absent: {row['absent']} | | | | | | |"
    first = f"{row['first_step_s']:.2f}" if "first_step_s" in row else ""
    ratio = f"{row['ours_over_this']:.2f}" if "ours_over_this" in row else ""
    return (
        f"| {name} | {row['median_ms']:.3f} | {row['p20_ms']:.3f} | {row['p80_ms']:.3f} | {row['gb_per_s']:.1f} "
        f"| {row['copy_share']:.0%} | {first} | {ratio} |"
    )


def _numel(text: str) -> int:
    numel = int(float(text))
    if numel < 1 or numel != float(text):
        raise argparse.ArgumentTypeError(f"invalid size {text!r}: expected a whole number of elements, at least 1")
    return numel
