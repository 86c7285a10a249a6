"""Time one step of AdaXW and of other optimizers in one run.

Optimizers with wrong results are not timed (`correctness.py`). The correct optimizers of a mode step the same
parameters and gradients in turn, round after round, each with its own states, so that machine drift affects all of
them equally. Each measurement runs twice, on different tensors and in opposite order. Optimizers that compile for
minutes run once. If the states do not fit in memory together, optimizers run in batches, each with AdaXW and a copy.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from typing import Any

import torch
from adax_triton.bench.harness.correctness import reference_at_ends
from adax_triton.bench.harness.providers import OURS, RULES, Provider, Step
from adax_triton.bench.harness.timing import (
    Clock,
    count_launches,
    free_bytes,
    quantiles,
    release,
    time_until_done,
)
from adax_triton.bench.harness.workloads import Shapes, elements
from torch import Tensor

COPY = "copy"
COPY_BYTES_PER_ELEMENT = 8
MAX_COPY_NUMEL = 2**30  # float32 elements; a larger copy is not faster and uses memory
MIN_ROUNDS = 2  # on each set of tensors, whatever the time
USABLE = 0.85  # fraction of the free memory


@dataclasses.dataclass(eq=False)
class Entry:
    """A provider, or None for the copy, and its measurements."""

    provider: Provider | None
    times: list[float] = dataclasses.field(default_factory=list)  # seconds of each step
    host_times: list[float] = dataclasses.field(default_factory=list)  # seconds of each launch, on a GPU
    first_step_s: float | None = None
    peak_bytes: int | None = None  # allocated on a GPU until the second step, without parameters and gradients
    absent: str | None = None  # why there are no times

    @property
    def label(self) -> str:
        """Key of the row."""
        return COPY if self.provider is None else self.provider.label

    def start(self, params: list[Tensor], device: torch.device) -> Step:
        """Run two warm-up steps, check the first, and return the step function."""
        if self.provider is None:
            return copying(sum(param.numel() for param in params), device)
        reference, before = reference_at_ends(self.provider, params), 0
        if device.type == "cuda":
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        step = self.provider.build(params, RULES[self.provider.second_moment])
        first_step_s = time_until_done(step, device)
        reference.check()
        time_until_done(step, device)
        if self.first_step_s is None:
            self.first_step_s = first_step_s
            self.peak_bytes = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
        return step


def make_params(shapes: Shapes, device: torch.device, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return random parameters with gradients, each tensor in its own allocation."""
    generator = torch.Generator(device=device).manual_seed(seed)
    params = []
    for shape in shapes:
        param = torch.randn(shape, device=device, dtype=dtype, generator=generator).requires_grad_()
        param.grad = torch.randn(shape, device=device, dtype=dtype, generator=generator)
        params.append(param)
    return params


def copying(numel: int, device: torch.device) -> Step:
    """Return a function that copies `numel` float32 elements, at most `MAX_COPY_NUMEL`."""
    source = torch.randn(min(numel, MAX_COPY_NUMEL), device=device)
    target = source.clone()
    return lambda: target.copy_(source)


def copying_bytes(moved: float, device: torch.device) -> tuple[Step, int]:
    """Return a function that copies elements, and the bytes that it reads and writes.

    They are `moved`, rounded up to whole elements, or those of `MAX_COPY_NUMEL` elements if that is less.
    """
    numel = min(math.ceil(moved / COPY_BYTES_PER_ELEMENT), MAX_COPY_NUMEL)
    return copying(numel, device), numel * COPY_BYTES_PER_ELEMENT


