"""Time of a step on a CPU, next to torch's fused AdamW, DeepSpeedCPUAdam and another copy of this package.

The sides of a workload take turns, so that a drift of the machine affects all of them; medians are compared. A side
whose package is missing is named below the table. Ratios are our time over the other's: below 1, ours is faster.

    adax-triton bench cpu --package FOLDER --json bench/results/cpu.json

compares with the copy of `adax_triton` in a folder, which steps in a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adax_triton.bench.harness.environment import describe
from adax_triton.bench.harness.origin import origin
from adax_triton.bench.harness.progress import progress
from adax_triton.bench.harness.timing import p20_and_p80

from adax_triton.step.cpu_kernel import build_problem

from .cpu_processes import BASELINE, Baseline, check_package, first_steps
from .cpu_workloads import CPU, OURS, WITHOUT, WORKLOADS, Sizes, Timed, seconds, started

LEAST_ROUNDS = 5
FIRST_STEP = "first step of a process, cache {}"


def measure(name: str, sizes: Sizes, rounds: int, limit_s: float, baseline: Baseline | None = None) -> dict[str, Any]:
    """Time the sides of a workload in turn; return its row, JSON-friendly.

    Args:
        name: of the workload.
        sizes: of its tensors.
        rounds: samples of each side, at most.
        limit_s: seconds after which no round begins, beyond `LEAST_ROUNDS`.
        baseline: the process of the other copy of the package. Default: none.

    Raises:
        RuntimeError: our own step fails.
    """
    workload = WORKLOADS[name]
    sides, absent = started(workload, sizes)
    ours_failed = absent.keys() & {OURS, WITHOUT}
    if ours_failed:
        raise RuntimeError(f"{name}: {absent[ours_failed.pop()]}")
    if baseline is not None:
        problem = baseline.start(name, sizes)
        if problem is not None:
            absent[BASELINE], baseline = problem, None
    times = _rounds(sides, workload.repeats, rounds, limit_s, baseline)
    sides.clear()
    gc.collect()
    scale = 1e3 / workload.parts(sizes)
    return row(name, {side: [scale * each for each in samples] for side, samples in times.items()}, absent)


def _rounds(
    sides: dict[str, Timed], repeats: int, rounds: int, limit_s: float, baseline: Baseline | None
) -> dict[str, list[float]]:
    """Return the seconds of each sample by side; those of `WITHOUT` are subtracted."""
    times: dict[str, list[float]] = {side: [] for side in sides if side != WITHOUT}
    if baseline is not None:
        times[BASELINE] = []
    begun = time.perf_counter()
    for done in range(rounds):
        if done >= LEAST_ROUNDS and time.perf_counter() - begun > limit_s:
            break
        found = {side: seconds(timed, repeats) for side, timed in sides.items()}
        without = found.pop(WITHOUT, 0.0)
        found[OURS] -= without
        if baseline is not None:
            theirs = baseline.sample()
            found[BASELINE] = theirs[OURS] - theirs.get(WITHOUT, 0.0)
        for side, each in found.items():
            times[side].append(each)
    return times


def row(name: str, milliseconds: dict[str, list[float]], absent: dict[str, str] | None = None) -> dict[str, Any]:
    """Return medians, p20 and p80 of each side, and our median over the others'."""
    sides: dict[str, dict[str, Any]] = {}
    for side, times in milliseconds.items():
        p20, p80 = p20_and_p80(times)
        sides[side] = {"median_ms": statistics.median(times), "p20_ms": p20, "p80_ms": p80}
    ours = sides[OURS]["median_ms"]
    for side, found in sides.items():
        if side != OURS:
            found["ours_over_this"] = ours / found["median_ms"]
    sides |= {side: {"absent": why} for side, why in (absent or {}).items()}
    return {"name": name, "rounds": len(milliseconds[OURS]), "sides": sides}


