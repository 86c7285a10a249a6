"""Cross-compile the step kernel without a GPU and read its machine code.

test_code_audit.py checks the output.

Usage, with TRITON_INTERPRET unset: python code_audit.py
Prints, for each target, a JSON list of one dictionary per variant, with the fields of its StepVariant and facts of its
code. The first target has every variant. Other targets have a few that contain each value of each field; AUDIT=all
selects every variant for all targets.
"""

import bisect
import inspect
import itertools
import json
import multiprocessing
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from adax_triton.bench.launch_variants.compile import absent_device
from adax_triton.kernels import adax_step as step_module
from adax_triton.kernels.adax_step import adax_step, adax_step_kernel
from adax_triton.kernels.launch import launch_shape
from adax_triton.kernels.variants import StepVariant
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),  # first, since it takes longest
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GRAD_DTYPES = (*PARAM_DTYPES, torch.float64)
STATES = ("float32", "bfloat16", "8bit_v16", "8bit")
FP32, BF16, FP16 = PARAM_DTYPES
# Variants closest to a register limit on some target, in triton 3.7.1.
TIGHT = (
    StepVariant(FP32, FP32),
    StepVariant(BF16, BF16),
    StepVariant(FP32, FP16, aligned=False),
    StepVariant(FP32, FP32, "8bit", telemetry=True),
    StepVariant(BF16, BF16, "bfloat16", "int8", telemetry=True),
    StepVariant(BF16, BF16, "8bit", "int8", telemetry=True),
    StepVariant(BF16, BF16, "8bit", "int8", aligned=False),
    StepVariant(BF16, BF16, "8bit", "int16"),
    StepVariant(BF16, BF16, "8bit", "int16", aligned=False),
    StepVariant(FP16, FP16, "8bit_v16", "float32", skip_unchanged_v=True),
    StepVariant(FP16, FP16, "8bit_v16", "float32", aligned=False),
    StepVariant(FP16, FP16, "8bit", "float32", skip_unchanged_v=True),
    StepVariant(FP16, FP16, "8bit", "float32", telemetry=True),
    StepVariant(FP16, FP16, "8bit", "float32", aligned=False),
)

LOCATION = re.compile(r"\.loc\s.*?adax_step\.py:(\d+):\d+(?: @\[ adax_step\.py:(\d+):)?")
PTX_ACCESS = re.compile(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.b(\d+)\s")
AMD_ACCESS = re.compile(r"^\s+(?:global|buffer|flat)_(load|store)_(\w+)")
SASS_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", re.MULTILINE)
STREAM = re.compile(r"tl\.(?:load|store)\((\w+?)_ptr")


class Launch(NamedTuple):
    """A compile request to Triton, and the cache key of its result."""

    key: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]


def step_variants() -> list[StepVariant]:
    """Return the step variants to compile.

    They are all dtypes with float32 states, and each states and master format with dtypes that support it.
    """
    variants = [
        StepVariant(param, grad, aligned=aligned)
        for param, grad, aligned in itertools.product(PARAM_DTYPES, GRAD_DTYPES, (True, False))
    ]
    for states, skip_unchanged_v in itertools.product(STATES, (False, True)):
        variants += [
            StepVariant(FP32, FP32, states, skip_unchanged_v=skip_unchanged_v),
            StepVariant(BF16, BF16, states, skip_unchanged_v=skip_unchanged_v),
            StepVariant(BF16, BF16, states, stochastic=True, skip_unchanged_v=skip_unchanged_v),
            StepVariant(BF16, BF16, states, "int16", skip_unchanged_v=skip_unchanged_v),
            StepVariant(BF16, BF16, states, "int8", skip_unchanged_v=skip_unchanged_v),
            StepVariant(FP16, FP16, states, "float32", skip_unchanged_v=skip_unchanged_v),
        ]
        variants += [variant._replace(aligned=False) for variant in variants[-6:] if not skip_unchanged_v]
    # float32 weights with a low-precision copy; see step/external_grads.py.
    for low_precision_copy, grad, aligned in (
        (BF16, BF16, True),
        (BF16, BF16, False),
        (BF16, FP32, True),
        (FP32, FP32, True),
    ):
        variants.append(StepVariant(low_precision_copy, grad, master="float32", aligned=aligned, param_is_copy=True))
    for states in STATES:
        variants += [
            StepVariant(FP32, FP32, states, telemetry=True),
            StepVariant(BF16, BF16, states, stochastic=True, telemetry=True),
            StepVariant(BF16, BF16, states, "int8", telemetry=True),
            StepVariant(FP16, FP16, states, "float32", telemetry=True),
        ]
    return sorted(set(variants), key=variants.index)


def field_values(variant: StepVariant) -> set[Any]:
    """Return a variant's (field, value) pairs and its (states, master) pair."""
    return {*variant._asdict().items(), (variant.states, variant.master)}


