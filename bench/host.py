"""Time a step on the host, from `step()` to its last launch.

On a GPU the launches are real, the device is idle before each call, and torch's AdamW, a GradScaler and the replay of a
CUDA graph are timed too. On a CPU launches do nothing, so Triton's launch time is not included. All steps are timed in
turn, round after round. "same": the gradients keep their addresses. "fresh": each step has new gradient tensors, as
after `zero_grad(set_to_none=True)`. DTensors are sharded over one rank.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from adax_triton.bench.harness.command import add_device, add_json, count, markdown_table, publish, seconds
from adax_triton.bench.harness.environment import describe
from adax_triton.bench.harness.progress import progress
from adax_triton.bench.harness.timing import quantiles, release, rounds_until, shares_of_time, wait
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from adax_triton import AdaXW

COUNTS = (1, 150, 1000)
_NUMEL = 64  # float32 elements of each tensor
_WARM_UP, _LEAST_ROUNDS = 3, 5
# Functions of kernels/ that launch.
_LAUNCHES = ("adax_step.adax_step", "prepare_step.prepare_step", "grad_norm.grad_norm_partials", "telemetry.sum_rows")

Step = Callable[[], object]
REPLAY = "adax_triton.AdaXW, replay of a CUDA graph"  # always at the same gradient addresses


class Method(NamedTuple):
    """A way to step parameters."""

    build: Callable[[list[Tensor]], Step]  # takes parameters with gradients
    sharded: bool = False  # parameters and gradients are DTensors


def methods(device: torch.device) -> dict[str, Method]:
    """Return the timed steps by name."""
    found = {
        "adax_triton.AdaXW plain": Method(lambda params: AdaXW(params, lr=1e-3).step),
        "adax_triton.AdaXW max_grad_norm": Method(lambda params: AdaXW(params, lr=1e-3, max_grad_norm=1.0).step),
        "adax_triton.AdaXW capturable": Method(lambda params: AdaXW(params, lr=1e-3, capturable=True).step),
        "adax_triton.AdaXW, DTensors": Method(lambda params: AdaXW(params, lr=1e-3).step, sharded=True),
    }
    if device.type != "cuda":
        return found
    return found | {
        REPLAY: Method(replay),
        "torch AdamW fused": Method(lambda params: _torch_adamw(params).step),
        "torch AdamW fused, DTensors": Method(lambda params: _torch_adamw(params).step, sharded=True),
        "torch AdamW foreach": Method(lambda params: torch.optim.AdamW(params, lr=1e-3, foreach=True).step),
        "GradScaler, adax_triton.AdaXW": Method(lambda params: _scaled(AdaXW(params, lr=1e-3))),
        "GradScaler, adax_triton.AdaXW fused": Method(lambda params: _scaled(AdaXW(params, lr=1e-3, fused=True))),
        "GradScaler, torch AdamW fused": Method(lambda params: _scaled(_torch_adamw(params))),
    }


def _torch_adamw(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3, fused=True)


def _scaled(optimizer: torch.optim.Optimizer) -> Step:
    """Return the step of a GradScaler, with scale 1."""
    scaler = torch.amp.GradScaler("cuda", init_scale=1.0, growth_interval=10**9)
    scaler.scale(torch.zeros((), device="cuda"))  # creates the scale

    def step() -> None:
        scaler.step(optimizer)
        scaler.update()

    return step


def replay(params: list[Tensor]) -> Step:
    """Capture a step in a CUDA graph and return its replay.

    The parameters have gradients.
    """
    optimizer = AdaXW(params, lr=1e-3, capturable=True)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()

    def step() -> object:
        graph.replay()
        return optimizer  # owns the memory that the graph uses

    return step


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


@contextlib.contextmanager
def one_rank(device: torch.device) -> Iterator[DeviceMesh]:
    """Start torch.distributed with one rank in the block and yield its mesh."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield DeviceMesh(device.type, [0])
    finally:
        dist.destroy_process_group()