def run(
    names: Sequence[str],
    sizes: Sizes,
    rounds: int,
    limit_s: float,
    processes: int,
    package: Path | None = None,
) -> dict[str, Any]:
    """Return the rows of workloads and of first steps, JSON-friendly.

    Args:
        names: of workloads.
        sizes: of their tensors.
        rounds, limit_s: see `measure`.
        processes: whose first step is timed, per side; 0 for none.
        package: a folder with another copy of `adax_triton`. Default: none.
    """
    baseline = None if package is None else Baseline(package)
    rows = []
    with progress(len(names) + bool(processes), "bench cpu") as advance:
        try:
            for name in names:
                advance(0, name)
                rows.append(measure(name, sizes, rounds, limit_s, baseline))
                advance(1, name)
        finally:
            if baseline is not None:
                baseline.close()
        if processes:
            advance(0, "first steps")
            for cache, found in first_steps(sizes, processes, package).items():
                in_ms = {side: [1e3 * each for each in times] for side, times in found.items()}
                rows.append(row(FIRST_STEP.format(cache), in_ms))
            advance(1, "first steps")
    compared = None if package is None else package.resolve().name
    return {
        "benchmark": "cpu",
        "environment": describe(CPU),
        "sizes": sizes._asdict(),
        "package": compared,
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown: a line for each workload and side that it is compared with."""
    sizes = result["sizes"]
    small = f"{sizes['tensors']:,} small tensors of {sizes['tensors']:,} elements"
    lines = [
        f"flat: {sizes['numel']:,} elements; {small}; first step: {sizes['first_numel']:,} elements; median, in "
        "brackets p20 to p80",
        "",
        "| workload | ours, ms | compared with | its ms | ratio |",
        "|---|---:|---|---:|---:|",
    ]
    absent = []
    for one in result["rows"]:
        ours, others = _times(one["sides"][OURS]), {side: at for side, at in one["sides"].items() if side != OURS}
        timed = {side: found for side, found in others.items() if "absent" not in found}
        absent += [f"{one['name']}, {side}: {others[side]['absent']}" for side in others if side not in timed]
        if not timed:
            lines.append(f"| {one['name']} | {ours} | | | |")
        for side, found in timed.items():
            lines.append(f"| {one['name']} | {ours} | {side} | {_times(found)} | {_ratio(found['ours_over_this'])} |")
    if result["package"] is not None:
        lines += ["", f"{BASELINE}: {result['package']}"]
    return "\n".join([*lines, *(["", "Absent: " + "; ".join(absent)] if absent else [])])


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _times(side: dict[str, float]) -> str:
    digits = 4 if side["median_ms"] < 1 else 2
    return f"{side['median_ms']:.{digits}f} ({side['p20_ms']:.{digits}f} to {side['p80_ms']:.{digits}f})"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `adax-triton bench cpu`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--numel", type=int, default=Sizes().numel, help="elements of the flat tensors; other workloads keep their size"
    )
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, metavar="NAME", help="; ".join(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=30, help="samples of each side, at most")
    parser.add_argument(
        "--seconds", type=float, default=15.0, help="of a workload, after which no round begins, but for the first 5"
    )
    parser.add_argument("--processes", type=int, default=3, help="whose first step is timed, per side; 0 for none")
    parser.add_argument("--package", type=Path, metavar="FOLDER", help="has another adax_triton, compared with ours")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the result")


def main(arguments: argparse.Namespace) -> int:
    """Measure, print the table and keep the result; return 0, or 2 for arguments that do not fit."""
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        print("bench cpu: TRITON_INTERPRET is set, so Triton's interpreter would step CPU tensors; unset it")
        return 2
    for name, least in (("numel", 1), ("rounds", 1), ("seconds", 0), ("processes", 0)):
        if getattr(arguments, name) < least:
            print(f"bench cpu: --{name} is {getattr(arguments, name)}; expected at least {least}")
            return 2
    problem = build_problem()
    if problem is not None:
        print(f"bench cpu: it measures the native kernel. {problem}")
        return 2
    if arguments.package is not None:
        try:
            check_package(arguments.package)
        except ValueError as error:
            print(f"bench cpu: {error}")
            return 2
    result = run(
        arguments.only or list(WORKLOADS),
        Sizes(numel=arguments.numel),
        arguments.rounds,
        arguments.seconds,
        arguments.processes,
        arguments.package,
    )
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{origin(result)}\n\n{table(result)}")
    return 0