def covering(variants: list[StepVariant]) -> list[StepVariant]:
    """Return a few variants that contain each field value of `variants`.

    The TIGHT variants are included.
    """
    chosen = [*TIGHT]
    missing = set().union(*map(field_values, variants)).difference(*map(field_values, TIGHT))
    while missing:
        chosen.append(max(variants, key=lambda variant: len(field_values(variant) & missing)))
        missing -= field_values(chosen[-1])
    return chosen


def recorded(launch: Callable[[], None]) -> list[Launch]:
    """Call a function that launches kernels; return each launch's compile request."""
    launches = []

    def record(*, compile: dict[str, Any], **_: Any) -> bool:
        options = {name: compile[name] for name in ("num_warps", "num_ctas", "num_stages", "enable_fp_fusion")}
        launches.append(
            Launch(compile["key"], compile["signature"], compile["constants"], compile["configs"][0], options)
        )
        return True  # neither compile nor launch

    triton.knobs.runtime.jit_cache_hook = record
    launch()
    return launches


def record_launches(variant: StepVariant) -> list[Launch]:
    """Call `adax_step` on varied tables; return each launch's compile request.

    The tables have several sizes and contents.
    """

    def launch() -> None:
        for tensors, chunks, value in ((1, 1, 0.0), (1, 16, 1.0), (2, 3, 1e-3), (16, 4096, float("nan"))):
            chunk_sums = torch.zeros(chunks, 5) if variant.telemetry else None
            tables = torch.full((tensors, 9), 16 * tensors), torch.arange(chunks), torch.full((tensors, 10), value)
            adax_step(*tables, variant, chunk_sums)

    return recorded(launch)


def compile_launch(kernel: Any, launch: Launch, target: GPUTarget) -> Any:
    source = ASTSource(kernel, launch.signature, launch.constants, launch.attributes)
    return triton.compile(source, target=target, options=launch.options)


def stream_of(line: str) -> str:
    match = STREAM.search(line)
    # A load that is merged with a sign extension has the source line of the extension.
    return match[1] if match else "master" if "join_master(" in line else "exp_avg"


def read_accesses(code: str) -> list[tuple[str, str, str, int]]:
    """Return (region, "load" or "store", stream, bits) of each vector access.

    `code` is PTX or AMD assembly, and the accesses are in its order. The region is "tile", "tail", or "table" for
    accesses outside `_update_tile`. The debug information gives the source line of each access, and that gives region
    and stream.
    """
    source = Path(inspect.getsourcefile(adax_step_kernel.fn)).read_text().splitlines()
    calls = [number for number, line in enumerate(source, start=1) if re.match(r"\s+(?:.* = )?_update_tile\(", line)]
    assert len(calls) == 2, "one call for the tile, then one for the tail"
    accesses = []
    for location, kind, bits in located_accesses(code, LOCATION):
        stream = stream_of(source[int(location[1]) - 1])
        # A call may extend over several lines, and the debug information may give any of them.
        region = "table" if location[2] is None else "tile" if int(location[2]) < calls[1] else "tail"
        accesses.append((region, kind, stream, bits))
    return accesses


def located_accesses(code: str, location: re.Pattern[str]) -> Iterator[tuple[Any, str, int]]:
    """Yield (match of its location, "load" or "store", bits) per vector access.

    `code` is PTX or AMD assembly.
    """
    last = None
    for line in code.splitlines():
        last = location.search(line) or last
        if match := PTX_ACCESS.search(line):
            yield last, {"ld": "load", "st": "store"}[match[1]], int(match[2] or 1) * int(match[3])
        elif match := AMD_ACCESS.match(line):
            yield last, match[1], amd_bits(match[2])


def amd_bits(operation: str) -> int:
    for name, bits in (("byte", 8), ("short", 16)):
        if name in operation:
            return bits
    return 32 * int(operation.removeprefix("dword").removeprefix("x") or 1)


def sass_bits(operation: str) -> int:
    wide = re.search(r"\.(64|128|256)\b", operation)
    narrow = re.search(r"\.[US](8|16)\b", operation)
    return int(wide[1]) if wide else int(narrow[1]) if narrow else 32


def machine_code(cubin: bytes) -> bytes:
    """Return the instructions of a cubin: its ELF file's .text.* section."""
    start, entry_size, count, names_index = struct.unpack_from("<40xQ10xHHH", cubin)
    sections = [struct.unpack_from("<II16xQQ", cubin, start + index * entry_size) for index in range(count)]
    names = sections[names_index][2]
    (code,) = [section for section in sections if cubin.startswith(b".text.", names + section[0])]
    return cubin[code[2] : code[2] + code[3]]


