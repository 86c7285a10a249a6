"""The fused update: one launch for any number of tensors, reached by address.

The tensor table has one int64 row per tensor; the chunk table has one int64 per program; the scalar table has one
float32 row per (group, step). A program finds its chunk, its tensor's row and that row's scalars, loads each element
once, computes in float32 and stores once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import current_backend, launch_shape

TENSOR_COLUMNS = tl.constexpr(6)  # addresses of param, grad, exp_avg, exp_avg_sq; numel; scalar row
SCALAR_COLUMNS = tl.constexpr(7)  # step_size, one_minus_beta1, exp_avg_sq_weight, eps, decay, l2, grad_factor

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,  # gradients only
}


@triton.jit
def _update_tile(
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, offsets, mask, scalars_ptr, PARAM_DTYPE: tl.constexpr
):
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0)
    param = tl.load(param_ptr + offsets, mask=mask, other=0.0)
    exp_avg = tl.load(exp_avg_ptr + offsets, mask=mask, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offsets, mask=mask, other=0.0)
    step_size = tl.load(scalars_ptr)
    one_minus_beta1 = tl.load(scalars_ptr + 1)
    exp_avg_sq_weight = tl.load(scalars_ptr + 2)
    eps = tl.load(scalars_ptr + 3)
    decay = tl.load(scalars_ptr + 4)
    l2 = tl.load(scalars_ptr + 5)
    grad_factor = tl.load(scalars_ptr + 6)

    param = param.to(tl.float32)
    grad = grad.to(tl.float32) * grad_factor + param * l2
    exp_avg += (grad - exp_avg) * one_minus_beta1
    exp_avg_sq += (grad * grad - exp_avg_sq) * exp_avg_sq_weight
    param -= param * decay + exp_avg / (tl.sqrt(exp_avg_sq) + eps) * step_size

    tl.store(param_ptr + offsets, param.to(PARAM_DTYPE), mask=mask)
    tl.store(exp_avg_ptr + offsets, exp_avg, mask=mask)
    tl.store(exp_avg_sq_ptr + offsets, exp_avg_sq, mask=mask)


@triton.jit
def adax_step_kernel(
    tensors_ptr,
    chunks_ptr,
    scalars_ptr,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    VECTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Update one chunk of one tensor.

    `chunks_ptr[program] = tensor << 32 | chunk`. VECTOR is the elements of one 16-byte access of the widest dtype
    stored; ALIGNED says that all four addresses of every tensor are multiples of 16 bytes.
    """
    chunk = tl.load(chunks_ptr + tl.program_id(0))
    row_ptr = tensors_ptr + (chunk >> 32) * TENSOR_COLUMNS
    start = (chunk & 0xFFFFFFFF) * CHUNK_SIZE  # int64: a tensor may exceed 2^31 elements
    param_ptr = tl.load(row_ptr).to(tl.pointer_type(PARAM_DTYPE))
    grad_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(GRAD_DTYPE))
    exp_avg_ptr = tl.load(row_ptr + 2).to(tl.pointer_type(tl.float32))
    exp_avg_sq_ptr = tl.load(row_ptr + 3).to(tl.pointer_type(tl.float32))
    remaining = tl.minimum(tl.load(row_ptr + 4) - start, CHUNK_SIZE).to(tl.int32)
    scalars_ptr += tl.load(row_ptr + 5) * SCALAR_COLUMNS
    if ALIGNED:
        param_ptr = tl.multiple_of(param_ptr, 16)
        grad_ptr = tl.multiple_of(grad_ptr, 16)
        exp_avg_ptr = tl.multiple_of(exp_avg_ptr, 16)
        exp_avg_sq_ptr = tl.multiple_of(exp_avg_sq_ptr, 16)
    param_ptr += start
    grad_ptr += start
    exp_avg_ptr += start
    exp_avg_sq_ptr += start

    # A mask at an arbitrary element would split every access; this one falls on a vector, and the rest is one small
    # tile. max_contiguous caps the layout at VECTOR, else the float32 stores need a trip through shared memory.
    vectors_end = (remaining // VECTOR) * VECTOR
    offsets = tl.max_contiguous(tl.arange(0, CHUNK_SIZE), VECTOR)
    _update_tile(
        param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, offsets, offsets < vectors_end, scalars_ptr, PARAM_DTYPE
    )
    if vectors_end != remaining:
        tail = vectors_end + tl.arange(0, VECTOR)
        _update_tile(param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, tail, tail < remaining, scalars_ptr, PARAM_DTYPE)


def chunk_size() -> int:
    """Return the elements one program of `adax_step` updates; the chunk table is built for it."""
    return launch_shape(current_backend()).chunk_size


def adax_step(
    tensors: torch.Tensor,
    chunks: torch.Tensor,
    scalars: torch.Tensor,
    *,
    param_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    aligned: bool,
) -> None:
    """Apply one update to every tensor of a table, in place and in one launch.

    The update is that of `adax_triton.reference.adax_update`, in float32 arithmetic.

    Args:
        tensors: (n, 6) int64: the addresses of param, grad, exp_avg and exp_avg_sq, the number of elements, and the row
            of `scalars`. The four arrays are contiguous; exp_avg and exp_avg_sq are float32.
        chunks: (programs,) int64: `tensor << 32 | chunk` for each run of `chunk_size()` elements of each tensor.
        scalars: (rows, 7) float32: the fields of `StepScalars` in order.
        param_dtype: float32, bfloat16 or float16, that of every parameter of the table.
        grad_dtype: likewise, or float64.
        aligned: every address is a multiple of 16 bytes.

    The caller keeps every tensor behind an address alive until the launch is enqueued.
    """
    if chunks.numel() == 0:
        return
    shape = launch_shape(current_backend())
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(tensors.device if tensors.is_cuda else -1):
        adax_step_kernel[(chunks.numel(),)](
            tensors,
            chunks,
            scalars,
            PARAM_DTYPE=TRITON_DTYPES[param_dtype],
            GRAD_DTYPE=TRITON_DTYPES[grad_dtype],
            CHUNK_SIZE=shape.chunk_size,
            VECTOR=4,  # exp_avg and exp_avg_sq are float32
            ALIGNED=aligned,
            num_warps=shape.num_warps,
        )
