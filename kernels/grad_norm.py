"""Sum the squares of all gradients in one read, without atomics.

The result has the same bits at every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .adax_step import CHUNK_BITS, CHUNK_MASK, GRAD, NUMEL, TENSOR_COLUMNS
from .launch import current_backend, launch, launch_shape
from .variants import TRITON_DTYPES

# Maximum number of programs. Each writes one partial sum, and all fit on a large GPU at once.
MAX_PARTIALS = 1024


@triton.jit
def _locate(tensors_ptr, chunks_ptr, index, chunk_count, GRAD_DTYPE: tl.constexpr, CHUNK_SIZE: tl.constexpr):
    present = index < chunk_count
    chunk = tl.load(chunks_ptr + index, mask=present, other=0)
    row_ptr = tensors_ptr + (chunk >> CHUNK_BITS) * TENSOR_COLUMNS
    start = (chunk & CHUNK_MASK) * CHUNK_SIZE  # int64: a tensor may exceed 2^31 elements
    address = tl.load(row_ptr + GRAD, mask=present, other=0) + start * (GRAD_DTYPE.primitive_bitwidth // 8)
    numel = tl.load(row_ptr + NUMEL, mask=present, other=0)
    return address, tl.minimum(numel - start, CHUNK_SIZE).to(tl.int32)


@triton.jit(do_not_specialize=["chunk_count"])
def grad_norm_kernel(
    tensors_ptr,
    chunks_ptr,
    partials_ptr,
    chunk_count: tl.int64,  # typed and not specialized, so that all counts share one compiled kernel
    GRAD_DTYPE: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Sum squares of chunks i, i + num_programs, ... in program i.

    Each load reads VECTOR elements.
    """
    # max_contiguous limits the layout to VECTOR elements.
    offsets = tl.max_contiguous(tl.arange(0, CHUNK_SIZE), VECTOR)
    total = tl.zeros([CHUNK_SIZE], dtype=tl.float32)
    tail_total = tl.zeros([VECTOR], dtype=tl.float32)
    index = tl.program_id(0).to(tl.int64)
    address, remaining = _locate(tensors_ptr, chunks_ptr, index, chunk_count, GRAD_DTYPE, CHUNK_SIZE)
    while index < chunk_count:
        grad_ptr = address.to(tl.pointer_type(GRAD_DTYPE))
        if VECTOR > 1:
            grad_ptr = tl.multiple_of(grad_ptr, 16)
        # The tile ends at a whole vector, because a mask within one would split its accesses. The remaining elements
        # are a small tile of their own.
        tile_end = (remaining // VECTOR) * VECTOR
        grad = tl.load(grad_ptr + offsets, mask=offsets < tile_end, other=0.0)
        # Look up the next chunk before the gradients are used, so that its address does not wait for them.
        index += tl.num_programs(0)
        next_address, next_remaining = _locate(tensors_ptr, chunks_ptr, index, chunk_count, GRAD_DTYPE, CHUNK_SIZE)
        grad = grad.to(tl.float32)
        total += grad * grad
        if tile_end != remaining:
            tail = tile_end + tl.arange(0, VECTOR)
            tail_grad = tl.load(grad_ptr + tail, mask=tail < remaining, other=0.0).to(tl.float32)
            tail_total += tail_grad * tail_grad
        address, remaining = next_address, next_remaining
    partial = tl.sum(total, axis=0) + tl.sum(tail_total, axis=0)
    tl.store(partials_ptr + tl.program_id(0), partial.to(tl.float64))


def partial_count(chunks: int) -> int:
    """Return the number of partial sums for a table of `chunks` chunks."""
    return max(1, min(chunks, MAX_PARTIALS))


def grad_norm_partials(
    tensors: torch.Tensor,
    chunks: torch.Tensor,
    partials: torch.Tensor,
    grad_dtype: torch.dtype,
    aligned: bool,
) -> None:
    """Write partial sums of the squared norm of all gradients.

    Gradients are converted to float32, squared and added in float32. The order depends only on the chunks and the
    number of partial sums. If a gradient or its square is not finite, its partial sum is inf or NaN. The caller adds
    the partial sums in float64.

    Args:
        tensors: (n, 9) int64, the table of `adax_step`; only the columns `grad` and `numel` are read.
        chunks: (k,) int64, k >= 0: `tensor << 32 | chunk` for each `launch.chunk_size()` elements of each tensor.
        partials: (m,) float64, 1 <= m <= MAX_PARTIALS, all written; see `partial_count`.
        grad_dtype: dtype of all gradients: float32, bfloat16, float16 or float64.
        aligned: whether every gradient's address is a multiple of 16 bytes.

    The caller keeps all gradients alive until the launch is enqueued.
    """
    shape = launch_shape(current_backend())
    dtype = TRITON_DTYPES[grad_dtype]
    # The widest access is 16 bytes.
    vector = min(128 // dtype.primitive_bitwidth, shape.elements_per_thread) if aligned else 1
    launch(
        grad_norm_kernel,
        partials.numel(),
        (tensors, chunks, partials, chunks.numel()),
        (grad_dtype, vector),
        lambda: {"GRAD_DTYPE": dtype, "CHUNK_SIZE": shape.chunk_size, "VECTOR": vector},
        {"num_warps": shape.num_warps},
    )