def disassemble(codes: list[bytes], architecture: str) -> list[list[str]]:
    """Return the instruction names, such as LDG.E.128, of each piece of code.

    One call of nvdisasm disassembles all pieces, since it is slow to start.
    """
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "--binary", architecture, file.name]
        dump = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    ends = list(itertools.accumulate(map(len, codes)))
    operations: list[list[str]] = [[] for _ in codes]
    for address, name in SASS_INSTRUCTION.findall(dump):
        operations[bisect.bisect_right(ends, int(address, 16))].append(name)
    for names in operations:
        while names[-1].startswith(("NOP", "BRA")):  # padding after the last EXIT
            names.pop()
    return operations


def resources(cubin: bytes) -> tuple[int, int]:
    """Return (registers per thread, stack bytes).

    cuobjdump counts spilled registers as STACK, not as LOCAL.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        dump = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", dump).groups()
    return int(registers), int(stack)


def nvidia_facts(kernels: list[Any]) -> Iterator[dict[str, Any]]:
    architecture = re.search(r"\.target (\w+)", kernels[0].asm["ptx"])[1].replace("sm_", "SM")
    codes = [machine_code(kernel.asm["cubin"]) for kernel in kernels]
    for kernel, operations in zip(kernels, disassemble(codes, architecture), strict=True):
        registers, stack = resources(kernel.asm["cubin"])
        yield {
            "registers": registers,
            "spills": stack + sum(name.startswith(("LDL", "STL")) for name in operations),
            "shared": kernel.metadata.shared + sum(name.startswith(("LDS", "STS")) for name in operations),
            "barriers": sum(name.startswith("BAR") for name in operations),
            "atomics": sum(name.startswith(("ATOM", "RED.")) for name in operations),
            "instructions": len(operations),
            "machine": [
                ({"LDG": "load", "STG": "store"}[name[:3]], sass_bits(name))
                for name in operations
                if name.startswith(("LDG", "STG"))
            ],
        }


def amd_facts(kernel: Any) -> dict[str, Any]:
    code = kernel.asm["amdgcn"]
    operations = re.findall(r"^\s+([a-z]+_\w+)", code, re.MULTILINE)
    accesses = [match for line in code.splitlines() if (match := AMD_ACCESS.match(line))]

    def count(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", code)[1])

    spills = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    return {
        "registers": count("vgpr_count"),
        "spills": sum(map(count, spills)) + sum(name.startswith("scratch_") for name in operations),
        "shared": count("group_segment_fixed_size") + sum(name.startswith("ds_") for name in operations),
        "barriers": sum(name.startswith("s_barrier") for name in operations),
        "atomics": sum(bool(re.match(r"(?:global|buffer|flat)_atomic", name)) for name in operations),
        "instructions": len(operations),
        "machine": [(match[1], amd_bits(match[2])) for match in accesses],
    }


def machine_facts(kernels: list[Any], target: GPUTarget) -> Iterator[dict[str, Any]]:
    """Yield the resources, instructions and accesses of each kernel's machine code."""
    return nvidia_facts(kernels) if target.backend == "cuda" else map(amd_facts, kernels)


def assembly(kernel: Any) -> str:
    return kernel.asm["ptx" if "ptx" in kernel.asm else "amdgcn"]


def elements_per_thread(kernel: Any, target: GPUTarget) -> int:
    return launch_shape(target.backend).chunk_size // (kernel.metadata.num_warps * target.warp_size)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def audit(target_name: str) -> list[dict[str, Any]]:
    """Return the audit results of the variants of one target."""
    target = TARGETS[target_name]
    driver.set_active(absent_device(target))
    step_module.current_backend = lambda: target.backend
    all_variants = target_name == next(iter(TARGETS)) or os.environ.get("AUDIT") == "all"
    variants = step_variants() if all_variants else covering(step_variants())
    launches = [record_launches(variant) for variant in variants]
    kernels = [compile_launch(adax_step_kernel, first, target) for first, *_ in launches]
    return [
        {
            **variant._asdict(),
            "param_dtype": dtype_name(variant.param_dtype),
            "grad_dtype": dtype_name(variant.grad_dtype),
            "keys": sorted({launch.key for launch in requests}),
            "elements_per_thread": elements_per_thread(kernel, target),
            "layout_conversions": kernel.asm["ttgir"].count("ttg.convert_layout"),
            "accesses": read_accesses(assembly(kernel)),
            **facts,
        }
        for variant, requests, kernel, facts in zip(
            variants, launches, kernels, machine_facts(kernels, target), strict=True
        )
    ]


def print_facts(audit: Callable[[str], Any], processes: int) -> None:
    """Print the audit results of all targets as JSON.

    Each target has its own process, because Triton caches device properties per process.
    """
    with multiprocessing.get_context("fork").Pool(processes, maxtasksperchild=1) as pool:
        json.dump(dict(zip(TARGETS, pool.map(audit, TARGETS, chunksize=1), strict=True)), sys.stdout)


if __name__ == "__main__":
    print_facts(audit, processes=2)
