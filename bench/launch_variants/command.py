"""Time launch shapes, register caps and small rewrites of the kernels on one GPU.

    python -m adax_triton.bench.step.launch_variants [--modes NAME ...] [--variants LABEL ...] [--json FILE]

A label such as `2048x8 r48 quotient` is elements per program x warps, the most registers per thread, and rewrites of
the kernel's source (`kernel_rewrites.py`). Each variant is compared with the present kernel first. All variants of a
section are then timed in turn, round after round, with cold caches, next to a copy that moves the same bytes. The exit
code is 1 if a variant that must not change the result does.

`--device cpu --numel 5000 --rounds 1` with TRITON_INTERPRET=1 compares without a GPU; its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from adax_triton.bench.harness.environment import describe
from adax_triton.bench.harness.origin import origin
from adax_triton.bench.harness.timing import Call, Clock, release

from .measure import reason
from .table import markdown_row
from .variant_cases import DIFFERS, NormCase, StepCase, case_of, compile_variant
from .variant_sections import SECTIONS, Section, Variant, variants_of

LEAST_ROUNDS = 3
COMPILING = 0.4  # of the budget, at most
NOT_REACHED = "not reached within the budget of time"
COLUMNS = {
    "ms": "{:.3f}",
    "tb_per_s": "{:.2f}",
    "of_reference": "{:.0%}",
    "registers": "{}",
    "spills": "{}",
    "verdict": "{}",
}


def compile_all(
    jobs: list[tuple[Section, Variant]], target: Any, workers: int, seconds: float
) -> dict[tuple[str, str], str]:
    """Compile variants in parallel into Triton's cache on disk.

    Args:
        jobs: in the order in which they are begun.
        target: Triton's `GPUTarget`.
        workers: processes.
        seconds: after which what is not compiled is left to its first launch.

    Returns:
        Why a job failed, by (name of the section, label of the variant).
    """
    begun = time.perf_counter()
    failed, late = {}, 0
    with multiprocessing.get_context("spawn").Pool(workers) as pool:  # the end of the block stops who still works
        results = [pool.apply_async(compile_variant, (*job, target)) for job in jobs]
        for (section, variant), result in zip(jobs, results, strict=True):
            try:
                why = result.get(max(0.0, begun + seconds - time.perf_counter()))
            except multiprocessing.TimeoutError:
                late += 1
                continue
            if why is not None:
                failed[section.name, variant.label] = why
    took = time.perf_counter() - begun
    print(f"compiled {len(jobs) - late - len(failed)} of {len(jobs)} in {took:.0f} s, {len(failed)} failed", flush=True)
    return failed


def compare(
    variants: dict[str, Variant], case: StepCase | NormCase, failed: dict[str, str], until: float
) -> tuple[dict[str, dict[str, Any]], dict[str, Call]]:
    """Compare variants with the first.

    Args:
        variants: by label.
        case: their tensors.
        failed: why a variant did not compile, by label.
        until: by `time.perf_counter`; from then on variants are left out, but not the first.

    Returns:
        A row of each variant, and the launches of those that can be timed, by label.
    """
    rows: dict[str, dict[str, Any]] = {}
    launches: dict[str, Call] = {}
    for label, variant in variants.items():
        if rows and time.perf_counter() > until:
            rows[label] = {"absent": NOT_REACHED}
        elif label in failed:
            rows[label] = {"absent": failed[label]}
        else:
            try:
                call = case.call(variant)
                row = {"verdict": case.check(variant, call)}
                compiled = call.launch()
                if compiled is not None:
                    row |= {"registers": compiled.n_regs, "spills": compiled.n_spills}
                rows[label], launches[label] = row, call.launch
            except Exception as error:  # whatever stops a variant is what its row says
                rows[label] = {"absent": reason(error)}
    return rows, launches


def measure(
    variants: dict[str, Variant],
    case: StepCase | NormCase,
    failed: dict[str, str],
    clock: Clock,
    rounds: int,
    until: float,
) -> dict[str, Any]:
    """Compare variants, then time them in turn.

    Args:
        variants: see `compare`.
        case: likewise.
        failed: likewise.
        clock: of the device.
        rounds: at most.
        until: when to stop, by `time.perf_counter`, after `LEAST_ROUNDS`.

    Returns:
        The name of the fastest reference, the rounds, and the rows of variants and references, JSON-friendly.
    """
    rows, calls = compare(variants, case, failed, until)
    moved = {label: case.bytes_moved(variants[label]) for label in calls}
    references = case.references()
    for reference in references:
        rows[reference.name] = {}
        calls[reference.name], moved[reference.name] = reference.call, reference.bytes
    host_s = {label: clock.host_time(call) for label, call in calls.items()}
    times: dict[str, list[float]] = {label: [] for label in calls}
    for done in range(rounds):
        if done >= LEAST_ROUNDS and time.perf_counter() > until:
            break
        for label, call in calls.items():
            times[label].append(clock.time(call, host_s[label]))
    medians = {label: statistics.median(seconds) for label, seconds in times.items()}
    bandwidths = {label: moved[label] / median for label, median in medians.items()}
    fastest = max((reference.name for reference in references), key=lambda name: bandwidths[name])
    for label, bandwidth in bandwidths.items():
        figures = {"tb_per_s": bandwidth / 1e12, "of_reference": bandwidth / bandwidths[fastest]}
        rows[label] |= {"ms": medians[label] * 1e3, **figures}
    return {"reference": fastest, "rounds": len(times[fastest]), "rows": rows}


def run(
    sections: list[Section], labels: list[str] | None, numel: int, device: torch.device, rounds: int, budget: float
) -> Iterator[dict[str, Any]]:
    """Measure sections.

    Args:
        sections: in order.
        labels: of the variants next to the present one; None for all.
        numel: elements of each parameter.
        device: where.
        rounds: timed launches of each variant, at most.
        budget: seconds for all.

    Yields:
        The result after each section, JSON-friendly.
    """
    deadline = time.perf_counter() + budget
    chosen = {section.name: _chosen(section, labels) for section in sections}
    failed: dict[tuple[str, str], str] = {}
    if device.type == "cuda":
        from triton.runtime import driver

        ranked = [
            (rank, section, variant)
            for section in sections
            for rank, variant in enumerate(chosen[section.name].values())
        ]
        jobs = [(section, variant) for _, section, variant in sorted(ranked, key=lambda job: job[0])]
        target, workers = driver.active.get_current_target(), min(len(jobs), os.cpu_count() or 1)
        failed = compile_all(jobs, target, workers, COMPILING * budget)
    clock = Clock(device)
    result: dict[str, Any] = {"benchmark": "variants", "environment": describe(device), "numel": numel, "sections": []}
    with tempfile.TemporaryDirectory() as folder:
        for done, section in enumerate(sections):
            now = time.perf_counter()
            until = now + (deadline - now) / (len(sections) - done)
            found: dict[str, Any] = {"name": section.name}
            try:
                case = case_of(section, numel, device, Path(folder))
                of_section = {label: why for (name, label), why in failed.items() if name == section.name}
                found |= measure(chosen[section.name], case, of_section, clock, rounds, until)
                del case
            except Exception as error:  # another section may fit in memory
                found["absent"] = reason(error)
            release(device)
            result["sections"].append(found)
            yield result


def _chosen(section: Section, labels: list[str] | None) -> dict[str, Variant]:
    present, *others = variants_of(section)
    return {variant.label: variant for variant in (present, *(v for v in others if not labels or v.label in labels))}


def failures(result: dict[str, Any]) -> list[str]:
    """Return what fails the command: a changed result, and sections whose present variant was not timed."""
    found = []
    for section in result["sections"]:
        rows = section.get("rows", {})
        found += [
            f"{section['name']}: {label} {row['verdict']}"
            for label, row in rows.items()
            if row.get("verdict", "").startswith(DIFFERS)
        ]
        present = next(iter(rows.values()), section)
        found += [f"{section['name']}: {present['absent']}"] if "absent" in present else []
    return found


def table(result: dict[str, Any]) -> str:
    """Return a result as Markdown."""
    return "\n\n".join(section_table(section) for section in result["sections"])


def section_table(section: dict[str, Any]) -> str:
    """Return a table of one section, whose first variant is the present one."""
    if "absent" in section:
        return f"{section['name']}: absent: {section['absent']}"
    titles = [section["name"], "ms", "TB/s", f"of {section['reference']}", "registers", "spills", "result"]
    lines = [markdown_row(titles), "|---" * len(titles) + "|"]
    for label, row in section["rows"].items():
        cells = [form.format(row[key]) if key in row else "" for key, form in COLUMNS.items()]
        if "absent" in row:
            cells[-1] = f"absent: {row['absent']}"
        lines.append(markdown_row([label, *cells]))
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--modes", nargs="+", choices=list(SECTIONS), metavar="NAME", help=f"of {list(SECTIONS)}")
    parser.add_argument("--variants", nargs="+", metavar="LABEL", help="next to the present one; default: all")
    parser.add_argument("--numel", type=lambda text: int(float(text)), default=10**8, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=20, help="at most; default: %(default)s")
    parser.add_argument("--budget", type=float, default=85.0, help="seconds for all; default: %(default)s")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here, after each section")


def main(argv: list[str] | None = None) -> int:
    """Measure, and print each table as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    sections = [SECTIONS[name] for name in arguments.modes or SECTIONS]
    known = {label for section in sections for label in _chosen(section, None)}
    if unknown := set(arguments.variants or ()) - known:
        parser.error(f"--variants: {sorted(unknown)} are not among {sorted(known)}")
    device = torch.device(arguments.device)
    result: dict[str, Any] = {}
    for result in run(sections, arguments.variants, arguments.numel, device, arguments.rounds, arguments.budget):
        if len(result["sections"]) == 1:
            print(origin(result), flush=True)
        print(f"\n{section_table(result['sections'][-1])}", flush=True)
        if arguments.json is not None:
            written = arguments.json.with_suffix(".part")
            written.write_text(json.dumps(result, indent=1) + "\n")
            written.replace(arguments.json)
    for failure in failures(result):
        print(f"launch_variants: {failure}", file=sys.stderr)
    return 1 if failures(result) else 0


if __name__ == "__main__":
    sys.exit(main())
