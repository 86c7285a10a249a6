"""Time a step on the host, from `step()` to its last launch.

On a GPU the launches are real, the device is idle before each call, and torch's AdamW and the replay of a CUDA graph
are timed too. On a CPU launches do nothing, so Triton's launch time is not included. "same": the gradients keep their
addresses. "fresh": each step has new gradient tensors, as after `zero_grad(set_to_none=True)`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from adax_triton.bench.harness.command import add_device, add_json, count, markdown_table, publish
from adax_triton.bench.harness.environment import describe
from adax_triton.bench.harness.progress import progress
from adax_triton.bench.harness.timing import quantiles, wait
from torch import Tensor

from adax_triton import AdaXW

COUNTS = (1, 150, 1000, 5000)
GOAL_US, GOAL_US_PER_TENSOR = 60.0, 0.05
_NUMEL = 64  # float32 elements of each tensor
_WARM_UP = 3
# Functions of kernels/ that launch.
_LAUNCHES = ("adax_step.adax_step", "prepare_step.prepare_step", "grad_norm.grad_norm_partials", "telemetry.sum_rows")

Step = Callable[[], object]
Build = Callable[[list[Tensor]], Step]
REPLAY = "adax_triton.AdaXW, replay of a CUDA graph"  # always at the same gradient addresses


def builders(device: torch.device) -> dict[str, Build]:
    """Return {name: function that makes the step of some parameters}."""
    ours: dict[str, Build] = {
        "adax_triton.AdaXW plain": lambda params: AdaXW(params, lr=1e-3).step,
        "adax_triton.AdaXW max_grad_norm": lambda params: AdaXW(params, lr=1e-3, max_grad_norm=1.0).step,
        "adax_triton.AdaXW capturable": lambda params: AdaXW(params, lr=1e-3, capturable=True).step,
    }
    if device.type != "cuda":
        return ours
    return ours | {
        REPLAY: replay,
        "torch AdamW fused": lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True).step,
        "torch AdamW foreach": lambda params: torch.optim.AdamW(params, lr=1e-3, foreach=True).step,
    }


def replay(params: list[Tensor]) -> Step:
    """Capture a step in a CUDA graph and return its replay.

    The parameters have gradients.
    """
    optimizer = AdaXW(params, lr=1e-3, capturable=True)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph.replay


@contextlib.contextmanager
def launching(device: torch.device) -> Iterator[None]:
    """Use the Triton path in the block; CPU launches do nothing."""
    if device.type == "cuda":
        yield
        return
    os.environ["TRITON_INTERPRET"] = "1"
    from adax_triton.kernels.launch import is_interpreted

    if not is_interpreted():
        raise RuntimeError("Triton was imported without its interpreter; set TRITON_INTERPRET=1 or use a new process")
    with contextlib.ExitStack() as stack:
        for name in _LAUNCHES:
            stack.enter_context(mock.patch(f"adax_triton.kernels.{name}", lambda *_: None))
        yield


def measure(build: Build, tensors: int, fresh: bool, device: torch.device, rounds: int) -> dict[str, float]:
    """Return host time and the time until the device is done.

    Host time is given as median, p20 and p80, the other time as median, all in us.
    """
    params = [torch.zeros(_NUMEL, device=device, requires_grad=True) for _ in range(tensors)]
    gradients = [[torch.ones(_NUMEL, device=device) for _ in range(tensors)] for _ in range(2)]
    _set_gradients(params, gradients[0])
    step = build(params)
    times, done = [], []
    for index in range(_WARM_UP + rounds):
        _set_gradients(params, gradients[(index + 1) % 2 if fresh else 0])
        wait(device)
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
        wait(device)
        done.append(time.perf_counter() - start)
    until_done = 1e6 * statistics.median(done[_WARM_UP:])
    return quantiles(times[_WARM_UP:], "us", 1e6) | {"done_us": until_done}


def _set_gradients(params: list[Tensor], gradients: list[Tensor]) -> None:
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient


def run(counts: Sequence[int], device: torch.device, rounds: int) -> dict[str, Any]:
    """Return the host times of every optimizer, JSON-friendly."""
    rows = []
    chosen = [
        (name, build, fresh, tensors)
        for (name, build), fresh, tensors in itertools.product(builders(device).items(), (False, True), counts)
        if not (fresh and name == REPLAY)
    ]
    with launching(device), progress(len(chosen), "bench host") as advance:
        for name, build, fresh, tensors in chosen:
            found = measure(build, tensors, fresh, device, max(5, min(rounds, rounds * 150 // tensors)))
            rows.append({"name": name, "tensors": tensors, "fresh": fresh, **found})
            advance(1, f"{name}: {tensors:,} tensors")
    launches = "real" if device.type == "cuda" else "replaced by nothing"
    return {"benchmark": "host", "environment": describe(device), "launches": launches, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """Return host times, and on a GPU times until it is done."""
    real = result["launches"] == "real"
    counts = sorted({row["tensors"] for row in result["rows"]})
    found = {(row["name"], row["fresh"], row["tensors"]): row for row in result["rows"]}
    rows = []
    for name, fresh in dict.fromkeys((row["name"], row["fresh"]) for row in result["rows"]):
        times = [found[name, fresh, tensors] for tensors in counts]
        cells = [f"{row['median_us']:,.0f}" + (f" ({row['done_us']:,.0f})" if real else "") for row in times]
        rows.append([name, "fresh" if fresh else "same", *cells])
    goals = [f"{GOAL_US + GOAL_US_PER_TENSOR * tensors:,.0f}" for tensors in counts]
    rows.append(["goal", "", *goals])
    text = "microseconds from the call to the last launch, median"
    text += (" (in brackets: until the device is done)" if real else "") + f"; launches {result['launches']}"
    titles = ["step", "gradients", *(f"{tensors:,} tensors" for tensors in counts)]
    return "\n".join([text, "", *markdown_table(titles, rows)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `adax-triton bench host`."""
    add_device(parser)
    parser.add_argument("--tensors", type=count, nargs="+", default=COUNTS, metavar="N", help="numbers of tensors")
    parser.add_argument("--rounds", type=count, default=300, help="timed steps; fewer for more than 150 tensors")
    add_json(parser)


def main(arguments: argparse.Namespace) -> int:
    """Measure and print; return 0."""
    publish(run(arguments.tensors, arguments.device, arguments.rounds), table, arguments.json)
    return 0
