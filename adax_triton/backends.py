"""Which code steps a tensor, and how a list of tensors is handed to it."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .cpu import COMPILE_FROM_NUMEL, compiler_problem, update_cpu, update_eager, update_small_cpu
from .flat_buffer import AddressTable, is_dense, memory_run
from .schedule import StepScalars

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNED_BYTES = 16
_MOST_TABLES = 64


class TensorStep(NamedTuple):
    """One tensor's share of a step: real tensors of equal shape on one device, and the scalars' row."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    scalar_row: int

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four tensors, in the order of every update."""
        return self.param, self.grad, self.exp_avg, self.exp_avg_sq

    def mapped(self, function: Callable[[Tensor], Tensor]) -> TensorStep:
        """Return this step on what `function` makes of each tensor."""
        param, grad, exp_avg, exp_avg_sq = map(function, self.tensors)
        return TensorStep(param, grad, exp_avg, exp_avg_sq, self.scalar_row)


class Bucket(NamedTuple):
    """What the tensors of one launch have in common."""

    device: torch.device
    param_dtype: torch.dtype
    grad_dtype: torch.dtype
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

    def run(self, steps: list[TensorStep], scalars: list[StepScalars]) -> None:
        """Update every tensor of `steps` in place: one launch per bucket on the kernel's devices, else one by one.

        Args:
            steps: the tensors; each names its row of `scalars`.
            scalars: one row per (group, step).
        """
        kernel: dict[tuple[torch.device, torch.dtype], bool] = {}
        buckets: dict[Bucket, list[TensorStep]] = defaultdict(list)
        small: dict[tuple[int, torch.dtype, torch.dtype], list[tuple[Tensor, Tensor, Tensor, Tensor]]] = defaultdict(
            list
        )
        copies: list[tuple[Tensor, Tensor]] = []
        for given in steps:
            step = _laid_out_alike(given, copies)
            kind = step.param.device, step.param.dtype
            if kind not in kernel:
                kernel[kind] = uses_kernel(*kind)
            if kernel[kind]:
                buckets[_bucket(step)].append(step)
                continue
            tensors = step.mapped(memory_run).tensors
            if step.param.device.type != "cpu":
                update_eager(*tensors, scalars[step.scalar_row])
            elif step.param.numel() < COMPILE_FROM_NUMEL:
                small[step.scalar_row, step.param.dtype, step.grad.dtype].append(tensors)
            else:
                update_cpu(*tensors, scalars[step.scalar_row])
        for (scalar_row, _, _), quads in small.items():
            update_small_cpu(quads, scalars[scalar_row])
        for bucket, alike in buckets.items():
            self._launch(bucket, alike, scalars)
        for original, copy in copies:
            original.copy_(copy)

    def _launch(self, bucket: Bucket, steps: list[TensorStep], scalars: list[StepScalars]) -> None:
        from adax_triton.kernels.adax_step import adax_step, chunk_size

        rows = [
            (
                step.param.data_ptr(),
                step.grad.data_ptr(),
                step.exp_avg.data_ptr(),
                step.exp_avg_sq.data_ptr(),
                step.param.numel(),
                step.scalar_row,
            )
            for step in steps
        ]
        table = self._table(bucket, rows[0][0], chunk_size())
        table.refresh(rows, [row[4] for row in rows])
        adax_step(
            table.tensors,
            table.chunks,
            table.upload(torch.tensor(scalars, dtype=torch.float32, device="cpu")),
            param_dtype=bucket.param_dtype,
            grad_dtype=bucket.grad_dtype,
            aligned=bucket.aligned,
        )
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


def _bucket(step: TensorStep) -> Bucket:
    addresses = step.param.data_ptr() | step.grad.data_ptr() | step.exp_avg.data_ptr() | step.exp_avg_sq.data_ptr()
    return Bucket(step.param.device, step.param.dtype, step.grad.dtype, addresses % _ALIGNED_BYTES == 0)


def _laid_out_alike(step: TensorStep, copies: list[tuple[Tensor, Tensor]]) -> TensorStep:
    """Return the step on dense tensors in which elements of equal indices lie at equal distances from the start.

    Dense tensors of equal strides are so already. A gradient that is not is copied into the parameter's layout. For a
    parameter with gaps, contiguous copies of all stand in, and `copies` gets the pairs to copy back.
    """
    if all(tensor.is_contiguous() for tensor in step.tensors):
        return step
    strides = step.param.stride()
    if is_dense(step.param) and step.exp_avg.stride() == strides and step.exp_avg_sq.stride() == strides:
        if step.grad.stride() != strides:
            grad = torch.empty_strided(step.grad.shape, strides, dtype=step.grad.dtype, device=step.grad.device)
            return step._replace(grad=grad.copy_(step.grad))
        return step
    contiguous = step.mapped(Tensor.contiguous)
    for original, copy in zip(step.tensors, contiguous.tensors, strict=True):
        if original is not step.grad and copy.data_ptr() != original.data_ptr():
            copies.append((original, copy))
    return contiguous
