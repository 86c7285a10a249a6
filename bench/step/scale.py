"""`adax-triton bench scale`: step time against elements and against tensors, and what follows for models up to 1T.

Measured: a step of one flat tensor of growing size, and of a growing number of small tensors, with the slope of each
line in a log-log plot. By formula (`scale_model`), checked against the measured points: the optimizer step's time and
the memory of a GPU under ZeRO 1, 2 and 3, both with DeepSpeed's own passes around a step and with those fused.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from adax_triton.bench.harness.correctness import WrongResultError, check
from adax_triton.bench.harness.environment import describe
from adax_triton.bench.harness.origin import origin
from adax_triton.bench.harness.progress import progress
from adax_triton.bench.harness.providers import OURS, PROVIDERS, RULES, Provider
from adax_triton.bench.harness.timing import Clock, free_bytes, p20_and_p80, release
from adax_triton.bench.harness.workloads import Shapes, flat
from adax_triton.bench.step import scale_model

from adax_triton.state.precision import STATES

from .measure import make_params
from .scale_model import Point, Rates, StepTime
from .scale_table import LAST_POINTS, table

SIZES = {
    "cuda": (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000, 500_000_000),
    "cpu": (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 50_000_000),
}
QUICK_SIZES = (1_000, 30_000, 1_000_000)
TENSORS = (1, 4, 16, 64, 256, 1024, 4096)
QUICK_TENSORS = (1, 8, 64)
DEFAULT_PROVIDERS = (OURS, "torch AdamW fused")
COPY_BYTES_PER_ELEMENT = 8
USABLE = 0.85  # of the free memory

Advance = Callable[[int, str], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's options."""
    parser.add_argument("--device", choices=list(SIZES), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=_count, nargs="+", help="elements of the flat tensor; default: 1e3 to 5e7, 5e8")
    parser.add_argument("--tensors", type=_count, nargs="+", help="how many small tensors; default: 1 to 4096")
    parser.add_argument("--tensor-size", type=_count, default=1024, help="elements of each; default: %(default)s")
    parser.add_argument("--rounds", type=int, help="timed steps of each point; default: 15")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="ours, and of the others those whose label contains one"
    )
    parser.add_argument("--list", action="store_true", help="print providers and points, and do nothing else")
    parser.add_argument("--quick", action="store_true", help="three points of each line, in some seconds")
    parser.add_argument("--json", type=Path, help="write the result here")
    paper = parser.add_argument_group("the model of ZeRO")
    paper.add_argument(
        "--bandwidth",
        type=float,
        help="GB/s of a copy on another device; the step then has its share of that, at most all, as measured here; "
        "default: this device, as measured",
    )
    paper.add_argument("--network", type=float, help="GB/s to each GPU, for gathering the weights; default: left out")
    paper.add_argument("--states", choices=STATES, default="float32", help="of AdaXW; default: %(default)s")


