"""Compile the kernels that tests and benchmarks share into Triton's cache on disk, one process per mode.

python -m adax_triton.bench.step.compile_kernels [--modes MODE ...]
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

NUMEL = 1001


def compile_mode(name: str, device: str) -> float:
    """Step small tensors of a mode, plain and with telemetry and clipping; return the seconds."""
    begun, mode = time.perf_counter(), MODES[name]
    states, master_weights = mode.precision
    for telemetry, max_grad_norm in ((False, None), (True, 1.0)):
        for first in (0, 1):  # the second parameter is not aligned
            param = torch.ones(NUMEL + first, device=device, dtype=mode.param_dtype)[first:].requires_grad_()
            param.grad = torch.ones_like(param)
            kept: Any = {"states": states, "master_weights": master_weights, "weight_rounding": mode.weight_rounding}
            AdaXW([param], telemetry=telemetry, max_grad_norm=max_grad_norm, **kept).step()
    return time.perf_counter() - begun


def main() -> int:
    """Compile for all modes; return 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), metavar="MODE", default=list(MODES))
    modes = parser.parse_args().modes
    device, failed = "cuda" if torch.cuda.is_available() else "cpu", 0
    # Forked processes could not use CUDA.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(len(modes), os.cpu_count() or 1), spawn) as pool:
        jobs = {name: pool.submit(compile_mode, name, device) for name in modes}
        for name, job in jobs.items():
            try:
                print(f"{name}: {job.result():.1f} s", flush=True)
            except Exception as error:  # report it and go on with the other modes
                failed = 1
                print(f"{name}: {type(error).__name__}: {error}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
