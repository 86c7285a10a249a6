"""A run of the step benchmark: who is admitted, every workload in every mode, within a budget of time."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from adax_triton.bench.harness.correctness import Passed, check
from adax_triton.bench.harness.environment import describe, versions
from adax_triton.bench.harness.modes import FP32, MODES
from adax_triton.bench.harness.peers import PEERS
from adax_triton.bench.harness.progress import progress
from adax_triton.bench.harness.providers import PROVIDERS, Provider
from adax_triton.bench.harness.timing import Clock, release
from adax_triton.bench.harness.workloads import Shapes

from .measure import COPY, launches_of, measure, reason

Rows = dict[str, dict[str, Any]]

# Of the time, for all but counting launches; and when the gate closes.
TIMED = {"cuda": 0.85, "cpu": 1.0}
GATED = 0.6
NOT_REACHED = "not reached within the budget of time"


def choose(modes: tuple[str, ...], only: list[str] | None) -> list[Provider]:
    """Return the providers mode by mode, ours first, those that cannot run here included.

    Raises:
        ValueError: no provider's label contains any of `only`.
    """
    known = [
        provider for mode in MODES if mode in modes for provider in (*PROVIDERS, *PEERS) if provider.mode.name == mode
    ]
    chosen = [provider for provider in known if not only or any(part in provider.label for part in only)]
    if not chosen:
        raise ValueError(f"only: none of {[provider.label for provider in known]} contains any of {only}")
    return chosen


def admit(providers: list[Provider], device: torch.device, until: float) -> tuple[dict[str, Passed], Rows]:
    """Return what the gate found of those who passed it, and a row with the reason of each of the others, by label.

    Args:
        providers: ours first.
        device: where.
        until: when the gate closes, by `time.perf_counter`.
    """
    passed, turned_away = {}, {}
    for provider in providers:
        row: dict[str, Any] = {"mode": provider.mode.name}
        missing = provider.missing_on(device)
        if missing is None and time.perf_counter() > until:
            missing = NOT_REACHED
        if missing is not None:
            turned_away[provider.label] = row | {"absent": missing}
            continue
        try:
            passed[provider.label] = check(provider, device)
        except Exception as error:  # whatever stops a provider is what its row says
            turned_away[provider.label] = row | {"absent": reason(error), "failed": True}
    return passed, turned_away


def run(
    workloads: dict[str, Shapes],
    device: torch.device,
    providers: list[Provider],
    rounds: int,
    budget: float,
    named: bool = False,
) -> Iterator[dict[str, Any]]:
    """Measure every workload.

    Args:
        workloads: shapes by name.
        device: where.
        providers: who, of any modes, ours first.
        rounds: timed steps of each provider at most.
        budget: seconds for all. What is not reached by then is listed so.
        named: time providers on lists that they compile for minutes, too.

    Yields:
        The result after each workload, and the whole of it last, JSON-friendly.
    """
    deadline = time.perf_counter() + budget
    timed_until = deadline - (1 - TIMED[device.type]) * budget
    modes = list(dict.fromkeys(provider.mode for provider in providers))
    result: dict[str, Any] = {
        "benchmark": "step",
        "environment": describe(device),
        "versions": versions(sorted({provider.package for provider in providers if provider in PEERS})),
        "rounds": rounds,
        "dtype": ", ".join(dict.fromkeys(str(mode.param_dtype).removeprefix("torch.") for mode in modes)),
        # Rows have their own.
        "bytes_per_element": FP32.bytes_per_element if modes == [FP32] else None,
        "workloads": [],
    }
    left = len(workloads) * len(modes)
    with progress(left + 1, "bench step") as advance:
        advance(0, "checking results")
        passed, turned_away = admit(providers, device, deadline - (1 - GATED) * budget)
        clock = Clock(device)
        for name, shapes in workloads.items():
            rows: Rows = {provider.label: turned_away.get(provider.label, {}) for provider in providers}
            for mode in modes:
                here = [provider for provider in providers if provider.mode == mode and provider.label in passed]
                seconds = (timed_until - time.perf_counter()) / left
                say = functools.partial(_say, advance, f"{name}, {mode.name}")
                found = measure_mode(here, shapes, clock, device, rounds, seconds, named, say)
                rows |= found | {COPY: rows[COPY]} if COPY in rows else found
                left -= 1
                advance(1, f"{name}, {mode.name}")
            for label, known in passed.items():
                if "median_ms" in rows[label]:
                    rows[label] |= known._asdict()
            numel = sum(torch.Size(shape).numel() for shape in shapes)
            result["workloads"].append({"name": name, "numel": numel, "tensors": len(shapes), "providers": rows})
            yield result
        advance(0, "counting launches")
        count_all(result, workloads, device, providers, deadline)
        advance(1, "done")
    yield result


def measure_mode(
    providers: list[Provider],
    shapes: Shapes,
    clock: Clock,
    device: torch.device,
    rounds: int,
    seconds: float,
    named: bool,
    say: Callable[[str], None],
) -> Rows:
    """Measure one workload in one mode; see `run`."""
    rows: Rows = {}
    timed = []
    for provider in providers:
        most = provider.most_tensors
        if most is not None and device.type == "cpu":
            most = 1  # a C++ compiler takes longer
        if seconds <= 0:
            why = NOT_REACHED
        elif most is not None and len(shapes) > most and not named:
            why = f"compiles {len(shapes)} tensors for minutes; timed if named by --only"
        else:
            timed.append(provider)
            continue
        rows[provider.label] = {"mode": provider.mode.name, "absent": why}
    return rows | (measure(timed, shapes, clock, device, rounds, seconds, say) if timed else {})


def _say(advance: Callable[[int, str], None], title: str, now: str) -> None:
    advance(0, f"{title}: {now}")


def count_all(
    result: dict[str, Any],
    workloads: dict[str, Shapes],
    device: torch.device,
    providers: list[Provider],
    deadline: float,
) -> None:
    """Fill in the launches of every row that has a time, until `deadline`; the rest stays unknown."""
    if device.type != "cuda":
        return
    for workload in result["workloads"]:
        shapes = workloads[workload["name"]]
        for provider in providers:
            row = workload["providers"][provider.label]
            compiles = provider.most_tensors is not None and len(shapes) > 1
            if "median_ms" not in row or compiles or time.perf_counter() > deadline:
                continue
            row["launches"] = launches_of(provider, shapes, device)
            release(device)


def failures(result: dict[str, Any]) -> dict[str, str]:
    """Return our own providers that were wrong or broke, with the reason; not those without room or time."""
    return {
        name: row["absent"]
        for workload in result["workloads"]
        for name, row in workload["providers"].items()
        if name.startswith("adax_triton") and "absent" in row and row.get("failed", False)
    }
