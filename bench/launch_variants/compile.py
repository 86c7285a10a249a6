"""Compile kernels into Triton's cache on disk, in parallel processes.

python -m adax_triton.bench.launch_variants.compile [--modes MODE ...]

compiles, by small steps, the kernels that tests and benchmarks share.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from adax_triton.bench.harness.modes import MODES

from adax_triton import AdaXW

from .variants import Case, Section, Variant

STEP_NUMEL = 5003  # more than 4096, from which states are quantized
LIMIT_S = 20.0  # gpu_check.py stops the command after 30
VARIANT_NUMEL = 64  # a variant's code depends on dtypes and alignment only


def absent_device(target: Any) -> Any:
    """Return a Triton driver that compiles without a GPU.

    It compiles for `target`, a `GPUTarget`, and needs no CUDA context.
    """
    return SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target
    )


def compile_all(compiler: Callable[..., None], jobs: Mapping[str, tuple[Any, ...]], seconds: float) -> bool:
    """Compile in new processes; return whether no job failed.

    Prints a line per job. `jobs` are the compiler's arguments by label. A job that is late after `seconds` is compiled
    at its first launch.
    """
    deadline, failed = time.perf_counter() + seconds, False
    # Forked processes could not use CUDA. Leaving the block terminates late processes.
    with multiprocessing.get_context("spawn").Pool(min(len(jobs), os.cpu_count() or 1)) as pool:
        results = {label: pool.apply_async(_timed, (compiler, *job)) for label, job in jobs.items()}
        for label, result in results.items():
            try:
                error, line = result.get(max(0.0, deadline - time.perf_counter()))
            except multiprocessing.TimeoutError:
                error, line = False, f"not compiled within {seconds:.0f} s"
            failed |= error
            print(f"{label}: {line}", flush=True)
    return not failed


def _timed(compiler: Callable[..., None], *job: Any) -> tuple[bool, str]:
    begun = time.perf_counter()
    try:
        compiler(*job)
    except Exception as error:  # not all errors of compilers can be sent to another process
        return True, f"{type(error).__name__}: {error}"
    return False, f"{time.perf_counter() - begun:.1f} s"


def compile_variant(section: Section, variant: Variant, target: Any) -> None:
    """Compile a launch variant, with or without a GPU."""
    from triton.runtime import driver

    driver.set_active(absent_device(target))
    Case(section, VARIANT_NUMEL, torch.device("cpu")).call(variant, compile_only=True)()


def compile_mode(name: str, device: str) -> None:
    """Step small tensors of a mode, plain and with telemetry and clipping."""
    mode = MODES[name]
    kept: dict[str, Any] = {**mode.precision._asdict(), "weight_rounding": mode.weight_rounding}
    for telemetry, max_grad_norm in ((False, None), (True, 1.0)):
        for first in (0, 1):  # the second parameter is not aligned
            param = torch.ones(STEP_NUMEL + first, device=device, dtype=mode.param_dtype)[first:].requires_grad_()
            param.grad = torch.ones_like(param)
            AdaXW([param], telemetry=telemetry, max_grad_norm=max_grad_norm, **kept).step()


def main() -> int:
    """Compile for all modes; return 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), metavar="MODE", default=list(MODES))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    jobs = {name: (name, device) for name in parser.parse_args().modes}
    return int(not compile_all(compile_mode, jobs, LIMIT_S))


if __name__ == "__main__":
    sys.exit(main())
