"""Time steps of AdaXW, torch's fused AdamW and DeepSpeedCPUAdam on a CPU.

The measurement is that of `bench step`, with telemetry, gradient release and the first step of a new process in
addition. Missing packages are listed below the table. ratio = AdaXW time / other time; below 1 AdaXW is faster.
`bench.zero_passes` times the CPU step of ZeRO offload.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from adax_triton.bench.harness.command import add_json, count, markdown_table, publish
from adax_triton.bench.harness.environment import describe
from adax_triton.bench.harness.modes import FP32
from adax_triton.bench.harness.providers import OURS, PROVIDERS, RULES, Provider, Rule, Step, adax_triton_provider
from adax_triton.bench.harness.timing import quantiles, time_call
from adax_triton.bench.harness.workloads import Shapes, flat, gpt2, many_small_tensors
from torch import Tensor

from adax_triton import AdaXW, GradientRelease
from adax_triton.step.cpu_kernel import build_problem

from .command import run as run_steps
from .measure import make_params
from .table import FUSED

CPU = torch.device("cpu")
OUR_SIDE = "ours"
FIRST_STEP = "first step of a process, cache {}"
PROCESSES = 3  # new processes per optimizer; their first step is timed
BUDGET_S = 30.0  # time limit of a workload


class Sizes(NamedTuple):
    """Sizes of the workloads."""

    numel: int = 50_000_000  # elements of the flat tensors
    gpt2: tuple[int, int, int, int] = (12, 768, 50257, 1024)  # layers, width, vocabulary, context
    tensors: int = 1024  # n small tensors of n elements each
    linears: int = 64  # linear layers that gradient release steps
    first_numel: int = 1_000_000  # elements of the tensor that a new process steps


class Workload(NamedTuple):
    """Tensors, and the optimizers of one mode that step them, AdaXW first."""

    shapes: Callable[[Sizes], Shapes]
    providers: tuple[Provider, ...]


def _backward_step(release: bool, params: list[Tensor], rule: Rule) -> Step:
    """Return a backward pass with a step, by gradient release or afterwards."""
    own = [param.detach().requires_grad_() for param in params]  # the same weights, with gradients and hooks
    optimizer = AdaXW(own, **rule)
    if release:
        GradientRelease(optimizer)

    def step() -> None:
        pairs = [(weights, param.grad) for weights, param in zip(own, params, strict=True)]
        torch.stack([(weights * grad).sum() for weights, grad in pairs if grad is not None]).sum().backward()
        if not release:
            optimizer.step()
            optimizer.zero_grad()

    return step


def _flat(sizes: Sizes) -> Shapes:
    return flat(sizes.numel)


def _gpt2(sizes: Sizes) -> Shapes:
    return gpt2(*sizes.gpt2)


def provider(label: str) -> Provider:
    """Return a provider of `bench step` by its label."""
    return next(one for one in PROVIDERS if one.label == label)


_ADAX, _FUSED, _BF16 = provider(OURS), provider(FUSED), "bf16 + bfloat16"
_TELEMETRY = (
    adax_triton_provider("AdaXW with telemetry", AdaXW, FP32, {"telemetry": True}),
    adax_triton_provider("AdaXW without telemetry", AdaXW, FP32),
)
_RELEASE = (
    Provider("AdaXW", FP32, functools.partial(_backward_step, True), "adax", package="adax_triton"),
    Provider("step after backward", FP32, functools.partial(_backward_step, False), "adax", package="adax_triton"),
)
WORKLOADS = {
    "fp32, flat": Workload(_flat, (_ADAX, _FUSED, provider("DeepSpeedCPUAdam"))),
    "fp32, GPT-2 small": Workload(_gpt2, (_ADAX, _FUSED)),
    "fp32, many small tensors": Workload(
        lambda sizes: many_small_tensors(sizes.tensors, sizes.tensors), (_ADAX, _FUSED)
    ),
    "fp32, one tensor of 1,000": Workload(lambda sizes: flat(1000), (_ADAX, _FUSED)),
    "bf16, stochastic": Workload(_flat, (provider(f"{OURS}, {_BF16}"), provider(f"{FUSED}, {_BF16}"))),
    "8bit_v16, 24bit": Workload(_flat, (provider(f"{OURS}, bf16 + 8bit_v16 + 24-bit masters"),)),
    "8bit, 24bit": Workload(_flat, (provider(f"{OURS}, bf16 + 8bit + 24-bit masters"),)),
    "telemetry, flat": Workload(_flat, _TELEMETRY),
    "telemetry, GPT-2 small": Workload(_gpt2, _TELEMETRY),
    "gradient release": Workload(lambda sizes: [(64, 64), (64,)] * sizes.linears, _RELEASE),
}


def time_workload(name: str, sizes: Sizes, rounds: int) -> dict[str, Any]:
    """Return the row of a workload, JSON-friendly; raise RuntimeError if AdaXW fails."""
    shapes, providers = WORKLOADS[name].shapes(sizes), list(WORKLOADS[name].providers)
    *_, result = run_steps({name: shapes}, CPU, providers, rounds, BUDGET_S)
    rows = result["workloads"][0]["providers"]
    first = rows[providers[0].label]
    if "absent" in first:
        raise RuntimeError(f"{name}: {first['absent']}")
    keys = ("median_ms", "p20_ms", "p80_ms", "absent")
    labels = {OUR_SIDE: providers[0].label, **{one.name: one.label for one in providers[1:]}}
    sides = {side: {key: rows[label][key] for key in keys if key in rows[label]} for side, label in labels.items()}
    return {"name": name, "rounds": first["rounds"], "sides": add_ratios(sides)}


def add_ratios(sides: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Add the ratio of our median to every other one."""
    for side, found in sides.items():
        if side != OUR_SIDE and "median_ms" in found:
            found["ours_over_this"] = sides[OUR_SIDE]["median_ms"] / found["median_ms"]
    return sides


