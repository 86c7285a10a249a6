"""Compile kernel variants in parallel, with or without a GPU."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from .variants import Section, Variant

NUMEL = 64  # the code depends on dtypes and alignment only


def absent_device(target: Any) -> Any:
    """Return a Triton driver that compiles for a `GPUTarget` without a GPU or a CUDA context."""
    return SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target
    )


def compile_all(
    jobs: list[tuple[Section, Variant]], target: Any, workers: int, seconds: float
) -> dict[tuple[str, str], str]:
    """Compile variants into Triton's cache on disk, in parallel processes.

    Args:
        jobs: in the order in which they start.
        target: Triton's `GPUTarget`.
        workers: processes.
        seconds: limit; the first launch compiles the rest.

    Returns:
        The errors, by (name of the section, label of the variant).
    """
    begun = time.perf_counter()
    failed, late = {}, 0
    with multiprocessing.get_context("spawn").Pool(workers) as pool:  # leaving the block terminates the workers
        results = [pool.apply_async(compile_variant, (*job, target)) for job in jobs]
        for (section, variant), result in zip(jobs, results, strict=True):
            try:
                error = result.get(max(0.0, begun + seconds - time.perf_counter()))
            except multiprocessing.TimeoutError:
                late += 1
                continue
            if error is not None:
                failed[section.name, variant.label] = error
    took = time.perf_counter() - begun
    print(f"compiled {len(jobs) - late - len(failed)} of {len(jobs)} in {took:.0f} s, {len(failed)} failed", flush=True)
    return failed


def compile_variant(section: Section, variant: Variant, target: Any) -> str | None:
    """Compile a variant into Triton's cache on disk; return the error, or None."""
    from adax_triton.bench.step.measure import reason
    from triton.runtime import driver

    from .cases import Case

    driver.set_active(absent_device(target))
    try:
        with tempfile.TemporaryDirectory() as folder:
            Case(section, NUMEL, torch.device("cpu"), Path(folder)).call(variant).compile()
    except Exception as error:  # the table shows it
        return reason(error)
    return None
