"""Time launch shapes, register limits and small rewrites of the kernels on one GPU.

    python -m adax_triton.bench.launch_variants.command [--modes NAME ...] [--variants LABEL ...] [--json FILE]

In the label `2048x8 r48 quotient`, 2048 is the elements per program, 8 the warps, 48 the limit of registers per thread,
and `quotient` a rewrite of the source (`kernel_rewrites.py`). Each variant is compared with the kernel as it is
launched today. Then all variants of a section are timed in alternation, with cold caches, together with a copy that
moves the same bytes. The exit code is 1 if a variant that must not change the result changes it.

`--device cpu --numel 5000 --rounds 1` with TRITON_INTERPRET=1 compares without a GPU; its times mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from adax_triton.bench.harness.command import add_device, add_json, count, seconds, write
from adax_triton.bench.harness.environment import describe, origin
from adax_triton.bench.harness.markdown import markdown_table
from adax_triton.bench.harness.timing import Clock, release
from adax_triton.bench.step.command import NOT_REACHED
from adax_triton.bench.step.measure import reason

from .cases import DIFFERS, Case
from .compile import compile_all
from .variants import SECTIONS, Section, Variant

LEAST_ROUNDS = 3
COMPILE_SHARE = 0.4  # of the budget, at most
COLUMNS = {
    **{"ms": "{:.3f}", "tb_per_s": "{:.2f}", "of_reference": "{:.0%}"},
    **{"registers": "{}", "spills": "{}", "verdict": "{}"},
}


def measure(
    variants: dict[str, Variant], case: Case, failed: dict[str, str], clock: Clock, rounds: int, until: float
) -> dict[str, Any]:
    """Compare variants with the first, then time them in alternation.

    Args:
        variants: by label.
        case: their tensors.
        failed: compiler errors, by label.
        clock: of the device.
        rounds: at most.
        until: `time.perf_counter()` at which to stop. The first variant always gets `LEAST_ROUNDS`.

    Returns:
        The name of the fastest reference, the number of rounds, and a row per variant and reference; JSON-friendly.
    """
    rows: dict[str, dict[str, Any]] = {}
    calls = {}
    for label, variant in variants.items():
        late = bool(rows) and time.perf_counter() > until
        if late or label in failed:
            rows[label] = {"absent": NOT_REACHED if late else failed[label]}
            continue
        try:
            call = case.call(variant)
            rows[label] = {"verdict": case.check(variant, call)}
            compiled = call.launch()
            if compiled is not None:
                rows[label] |= {"registers": compiled.n_regs, "spills": compiled.n_spills}
            calls[label] = call.launch, case.bytes_moved(variant)
        except Exception as error:  # the table shows it
            rows[label] = {"absent": reason(error)}
    references = case.references()
    calls |= references
    host_s = {label: clock.host_time(launch) for label, (launch, _) in calls.items()}
    times: dict[str, list[float]] = {label: [] for label in calls}
    for done in range(rounds):
        if done >= LEAST_ROUNDS and time.perf_counter() > until:
            break
        for label, (launch, _) in calls.items():
            times[label].append(clock.time(launch, host_s[label]))
    medians = {label: statistics.median(seconds) for label, seconds in times.items()}
    bandwidths = {label: moved / medians[label] for label, (_, moved) in calls.items()}
    fastest = max(references, key=lambda name: bandwidths[name])
    for label, bandwidth in bandwidths.items():
        figures = {"tb_per_s": bandwidth / 1e12, "of_reference": bandwidth / bandwidths[fastest]}
        rows[label] = {**rows.get(label, {}), "ms": medians[label] * 1e3, **figures}
    return {"reference": fastest, "rounds": len(times[fastest]), "rows": rows}


def run(
    sections: list[Section], labels: list[str] | None, numel: int, device: torch.device, rounds: int, budget: float
) -> Iterator[dict[str, Any]]:
    """Measure sections; yield the JSON-friendly result after each.

    Args:
        sections: in order.
        labels: variants to compare with the first; None for all.
        numel: elements of the parameter.
        device: of the tensors.
        rounds: timed launches of each variant, at most.
        budget: seconds for all sections.
    """
    deadline = time.perf_counter() + budget
    chosen = {section.name: section.variants(labels) for section in sections}
    failed: dict[tuple[str, str], str] = {}
    if device.type == "cuda":
        from triton.runtime import driver

        by_rank = itertools.zip_longest(*([(one, v) for v in chosen[one.name].values()] for one in sections))
        jobs = [job for jobs in by_rank for job in jobs if job is not None]
        workers = min(len(jobs), os.cpu_count() or 1)
        failed = compile_all(jobs, driver.active.get_current_target(), workers, COMPILE_SHARE * budget)
    clock = Clock(device)
    result: dict[str, Any] = {"benchmark": "variants", "environment": describe(device), "numel": numel, "sections": []}
    with tempfile.TemporaryDirectory() as folder:
        for done, section in enumerate(sections):
            now = time.perf_counter()
            until = now + (deadline - now) / (len(sections) - done)
            found: dict[str, Any] = {"name": section.name}
            try:
                case = Case(section, numel, device, Path(folder))
                errors = {label: error for (name, label), error in failed.items() if name == section.name}
                found |= measure(chosen[section.name], case, errors, clock, rounds, until)
                del case
            except Exception as error:  # another section may fit in memory
                found["absent"] = reason(error)
            release(device)
            result["sections"].append(found)
            yield result


def failures(result: dict[str, Any]) -> list[str]:
    """Return what makes the command fail: changed results, and sections without a time of the first variant."""
    found = []
    for section in result["sections"]:
        rows = section.get("rows", {})
        verdicts = [f"{label} {row['verdict']}" for label, row in rows.items() if DIFFERS in row.get("verdict", "")]
        first = next(iter(rows.values()), section)
        absent = [first["absent"]] if "absent" in first else []
        found += [f"{section['name']}: {failure}" for failure in verdicts + absent]
    return found


def table(result: dict[str, Any]) -> str:
    """Return a result as Markdown."""
    return "\n\n".join(section_table(section) for section in result["sections"])


def section_table(section: dict[str, Any]) -> str:
    """Return the table of one section."""
    if "absent" in section:
        return f"{section['name']}: absent: {section['absent']}"
    titles = [section["name"], "ms", "TB/s", f"of {section['reference']}", "registers", "spills", "result"]
    rows = []
    for label, row in section["rows"].items():
        row = row | ({"verdict": f"absent: {row['absent']}"} if "absent" in row else {})
        rows.append([label, *(COLUMNS[key].format(row[key]) if key in row else "" for key in COLUMNS)])
    return "\n".join(markdown_table(titles, rows))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--modes", nargs="+", choices=list(SECTIONS), metavar="NAME", help=f"of {list(SECTIONS)}")
    parser.add_argument("--variants", nargs="+", metavar="LABEL", help="compared with the first; default: all")
    parser.add_argument("--numel", type=count, default=10**8, help="default: %(default)s")
    parser.add_argument("--rounds", type=count, default=20, help="at most; default: %(default)s")
    parser.add_argument("--budget", type=seconds, default=85.0, help="seconds in total; default: %(default)s")
    add_device(parser)
    add_json(parser)


def main(argv: list[str] | None = None) -> int:
    """Measure, and print each table when it is ready; return 1 for a failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    sections = [SECTIONS[name] for name in arguments.modes or SECTIONS]
    known = {label for section in sections for label in section.variants()}
    if unknown := set(arguments.variants or ()) - known:
        parser.error(f"--variants: {sorted(unknown)} are not in {sorted(known)}")
    options = (arguments.variants, arguments.numel, arguments.device, arguments.rounds, arguments.budget)
    result: dict[str, Any] = {}
    for result in run(sections, *options):
        if len(result["sections"]) == 1:
            print(origin(result), flush=True)
        print(f"\n{section_table(result['sections'][-1])}", flush=True)
        write(result, arguments.json)
    for failure in failures(result):
        print(f"launch_variants: {failure}", file=sys.stderr)
    return 1 if failures(result) else 0


if __name__ == "__main__":
    sys.exit(main())
