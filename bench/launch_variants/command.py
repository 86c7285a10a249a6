"""Time the step kernel's launch shapes and register limits on one GPU.

    python -m adax_triton.bench.launch_variants.command [--modes NAME ...] [--variants LABEL ...] [--json FILE]

In the label `2048x8 r48`, 2048 is the elements per program, 8 the warps, and 48 the limit of registers per thread.
Each variant is compared with the variant that the package launches. Then all variants of a section are timed in
alternation, with cold caches, together with a copy that moves the same bytes. The exit code is 1 if a variant changes
the result.

`--device cpu --numel 5000 --rounds 1` with TRITON_INTERPRET=1 compares without a GPU; its times mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from adax_triton.bench.harness.command import add_device, add_json, count, markdown_table, seconds, write
from adax_triton.bench.harness.environment import describe, origin
from adax_triton.bench.harness.timing import Clock, release, shares_of_time
from adax_triton.bench.step.command import NOT_REACHED
from adax_triton.bench.step.measure import COPY, copying_bytes, reason

from .compile import compile_all, compile_variant
from .variants import DIFFERS, SECTIONS, Case, Section, Variant

LEAST_ROUNDS = 3
COMPILE_SHARE = 0.4  # of the budget, at most
COLUMNS = {
    **{"ms": "{:.3f}", "tb_per_s": "{:.2f}", "of_reference": "{:.0%}"},
    **{"registers": "{}", "spills": "{}", "verdict": "{}"},
}


def measure(variants: dict[str, Variant], case: Case, clock: Clock, rounds: int, until: float) -> dict[str, Any]:
    """Compare variants with the first, then time them in alternation.

    They stop at `until`, by `time.perf_counter`; the first variant always gets `LEAST_ROUNDS`. Returns the number of
    rounds, and a row per variant and of a copy, JSON-friendly.
    """
    rows: dict[str, dict[str, Any]] = {}
    calls = {}
    for label, variant in variants.items():
        if rows and time.perf_counter() > until:
            rows[label] = {"absent": NOT_REACHED}
            continue
        try:
            launch = case.call(variant)
            rows[label] = {"verdict": case.check(launch)}
            if (compiled := launch()) is not None:  # not in the interpreter
                rows[label] |= {"registers": compiled.n_regs, "spills": compiled.n_spills}
            calls[label] = launch, case.bytes_moved(variant)
        except Exception as error:  # the table shows it
            rows[label] = {"absent": reason(error)}
    calls[COPY] = copying_bytes(case.bytes_moved(next(iter(variants.values()))), case.device)
    times = clock.time_in_turn({label: launch for label, (launch, _) in calls.items()}, rounds, LEAST_ROUNDS, until)
    medians = {label: statistics.median(seconds) for label, (seconds, _) in times.items()}
    bandwidths = {label: moved / medians[label] for label, (_, moved) in calls.items()}
    for label, bandwidth in bandwidths.items():
        figures = {"tb_per_s": bandwidth / 1e12, "of_reference": bandwidth / bandwidths[COPY]}
        rows[label] = {**rows.get(label, {}), "ms": medians[label] * 1e3, **figures}
    return {"reference": COPY, "rounds": len(times[COPY][0]), "rows": rows}


def run(
    sections: list[Section], labels: list[str] | None, numel: int, device: torch.device, rounds: int, budget: float
) -> Iterator[dict[str, Any]]:
    """Measure sections within a budget; yield the result after each.

    `labels` are the variants to compare with the first, None for all, and `rounds` their timed launches at most.
    `budget` is in seconds. Results are JSON-friendly.
    """
    deadline = time.perf_counter() + budget
    chosen = [section.variants(labels) for section in sections]
    if device.type == "cuda":
        from triton.runtime import driver

        target = driver.active.get_current_target()
        by_rank = itertools.zip_longest(*(variants.values() for variants in chosen))  # the most promising first
        pairs = [pair for rank in by_rank for pair in zip(sections, rank, strict=True) if pair[1] is not None]
        jobs = {f"{section.name}, {variant.label}": (section, variant, target) for section, variant in pairs}
        compile_all(compile_variant, jobs, COMPILE_SHARE * budget)
    clock = Clock(device)
    result: dict[str, Any] = {"benchmark": "variants", "environment": describe(device), "numel": numel, "sections": []}
    for (section, variants), until in shares_of_time(list(zip(sections, chosen, strict=True)), deadline):
        try:
            found = measure(variants, Case(section, numel, device), clock, rounds, until)
        except Exception as error:  # another section may fit in memory
            found = {"absent": reason(error)}
        release(device)
        result["sections"].append({"name": section.name, **found})
        yield result


def failures(result: dict[str, Any]) -> list[str]:
    """Return changed results, and sections without a time of the first variant."""
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
    labels = list(dict.fromkeys(label for section in SECTIONS.values() for label in section.labels.split(", ")))
    parser.add_argument("--modes", nargs="+", choices=list(SECTIONS), metavar="NAME", help=f"of {list(SECTIONS)}")
    parser.add_argument("--variants", nargs="+", choices=labels, metavar="LABEL", help=f"of {labels}; default: all")
    parser.add_argument("--numel", type=count, default=10**8, help="default: %(default)s")
    parser.add_argument("--rounds", type=count, default=20, help="at most; default: %(default)s")
    parser.add_argument("--budget", type=seconds, default=85.0, help="seconds in total; default: %(default)s")
    add_device(parser)
    add_json(parser)


def main(argv: list[str] | None = None) -> int:
    """Measure, and print each table when ready; return 1 for a failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    sections = [SECTIONS[name] for name in arguments.modes or SECTIONS]
    result: dict[str, Any] = {}
    for result in run(
        sections, arguments.variants, arguments.numel, arguments.device, arguments.rounds, arguments.budget
    ):
        if len(result["sections"]) == 1:
            print(origin(result), flush=True)
        print(f"\n{section_table(result['sections'][-1])}", flush=True)
        write(result, arguments.json)
    for failure in failures(result):
        print(f"launch_variants: {failure}", file=sys.stderr)
    return 1 if failures(result) else 0


if __name__ == "__main__":
    sys.exit(main())
