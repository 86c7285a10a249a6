"""Cross-compile the small kernels without a GPU and read their machine code.

test_small_kernels_audit.py checks the output.

Usage, with TRITON_INTERPRET unset: python small_kernels_audit.py
Prints, for each target and kernel, a JSON list of one dictionary per variant.
"""

import inspect
import itertools
import re
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from adax_triton.bench.launch_variants.compile import absent_device
from adax_triton.kernels import grad_norm as grad_norm_module
from adax_triton.kernels.grad_norm import grad_norm_kernel, grad_norm_partials
from adax_triton.kernels.prepare_step import prepare_step, prepare_step_kernel
from adax_triton.kernels.telemetry import sum_rows, sum_rows_kernel
from code_audit import (
    GRAD_DTYPES,
    TARGETS,
    Launch,
    assembly,
    compile_launch,
    dtype_name,
    elements_per_thread,
    located_accesses,
    machine_facts,
    print_facts,
    recorded,
)
from triton.runtime import driver

LOCATION = re.compile(r"\.loc\s.*?grad_norm\.py:(\d+):")
STREAMS = {"grad_ptr + offsets": "tile", "grad_ptr + tail": "tail", "partials_ptr": "partial"}
UNRESOLVED = re.compile(r"\.extern \.func.*|s_swappc_b64.*|__ocml_\w+")


def sum_gradients(grad_dtype: torch.dtype, aligned: bool) -> None:
    for tensors, chunks, partials in ((0, 0, 1), (1, 1, 1), (1, 16, 16), (2, 3, 3), (16, 4096, 1024)):
        tables = torch.zeros(tensors, 9, dtype=torch.int64), torch.arange(chunks)
        grad_norm_partials(*tables, torch.zeros(partials, dtype=torch.float64), grad_dtype, aligned)


def prepare_steps(scaled: bool, clipped: bool) -> None:
    values = {0: 0.0, 1: 1.0, 16: 16.0, 17: 1e-3, 127: float("nan"), 128: float("inf"), 4096: -1.0}
    for n, value in values.items():
        rows, scalars = torch.full((n, 3), n), torch.full((n, 10), value)
        groups = torch.full((1 + n, 14), value, dtype=torch.float64)
        flags = dict.fromkeys(("grad_scale", "found_inf"), torch.zeros(1)) if scaled else {}
        clipping = {"squares": torch.zeros(1 + n, dtype=torch.float64), "max_grad_norm": value} if clipped else {}
        prepare_step(rows, groups, scalars, torch.full((3,), value), **flags, **clipping)


def sum_telemetry_rows() -> None:
    for rows, ranges in ((1, 1), (16, 1), (17, 2), (4096, 16), (5000, 128)):
        sum_rows(torch.zeros(rows, 5), torch.zeros(ranges, 2, dtype=torch.int64), torch.zeros(ranges, 5))


def gradient_accesses(code: str) -> list[tuple[str, str, int]]:
    """Return (stream, "load" or "store", bits) of each vector access.

    `code` is PTX or AMD assembly, and the accesses are in its order. The source line of an access gives its stream:
    "tile" or "tail" of the gradients, "partial" or "table".
    """
    source = Path(inspect.getsourcefile(grad_norm_kernel.fn)).read_text().splitlines()
    accesses = []
    for location, kind, bits in located_accesses(code, LOCATION):
        text = source[int(location[1]) - 1] if location else ""
        accesses.append((next((name for pointer, name in STREAMS.items() if pointer in text), "table"), kind, bits))
    return accesses


def variants() -> list[tuple[Any, list[Launch], dict[str, Any]]]:
    """Return (kernel, compile requests, variant fields) of each variant."""
    norm_variants = []
    for grad_dtype, aligned in itertools.product(GRAD_DTYPES, (True, False)):
        launches = recorded(partial(sum_gradients, grad_dtype, aligned))
        norm_variants.append((grad_norm_kernel, launches, {"grad_dtype": dtype_name(grad_dtype), "aligned": aligned}))
    prepare_variants = []
    for scaled, clipped in itertools.product((False, True), repeat=2):
        launches = recorded(partial(prepare_steps, scaled, clipped))
        prepare_variants.append((prepare_step_kernel, launches, {"scaled": scaled, "clipped": clipped}))
    return [
        *norm_variants,
        *prepare_variants,
        (sum_rows_kernel, recorded(sum_telemetry_rows), {}),
    ]


def audit(target_name: str) -> dict[str, list[dict[str, Any]]]:
    """Return {kernel name: audit results of its variants} for one target."""
    target = TARGETS[target_name]
    driver.set_active(absent_device(target))
    grad_norm_module.current_backend = lambda: target.backend
    kernel_variants = variants()
    kernels = [compile_launch(kernel, launches[0], target) for kernel, launches, _ in kernel_variants]
    facts = defaultdict(list)
    for (kernel, launches, fields), compiled, machine in zip(
        kernel_variants, kernels, machine_facts(kernels, target), strict=True
    ):
        code = assembly(compiled)
        launch_facts = {"keys": sorted({launch.key for launch in launches}), "launches": len(launches)}
        code_facts = {"unresolved": UNRESOLVED.findall(code), "signature": launches[0].signature}
        if kernel is grad_norm_kernel:
            code_facts["elements_per_thread"] = elements_per_thread(compiled, target)
            code_facts["accesses"] = gradient_accesses(code)
        facts[kernel.fn.__name__].append({**fields, **launch_facts, **code_facts, **machine})
    return facts


if __name__ == "__main__":
    print_facts(audit, processes=1)
