"""Time a step of AdaXW and others, by size, model and mode.

Each optimizer is compared in the mode of its own dtypes. Missing, failing and wrong optimizers are listed with the
reason. GPU times are device times, and host launch time is a separate column. Bandwidth is bytes by formula over time,
and is also given relative to a copy of the same run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from adax_triton.bench.harness.command import add_device, add_json, count, publish, seconds, write
from adax_triton.bench.harness.correctness import CheckResult, check
from adax_triton.bench.harness.environment import describe, versions
from adax_triton.bench.harness.modes import FP32, MODES
from adax_triton.bench.harness.progress import progress
from adax_triton.bench.harness.providers import PROVIDERS, Provider
from adax_triton.bench.harness.timing import Clock, free_bytes, release
from adax_triton.bench.harness.workloads import LISTS, Shapes, elements, flat

from .measure import COPY, USABLE, launches_of, measure, reason
from .table import table

Rows = dict[str, dict[str, Any]]

SIZES = {
    "cuda": (1_000_000, 10_000_000, 100_000_000, 1_000_000_000, 4_000_000_000),
    "cpu": (1_000_000, 10_000_000, 50_000_000),
}
MODELS = {"cuda": tuple(LISTS), "cpu": ("gpt2", "resnet50", "many-small")}
TIMED_FRACTION = {"cuda": 0.85, "cpu": 1.0}  # of the budget; counting launches on a GPU gets the rest
CHECK_FRACTION = 0.6  # of the budget; no check begins later
NOT_REACHED = "not reached: the time budget is used up"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `adax-triton bench step`."""
    add_device(parser)
    parser.add_argument(
        "--sizes",
        type=count,
        nargs="*",
        help="elements of the flat tensors, such as 5e7; default: 1e6 and larger, as memory permits",
    )
    parser.add_argument("--models", nargs="*", choices=list(LISTS), help="lists of tensors; default: by device")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), metavar="MODE", help="as in --list; default: all")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="providers whose label contains one of these")
    parser.add_argument("--rounds", type=count, default=30, help="timed steps at most; default: %(default)s")
    budget_help = "time limit in seconds; later cases are listed as not reached; default: %(default)s"
    parser.add_argument("--budget", type=seconds, default=420.0, help=budget_help)
    parser.add_argument("--list", action="store_true", help="list workloads, modes and providers, and measure nothing")
    add_json(parser)


def main(arguments: argparse.Namespace) -> int:
    """Measure and print; return the exit code.

    The code is 1 if an optimizer of this package failed, 2 for invalid arguments.
    """
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
        chosen = [provider for provider in chosen if not provider.compiles_long]
    if arguments.list:
        print(listing(workloads, chosen, device))
        return 0
    for result in run(workloads, device, chosen, arguments.rounds, arguments.budget, bool(arguments.only)):
        write(result, arguments.json)  # after each workload, in case a later one is killed
    publish(result, table, arguments.json)
    failed = failures(result)
    for label, why in failed.items():
        print(f"{label}: {why}", file=sys.stderr)
    return 1 if failed else 0


def default_sizes(device: torch.device, modes: tuple[str, ...]) -> tuple[int, ...]:
    """Return the sizes that fit in memory in at least one mode.

    Memory includes gradients.
    """
    least = min(2 * MODES[mode].param_dtype.itemsize + MODES[mode].state_bytes for mode in modes)
    return tuple(size for size in SIZES[device.type] if least * size <= USABLE * free_bytes(device))


def choose(modes: tuple[str, ...], only: list[str] | None) -> list[Provider]:
    """Return the providers whose label contains one of `only`.

    They are sorted by mode, AdaXW first. Raises ValueError if there are none.
    """
    known = [provider for mode in MODES if mode in modes for provider in PROVIDERS if provider.mode.name == mode]
    chosen = [provider for provider in known if not only or any(part in provider.label for part in only)]
    if not chosen:
        raise ValueError(f"only: expected parts of {[provider.label for provider in known]}, got {only}")
    return chosen


def listing(workloads: dict[str, Shapes], providers: list[Provider], device: torch.device) -> str:
    """Return the planned measurements as text."""
    lines = ["workloads", *(f"  {name}: {elements(shapes):,} elements" for name, shapes in workloads.items())]
    modes = dict.fromkeys(provider.mode for provider in providers)
    lines += ["modes, and bytes per element", *(f"  {mode.name}: {mode.bytes_per_element:g}" for mode in modes)]
    lines.append("providers")
    for provider in providers:
        missing = provider.missing_on(device)
        lines.append(f"  {provider.label}" + (f": absent: {missing}" if missing else ""))
    return "\n".join(lines)