def time_first_steps(numel: int, processes: int) -> list[dict[str, Any]]:
    """Time the first step of new processes.

    Returns rows for an empty and a filled kernel cache.
    """
    times: dict[str, dict[str, list[float]]] = {"empty": {}, "filled": {}}
    for _ in range(processes):
        for side, label in ((OUR_SIDE, OURS), (FUSED, FUSED)):
            with tempfile.TemporaryDirectory() as folder:
                caches = {"XDG_CACHE_HOME": folder, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
                environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": f"{folder}/triton", **caches}
                for found in times.values():
                    found.setdefault(side, []).append(_first_step(label, numel, environment))
    return [
        {
            "name": FIRST_STEP.format(cache),
            "rounds": processes,
            "sides": add_ratios({side: quantiles(samples) for side, samples in found.items()}),
        }
        for cache, found in times.items()
    ]


def _first_step(label: str, numel: int, environment: Mapping[str, str]) -> float:
    command = [sys.executable, "-P", "-m", "adax_triton.bench.step.cpu", label, str(numel)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run(names: Sequence[str], sizes: Sizes, rounds: int, processes: int = PROCESSES) -> dict[str, Any]:
    """Return JSON-friendly rows of workloads and of new processes' first steps."""
    rows = [time_workload(name, sizes, rounds) for name in names]
    if processes:
        rows += time_first_steps(sizes.first_numel, processes)
    return {"benchmark": "cpu", "environment": describe(CPU), "sizes": sizes._asdict(), "rows": rows}


def table(result: dict[str, Any]) -> str:
    """Return one line per workload and compared optimizer."""
    sizes, lines, absent = result["sizes"], [], []
    for row in result["rows"]:
        times = [row["name"], _times(row["sides"][OUR_SIDE])]
        absent += [f"{row['name']}, {side}: {one['absent']}" for side, one in row["sides"].items() if "absent" in one]
        compared = {side: found for side, found in row["sides"].items() if "ours_over_this" in found}
        lines += [[*times, side, _times(one), _ratio(one["ours_over_this"])] for side, one in compared.items()]
        lines += [] if compared else [[*times, "", "", ""]]
    text = [
        f"flat: {sizes['numel']:,} elements; {sizes['tensors']:,} small tensors of {sizes['tensors']:,} elements; "
        f"first step: {sizes['first_numel']:,} elements; median, in brackets p20 to p80",
        "",
        *markdown_table(["workload", "ours, ms", "compared with", "its ms", "ratio"], lines, right=(1, 3, 4)),
    ]
    if result.get("package"):  # the commit of another copy of this package, in older results
        text += ["", f"baseline: {result['package']}"]
    return "\n".join([*text, *(["", "Absent: " + "; ".join(absent)] if absent else [])])


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _times(side: dict[str, float]) -> str:
    digits = 4 if side["median_ms"] < 1 else 2
    return f"{side['median_ms']:.{digits}f} ({side['p20_ms']:.{digits}f} to {side['p80_ms']:.{digits}f})"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `adax-triton bench cpu`."""
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, metavar="NAME", help=f"of {'; '.join(WORKLOADS)}")
    parser.add_argument("--rounds", type=count, default=30, help="timed steps at most; default: %(default)s")
    add_json(parser)


def main(arguments: argparse.Namespace) -> int:
    """Measure and print; return 2 without the native kernel."""
    problem = build_problem()
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        problem = "TRITON_INTERPRET is set, so Triton's interpreter would step CPU tensors; unset it"
    if problem is not None:
        print(f"bench cpu needs the native CPU kernel: {problem}", file=sys.stderr)
        return 2
    publish(run(arguments.only or list(WORKLOADS), Sizes(), arguments.rounds), table, arguments.json)
    return 0


if __name__ == "__main__":
    first, params = provider(sys.argv[1]), make_params(flat(int(sys.argv[2])), CPU, seed=2)
    print(time_call(first.build(params, RULES[first.second_moment]), CPU))
