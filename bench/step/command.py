"""`adax-triton bench step`: time of one optimizer step, ours beside others', over sizes, models and modes.

Every provider is compared in the mode of its own dtypes. One that is not installed, cannot run here or is wrong is
listed with the reason. On a GPU times are the device's, and what the host needs to launch a step stands beside them;
bandwidths are bytes by formula over time, and their share is that of a copy in the same run.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from adax_triton.bench.harness.modes import MODES
from adax_triton.bench.harness.origin import origin
from adax_triton.bench.harness.providers import Provider
from adax_triton.bench.harness.timing import free_bytes
from adax_triton.bench.harness.workloads import LISTS, Shapes, flat

from .measure import USABLE
from .run import choose, failures, run
from .table import table

SIZES = {
    "cuda": (1_000_000, 10_000_000, 100_000_000, 1_000_000_000, 4_000_000_000),
    "cpu": (1_000_000, 10_000_000, 50_000_000),
}
MODELS = {"cuda": tuple(LISTS), "cpu": ("gpt2", "resnet50", "many-small")}
BUDGET_S = 420.0
ROUNDS = 30
# One flat tensor and one list, in float32 and in one mode of codes, without what compiles for long.
QUICK_SIZES, QUICK_MODELS, QUICK_MODES, QUICK_BUDGET_S = (
    (1_000_000,),
    ("many-small",),
    ("fp32", "bf16 + 8bit_v16"),
    50.0,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's options."""
    parser.add_argument(
        "--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s"
    )
    parser.add_argument(
        "--sizes", type=_numel, nargs="*", help="elements of the flat tensors, such as 5e7; default: 1e6 to what fits"
    )
    parser.add_argument("--models", nargs="*", choices=list(LISTS), help="lists of tensors; default: by device")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), metavar="MODE", help="as in --list; default: all")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="providers whose label contains one of these")
    parser.add_argument(
        "--rounds", type=_count, default=ROUNDS, help="timed steps of each provider at most; default: %(default)s"
    )
    parser.add_argument(
        "--budget",
        type=_seconds,
        help=f"seconds for all of it, shared among the workloads; default: {BUDGET_S:.0f}, after which what is left is "
        "listed as not reached",
    )
    parser.add_argument("--quick", action="store_true", help="one size, one list and two modes, within a minute")
    parser.add_argument("--threads", type=_count, help="CPU threads; default: PyTorch's")
    parser.add_argument("--json", type=Path, help="write the result here, anew after each workload")
    parser.add_argument("--list", action="store_true", help="print workloads, modes and providers, and do nothing else")


def main(arguments: argparse.Namespace) -> int:
    """Run what the options ask for; return an exit code, 1 where one of our own optimizers failed or was wrong."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)  # of the events that time
    quick = arguments.quick
    modes = tuple(arguments.modes or (QUICK_MODES if quick else MODES))
    sizes = arguments.sizes if arguments.sizes is not None else QUICK_SIZES if quick else default_sizes(device, modes)
    models = arguments.models if arguments.models is not None else QUICK_MODELS if quick else MODELS[device.type]
    workloads = {f"flat {size:,}": flat(size) for size in sizes} | {LISTS[name][0]: LISTS[name][1]() for name in models}
    try:
        if not workloads:
            raise ValueError("sizes, models: no workload is left")
        chosen = choose(modes, arguments.only)
    except ValueError as error:
        print(f"adax-triton bench step: {error}", file=sys.stderr)
        return 2
    # On a GPU one compilation takes the time of all other measurements.
    if (quick or device.type == "cuda") and not arguments.only:
        chosen = [provider for provider in chosen if provider.most_tensors is None]
    if arguments.list:
        print(listing(workloads, chosen, device))
        return 0
    budget = arguments.budget or (QUICK_BUDGET_S if quick else BUDGET_S)
    named = bool(arguments.only)
    for result in run(workloads, device, chosen, arguments.rounds, budget, named):
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{origin(result)}\n\n{table(result)}")
    failed = failures(result)
    for name, why in failed.items():
        print(f"{name}: {why}", file=sys.stderr)
    return 1 if failed else 0


def default_sizes(device: torch.device, modes: tuple[str, ...]) -> tuple[int, ...]:
    """Return the sizes of a device's list that fit in its memory in one of the modes at least, with gradients."""
    least = min(2 * MODES[mode].param_dtype.itemsize + MODES[mode].state_bytes for mode in modes)
    return tuple(size for size in SIZES[device.type] if least * size <= USABLE * free_bytes(device))


def listing(workloads: dict[str, Shapes], providers: list[Provider], device: torch.device) -> str:
    """Return what would be run, as text."""
    lines = ["workloads"]
    for name, shapes in workloads.items():
        lines.append(f"  {name}: {sum(torch.Size(shape).numel() for shape in shapes):,} elements")
    lines.append("modes, and bytes per element")
    for mode in dict.fromkeys(provider.mode for provider in providers):
        lines.append(f"  {mode.name}: {mode.bytes_per_element:g}")
    lines.append("providers")
    for provider in providers:
        missing = provider.missing_on(device)
        lines.append(f"  {provider.label}" + (f": absent: {missing}" if missing else ""))
    return "\n".join(lines)


def _numel(text: str) -> int:
    numel = int(_number(text))
    if numel < 1 or numel != float(text):
        raise argparse.ArgumentTypeError(f"invalid size {text!r}: expected a whole number of elements, at least 1")
    return numel


def _count(text: str) -> int:
    if _number(text) != int(_number(text)) or _number(text) < 1:
        raise argparse.ArgumentTypeError(f"invalid count {text!r}: expected a whole number, at least 1")
    return int(text)


def _seconds(text: str) -> float:
    if _number(text) <= 0:
        raise argparse.ArgumentTypeError(f"invalid time {text!r}: expected seconds, more than 0")
    return _number(text)


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid number {text!r}") from None
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"invalid number {text!r}: expected a finite one")
    return number


def _device(text: str) -> str:
    kind = text.partition(":")[0]
    if kind not in SIZES:
        raise argparse.ArgumentTypeError(f"invalid device {text!r}: expected one of {', '.join(SIZES)}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"invalid device {text!r}: PyTorch sees no GPU")
    return text