def main(arguments: argparse.Namespace) -> int:
    """Run what the options ask for; return 1 where ours got no time."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    sizes = arguments.sizes or (QUICK_SIZES if arguments.quick else SIZES[arguments.device])
    tensors = arguments.tensors or (QUICK_TENSORS if arguments.quick else TENSORS)
    rounds = (5 if arguments.quick else 15) if arguments.rounds is None else arguments.rounds
    try:
        chosen = choose(arguments.only)
        if arguments.list:
            print(listing(chosen, sizes, tensors, arguments.tensor_size))
            return 0
        result = run(torch.device(arguments.device), sizes, tensors, arguments.tensor_size, rounds, chosen)
        extend(result, arguments.bandwidth, arguments.network, arguments.states)
    except ValueError as error:
        print(f"adax-triton bench scale: {error}", file=sys.stderr)
        return 2
    print(f"{origin(result)}\n\n{table(result)}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    return 1 if "absent" in result["providers"][OURS] else 0


def choose(only: list[str] | None) -> list[Provider]:
    """Return ours, which is fitted, and of `DEFAULT_PROVIDERS` those whose label contains one of `only`, if given.

    Raises:
        ValueError: no label contains any of `only`.
    """
    known = [provider for provider in PROVIDERS if provider.label in DEFAULT_PROVIDERS]
    if only and not any(part in provider.label for provider in known for part in only):
        raise ValueError(f"only: none of {[provider.label for provider in known]} contains any of {only}")
    return [
        provider
        for provider in known
        if not only or provider.label == OURS or any(part in provider.label for part in only)
    ]


def listing(providers: list[Provider], sizes: Sequence[int], tensors: Sequence[int], tensor_size: int) -> str:
    """Return what would be measured, as text."""
    return "\n".join(
        [
            *(provider.label for provider in providers),
            f"elements of one tensor: {', '.join(f'{size:,}' for size in sizes)}",
            f"tensors of {tensor_size:,} elements: {', '.join(f'{count:,}' for count in tensors)}",
        ]
    )


def run(
    device: torch.device,
    sizes: Sequence[int],
    tensors: Sequence[int],
    tensor_size: int,
    rounds: int,
    chosen: list[Provider],
) -> dict[str, Any]:
    """Measure both lines of every provider, and fit ours; return the result, JSON-friendly.

    Args:
        device: where.
        sizes: elements of the flat tensor, for the first line.
        tensors: how many tensors, for the second line.
        tensor_size: elements of each of those.
        rounds: timed steps of every point.
        chosen: who, ours among them.

    Raises:
        ValueError: a line has less than two points that fit the memory, there are no rounds, or no line can be fitted.
    """
    # A parameter, its gradient and two moments for each provider; two tensors for the copy.
    most = int(USABLE * free_bytes(device)) // (16 * len(chosen) + COPY_BYTES_PER_ELEMENT)
    too_large = sorted(size for size in set(sizes) if size > most)
    sizes = tuple(size for size in sizes if size <= most)
    for name, points in (("sizes", sizes), ("tensors", tensors)):
        if len(set(points)) < 2:
            raise ValueError(f"{name}: expected at least two different ones, got {list(points)}")
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    workloads: dict[str, list[Shapes]] = {
        "elements": [flat(size) for size in sorted(set(sizes))],
        "tensors": [[(tensor_size,)] * count for count in sorted(set(tensors))],
    }
    rows: dict[str, Any] = {}
    providers = []
    for provider in chosen:
        try:
            check(provider, device)
            providers.append(provider)
            rows[provider.label] = {"elements": [], "tensors": []}
        except (ImportError, RuntimeError, WrongResultError) as error:
            rows[provider.label] = {"absent": f"{type(error).__name__}: {error}".splitlines()[0]}
    rows["copy"] = {"elements": [], "tensors": []}
    clock = Clock(device)
    with progress(rounds * sum(map(len, workloads.values())), "bench scale") as advance:
        for line, lists in workloads.items():
            for shapes in lists:
                for name, point in _measure(providers, shapes, clock, device, rounds, advance).items():
                    rows[name][line].append(point)
    for row in rows.values():
        if "absent" not in row:
            row |= _slopes(row)
    largest = rows["copy"]["elements"][-1]
    result = {
        "benchmark": "scale",
        "environment": describe(device),
        **{"rounds": rounds, "dtype": "float32", "tensor_size": tensor_size, "too_large": too_large},
        "bytes_per_element": scale_model.kernel_bytes("float32"),
        "copy_bytes_per_s": COPY_BYTES_PER_ELEMENT * largest["numel"] / (largest["median_ms"] / 1e3),
        "providers": rows,
    }
    if "absent" not in rows[OURS]:
        result["fit"] = _fit(rows[OURS], result["bytes_per_element"])
    return result


def _measure(
    providers: list[Provider], shapes: Shapes, clock: Clock, device: torch.device, rounds: int, advance: Advance
) -> dict[str, dict[str, Any]]:
    """Step all providers in turn on tensors of their own, and copy as many elements; return a point for each."""
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    source = torch.randn(numel, device=device)
    calls: dict[str, Callable[[], Any]] = {"copy": functools.partial(torch.clone(source).copy_, source)}
    for provider in providers:
        calls[provider.label] = provider.build(make_params(shapes, device, seed=2), RULES[provider.second_moment])
    for call in calls.values():  # compiles
        call()
    hosts = {name: clock.host_time(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(clock.time(call, hosts[name]))
        advance(1, f"{numel:,} elements, {len(shapes):,} tensors")
    calls.clear()
    release(device)
    points = {name: _point(numel, len(shapes), times) for name, times in samples.items()}
    return {
        name: {**point, **({} if host is None else {"host_us": 1e6 * host})}
        for (name, point), host in zip(points.items(), hosts.values(), strict=True)
    }


def _point(numel: int, tensors: int, times: list[float]) -> dict[str, Any]:
    p20, p80 = p20_and_p80(times)
    quantiles = {"median_ms": statistics.median(times), "p20_ms": p20, "p80_ms": p80}
    return {"numel": numel, "tensors": tensors, **{name: 1e3 * seconds for name, seconds in quantiles.items()}}


def _slopes(row: dict[str, Any]) -> dict[str, float]:
    slopes = {}
    for line, axis in (("elements", "numel"), ("tensors", "tensors")):
        sizes, times = ([point[key] for point in row[line]] for key in (axis, "median_ms"))
        slopes[f"{line}_slope"] = scale_model.slope(sizes, times)
        slopes[f"{line}_slope_last"] = scale_model.slope(sizes[-LAST_POINTS:], times[-LAST_POINTS:])
    return slopes


def _fit(row: dict[str, Any], bytes_per_element: float) -> dict[str, float]:
    """Fit the formula to our two lines, and leave its error beside every point."""
    flat_points, many = (
        [Point(point["numel"], point["tensors"], point["median_ms"] / 1e3) for point in row[line]]
        for line in ("elements", "tensors")
    )
    fitted = scale_model.fit(flat_points, many, bytes_per_element)
    for point in (*row["elements"], *row["tensors"]):
        seconds = fitted.seconds(point["numel"], point["tensors"], bytes_per_element)
        point["model_error"] = seconds / (point["median_ms"] / 1e3) - 1
    return fitted._asdict()


def extend(result: dict[str, Any], bandwidth: float | None, network: float | None, states: str) -> None:
    """Add the model of ZeRO to a result whose points are fitted.

    Args:
        result: of `run`.
        bandwidth: GB/s of a copy on the device to be modelled. None: the measured one.
        network: GB/s to each GPU. None: the gathering of weights is left out.
        states: of AdaXW.

    Raises:
        ValueError: a bandwidth is not positive.
    """
    for name, value in (("bandwidth", bandwidth), ("network", network)):
        if value is not None and not value > 0:
            raise ValueError(f"{name}: expected GB/s above 0, got {value}")
    if "fit" not in result:
        return
    step, copy = StepTime(**result["fit"]), result["copy_bytes_per_s"]
    if bandwidth is not None:
        step = step._replace(bytes_per_s=min(1.0, step.bytes_per_s / copy) * bandwidth * 1e9)
        copy = bandwidth * 1e9
    rates = Rates(step, copy, None if network is None else network * 1e9)
    result["paper"] = {
        **{"states": states, "bandwidth_is_measured": bandwidth is None, "network_gb_per_s": network},
        **{"copy_bytes_per_s": copy, "step_bytes_per_s": step.bytes_per_s},
        "rows": scale_model.rows(rates, states),
    }


def _count(text: str) -> int:
    count = int(float(text))
    if count < 1 or count != float(text):
        raise argparse.ArgumentTypeError(f"invalid count {text!r}: expected a whole number, at least 1")
    return count
