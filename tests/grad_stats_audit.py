"""Compile the gradient sums for GPUs that need not be there, and read facts from the code; see code_audit.py.

Usage, with TRITON_INTERPRET unset: python grad_stats_audit.py TARGET
Prints a JSON list of one dictionary per variant.
"""

import inspect
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from adax_triton.kernels import grad_stats as stats_module
from adax_triton.kernels.grad_stats import grad_stats, grad_stats_kernel
from adax_triton.kernels.launch import launch_shape
from code_audit import (
    AMD_ACCESS,
    GRAD_DTYPES,
    PTX_ACCESS,
    TARGETS,
    AbsentDevice,
    Launch,
    amd_bits,
    compile_launch,
    disassemble,
    machine_code,
    recorded,
    resources,
    sass_bits,
)
from triton.runtime import driver

LOCATION = re.compile(r"\.loc\s.*?grad_stats\.py:(\d+):")
STREAMS = {"grad_ptr + offsets": "tile", "grad_ptr + tail": "tail", "partials_ptr": "partial"}


def record_launches(grad_dtype: torch.dtype, aligned: bool) -> list[Launch]:
    """Call `grad_stats` on tables of several sizes, and return what it would have compiled for each."""

    def launch() -> None:
        for tensors, chunks, partials in ((0, 0, 1), (1, 1, 1), (1, 16, 16), (2, 3, 3), (16, 4096, 1024)):
            tables = torch.zeros(tensors, 9, dtype=torch.int64), torch.arange(chunks)
            grad_stats(*tables, torch.zeros(partials), grad_dtype, aligned)

    return recorded(launch)


def read_accesses(code: str) -> list[tuple[str, str, int]]:
    """Return (stream, "load" or "store", bits) of each vector access of PTX or AMD assembly, in order.

    The stream is "tile" or "tail" of the gradients, "partial" or "table", from the source line of the access.
    """
    source = Path(inspect.getsourcefile(grad_stats_kernel.fn)).read_text().splitlines()
    accesses, line_number = [], 0
    for line in code.splitlines():
        if location := LOCATION.search(line):
            line_number = int(location[1])
        if match := PTX_ACCESS.search(line):
            kind, bits = {"ld": "load", "st": "store"}[match[1]], int(match[2] or 1) * int(match[3])
        elif match := AMD_ACCESS.match(line):
            kind, bits = match[1], amd_bits(match[2])
        else:
            continue
        text = source[line_number - 1]
        accesses.append((next((name for words, name in STREAMS.items() if words in text), "table"), kind, bits))
    return accesses


def nvidia_facts(kernels: list[Any]) -> Iterator[dict[str, Any]]:
    architecture = re.search(r"\.target (\w+)", kernels[0].asm["ptx"])[1].replace("sm_", "SM")
    codes = [machine_code(kernel.asm["cubin"]) for kernel in kernels]
    for kernel, operations in zip(kernels, disassemble(codes, architecture), strict=True):
        registers, stack = resources(kernel.asm["cubin"])
        yield {
            "registers": registers,
            "spills": stack + sum(name.startswith(("LDL", "STL")) for name in operations),
            "atomics": sum(name.startswith(("ATOM", "RED.")) for name in operations),
            "accesses": read_accesses(kernel.asm["ptx"]),
            "machine": [
                ({"LDG": "load", "STG": "store"}[name[:3]], sass_bits(name))
                for name in operations
                if name.startswith(("LDG", "STG"))
            ],
        }


def amd_facts(kernel: Any) -> dict[str, Any]:
    code = kernel.asm["amdgcn"]

    def count(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", code)[1])

    accesses = read_accesses(code)
    spills = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    return {
        "registers": count("vgpr_count"),
        "spills": sum(map(count, spills)) + len(re.findall(r"^\s+scratch_", code, re.MULTILINE)),
        "atomics": len(re.findall(r"^\s+(?:global|buffer|flat)_atomic", code, re.MULTILINE)),
        "accesses": accesses,
        "machine": [(kind, bits) for _, kind, bits in accesses],
    }


def audit(target_name: str) -> Iterator[dict[str, Any]]:
    """Yield the facts of every variant of one target."""
    target = TARGETS[target_name]
    driver.set_active(AbsentDevice(target))
    stats_module.current_backend = lambda: target.backend
    variants = list(itertools.product(GRAD_DTYPES, (True, False)))
    launches = [record_launches(*variant) for variant in variants]
    kernels = [compile_launch(grad_stats_kernel, first, target) for first, *_ in launches]
    found = nvidia_facts(kernels) if target.backend == "cuda" else map(amd_facts, kernels)
    for (grad_dtype, aligned), of_variant, kernel, facts in zip(variants, launches, kernels, found, strict=True):
        yield {
            "grad_dtype": str(grad_dtype).removeprefix("torch."),
            "aligned": aligned,
            "keys": sorted({launch.key for launch in of_variant}),
            "launches": len(of_variant),
            "elements_per_thread": launch_shape(target.backend).chunk_size
            // (kernel.metadata.num_warps * target.warp_size),
            **facts,
        }


if __name__ == "__main__":
    json.dump(list(audit(sys.argv[1])), sys.stdout)
