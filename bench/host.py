"""Host time of a step: from the call of `step()` to its last launch, in steady state.

On a GPU the launches are real, the device is idle before each call, and torch's fused and foreach AdamW and the replay
of a CUDA graph are timed too. On a CPU the kernels' launch functions are replaced by functions that do nothing, so what
Triton itself takes to launch is not in the figure. "Same" steps find each gradient where it was, "fresh" ones find
other tensors elsewhere, as after `zero_grad(set_to_none=True)`.
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
from adax_triton.bench.harness.environment import describe
from adax_triton.bench.harness.origin import origin
from adax_triton.bench.harness.progress import progress
from adax_triton.bench.harness.timing import p20_and_p80
from torch import Tensor

from adax_triton import AdaXW

COUNTS = (1, 150, 1000, 5000)
GOAL_US, GOAL_US_PER_TENSOR = 60.0, 0.05
_LAUNCHES = {
    "adax_step": "adax_step",
    "coefficients": "prepare_step",
    "grad_norm": "grad_norm_partials",
    "telemetry": "sum_rows",
}
_NUMEL = 64
_MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "max_grad_norm": {"max_grad_norm": 1.0},
    "capturable": {"capturable": True},
}

Step = Callable[[], object]
Builders = dict[str, Callable[[list[Tensor]], Step]]
REPLAY = "adax_triton.AdaXW, replay of a CUDA graph"  # its gradients cannot lie elsewhere


def builders(device: torch.device) -> Builders:
    """Return what is timed, each made of a list of parameters: our modes, and on a GPU a replay and torch's AdamW."""
    ours: Builders = {
        f"adax_triton.AdaXW {mode}": lambda params, options=options: AdaXW(params, lr=1e-3, **options).step  # type: ignore[misc]
        for mode, options in _MODES.items()
    }
    if device.type != "cuda":
        return ours
    return ours | {
        REPLAY: replay,
        "torch AdamW fused": lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True).step,
        "torch AdamW foreach": lambda params: torch.optim.AdamW(params, lr=1e-3, foreach=True).step,
    }


def replay(params: list[Tensor]) -> Step:
    """Return the replay of a step that was captured in a CUDA graph; the parameters have gradients."""
    optimizer = AdaXW(params, lr=1e-3, capturable=True)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph.replay


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
    build: Callable[[list[Tensor]], Step], tensors: int, fresh: bool, device: torch.device, rounds: int
) -> dict[str, float]:
    """Return median, p20 and p80 of the host time of a step, and the median until the device is done; microseconds.

    Args:
        build: makes the step of a list of parameters.
        tensors: number of parameters, of 64 float32 elements each.
        fresh: whether each step finds other gradients than the last one.
        device: of the parameters.
        rounds: timed steps.
    """
    params = [torch.zeros(_NUMEL, device=device, requires_grad=True) for _ in range(tensors)]
    gradients = [[torch.ones(_NUMEL, device=device) for _ in range(tensors)] for _ in range(2)]
    _give(params, gradients[0])
    step = build(params)
    times, done = [], []
    for index in range(-3, rounds):
        _give(params, gradients[index % 2 if fresh else 0])
        _wait(device)
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1e6)
        _wait(device)
        done.append((time.perf_counter() - start) * 1e6)
    p20, p80 = p20_and_p80(times[3:])
    median, until_done = statistics.median(times[3:]), statistics.median(done[3:])
    return {"median_us": median, "p20_us": p20, "p80_us": p80, "done_us": until_done}


def _give(params: list[Tensor], gradients: list[Tensor]) -> None:
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run(counts: list[int], device: torch.device, rounds: int) -> dict[str, Any]:
    """Return the host times of every optimizer, JSON-friendly."""
    rows = []
    chosen = [
        ((name, build), fresh, tensors)
        for (name, build), fresh, tensors in itertools.product(builders(device).items(), (False, True), counts)
        if not (fresh and name == REPLAY)
    ]
    with launching(device), progress(len(chosen), "bench host") as advance:
        for (name, build), fresh, tensors in chosen:
            advance(0, f"{name}: {tensors:,} tensors")
            found = measure(build, tensors, fresh, device, max(5, min(rounds, rounds * 150 // tensors)))
            rows.append({"name": name, "tensors": tensors, "fresh": fresh, **found})
            advance(1, name)
    launches = "real" if device.type == "cuda" else "replaced by nothing"
    return {"benchmark": "host", "environment": describe(device), "launches": launches, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown: host times, and on a GPU the times until the device is done."""
    counts = sorted({row["tensors"] for row in result["rows"]})
    lines = [
        "microseconds from the call to the last launch, median"
        + (" (in brackets: until the device is done)" if result["launches"] == "real" else "")
        + f"; launches {result['launches']}",
        "",
        f"| step | gradients | {' | '.join(f'{count:,} tensors' for count in counts)} |",
        f"|---|---|{'---|' * len(counts)}",
    ]
    found = {(row["name"], row["fresh"], row["tensors"]): row for row in result["rows"]}
    for name, fresh in dict.fromkeys((row["name"], row["fresh"]) for row in result["rows"]):
        times = (found[name, fresh, count] for count in counts)
        # Where launches are replaced there is no device to wait for.
        cells = (
            f"{row['median_us']:,.0f}" + (f" ({row['done_us']:,.0f})" if result["launches"] == "real" else "")
            for row in times
        )
        lines.append(f"| {name} | {'fresh' if fresh else 'same'} | {' | '.join(cells)} |")
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
