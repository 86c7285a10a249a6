"""Time one optimizer step, ours and others', over sizes, models and modes.

Each optimizer is compared in the mode of its own dtypes. Missing, failing and wrong optimizers are listed with the
reason. GPU times are device times, and host launch time is a separate column. Bandwidth is bytes by formula over time,
and is also given relative to a copy of the same run.
"""

from __future__ import annotations

import argparse
import sys

import torch
from adax_triton.bench.harness.command import add_device, add_json, count, publish, seconds, write
from adax_triton.bench.harness.modes import MODES
from adax_triton.bench.harness.providers import Provider
from adax_triton.bench.harness.timing import free_bytes
from adax_triton.bench.harness.workloads import LISTS, Shapes, elements, flat

from .measure import USABLE
from .run import choose, failures, run
from .table import table

SIZES = {
    "cuda": (1_000_000, 10_000_000, 100_000_000, 1_000_000_000, 4_000_000_000),
    "cpu": (1_000_000, 10_000_000, 50_000_000),
}
MODELS = {"cuda": tuple(LISTS), "cpu": ("gpt2", "resnet50", "many-small")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `adax-triton bench step`."""
    add_device(parser)
    parser.add_argument(
        "--sizes", type=count, nargs="*", help="elements of the flat tensors, such as 5e7; default: 1e6 to what fits"
    )
    parser.add_argument("--models", nargs="*", choices=list(LISTS), help="lists of tensors; default: by device")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), metavar="MODE", help="as in --list; default: all")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="providers whose label contains one of these")
    parser.add_argument("--rounds", type=count, default=30, help="timed steps at most; default: %(default)s")
    parser.add_argument(
        "--budget",
        type=seconds,
        default=420.0,
        help="time limit in seconds, shared among the workloads; the rest is listed as not reached; "
        "default: %(default)s",
    )
    parser.add_argument("--list", action="store_true", help="list workloads, modes and providers, and measure nothing")
    add_json(parser)


def main(arguments: argparse.Namespace) -> int:
    """Measure and print; return 1 if one of our own optimizers failed, 2 for invalid arguments."""
    device = arguments.device
    modes = tuple(arguments.modes or MODES)
    sizes = default_sizes(device, modes) if arguments.sizes is None else arguments.sizes
    models = MODELS[device.type] if arguments.models is None else arguments.models
    workloads = {f"flat {size:,}": flat(size) for size in sizes} | {LISTS[name][0]: LISTS[name][1]() for name in models}
    try:
        if not workloads:
            raise ValueError("sizes, models: got no workload; give at least one")
        chosen = choose(modes, arguments.only)
    except ValueError as error:
        print(f"adax-triton bench step: {error}", file=sys.stderr)
        return 2
    # On a GPU one compilation takes the time of all other measurements.
    if device.type == "cuda" and not arguments.only:
        chosen = [provider for provider in chosen if provider.most_tensors is None]
    if arguments.list:
        print(listing(workloads, chosen, device))
        return 0
    compile_long = bool(arguments.only)
    for result in run(workloads, device, chosen, arguments.rounds, arguments.budget, compile_long):
        write(result, arguments.json)  # after each workload, in case a later one is killed
    publish(result, table, arguments.json)
    failed = failures(result)
    for label, why in failed.items():
        print(f"{label}: {why}", file=sys.stderr)
    return 1 if failed else 0


def default_sizes(device: torch.device, modes: tuple[str, ...]) -> tuple[int, ...]:
    """Return the sizes that fit in memory, with gradients, in at least one of the modes."""
    least = min(2 * MODES[mode].param_dtype.itemsize + MODES[mode].state_bytes for mode in modes)
    return tuple(size for size in SIZES[device.type] if least * size <= USABLE * free_bytes(device))


def listing(workloads: dict[str, Shapes], providers: list[Provider], device: torch.device) -> str:
    """Return the planned measurements as text."""
    lines = ["workloads", *(f"  {name}: {elements(shapes):,} elements" for name, shapes in workloads.items())]
    lines.append("modes, and bytes per element")
    modes = dict.fromkeys(provider.mode for provider in providers)
    lines += [f"  {mode.name}: {mode.bytes_per_element:g}" for mode in modes]
    lines.append("providers")
    for provider in providers:
        missing = provider.missing_on(device)
        lines.append(f"  {provider.label}" + (f": absent: {missing}" if missing else ""))
    return "\n".join(lines)
