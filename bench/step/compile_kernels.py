"""Compile the kernels that tests and benchmarks share, in parallel, into Triton's cache on disk.

    python -m adax_triton.bench.step.compile_kernels [--modes MODE ...]

One process per mode of `modes.MODES`: its step plain, with telemetry, and scheduled by the device behind a norm; for
addresses that are multiples of 16 bytes and others.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from adax_triton.bench.harness.modes import MODES

from adax_triton import AdaXW

_OPTIONS: tuple[dict[str, Any], ...] = ({}, {"telemetry": True, "max_grad_norm": 1.0})
_NUMEL = 1001


def compile_mode(name: str, device: str) -> float:
    """Step small tensors of a mode in every way; return the seconds."""
    begun = time.perf_counter()
    mode = MODES[name]
    for options in _OPTIONS:
        for first in (0, 1):  # the second begins where no wide access can
            param = torch.ones(_NUMEL + first, device=device, dtype=mode.param_dtype)[first:].requires_grad_()
            param.grad = torch.ones_like(param)
            states, master_weights = mode.precision
            AdaXW(
                [param],
                states=states,
                master_weights=master_weights,
                weight_rounding=mode.weight_rounding,
                **options,
            ).step()
    return time.perf_counter() - begun


def main() -> int:
    """Compile for all modes; return 1 if one of them failed."""
    parser = argparse.ArgumentParser(description="Fill Triton's cache with the kernels of every mode.")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), metavar="MODE", default=list(MODES))
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    failed = 0
    workers = min(len(arguments.modes), os.cpu_count() or 1)
    # Forked processes could not use CUDA.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        jobs = {name: pool.submit(compile_mode, name, device) for name in arguments.modes}
        for name, job in jobs.items():
            try:
                print(f"{name}: {job.result():.1f} s", flush=True)
            except Exception as error:  # whatever stops a kernel is the finding
                failed = 1
                print(f"{name}: {type(error).__name__}: {error}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
