"""Cross-compile the small kernels, without a GPU, and collect facts about them for test_small_kernels_audit.py.

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
from adax_triton.kernels import grad_norm as stats_module
from adax_triton.kernels.grad_norm import grad_norm_kernel, grad_norm_partials
from adax_triton.kernels.prepare_step import prepare_step, prepare_step_kernel
from adax_triton.kernels.telemetry import add_rows, add_rows_kernel
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
        grad_norm_partials(*tables, torch.zeros(partials), grad_dtype, aligned)


def prepare_steps() -> None:
    values = {0: 0.0, 1: 1.0, 16: 16.0, 17: 1e-3, 127: float("nan"), 128: float("inf"), 4096: -1.0}
    for n, value in values.items():
        rows, scalars = torch.full((n, 3), n), torch.full((n, 10), value)
        groups = torch.full((1 + n, 14), value, dtype=torch.float64)
        inputs = torch.full((4,), value, dtype=torch.float64)
        prepare_step(rows, groups, inputs, scalars, torch.full((3,), value))


def add_up_rows() -> None:
    for rows, runs in ((1, 1), (16, 1), (17, 2), (4096, 16), (5000, 128)):
        add_rows(torch.zeros(rows, 5), torch.zeros(runs, 2, dtype=torch.int64), torch.zeros(runs, 5))


def gradient_accesses(code: str) -> list[tuple[str, str, int]]:
    """Return (stream, "load" or "store", bits) of each vector access of PTX or AMD assembly, in order.

    The stream is "tile" or "tail" of the gradients, "partial" or "table", from the source line of the access.
    """
    source = Path(inspect.getsourcefile(grad_norm_kernel.fn)).read_text().splitlines()
    accesses = []
    for location, kind, bits in located_accesses(code, LOCATION):
        text = source[int(location[1]) - 1] if location else ""
        accesses.append((next((name for words, name in STREAMS.items() if words in text), "table"), kind, bits))
    return accesses


def variants() -> list[tuple[Any, list[Launch], dict[str, Any]]]:
    """Return each kernel with its compile requests and the fields of its variant."""
    found = []
    for grad_dtype, aligned in itertools.product(GRAD_DTYPES, (True, False)):
        launches = recorded(partial(sum_gradients, grad_dtype, aligned))
        found.append((grad_norm_kernel, launches, {"grad_dtype": dtype_name(grad_dtype), "aligned": aligned}))
    return [
        *found,
        (prepare_step_kernel, recorded(prepare_steps), {}),
        (add_rows_kernel, recorded(add_up_rows), {}),
    ]


def audit(target_name: str) -> dict[str, list[dict[str, Any]]]:
    """Return the facts of every variant of one target, by kernel."""
    target = TARGETS[target_name]
    driver.set_active(absent_device(target))
    stats_module.current_backend = lambda: target.backend
    found = variants()
    kernels = [compile_launch(kernel, launches[0], target) for kernel, launches, _ in found]
    facts = defaultdict(list)
    for (kernel, launches, fields), compiled, machine in zip(
        found, kernels, machine_facts(kernels, target), strict=True
    ):
        code = assembly(compiled)
        of_launches = {"keys": sorted({launch.key for launch in launches}), "launches": len(launches)}
        of_code = {"unresolved": UNRESOLVED.findall(code), "signature": launches[0].signature}
        if kernel is grad_norm_kernel:
            of_code["elements_per_thread"] = elements_per_thread(compiled, target)
            of_code["accesses"] = gradient_accesses(code)
        facts[kernel.fn.__name__].append({**fields, **of_launches, **of_code, **machine})
    return facts


if __name__ == "__main__":
    print_facts(audit, processes=1)