def run(
    workloads: dict[str, Shapes],
    device: torch.device,
    providers: list[Provider],
    rounds: int,
    budget: float,
    compile_long: bool = False,
) -> Iterator[dict[str, Any]]:
    """Measure every workload; yield the result after each, and at the end.

    Results are JSON-friendly.

    Args:
        workloads: shapes by name.
        device: of the parameters.
        providers: of any modes, AdaXW first.
        rounds: timed steps of each provider at most.
        budget: seconds for all; the rest is listed as not reached.
        compile_long: also time providers on lists that they compile for minutes.
    """
    begun = time.perf_counter()
    modes = list(dict.fromkeys(provider.mode for provider in providers))
    packages = {provider.package for provider in providers} - {"torch", "adax_triton"}
    result: dict[str, Any] = {
        "benchmark": "step",
        "environment": describe(device),
        "versions": versions(sorted(packages)),
        "rounds": rounds,
        "dtype": ", ".join(dict.fromkeys(str(mode.param_dtype).removeprefix("torch.") for mode in modes)),
        "bytes_per_element": FP32.bytes_per_element if modes == [FP32] else None,  # else each row has its own
        "workloads": [],
    }
    left = len(workloads) * len(modes)
    with progress(left, "bench step") as advance:
        advance(0, "checking results")
        passed, rejected = check_all(providers, device, begun + CHECK_FRACTION * budget)
        clock = Clock(device)
        for name, shapes in workloads.items():
            rows: Rows = {provider.label: rejected.get(provider.label, {}) for provider in providers}
            for mode in modes:
                advance(0, f"{name}, {mode.name}")
                checked = [provider for provider in providers if provider.mode == mode and provider.label in passed]
                seconds = (begun + TIMED_FRACTION[device.type] * budget - time.perf_counter()) / left
                # A C++ compiler takes minutes for a list on a CPU.
                skipped = [one for one in checked if one.compiles_long and len(shapes) > 1 and not compile_long]
                timed = [one for one in checked if one not in skipped] if seconds > 0 else []
                found = measure(timed, shapes, clock, device, rounds, seconds) if timed else {}
                slow = f"compiles {len(shapes)} tensors for minutes; timed if named by --only"
                for one in checked:
                    why = slow if one in skipped else NOT_REACHED
                    rows[one.label] = found.get(one.label, {"mode": mode.name, "absent": why})
                    if "median_ms" in rows[one.label]:
                        rows[one.label] |= passed[one.label]._asdict()
                rows |= {COPY: found[COPY]} if COPY in found and COPY not in rows else {}
                left -= 1
                advance(1, f"{name}, {mode.name}")
            named = {"name": name, "numel": elements(shapes), "tensors": len(shapes), "providers": rows}
            result["workloads"].append(named)
            yield result
        if device.type == "cuda":
            advance(0, "counting launches")
            count_launches(result, workloads, device, providers, begun + budget)
    yield result


def check_all(providers: list[Provider], device: torch.device, until: float) -> tuple[dict[str, CheckResult], Rows]:
    """Check providers; return passed results and the rows of the rest.

    Both are by label. No check begins when `time.perf_counter()` exceeds `until`.
    """
    passed: dict[str, CheckResult] = {}
    rejected: Rows = {}
    for provider in providers:
        missing = provider.missing_on(device) or (NOT_REACHED if time.perf_counter() > until else None)
        try:
            if missing is None:
                passed[provider.label] = check(provider, device)
            else:
                rejected[provider.label] = {"mode": provider.mode.name, "absent": missing}
        except Exception as error:  # the row shows it
            rejected[provider.label] = {"mode": provider.mode.name, "absent": reason(error), "failed": True}
    return passed, rejected


def count_launches(
    result: dict[str, Any], workloads: dict[str, Shapes], device: torch.device, providers: list[Provider], until: float
) -> None:
    """Add the launches to every timed row; start none after `until`."""
    for workload in result["workloads"]:
        shapes = workloads[workload["name"]]
        for provider in providers:
            row = workload["providers"][provider.label]
            compiles = provider.compiles_long and len(shapes) > 1
            if "median_ms" in row and not compiles and time.perf_counter() <= until:
                row["launches"] = launches_of(provider, shapes, device)
                release(device)


def failures(result: dict[str, Any]) -> dict[str, str]:
    """Return {label: reason} of this package's wrong or failing providers.

    Missing memory or time is no failure.
    """
    return {
        label: row["absent"]
        for workload in result["workloads"]
        for label, row in workload["providers"].items()
        if label.startswith("adax_triton") and row.get("failed")
    }
