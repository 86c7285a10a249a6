"""Run the step benchmark within a time budget: check all providers, then time every workload in every mode."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from adax_triton.bench.harness.correctness import CheckResult, check
from adax_triton.bench.harness.environment import describe, versions
from adax_triton.bench.harness.modes import FP32, MODES
from adax_triton.bench.harness.progress import progress
from adax_triton.bench.harness.providers import PROVIDERS, Provider
from adax_triton.bench.harness.timing import Clock, release
from adax_triton.bench.harness.workloads import Shapes, elements

from .measure import COPY, launches_of, measure, reason

Rows = dict[str, dict[str, Any]]

TIMED = {"cuda": 0.85, "cpu": 1.0}  # fraction of the budget; counting launches on a GPU gets the rest
CHECKED = 0.6  # no check begins after this fraction of the budget
NOT_REACHED = "not reached within the budget of time"


def choose(modes: tuple[str, ...], only: list[str] | None) -> list[Provider]:
    """Return the providers mode by mode, ours first, whether they can run here or not.

    Args:
        modes: names of modes.
        only: parts of labels. None: all providers.

    Raises:
        ValueError: no label contains any of `only`.
    """
    known = [provider for mode in MODES if mode in modes for provider in PROVIDERS if provider.mode.name == mode]
    chosen = [provider for provider in known if not only or any(part in provider.label for part in only)]
    if not chosen:
        raise ValueError(f"only: expected parts of {[provider.label for provider in known]}, got {only}")
    return chosen


def check_all(providers: list[Provider], device: torch.device, until: float) -> tuple[dict[str, CheckResult], Rows]:
    """Check providers; return the results of those that passed, and a row of each that did not, by label.

    Args:
        providers: ours first.
        device: of the parameters.
        until: no check begins later, by `time.perf_counter`.
    """
    passed, rejected = {}, {}
    for provider in providers:
        row: dict[str, Any] = {"mode": provider.mode.name}
        missing = provider.missing_on(device)
        if missing is None and time.perf_counter() > until:
            missing = NOT_REACHED
        if missing is not None:
            rejected[provider.label] = row | {"absent": missing}
            continue
        try:
            passed[provider.label] = check(provider, device)
        except Exception as error:  # the row shows it
            rejected[provider.label] = row | {"absent": reason(error), "failed": True}
    return passed, rejected


def run(
    workloads: dict[str, Shapes],
    device: torch.device,
    providers: list[Provider],
    rounds: int,
    budget: float,
    compile_long: bool = False,
) -> Iterator[dict[str, Any]]:
    """Measure every workload.

    Args:
        workloads: shapes by name.
        device: of the parameters.
        providers: of any modes, ours first.
        rounds: timed steps of each provider at most.
        budget: seconds for all; the rest is listed as not reached.
        compile_long: also time providers on lists that they compile for minutes.

    Yields:
        The result after each workload, and the whole result at the end, JSON-friendly.
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
        # Each row has its own.
        "bytes_per_element": FP32.bytes_per_element if modes == [FP32] else None,
        "workloads": [],
    }
    left = len(workloads) * len(modes)
    with progress(left, "bench step") as advance:
        advance(0, "checking results")
        passed, rejected = check_all(providers, device, begun + CHECKED * budget)
        clock = Clock(device)
        for name, shapes in workloads.items():
            rows: Rows = {provider.label: rejected.get(provider.label, {}) for provider in providers}
            for mode in modes:
                checked = [provider for provider in providers if provider.mode == mode and provider.label in passed]
                seconds = (begun + TIMED[device.type] * budget - time.perf_counter()) / left
                reasons = {one.label: _why_not(one, shapes, device, seconds, compile_long) for one in checked}
                timed = [one for one in checked if reasons[one.label] is None]
                skipped = {label: {"mode": mode.name, "absent": why} for label, why in reasons.items() if why}
                advance(0, f"{name}, {mode.name}")
                found = measure(timed, shapes, clock, device, rounds, seconds) if timed else {}
                rows |= skipped | found | ({COPY: rows[COPY]} if COPY in rows else {})
                left -= 1
                advance(1, f"{name}, {mode.name}")
            for label, result_of_check in passed.items():
                if "median_ms" in rows[label]:
                    rows[label] |= result_of_check._asdict()
            result["workloads"].append(
                {"name": name, "numel": elements(shapes), "tensors": len(shapes), "providers": rows}
            )
            yield result
        if device.type == "cuda":
            advance(0, "counting launches")
            count_launches(result, workloads, device, providers, begun + budget)
    yield result


def _why_not(
    provider: Provider, shapes: Shapes, device: torch.device, seconds: float, compile_long: bool
) -> str | None:
    """Return why a provider is not timed on a workload that has so many seconds, or None."""
    if seconds <= 0:
        return NOT_REACHED
    if provider.most_tensors is None or compile_long:
        return None
    most = provider.most_tensors if device.type == "cuda" else 1  # a C++ compiler takes longer
    return f"compiles {len(shapes)} tensors for minutes; timed if named by --only" if len(shapes) > most else None


def count_launches(
    result: dict[str, Any],
    workloads: dict[str, Shapes],
    device: torch.device,
    providers: list[Provider],
    deadline: float,
) -> None:
    """Add the launches to every row that has a time, until `deadline`; the rest stays unknown."""
    for workload in result["workloads"]:
        shapes = workloads[workload["name"]]
        for provider in providers:
            row = workload["providers"][provider.label]
            compiles = provider.most_tensors is not None and len(shapes) > 1
            if "median_ms" in row and not compiles and time.perf_counter() <= deadline:
                row["launches"] = launches_of(provider, shapes, device)
                release(device)


def failures(result: dict[str, Any]) -> dict[str, str]:
    """Return {label: reason} of our own providers that were wrong or broke; not of those without memory or time."""
    return {
        label: row["absent"]
        for workload in result["workloads"]
        for label, row in workload["providers"].items()
        if label.startswith("adax_triton") and row.get("failed")
    }
