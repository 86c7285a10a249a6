"""Time of one optimizer step, ours beside the others', in one run.

A provider whose result is not its rule's, by the reference in float64, gets no time (`gate.py`). The others of a mode
step the same parameters and gradients in turn, each with states of its own, round after round, so that a drift of the
machine meets them alike; medians are compared. All of it happens twice, on tensors of other values and other places, in
opposite order, and once for what compiles long. The caches are overwritten before each step. Where not all states fit
in memory together, providers run in several heats, each with ours and a copy beside them.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from adax_triton.bench.harness import correctness as gate
from adax_triton.bench.harness.providers import OURS, RULES, Provider, Step
from adax_triton.bench.harness.timing import (
    Clock,
    Peak,
    count_launches,
    free_bytes,
    p20_and_p80,
    release,
    time_until_done,
)
from adax_triton.bench.harness.workloads import Shapes
from torch import Tensor

COPY = "copy"
COPY_BYTES_PER_ELEMENT = 8
# A copy of more float32 elements is no faster, and would take the place of a provider's states.
MOST_COPIED = 2**30
LEAST_ROUNDS = 2  # of each set of tensors, whatever the time
USABLE = 0.85  # of the free memory

Advance = Callable[[str], None]


@dataclasses.dataclass(eq=False)
class Entry:
    """One who steps in turn with others, and what was found.

    Attributes:
        provider: who; None for the copy.
        times: seconds of each timed step.
        host_times: seconds of each launch, on a GPU.
        first_step_s: seconds of the first step on these tensors.
        peak_bytes: allocated beyond parameters and gradients, from construction to the second step, on a GPU.
        absent: why there are no times.
    """

    provider: Provider | None
    times: list[float] = dataclasses.field(default_factory=list)
    host_times: list[float] = dataclasses.field(default_factory=list)
    first_step_s: float | None = None
    peak_bytes: int | None = None
    absent: str | None = None

    def start(self, params: list[Tensor], device: torch.device) -> Step:
        """Return the step, after the first two, of which the first is held against the reference."""
        if self.provider is None:
            return copying(sum(param.numel() for param in params), device)
        ends = gate.Ends(params)
        with Peak(device) as peak:
            step = self.provider.build(params, RULES[self.provider.second_moment])
            first_step_s = time_until_done(step, device)
            ends.check(self.provider)
            time_until_done(step, device)
        if self.first_step_s is None:
            self.first_step_s, self.peak_bytes = first_step_s, peak.bytes
        return step


def make_params(shapes: Shapes, device: torch.device, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return parameters with gradients, random, each tensor its own allocation."""
    generator = torch.Generator(device=device).manual_seed(seed)
    params = []
    for shape in shapes:
        param = torch.randn(shape, device=device, dtype=dtype, generator=generator).requires_grad_()
        param.grad = torch.randn(shape, device=device, dtype=dtype, generator=generator)
        params.append(param)
    return params


def copying(numel: int, device: torch.device) -> Step:
    """Return a copy of so many float32 elements, `MOST_COPIED` at most."""
    source = torch.randn(min(numel, MOST_COPIED), device=device)
    target = source.clone()
    return lambda: target.copy_(source)


def measure(
    providers: list[Provider],
    shapes: Shapes,
    clock: Clock,
    device: torch.device,
    rounds: int,
    seconds: float,
    advance: Advance = lambda now: None,
) -> dict[str, dict[str, Any]]:
    """Time providers of one mode, all of which have passed the gate, on tensors of `shapes`.

    Args:
        providers: whose turn it is; ours first.
        shapes: of the parameters.
        clock: of the device.
        device: where.
        rounds: timed steps of each provider at most, half of them on each set of tensors.
        seconds: after which no round is begun, beyond `LEAST_ROUNDS` of each set.
        advance: called with what is done, before it.

    Returns:
        A row per provider, by label, and of the copy: what `summarize` returns, or why there is none.
    """
    rows: dict[str, dict[str, Any]] = {}
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    chosen = heats(providers, numel, device)
    if not chosen:
        (mode,) = {provider.mode for provider in providers}
        needed, free = (2 * mode.param_dtype.itemsize + mode.state_bytes) * numel, free_bytes(device)
        why = f"{needed / 1e9:.0f} GB beside a copy do not fit in {USABLE:.0%} of {free / 1e9:.0f} GB"
        return {provider.label: {"mode": provider.mode.name, "absent": why} for provider in providers}
    for heat in chosen:
        entries = [Entry(None), *map(Entry, heat)]
        run_heat(entries, shapes, clock, device, rounds, seconds / len(chosen), advance)
        found = {name_of(entry): summarize(entry, entries, numel) for entry in entries}
        ours = next((row.get("median_ms") for name, row in found.items() if name.startswith(OURS)), None)
        for name, row in found.items():
            if ours is not None and "median_ms" in row and row.get("elements", numel) == numel:
                row["ours_over_this"] = ours / row["median_ms"]
            rows.setdefault(name, row)
    return rows


