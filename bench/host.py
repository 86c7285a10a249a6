"""Host time of a step: from the call of `step()` to its last launch, in steady state.

On a GPU the launches are real, the device is idle before each call, and torch's fused and foreach AdamW are timed
beside. On a CPU the kernels' launch functions are replaced by functions that do nothing, so what Triton itself takes to
launch is not in the figure. "Same" steps find each gradient where it was, "fresh" ones find other tensors elsewhere, as
after `zero_grad(set_to_none=True)`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from adax_triton import AdaXW

from .environment import describe
from .origin import origin
from .progress import progress

COUNTS = (1, 150, 1000, 5000)
GOAL_US, GOAL_US_PER_TENSOR = 60.0, 0.05
_LAUNCHES = {"adax_step": "adax_step", "schedule": "prepare_step", "grad_stats": "grad_stats", "telemetry": "add_rows"}
_NUMEL = 64
_MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "max_grad_norm": {"max_grad_norm": 1.0},
    "capturable": {"capturable": True},
}

Optimizers = dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]]


def optimizers(device: torch.device) -> Optimizers:
    """Return what is timed: our modes, and on a GPU those of torch."""
    ours: Optimizers = {
        f"adax_triton.AdaXW {mode}": lambda params, options=options: AdaXW(params, lr=1e-3, **options)  # type: ignore[misc]
        for mode, options in _MODES.items()
    }
    if device.type != "cuda":
        return ours
    return ours | {
        "torch AdamW fused": lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
        "torch AdamW foreach": lambda params: torch.optim.AdamW(params, lr=1e-3, foreach=True),
    }


@contextlib.contextmanager
def launching(device: torch.device) -> Iterator[None]:
    """Have steps of tensors on a device launch: really on a GPU, into nothing on a CPU.

    Raises:
        RuntimeError: Triton was imported before without its interpreter, so that CPU tensors take another path.
    """
    if device.type == "cuda":
        yield
        return
    os.environ["TRITON_INTERPRET"] = "1"
    from adax_triton.kernels.launch import is_interpreted

    if not is_interpreted():
        raise RuntimeError("bench host: set TRITON_INTERPRET=1, or run it in a process of its own")
    with contextlib.ExitStack() as stack:
        for module, function in _LAUNCHES.items():
            stack.enter_context(
                mock.patch.object(importlib.import_module(f"adax_triton.kernels.{module}"), function, _nothing)
            )
        yield


def _nothing(*_: object) -> None:
    pass


def measure(
    build: Callable[[list[Tensor]], torch.optim.Optimizer], tensors: int, fresh: bool, device: torch.device, rounds: int
) -> dict[str, float]:
    """Return median, p20 and p80 of the host time of a step, in microseconds.

    Args:
        build: makes the optimizer of a list of parameters.
        tensors: number of parameters, of 64 float32 elements each.
        fresh: whether each step finds other gradients than the last one.
        device: of the parameters.
        rounds: timed steps.
    """
    params = [torch.zeros(_NUMEL, device=device, requires_grad=True) for _ in range(tensors)]
    gradients = [[torch.ones(_NUMEL, device=device) for _ in range(tensors)] for _ in range(2)]
    optimizer = build(params)
    times = []
    for index in range(-3, rounds):
        for param, gradient in zip(params, gradients[index % 2 if fresh else 0], strict=True):
            param.grad = gradient
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        optimizer.step()
        times.append((time.perf_counter() - start) * 1e6)
    deciles = statistics.quantiles(times[3:], n=10, method="inclusive")
    return {"median_us": statistics.median(times[3:]), "p20_us": deciles[1], "p80_us": deciles[7]}


def run(counts: list[int], device: torch.device, rounds: int) -> dict[str, Any]:
    """Return the host times of every optimizer, JSON-friendly."""
    rows = []
    chosen = list(itertools.product(optimizers(device).items(), (False, True), counts))
    with launching(device), progress(len(chosen), "bench host") as advance:
        for (name, build), fresh, tensors in chosen:
            advance(0, f"{name}: {tensors:,} tensors")
            found = measure(build, tensors, fresh, device, max(5, min(rounds, rounds * 150 // tensors)))
            rows.append({"name": name, "tensors": tensors, "fresh": fresh, **found})
            advance(1, name)
    launches = "real" if device.type == "cuda" else "replaced by nothing"
    return {"benchmark": "host", "environment": describe(device), "launches": launches, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    counts = sorted({row["tensors"] for row in result["rows"]})
    lines = [
        f"microseconds from the call to the last launch, median; launches {result['launches']}",
        "",
        f"| step | gradients | {' | '.join(f'{count:,} tensors' for count in counts)} |",
        f"|---|---|{'---|' * len(counts)}",
    ]
    found = {(row["name"], row["fresh"], row["tensors"]): row["median_us"] for row in result["rows"]}
    for name, fresh in dict.fromkeys((row["name"], row["fresh"]) for row in result["rows"]):
        cells = " | ".join(f"{found[name, fresh, count]:,.0f}" for count in counts)
        lines.append(f"| {name} | {'fresh' if fresh else 'same'} | {cells} |")
    goals = " | ".join(f"{GOAL_US + GOAL_US_PER_TENSOR * count:,.0f}" for count in counts)
    return "\n".join([*lines, f"| goal | | {goals} |"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `adax-triton bench host`."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(default))
    parser.add_argument("--tensors", type=int, nargs="+", default=list(COUNTS), metavar="N", help="numbers of tensors")
    parser.add_argument("--rounds", type=int, default=300, help="timed steps, fewer of more than 150 tensors")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the result")


def main(arguments: argparse.Namespace) -> int:
    """Measure, print the table and keep the result; return 0."""
    result = run(arguments.tensors, arguments.device, arguments.rounds)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{origin(result)}\n\n{table(result)}")
    return 0