def measure(
    providers: list[Provider], shapes: Shapes, clock: Clock, device: torch.device, rounds: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """Time checked providers of one mode; return {label: row}.

    AdaXW is the first provider, and a copy has a row. `rounds` are timed steps of each provider at most, half of them
    on each set of tensors. No round begins after `seconds`, except the first `MIN_ROUNDS` of each set.
    """
    rows: dict[str, dict[str, Any]] = {}
    numel = elements(shapes)
    batches = memory_batches(providers, numel, device)
    if not batches:
        mode = providers[0].mode
        needed, free = (2 * mode.param_dtype.itemsize + mode.state_bytes) * numel, free_bytes(device)
        why = f"needs {needed / 1e9:.0f} GB and a copy; {USABLE:.0%} of {free / 1e9:.0f} GB are usable"
        return {provider.label: {"mode": provider.mode.name, "absent": why} for provider in providers}
    for batch in batches:
        entries = [Entry(None), *map(Entry, batch)]
        run_batch(entries, shapes, clock, device, rounds, seconds / len(batches))
        found = {entry.label: summarize(entry, entries[0], numel) for entry in entries}
        ours = next((row.get("median_ms") for label, row in found.items() if label.startswith(OURS)), None)
        for label, row in found.items():
            if ours is not None and "median_ms" in row and row.get("elements", numel) == numel:
                row["ours_over_this"] = ours / row["median_ms"]
            rows.setdefault(label, row)
    return rows


def memory_batches(providers: list[Provider], numel: int, device: torch.device) -> list[list[Provider]]:
    """Split providers into batches whose states fit in memory.

    Each batch has AdaXW if two providers fit. Returns [] if none fits.
    """
    mode = providers[0].mode
    shared = 2 * mode.param_dtype.itemsize * numel + COPY_BYTES_PER_ELEMENT * min(numel, MAX_COPY_NUMEL)
    room = int((USABLE * free_bytes(device) - shared) / (mode.state_bytes * numel))
    if room >= len(providers):
        return [providers]
    if room < 2 or not providers[0].name.startswith(OURS):
        return [[provider] for provider in providers] if room >= 1 else []
    return [[providers[0], other] for other in providers[1:]]


def run_batch(
    entries: list[Entry], shapes: Shapes, clock: Clock, device: torch.device, rounds: int, seconds: float
) -> None:
    """Time entries in turn on two sets of tensors.

    The times are stored in the entries.
    """
    (dtype,) = {entry.provider.mode.param_dtype for entry in entries if entry.provider is not None}
    begun = time.perf_counter()
    halves = ((2, entries, -(-rounds // 2), seconds / 2), (3, entries[::-1], rounds // 2, seconds))
    for seed, order, most, until in halves:
        params = make_params(shapes, device, seed, dtype) if most else []
        steps = {}
        for entry in order if most else []:
            compiled = entry.times and entry.provider is not None and entry.provider.compiles_long
            if entry.absent is None and not compiled:  # slow compilations run in the first half only
                try:
                    steps[entry] = entry.start(params, device)
                except Exception as error:  # the row shows it
                    entry.absent = reason(error)
            if entry.absent is not None:
                release(device)
        for entry, (times, host_times) in clock.time_in_turn(steps, most, MIN_ROUNDS, begun + until).items():
            entry.times += times
            entry.host_times += host_times
        steps.clear()
        params.clear()
        release(device)


def reason(error: Exception) -> str:
    """Return an error's type and the first line of its text."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def summarize(entry: Entry, copy: Entry, numel: int) -> dict[str, Any]:
    """Return the row of an entry, JSON-friendly.

    `copy_share` is relative to the copy of the same batch.
    """
    row: dict[str, Any] = {} if entry.provider is None else {"mode": entry.provider.mode.name}
    if entry.absent is not None:
        return row | {"absent": entry.absent, "failed": True}
    copied = min(numel, MAX_COPY_NUMEL)
    copy_bandwidth = COPY_BYTES_PER_ELEMENT * copied / statistics.median(copy.times) if copy.times else None
    per_element = COPY_BYTES_PER_ELEMENT if entry.provider is None else entry.provider.bytes_per_element
    bandwidth = per_element * (copied if entry.provider is None else numel) / statistics.median(entry.times)
    return row | {
        "bytes_per_element": per_element,
        "rounds": len(entry.times),
        **quantiles(entry.times),
        "gb_per_s": bandwidth / 1e9,
        "copy_share": None if copy_bandwidth is None else bandwidth / copy_bandwidth,
        "host_us": statistics.median(entry.host_times) * 1e6 if entry.host_times else None,
        "peak_bytes": entry.peak_bytes,
        "launches": None,
        "first_step_s": entry.first_step_s,
        **({"elements": copied} if entry.provider is None else {}),
    }


def launches_of(provider: Provider, shapes: Shapes, device: torch.device) -> int | None:
    """Return the number of kernels that a step launches on a GPU.

    Run it last: the profiler slows later launches down.
    """
    params = make_params(shapes, device, seed=2, dtype=provider.mode.param_dtype)
    step = provider.build(params, RULES[provider.second_moment])
    for _ in range(2):
        time_until_done(step, device)
    return count_launches(step)
