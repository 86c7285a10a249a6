"""Functions and files of this package that one step calls: the first step of an optimizer, and a later one.

"CPU" is the native kernel; its cache on disk is filled. "GPU" is the Triton path, with launches that do nothing. A
function is a code object of `adax_triton` or `adax_triton.kernels`, counted once however often it runs. Lambdas,
comprehensions and generator expressions are in brackets; module and class bodies do not count.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
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
from adax_triton.bench.harness.environment import describe
from adax_triton.bench.harness.origin import origin
from adax_triton.bench.host import launching

import adax_triton
from adax_triton import AdaXW, kernels
from adax_triton.step.cpu_kernel import build_problem

_ROOTS = [Path(adax_triton.__path__[0]), Path(kernels.__path__[0])]
_BENCH = Path(__file__).parents[1]
_TENSORS, _NUMEL = 3, 64
PATHS = {"CPU": "0", "GPU": "1"}  # TRITON_INTERPRET
FIRST, STEADY = "first", "steady"


def called(call: Callable[[], object]) -> list[str]:
    """Return the functions of ours that a call passes, as `file: name`, in the order of their first calls."""
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
    located = ((_location(code.co_filename), code) for code in found if code.co_flags & inspect.CO_OPTIMIZED)
    return [f"{file}: {code.co_qualname}" for file, code in located if file is not None]


def _location(filename: str) -> str | None:
    path = Path(filename)
    if path.is_relative_to(_BENCH):
        return None
    for root in _ROOTS:
        if path.is_relative_to(root):
            return str(root.name / path.relative_to(root))
    return None


def is_anonymous(function: str) -> bool:
    """Return whether an entry of `called` is a lambda, a comprehension or a generator expression."""
    return function.endswith(">")


def trace() -> dict[str, list[str]]:
    """Return the functions of a first step and of the third, of an optimizer of a few float32 CPU tensors."""
    params = [torch.zeros(_NUMEL, requires_grad=True) for _ in range(_TENSORS)]
    for param in params:
        param.grad = torch.ones(_NUMEL)
    optimizer = AdaXW(params, lr=1e-3)
    first = called(optimizer.step)
    optimizer.step()
    return {FIRST: first, STEADY: called(optimizer.step)}


def run() -> dict[str, Any]:
    """Return the functions of both paths, JSON-friendly; each path in a new process."""
    found = {}
    for path, interpret in PATHS.items():
        if path == "GPU" and importlib.util.find_spec("numpy") is None:
            print("bench functions: GPU is left out, because Triton's interpreter needs numpy; pip install numpy")
            continue
        command = [sys.executable, "-m", "adax_triton.bench.step.functions", path]
        environment = {**os.environ, "TRITON_INTERPRET": interpret}
        for _ in range(2 if path == "CPU" else 1):  # a process before fills the cache
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found[path] = json.loads(done.stdout.splitlines()[-1])
    return {"benchmark": "functions", "environment": describe(torch.device("cpu")), "functions": found}


def table(result: dict[str, Any], names: bool = False) -> str:
    """Return the counts as Markdown, and below them the names of the functions."""
    lines = ["| path | step | functions | files |", "|---|---|---:|---:|"]
    lists = []
    for path, steps in result["functions"].items():
        for step, functions in steps.items():
            named = [function for function in functions if not is_anonymous(function)]
            files = {function.partition(": ")[0] for function in functions}
            lines.append(f"| {path} | {step} | {len(named)} (+{len(functions) - len(named)}) | {len(files)} |")
            lists += ["", f"{path}, {step}:", *functions]
    return "\n".join(lines + (lists if names else []))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `adax-triton bench functions`."""
    parser.add_argument("--list", action="store_true", help="name the functions, in the order of their first calls")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the result")


def main(arguments: argparse.Namespace) -> int:
    """Count, print the table and keep the result; return 0, or 2 without a native kernel."""
    problem = build_problem()
    if problem is not None:
        print(f"bench functions: it counts those of the native kernel's step. {problem}")
        return 2
    result = run()
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{origin(result)}\n\n{table(result, arguments.list)}")
    return 0


if __name__ == "__main__":
    with launching(torch.device("cpu")) if sys.argv[1] == "GPU" else contextlib.nullcontext():
        print(json.dumps(trace()))
