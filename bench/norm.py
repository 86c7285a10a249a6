"""Time the norm of all gradients next to torch's, as for clipping.

AdaXW reads the gradients once and writes at most 1,024 partial sums per launch. The kernel that prepares the step adds
them, so their addition is not timed; torch's time includes it. GB/s are the bytes of the gradients per time. The caches
are overwritten before each call, and all methods of a workload are timed in turn, with a copy.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from adax_triton.bench.harness.command import add_device, add_json, count, markdown_table, publish, seconds
from adax_triton.bench.harness.environment import describe
from adax_triton.bench.harness.progress import progress
from adax_triton.bench.harness.timing import Clock, quantiles, release, shares_of_time
from adax_triton.bench.harness.workloads import LISTS, Shapes, elements, flat
from adax_triton.bench.step.measure import COPY, copying_bytes, make_params
from torch import Tensor

from adax_triton import AdaXW
from adax_triton.step.grad_norm import gradient_squares

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SIZES = {"cuda": [10**8, 10**9], "cpu": [10**7]}  # elements, by device
LEAST_ROUNDS = 3
TOLERANCE = 1e-5  # relative error of our norm; each partial sum is float32


def ours(params: list[Tensor]) -> Callable[[], Tensor]:
    """Return a function that measures the partial sums of squares as a step does."""
    optimizer = AdaXW(params, max_grad_norm=math.inf)
    optimizer.step()
    (plan,) = optimizer._plans.values()
    launches = [launch for launch, _ in plan._launches]
    found: Tensor | None = None

    def measure() -> Tensor:
        nonlocal found
        found = gradient_squares(launches, out=found)
        assert found is not None
        return found

    return measure


def norm_in_float64(gradients: list[Tensor]) -> float:
    """Return the norm of all gradients, computed in float64."""
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    return torch.stack(norms).norm().item()


def measure(
    shapes: Shapes, dtype: torch.dtype, clock: Clock, device: torch.device, rounds: int, until: float = math.inf
) -> dict[str, Any]:
    """Check our norm, time all, and return a row for each.

    After a few rounds, none begins when `time.perf_counter()` exceeds `until`. Raises ValueError if our norm is wrong.
    """
    params = make_params(shapes, device, seed=2, dtype=dtype)
    gradients = [param.grad for param in params if param.grad is not None]
    calls = {"adax_triton": ours(params), "torch get_total_norm": lambda: torch.nn.utils.get_total_norm(gradients)}
    norm, expected = calls["adax_triton"]().sum().sqrt().item(), norm_in_float64(gradients)
    if not abs(norm - expected) <= TOLERANCE * expected:
        raise ValueError(f"the norm is {norm}, expected {expected}")
    moved: dict[str, int] = dict.fromkeys(calls, elements(shapes) * dtype.itemsize)
    calls[COPY], moved[COPY] = copying_bytes(moved["adax_triton"], device)
    times = clock.time_in_turn(calls, rounds, LEAST_ROUNDS, until)
    rows = {}
    for name, (taken, _) in times.items():
        rows[name] = quantiles(taken)
        rows[name]["gb_per_s"] = moved[name] / rows[name]["median_ms"] / 1e6
    return rows


def run(
    workloads: dict[str, Shapes],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    rounds: int,
    budget: float = math.inf,
) -> dict[str, Any]:
    """Return the rows of all workloads within `budget` seconds, JSON-friendly."""
    deadline = time.perf_counter() + budget
    clock, found = Clock(device), []
    sections = list(itertools.product(workloads.items(), dtypes))
    with progress(len(sections), "bench norm") as advance:
        for ((name, shapes), dtype), until in shares_of_time(sections, deadline):
            rows = measure(shapes, dtype, clock, device, rounds, until)
            found.append({"name": name, "dtype": str(dtype).removeprefix("torch."), "rows": rows})
            release(device)
            advance(1, name)
    return {"benchmark": "norm", "environment": describe(device), "workloads": found}


def table(result: dict[str, Any]) -> str:
    """Return the times as Markdown."""
    rows = []
    for workload in result["workloads"]:
        copy = workload["rows"][COPY]["gb_per_s"]
        for name, row in workload["rows"].items():
            times = [f"{row[key]:.3f}" for key in ("median_ms", "p20_ms", "p80_ms")]
            speed = [f"{row['gb_per_s']:,.0f}", f"{row['gb_per_s'] / copy:.0%}"]
            rows.append([workload["name"], workload["dtype"], name, *times, *speed])
    return "\n".join(markdown_table(["gradients", "dtype", "norm", "median ms", "p20", "p80", "GB/s", "of copy"], rows))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `adax-triton bench norm`."""
    add_device(parser)
    sizes = "elements; default: 1e8 and 1e9, on a CPU 1e7"
    parser.add_argument("--sizes", type=count, nargs="*", metavar="N", help=sizes)
    parser.add_argument("--models", nargs="*", choices=LISTS, default=["gpt2", "many-small"], help=f"of {list(LISTS)}")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="of the gradients")
    parser.add_argument("--rounds", type=count, default=20, help="timed calls at most; default: %(default)s")
    parser.add_argument("--budget", type=seconds, default=60.0, help="seconds in total; default: %(default)s")
    add_json(parser)


def main(arguments: argparse.Namespace) -> int:
    """Measure and print; return 0."""
    sizes = SIZES[arguments.device.type] if arguments.sizes is None else arguments.sizes
    workloads = {f"flat {numel:,}": flat(numel) for numel in sizes}
    workloads |= {LISTS[name][0]: LISTS[name][1]() for name in arguments.models}
    dtypes = [DTYPES[name] for name in arguments.dtypes]
    result = run(workloads, dtypes, arguments.device, arguments.rounds, arguments.budget)
    publish(result, table, arguments.json)
    return 0
