"""Count this package's Python functions and files that an optimizer step executes.

"CPU" is the native kernel, with a filled cache on disk. "GPU" is the Triton path, with launches that do nothing. A
function is a code object of `adax_triton` or `adax_triton.kernels`, counted once however often it runs. Lambdas,
comprehensions and generator expressions are counted in brackets; module and class bodies are not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from adax_triton.bench.harness.command import add_json, markdown_table, publish
from adax_triton.bench.harness.environment import describe
from adax_triton.bench.host import launching

import adax_triton
from adax_triton import AdaXW, kernels
from adax_triton.step.cpu_kernel import build_problem

_ROOTS = [Path(adax_triton.__path__[0]), Path(kernels.__path__[0])]
_BENCH = Path(__file__).parents[1]
_TENSORS, _NUMEL = 3, 64
PATHS = {"CPU": "0", "GPU": "1"}  # TRITON_INTERPRET


def called_functions(call: Callable[[], object]) -> list[str]:
    """Return our called functions as `file: name`, in first-call order."""
    found: dict[CodeType, None] = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            found.setdefault(frame.f_code)

    previous = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(previous)
    located = ((_location(Path(code.co_filename)), code) for code in found if code.co_flags & inspect.CO_OPTIMIZED)
    return [f"{file}: {code.co_qualname}" for file, code in located if file is not None]


def _location(path: Path) -> str | None:
    if path.is_relative_to(_BENCH):
        return None
    return next((str(root.name / path.relative_to(root)) for root in _ROOTS if path.is_relative_to(root)), None)


def trace() -> dict[str, list[str]]:
    """Return the functions executed by the first and the third step.

    The steps are of a few float32 CPU tensors.
    """
    params = [torch.zeros(_NUMEL, requires_grad=True) for _ in range(_TENSORS)]
    for param in params:
        param.grad = torch.ones(_NUMEL)
    optimizer = AdaXW(params, lr=1e-3)
    first = called_functions(optimizer.step)
    optimizer.step()
    return {"first": first, "steady": called_functions(optimizer.step)}


def run() -> dict[str, Any]:
    """Return the functions of both paths, JSON-friendly.

    Each path runs in a new process.
    """
    found = {}
    for path, interpret in PATHS.items():
        command = [sys.executable, "-m", "adax_triton.bench.step.functions", path]
        environment = {**os.environ, "TRITON_INTERPRET": interpret}
        for _ in range(2 if path == "CPU" else 1):  # the first process fills the cache
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found[path] = json.loads(done.stdout.splitlines()[-1])
    return {"benchmark": "functions", "environment": describe(torch.device("cpu")), "functions": found}


def table(result: dict[str, Any], names: bool = False) -> str:
    """Return the counts, and the names of the functions if `names`."""
    rows, lists = [], []
    for path, steps in result["functions"].items():
        for step, functions in steps.items():
            named = [function for function in functions if not function.endswith(">")]  # such as <lambda>
            files = {function.partition(": ")[0] for function in functions}
            rows.append([path, step, f"{len(named)} (+{len(functions) - len(named)})", str(len(files))])
            lists += ["", f"{path}, {step}:", *functions]
    lines = markdown_table(["path", "step", "functions", "files"], rows, right=(2, 3))
    return "\n".join(lines + (lists if names else []))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `adax-triton bench functions`."""
    parser.add_argument("--list", action="store_true", help="name the functions, in first-call order")
    add_json(parser)


def main(arguments: argparse.Namespace) -> int:
    """Count and print; return 2 without the native kernel."""
    problem = build_problem()
    if problem is not None:
        print(f"bench functions needs the native CPU kernel: {problem}", file=sys.stderr)
        return 2
    publish(run(), lambda result: table(result, arguments.list), arguments.json)
    return 0


if __name__ == "__main__":
    with launching(torch.device("cpu")) if sys.argv[1] == "GPU" else contextlib.nullcontext():
        print(json.dumps(trace()))