class TimedSteps:
    """The steps of one method and their times."""

    def __init__(self, method: Method, tensors: int, fresh: bool, device: torch.device, mesh: DeviceMesh) -> None:
        def make(fill: float) -> Tensor:
            tensor = torch.full((_NUMEL,), fill, device=device)
            return DTensor.from_local(tensor, mesh, [Shard(0)]) if method.sharded else tensor

        self._device = device
        self._params = [make(0.0).requires_grad_() for _ in range(tensors)]
        sets = [[make(1.0) for _ in range(tensors)] for _ in range(2 if fresh else 1)]
        self._gradients = itertools.cycle(sets)
        self._set_gradients()
        self._step = method.build(self._params)
        self.times: list[float] = []
        self.done: list[float] = []

    def run(self) -> None:
        """Time one step."""
        self._set_gradients()
        wait(self._device)
        start = time.perf_counter()
        self._step()
        self.times.append(time.perf_counter() - start)
        wait(self._device)
        self.done.append(time.perf_counter() - start)

    def _set_gradients(self) -> None:
        for param, gradient in zip(self._params, next(self._gradients), strict=True):
            param.grad = gradient


def measure(
    chosen: dict[str, Method],
    tensors: int,
    fresh: bool,
    device: torch.device,
    mesh: DeviceMesh,
    rounds: int,
    until: float = math.inf,
) -> list[dict[str, Any]]:
    """Time methods in turn and return a row for each.

    After a few rounds, none begins when `time.perf_counter()` exceeds `until`. A row has the host time as median, p20
    and p80, and the median time until the device is done, all in us.
    """
    timed = {name: TimedSteps(method, tensors, fresh, device, mesh) for name, method in chosen.items()}
    for _ in rounds_until(_WARM_UP + rounds, _WARM_UP + _LEAST_ROUNDS, until):
        for steps in timed.values():
            steps.run()
    return [
        {"name": name, "tensors": tensors, "fresh": fresh, "rounds": len(steps.times) - _WARM_UP}
        | quantiles(steps.times[_WARM_UP:], "us", 1e6)
        | {"done_us": 1e6 * statistics.median(steps.done[_WARM_UP:])}
        for name, steps in timed.items()
    ]


def run(counts: Sequence[int], device: torch.device, rounds: int, budget: float = math.inf) -> dict[str, Any]:
    """Return the host times of every method within `budget` seconds, JSON-friendly."""
    rows: list[dict[str, Any]] = []
    found, sections = methods(device), list(itertools.product(counts, (False, True)))
    deadline = time.perf_counter() + budget
    with launching(device), one_rank(device) as mesh, progress(len(sections), "bench host") as advance:
        for (tensors, fresh), until in shares_of_time(sections, deadline):
            chosen = {name: method for name, method in found.items() if not (fresh and name == REPLAY)}
            rows += measure(chosen, tensors, fresh, device, mesh, rounds, until)
            release(device)
            advance(1, f"{tensors:,} tensors")
    launches = "real" if device.type == "cuda" else "replaced by nothing"
    return {"benchmark": "host", "environment": describe(device), "launches": launches, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """Return host times, and on a GPU times until it is done."""
    real = result["launches"] == "real"
    counts = sorted({row["tensors"] for row in result["rows"]})
    found = {(row["name"], row["fresh"], row["tensors"]): row for row in result["rows"]}
    rows = []
    for name, fresh in sorted({(row["name"], row["fresh"]) for row in result["rows"]}):
        times = [found[name, fresh, tensors] for tensors in counts]
        cells = [f"{row['median_us']:,.0f}" + (f" ({row['done_us']:,.0f})" if real else "") for row in times]
        rows.append([name, "fresh" if fresh else "same", *cells])
    text = "microseconds from the call to the last launch, median"
    text += (" (in brackets: until the device is done)" if real else "") + f"; launches {result['launches']}"
    titles = ["step", "gradients", *(f"{tensors:,} tensors" for tensors in counts)]
    return "\n".join([text, "", *markdown_table(titles, rows)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `adax-triton bench host`."""
    add_device(parser)
    parser.add_argument("--tensors", type=count, nargs="+", default=COUNTS, metavar="N", help="numbers of tensors")
    parser.add_argument("--rounds", type=count, default=200, help="timed steps at most; default: %(default)s")
    parser.add_argument("--budget", type=seconds, default=60.0, help="seconds in total; default: %(default)s")
    add_json(parser)


def main(arguments: argparse.Namespace) -> int:
    """Measure and print; return 0."""
    publish(run(arguments.tensors, arguments.device, arguments.rounds, arguments.budget), table, arguments.json)
    return 0
