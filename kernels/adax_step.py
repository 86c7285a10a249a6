"""Fused AdaX update on the GPU.

One launch updates every tensor of an address table.

The tensor table has one int64 row per tensor; the chunk table has one int64 per program; the scalar table has one row
of 32-bit words per parameter group and step count. A program finds its chunk, its tensor's row and that row's scalars,
loads each element once, computes in float32 and stores once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import tables
from .launch import current_backend, launch, launch_shape
from .quantization import GROUP, dequantize_moments, quantize_moments
from .rounding import HALF_BFLOAT16, differ, join_master, random_bits, round_to_bfloat16, split_master, to_float32
from .telemetry import TELEMETRY_COLUMNS, add_sums, tile_sums
from .variants import StepVariant

CHUNK_BITS = tl.constexpr(tables.CHUNK_BITS)
CHUNK_MASK = tl.constexpr((1 << tables.CHUNK_BITS) - 1)
TENSOR_COLUMNS = tl.constexpr(len(tables.TENSOR_COLUMNS))
_PARAM = tl.constexpr(tables.TENSOR_COLUMNS.index("param"))
GRAD = tl.constexpr(tables.TENSOR_COLUMNS.index("grad"))
_EXP_AVG = tl.constexpr(tables.TENSOR_COLUMNS.index("exp_avg"))
_EXP_AVG_SQ = tl.constexpr(tables.TENSOR_COLUMNS.index("exp_avg_sq"))
_MASTER = tl.constexpr(tables.TENSOR_COLUMNS.index("master"))
_GROUP_EXPONENTS = tl.constexpr(tables.TENSOR_COLUMNS.index("group_exponents"))
_FIRST_ELEMENT = tl.constexpr(tables.TENSOR_COLUMNS.index("first_element"))
NUMEL = tl.constexpr(tables.TENSOR_COLUMNS.index("numel"))
_SCALAR_ROW = tl.constexpr(tables.TENSOR_COLUMNS.index("scalar_row"))

SCALAR_COLUMNS = tl.constexpr(len(tables.SCALAR_COLUMNS))
STEP_SIZE = tl.constexpr(tables.SCALAR_COLUMNS.index("step_size"))
ONE_MINUS_BETA1 = tl.constexpr(tables.SCALAR_COLUMNS.index("one_minus_beta1"))
EXP_AVG_SQ_WEIGHT = tl.constexpr(tables.SCALAR_COLUMNS.index("exp_avg_sq_weight"))
EPS = tl.constexpr(tables.SCALAR_COLUMNS.index("eps"))
DECAY = tl.constexpr(tables.SCALAR_COLUMNS.index("decay"))
L2 = tl.constexpr(tables.SCALAR_COLUMNS.index("l2"))
GRAD_FACTOR = tl.constexpr(tables.SCALAR_COLUMNS.index("grad_factor"))
RANDOM_KEY0 = tl.constexpr(tables.SCALAR_COLUMNS.index("random_key0"))
RANDOM_KEY1 = tl.constexpr(tables.SCALAR_COLUMNS.index("random_key1"))
SKIP = tl.constexpr(tables.SCALAR_COLUMNS.index("skip"))


@triton.jit
def _scalars(scalars_ptr):
    step_size = tl.load(scalars_ptr + STEP_SIZE)
    one_minus_beta1 = tl.load(scalars_ptr + ONE_MINUS_BETA1)
    exp_avg_sq_weight = tl.load(scalars_ptr + EXP_AVG_SQ_WEIGHT)
    eps = tl.load(scalars_ptr + EPS)
    decay = tl.load(scalars_ptr + DECAY)
    l2 = tl.load(scalars_ptr + L2)
    grad_factor = tl.load(scalars_ptr + GRAD_FACTOR)
    key0 = tl.load(scalars_ptr + RANDOM_KEY0).to(tl.uint32, bitcast=True)
    key1 = tl.load(scalars_ptr + RANDOM_KEY1).to(tl.uint32, bitcast=True)
    return (step_size, one_minus_beta1, exp_avg_sq_weight, eps, decay, l2, grad_factor), key0, key1


@triton.jit
def _update(param, grad, exp_avg, exp_avg_sq, scalars):
    step_size, one_minus_beta1, exp_avg_sq_weight, eps, decay, l2, grad_factor = scalars
    grad = grad * grad_factor + param * l2
    exp_avg += (grad - exp_avg) * one_minus_beta1
    exp_avg_sq += (grad * grad - exp_avg_sq) * exp_avg_sq_weight
    # rsqrt takes 6 instructions less than a division. A nonzero root is at least 2^-63, so root * root does not
    # underflow. If it overflows, the update is 0.
    root = tl.sqrt(exp_avg_sq) + eps
    param -= param * decay + exp_avg * tl.rsqrt(root * root) * step_size
    return param, exp_avg, exp_avg_sq


@triton.jit
def _stored_weight(param, master):
    if master is None:
        return to_float32(param)
    elif master.dtype == tl.float32:
        return master
    else:
        return join_master(param, master)


@triton.jit
def _store_exponents(group_exponents_ptr, exponents, groups, end, THREADS_PER_GROUP: tl.constexpr):
    exponents = exponents.to(group_exponents_ptr.dtype.element_ty)
    stored = groups * GROUP < end
    if THREADS_PER_GROUP > 0:
        # Every thread of a group holds the exponent. Give each thread a column and store only the first: a single
        # column would go through shared memory.
        columns = tl.arange(0, THREADS_PER_GROUP)[None, :]
        groups = tl.max_contiguous(groups + columns, [1, THREADS_PER_GROUP])
        exponents = tl.broadcast_to(exponents, groups.shape)
        stored = stored & (columns == 0)
    tl.store(group_exponents_ptr + groups, exponents, mask=stored)


@triton.jit
def _update_tile(
    chunk,
    tile,
    STATES: tl.constexpr,
    MASTER_DTYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SKIP_UNCHANGED_V: tl.constexpr,
    TELEMETRY: tl.constexpr,
    PARAM_IS_COPY: tl.constexpr,
    THREADS_PER_GROUP: tl.constexpr,
):
    AXIS: tl.constexpr = 1 if THREADS_PER_GROUP > 0 else 0
    pointers, scalars_ptr, first_index = chunk
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, master_ptr, group_exponents_ptr = pointers
    offsets, groups, end = tile
    mask = offsets < end
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0)
    if not PARAM_IS_COPY:
        param = tl.load(param_ptr + offsets, mask=mask, other=0.0)
    master = None
    if MASTER_DTYPE is not None:
        master = tl.load(master_ptr + offsets, mask=mask, other=0)
        param = master if PARAM_IS_COPY else join_master(param, master)
    param = to_float32(param)
    exp_avg_stored = tl.load(exp_avg_ptr + offsets, mask=mask, other=0)
    exp_avg_sq_stored = tl.load(exp_avg_sq_ptr + offsets, mask=mask, other=0)
    if STATES == "8bit_v16" or STATES == "8bit":
        exponents = tl.load(group_exponents_ptr + groups, mask=groups * GROUP < end, other=0).to(tl.uint32)
        exp_avg, exp_avg_sq = dequantize_moments(exp_avg_stored, exp_avg_sq_stored, exponents, STATES)
    else:
        exp_avg, exp_avg_sq = to_float32(exp_avg_stored), to_float32(exp_avg_sq_stored)
    scalars, key0, key1 = _scalars(scalars_ptr)

    raw_grad, old_param = to_float32(grad), param
    param, exp_avg, exp_avg_sq = _update(param, raw_grad, exp_avg, exp_avg_sq, scalars)

    # The upper 16 random bits round exp_avg_sq, the lower 16 the parameter.
    random = random_bits(first_index + offsets.to(tl.uint32), key0, key1)
    if MASTER_DTYPE == tl.float32:
        master = param
    elif MASTER_DTYPE is not None:
        param, master = split_master(param, random & 0xFF, MASTER_DTYPE)
    elif STOCHASTIC:
        param = round_to_bfloat16(param, random & 0xFFFF)

    # The skip flag is loaded last and masks only the stores, so that no other load waits for it.
    store_end = tl.where(tl.load(scalars_ptr + SKIP) == 0.0, end, 0)
    store_mask = offsets < store_end
    # Parameters are stored first: that frees their registers for the quantization.
    param = param.to(param_ptr.dtype.element_ty)
    tl.store(param_ptr + offsets, param, mask=store_mask)
    if MASTER_DTYPE is not None:
        tl.store(master_ptr + offsets, master, mask=store_mask)
    if STATES == "8bit_v16" or STATES == "8bit":
        SHIFT_FIRST: tl.constexpr = MASTER_DTYPE == tl.int8 and not TELEMETRY  # see `quantize_moments`
        exp_avg, exp_avg_sq, exponents = quantize_moments(exp_avg, exp_avg_sq, random, STATES, AXIS, SHIFT_FIRST)
        _store_exponents(group_exponents_ptr, exponents, groups, store_end, THREADS_PER_GROUP)
    elif STATES == "bfloat16":
        exp_avg, exp_avg_sq = round_to_bfloat16(exp_avg, HALF_BFLOAT16), round_to_bfloat16(exp_avg_sq, random >> 16)
    tl.store(exp_avg_ptr + offsets, exp_avg, mask=store_mask)
    v_mask = store_mask
    if SKIP_UNCHANGED_V:
        changed = differ(exp_avg_sq, exp_avg_sq_stored).to(tl.int32)
        v_mask = store_mask & (tl.max(changed, axis=AXIS, keep_dims=True) > 0)
    tl.store(exp_avg_sq_ptr + offsets, exp_avg_sq, mask=v_mask)
    if TELEMETRY:
        weight = tl.where(store_mask, _stored_weight(param, master), old_param)
        return tile_sums(raw_grad, old_param, weight, mask)
    else:
        return 0.0, 0.0, 0.0, 0.0, 0.0


@triton.jit
def _pointer(address_ptr, DTYPE: tl.constexpr, start, ALIGNED: tl.constexpr):
    pointer = tl.load(address_ptr).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start


@triton.jit
def _pointers(
    row_ptr,
    start,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    STATES: tl.constexpr,
    EXP_AVG_DTYPE: tl.constexpr,
    EXP_AVG_SQ_DTYPE: tl.constexpr,
    MASTER_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    param_ptr = _pointer(row_ptr + _PARAM, PARAM_DTYPE, start, ALIGNED)
    grad_ptr = _pointer(row_ptr + GRAD, GRAD_DTYPE, start, ALIGNED)
    exp_avg_ptr = _pointer(row_ptr + _EXP_AVG, EXP_AVG_DTYPE, start, ALIGNED)
    exp_avg_sq_ptr = _pointer(row_ptr + _EXP_AVG_SQ, EXP_AVG_SQ_DTYPE, start, ALIGNED)
    master_ptr = param_ptr
    if MASTER_DTYPE is not None:
        master_ptr = _pointer(row_ptr + _MASTER, MASTER_DTYPE, start, ALIGNED)
    group_exponents_ptr = param_ptr
    if STATES == "8bit_v16":
        group_exponents_ptr = _pointer(row_ptr + _GROUP_EXPONENTS, tl.uint8, start // GROUP, False)
    elif STATES == "8bit":
        group_exponents_ptr = _pointer(row_ptr + _GROUP_EXPONENTS, tl.uint16, start // GROUP, False)
    return param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, master_ptr, group_exponents_ptr


@triton.jit
def _tile_offsets(SIZE: tl.constexpr, VECTOR: tl.constexpr, GROUPED: tl.constexpr):
    # max_contiguous limits the layout to VECTOR elements; wider stores would go through shared memory.
    if GROUPED:
        groups = tl.arange(0, SIZE // GROUP)[:, None]
        return groups, tl.max_contiguous(groups * GROUP + tl.arange(0, GROUP)[None, :], [1, VECTOR])
    else:
        offsets = tl.max_contiguous(tl.arange(0, SIZE), VECTOR)
        return offsets, offsets


@triton.jit
def adax_step_kernel(
    tensors_ptr,
    chunks_ptr,
    scalars_ptr,
    chunk_sums_ptr,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    STATES: tl.constexpr,
    EXP_AVG_DTYPE: tl.constexpr,
    EXP_AVG_SQ_DTYPE: tl.constexpr,
    MASTER_DTYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SKIP_UNCHANGED_V: tl.constexpr,
    TELEMETRY: tl.constexpr,
    PARAM_IS_COPY: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    VECTOR: tl.constexpr,  # elements in 16 bytes of the widest stored dtype
    ALIGNED: tl.constexpr,
):
    """Update one chunk of one tensor; see `adax_step` and `StepVariant`."""
    entry = tl.load(chunks_ptr + tl.program_id(0))
    row_ptr = tensors_ptr + (entry >> CHUNK_BITS) * TENSOR_COLUMNS
    start = (entry & CHUNK_MASK) * CHUNK_SIZE  # int64: a tensor may exceed 2^31 elements
    pointers = _pointers(
        row_ptr, start, PARAM_DTYPE, GRAD_DTYPE, STATES, EXP_AVG_DTYPE, EXP_AVG_SQ_DTYPE, MASTER_DTYPE, ALIGNED
    )
    first_index = (tl.load(row_ptr + _FIRST_ELEMENT) + start).to(tl.uint32)
    remaining = tl.minimum(tl.load(row_ptr + NUMEL) - start, CHUNK_SIZE).to(tl.int32)
    scalars_ptr += tl.load(row_ptr + _SCALAR_ROW) * SCALAR_COLUMNS
    chunk = (pointers, scalars_ptr, first_index)

    # The main tile covers whole vectors or groups: a mask inside a vector would split its access. A small second tile
    # covers the remaining elements.
    GROUPED: tl.constexpr = STATES == "8bit_v16" or STATES == "8bit" or SKIP_UNCHANGED_V
    UNIT: tl.constexpr = GROUP if GROUPED else VECTOR
    THREADS_PER_GROUP: tl.constexpr = GROUP // VECTOR if GROUPED else 0
    groups, offsets = _tile_offsets(CHUNK_SIZE, VECTOR, GROUPED)
    tile_end = tl.multiple_of(remaining & -UNIT, UNIT)
    tile = (offsets, groups, tile_end)
    tail_offsets = tile_end + tl.arange(0, UNIT)
    sums = _update_tile(
        chunk, tile, STATES, MASTER_DTYPE, STOCHASTIC, SKIP_UNCHANGED_V, TELEMETRY, PARAM_IS_COPY, THREADS_PER_GROUP
    )
    if tile_end != remaining:
        tail = (tail_offsets, tile_end // GROUP + tl.arange(0, 1), remaining)
        tail_sums = _update_tile(
            chunk, tail, STATES, MASTER_DTYPE, STOCHASTIC, SKIP_UNCHANGED_V, TELEMETRY, PARAM_IS_COPY, 0
        )
        if TELEMETRY:
            sums = add_sums(sums, tail_sums)
    if TELEMETRY:
        chunk_sums_ptr += tl.program_id(0) * TELEMETRY_COLUMNS
        for column in tl.static_range(TELEMETRY_COLUMNS):
            tl.store(chunk_sums_ptr + column, sums[column])


def adax_step(
    tensors: torch.Tensor,
    chunks: torch.Tensor,
    scalars: torch.Tensor,
    variant: StepVariant,
    chunk_sums: torch.Tensor | None = None,
) -> None:
    """Update every tensor of a table, in place, in one launch.

    It is the update of `adax_triton.update.reference.adax_update`, in float32.

    Args:
        tensors: (n, 9) int64, see `tables.TENSOR_COLUMNS`. Every address points to a contiguous array.
        chunks: (programs,) int64: `tensor << 32 | chunk` for each `launch.chunk_size()` elements of each tensor.
        scalars: (rows, 10) float32, see `tables.SCALAR_COLUMNS`.
        variant: compile-time options, the same for all tensors of the table.
        chunk_sums: (programs, 5) float32, written by a variant with telemetry; see `tables.SUM_COLUMNS`.

    The caller keeps all tensors of the table alive until the launch is enqueued.
    """
    if chunks.numel() == 0:
        return
    shape = launch_shape(current_backend())
    launch(
        adax_step_kernel,
        chunks.numel(),
        (tensors, chunks, scalars, chunk_sums),
        variant,
        lambda: variant.constants(shape),
        {"num_warps": shape.num_warps},
    )