def name_of(entry: Entry) -> str:
    """Return the key of an entry's row."""
    return COPY if entry.provider is None else entry.provider.label


def heats(providers: list[Provider], numel: int, device: torch.device) -> list[list[Provider]]:
    """Return providers in groups whose states fit in memory together, ours in each; none where not even one fits."""
    mode = providers[0].mode
    shared = 2 * mode.param_dtype.itemsize * numel + COPY_BYTES_PER_ELEMENT * min(numel, MOST_COPIED)
    room = int((USABLE * free_bytes(device) - shared) / (mode.state_bytes * numel)) if numel else len(providers)
    if room >= len(providers):
        return [providers]
    if room < 2 or not providers[0].name.startswith(OURS):
        return [[provider] for provider in providers] if room >= 1 else []
    ours, *others = providers
    return [[ours, *others[at : at + room - 1]] for at in range(0, len(others), room - 1)]


def run_heat(
    entries: list[Entry],
    shapes: Shapes,
    clock: Clock,
    device: torch.device,
    rounds: int,
    seconds: float,
    advance: Advance,
) -> None:
    """Time entries in turn, on two sets of tensors made in opposite order, and leave the times in them."""
    (dtype,) = {entry.provider.mode.param_dtype for entry in entries if entry.provider is not None}
    begun = time.perf_counter()
    halves = ((2, entries, -(-rounds // 2), seconds / 2), (3, entries[::-1], rounds // 2, seconds))
    for seed, order, most, until in halves:
        if not most:
            continue
        params = make_params(shapes, device, seed, dtype)
        # What compiles for long does so once.
        again = [entry for entry in order if not (entry.times and entry.provider and entry.provider.most_tensors)]
        steps = _start_all(again, params, device, advance)
        for done in range(most):
            if done >= LEAST_ROUNDS and time.perf_counter() - begun > until:
                break
            advance(f"round {len(entries[0].times) + 1}/{rounds}")
            for entry, step in steps.items():
                host_s = clock.host_time(step)
                if host_s is not None:
                    entry.host_times.append(host_s)
                entry.times.append(clock.time(step, host_s))
        steps.clear()
        params.clear()
        release(device)


def _start_all(order: list[Entry], params: list[Tensor], device: torch.device, advance: Advance) -> dict[Entry, Step]:
    steps = {}
    for entry in order:
        if entry.absent is not None:
            continue
        advance(f"first step of {name_of(entry)}")
        try:
            steps[entry] = entry.start(params, device)
        except Exception as error:  # whatever stops a provider is what its row says
            entry.absent = reason(error)
        if entry.absent is not None:
            release(device)
    return steps


def reason(error: Exception) -> str:
    """Return an error's kind and the first line of its text."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def summarize(entry: Entry, entries: list[Entry], numel: int) -> dict[str, Any]:
    """Return the row of one entry of a heat, JSON-friendly.

    Times are in ms, launches by the host in us, bandwidths by formula; the share is that of this heat's copy.
    """
    row: dict[str, Any] = {} if entry.provider is None else {"mode": entry.provider.mode.name}
    if entry.absent is not None:
        return row | {"absent": entry.absent, "failed": True}
    elements = min(numel, MOST_COPIED) if entry.provider is None else numel
    per_element = COPY_BYTES_PER_ELEMENT if entry.provider is None else entry.provider.bytes_per_element
    median = statistics.median(entry.times)
    p20, p80 = p20_and_p80(entry.times)
    bandwidth = per_element * elements / median
    (copy,) = (other for other in entries if other.provider is None)
    copied = COPY_BYTES_PER_ELEMENT * min(numel, MOST_COPIED)
    return row | {
        "bytes_per_element": per_element,
        "rounds": len(entry.times),
        "median_ms": median * 1e3,
        "p20_ms": p20 * 1e3,
        "p80_ms": p80 * 1e3,
        "gb_per_s": bandwidth / 1e9,
        "copy_share": bandwidth / (copied / statistics.median(copy.times)) if copy.times else None,
        "host_us": statistics.median(entry.host_times) * 1e6 if entry.host_times else None,
        "peak_bytes": entry.peak_bytes,
        "launches": None,
        "first_step_s": entry.first_step_s,
        **({"elements": elements} if entry.provider is None else {}),
    }


def launches_of(provider: Provider, shapes: Shapes, device: torch.device) -> int | None:
    """Return the kernels that a step of `shapes` launches; None on a CPU, and where the profiler sees none.

    A profiler that has run once slows launches down, so this comes after all that is timed.
    """
    if device.type != "cuda":
        return None
    params = make_params(shapes, device, seed=2, dtype=provider.mode.param_dtype)
    step = provider.build(params, RULES[provider.second_moment])
    time_until_done(step, device)
    time_until_done(step, device)
    return count_launches(step)
