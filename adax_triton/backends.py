"""Which code steps a tensor, and how a list of tensors is handed to it."""

from __future__ import annotations

import os
from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from .cpu import COMPILE_FROM_NUMEL, compiler_problem, update_cpu, update_eager, update_small_cpu, update_stored
from .flat_buffer import AddressTable
from .schedule import StepScalars
from .tensor_step import TensorStep, laid_out_alike

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNED_BYTES = 16
_MOST_TABLES = 64
# Weights of the newest squared gradient below which about one group of 32 elements in ten, or fewer, still changes a
# bit of its second moment in a step: the coarser the code, the earlier. From here the kernel writes only those.
_SETTLED_BELOW = {"float32": 2.0**-27, "bfloat16": 2.0**-15, "low": 2.0**-16, "lowest": 2.0**-14}


class Bucket(NamedTuple):
    """What the tensors of one launch have in common."""

    device: torch.device
    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    states: str
    master: str | None
    stochastic: bool
    settled: bool
    aligned: bool


def uses_kernel(device: torch.device, param_dtype: torch.dtype) -> bool:
    """Whether the Triton kernel steps parameters of this kind; CPU tensors only in Triton's interpreter."""
    return param_dtype in _KERNEL_DTYPES and (device.type == "cuda" or (device.type == "cpu" and _interpreting()))


def explain_backend(device: torch.device, param_dtype: torch.dtype) -> tuple[str, str]:
    """Return `"triton"`, `"compiled"` or `"eager"`, what steps parameters of this kind, and why it is this one."""
    if uses_kernel(device, param_dtype):
        interpreted = ", in the interpreter because TRITON_INTERPRET is set" if device.type == "cpu" else ""
        return "triton", f"the fused kernel{interpreted}"
    if device.type != "cpu":
        return "eager", f"uncompiled PyTorch: the kernel does not take {param_dtype} on {device.type}"
    problem = compiler_problem()
    if problem is not None:
        return "eager", f"uncompiled PyTorch: {problem}"
    return "compiled", f"one compiled pass; less than {COMPILE_FROM_NUMEL:,} elements uncompiled"


def _interpreting() -> bool:
    if os.environ.get("TRITON_INTERPRET", "0") == "0":
        return False
    from adax_triton.kernels.launch import is_interpreted

    return is_interpreted()


class Stepper:
    """Runs one step's tensors, and keeps the launch tables between steps."""

    def __init__(self) -> None:
        self._tables: dict[tuple[Bucket, int, int], AddressTable] = {}

    def run(self, steps: list[TensorStep], scalars: list[StepScalars], keys: list[tuple[int, int]]) -> None:
        """Update every tensor of `steps` in place: one launch per bucket on the kernel's devices, else one by one.

        Args:
            steps: the tensors; each names its row of `scalars`.
            scalars: one row per (group, step).
            keys: the random key of each row, see `rounding.random_key`.
        """
        kernel: dict[tuple[torch.device, torch.dtype], bool] = {}
        buckets: dict[Bucket, list[TensorStep]] = defaultdict(list)
        small: dict[tuple[int, torch.dtype, torch.dtype], list[tuple[Tensor, Tensor, Tensor, Tensor]]] = defaultdict(
            list
        )
        copies: list[tuple[Tensor, Tensor]] = []
        for given in steps:
            step = laid_out_alike(given, copies)
            kind = step.param.device, step.param.dtype
            if kind not in kernel:
                kernel[kind] = uses_kernel(*kind)
            if kernel[kind]:
                buckets[_bucket(step, scalars[step.scalar_row])].append(step)
                continue
            runs = step.as_runs()
            tensors = runs.tensors
            if not step.is_plain:
                update_stored(runs, scalars[step.scalar_row], keys[step.scalar_row])
            elif step.param.device.type != "cpu":
                update_eager(*tensors, scalars[step.scalar_row])
            elif step.param.numel() < COMPILE_FROM_NUMEL:
                small[step.scalar_row, step.param.dtype, step.grad.dtype].append(tensors)
            else:
                update_cpu(*tensors, scalars[step.scalar_row])
        for (scalar_row, _, _), quads in small.items():
            update_small_cpu(quads, scalars[scalar_row])
        if buckets:
            scalar_table = _scalar_table(scalars, keys)
            for bucket, alike in buckets.items():
                self._launch(bucket, alike, scalar_table)
        for original, copy in copies:
            original.copy_(copy)

    def _launch(self, bucket: Bucket, steps: list[TensorStep], scalars: Tensor) -> None:
        from adax_triton.kernels.adax_step import adax_step, chunk_size
        from adax_triton.kernels.variants import StepVariant

        rows = [(*_addresses(step), step.first_element, step.param.numel(), step.scalar_row) for step in steps]
        table = self._table(bucket, rows[0][0], chunk_size())
        table.refresh(rows, [row[7] for row in rows])
        adax_step(table.tensors, table.chunks, table.upload(scalars), StepVariant(*bucket[1:]))
        # The kernel writes behind autograd's back; a backward that still needs the old values must fail, not mislead.
        torch.autograd.graph.increment_version([step.param for step in steps])

    def _table(self, bucket: Bucket, first_address: int, chunk_size: int) -> AddressTable:
        # ZeRO calls step() once per group, so several tables are live at once. One whose tensors have moved is never
        # found again: forget all when there are many. The allocator orders reuse of a table's memory by one stream.
        stream = torch.cuda.current_stream(bucket.device).cuda_stream if bucket.device.type == "cuda" else 0
        key = bucket, first_address, stream
        if key not in self._tables:
            if len(self._tables) >= _MOST_TABLES:
                self._tables.clear()
            self._tables[key] = AddressTable(bucket.device, chunk_size)
        return self._tables[key]


def _addresses(step: TensorStep) -> tuple[int, ...]:
    return tuple(
        0 if tensor is None else tensor.data_ptr() for tensor in (*step.tensors, step.master, step.group_exponents)
    )


def _scalar_table(scalars: list[StepScalars], keys: list[tuple[int, int]]) -> Tensor:
    # The words of the keys keep their bits among the floats.
    words = torch.tensor(keys, dtype=torch.int64, device="cpu").to(torch.int32).view(torch.float32)
    return torch.cat([torch.tensor(scalars, dtype=torch.float32, device="cpu"), words], dim=1)


def _bucket(step: TensorStep, scalars: StepScalars) -> Bucket:
    misaligned = 0
    for address in _addresses(step._replace(group_exponents=None)):
        misaligned |= address % _ALIGNED_BYTES
    return Bucket(
        step.param.device,
        step.param.dtype,
        step.grad.dtype,
        step.states,
        None if step.master is None else str(step.master.dtype).removeprefix("torch."),
        step.stochastic,
        scalars.exp_avg_sq_weight < _SETTLED_BELOW[step.states],
        misaligned == 0,
    )
