"""Compute the scalars of a step on the GPU.

The GPU can then skip steps, and CUDA graphs can replay them.

A small kernel runs before the update. Each thread computes one tensor's row of the scalar table from its step count,
in float64. `adax_triton/update/coefficients.py` explains the closed forms.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import tables
from .adax_step import (
    DECAY,
    EPS,
    EXP_AVG_SQ_WEIGHT,
    GRAD_FACTOR,
    L2,
    ONE_MINUS_BETA1,
    RANDOM_KEY0,
    RANDOM_KEY1,
    SCALAR_COLUMNS,
    SKIP,
    STEP_SIZE,
)
from .grad_norm import MAX_PARTIALS
from .launch import launch
from .rounding import from_bits, random_bits

ROW_COLUMNS = tl.constexpr(len(tables.ROW_COLUMNS))
# Number of fields of DeviceCoefficients.
COEFFICIENT_COLUMNS = tl.constexpr(14)
# Added to the norm, as in torch.nn.utils.clip_grad_norm_.
NORM_EPS = tl.constexpr(1e-6)
# Tensors per program, one per thread.
BLOCK_SIZE = 128
# Values that a program adds at once: all partial sums of one launch of `grad_norm_kernel`.
SUM_BLOCK_SIZE = tl.constexpr(MAX_PARTIALS)


@triton.jit
def _one_minus_exp(x):
    """Return `1 - exp(-x)` for x >= 0, without cancellation."""
    series = x * (1.0 - x / 2.0 * (1.0 - x / 3.0 * (1.0 - x / 4.0)))
    return tl.where(x < 0.001, series, 1.0 - tl.exp(-x))


@triton.jit
def random_key(seed, step):
    """Return the two words of `update.rounding.random_key`.

    The seed is uint32, the step is taken modulo 2^32.

    Both words are hashes: `random_bits` with the key (0, 0).
    """
    key0 = random_bits(seed ^ random_bits(step, 0, 0), 0, 0)
    key1 = random_bits((step + 0x9E3779B9) ^ random_bits(seed ^ 0xFFFFFFFF, 0, 0), 0, 0)
    return key0, key1


@triton.jit
def _sum(values_ptr, count):
    """Return the sum of `count` float64 values; every program gets the same bits."""
    offsets = tl.arange(0, SUM_BLOCK_SIZE)
    total = tl.zeros([SUM_BLOCK_SIZE], dtype=tl.float64)
    for start in range(0, count, SUM_BLOCK_SIZE):
        total += tl.load(values_ptr + start + offsets, mask=start + offsets < count, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _clip_and_skip(grad_scale_ptr, found_inf_ptr, squares_ptr, square_count, max_grad_norm):
    """Return gradient norm, clip factor, AMP scale and whether to step."""
    grad_scale = tl.full([], 1.0, tl.float64)
    if grad_scale_ptr is not None:
        grad_scale = tl.load(grad_scale_ptr).to(tl.float64)
    norm, clip = tl.full([], float("nan"), tl.float64), tl.full([], 1.0, tl.float64)
    taken = tl.full([], 1, tl.int1)
    if squares_ptr is not None:
        norm = tl.sqrt(_sum(squares_ptr, square_count)) / grad_scale
        ratio = max_grad_norm / (norm + NORM_EPS)
        clip = tl.where(ratio > 1.0, 1.0, ratio)
        taken = norm < float("inf")
    if found_inf_ptr is not None:
        taken = taken & (tl.load(found_inf_ptr) == 0.0)
    return norm, clip, grad_scale, taken


@triton.jit(do_not_specialize=["square_count", "max_grad_norm", "n"])
def prepare_step_kernel(
    rows_ptr,
    groups_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    squares_ptr,
    scalars_ptr,
    report_ptr,
    square_count: tl.int64,
    max_grad_norm: tl.float64,
    n: tl.int64,
    BLOCK_SIZE: tl.constexpr,
):
    """Prepare the step of one block of tensors; see `prepare_step`."""
    norm, clip, grad_scale, taken = _clip_and_skip(
        grad_scale_ptr, found_inf_ptr, squares_ptr, square_count, max_grad_norm
    )
    skip = tl.where(taken, 0.0, 1.0)
    if tl.program_id(0) == 0:
        tl.store(report_ptr, norm.to(tl.float32))
        tl.store(report_ptr + 1, clip.to(tl.float32))
        tl.store(report_ptr + 2, skip)

    tensors = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = tensors < n
    rows_ptr += tensors * ROW_COLUMNS
    count_ptr = tl.load(rows_ptr, mask=mask, other=0).to(tl.pointer_type(tl.int64))
    groups_ptr += tl.load(rows_ptr + 1, mask=mask, other=0) * COEFFICIENT_COLUMNS
    lr_address = tl.load(rows_ptr + 2, mask=mask, other=0)

    # other=1.0 keeps threads without a tensor from dividing by 0.
    group_lr = tl.load(groups_ptr, mask=mask, other=1.0)
    bias_rate = tl.load(groups_ptr + 1, mask=mask, other=1.0)
    one_minus_beta1 = tl.load(groups_ptr + 2, mask=mask, other=1.0)
    w_factor = tl.load(groups_ptr + 3, mask=mask, other=1.0)
    w_power = tl.load(groups_ptr + 4, mask=mask, other=1.0)
    w_exponent = tl.load(groups_ptr + 5, mask=mask, other=1.0)
    w_rate = tl.load(groups_ptr + 6, mask=mask, other=1.0)
    normalized_eps = tl.load(groups_ptr + 7, mask=mask, other=1.0)
    unnormalized_eps = tl.load(groups_ptr + 8, mask=mask, other=1.0)
    smallest_eps = tl.load(groups_ptr + 9, mask=mask, other=1.0)
    decoupled_decay = tl.load(groups_ptr + 10, mask=mask, other=1.0)
    l2 = tl.load(groups_ptr + 11, mask=mask, other=1.0)
    grad_sign = tl.load(groups_ptr + 12, mask=mask, other=1.0)
    seed = tl.load(groups_ptr + 13, mask=mask, other=1.0)

    device_lr = tl.load(lr_address.to(tl.pointer_type(tl.float32)), mask=mask & (lr_address != 0), other=0.0)
    lr = tl.where(lr_address != 0, device_lr.to(tl.float64), group_lr)
    count = tl.load(count_ptr, mask=mask, other=0)
    step = count + 1
    t = step.to(tl.float64)
    weight = w_factor * tl.exp(-w_power * tl.log(t) - w_exponent * t) / _one_minus_exp(w_rate * t)
    eps = tl.maximum(normalized_eps + unnormalized_eps * tl.sqrt(weight), smallest_eps)
    # Cast through int64, because casts of float64 to uint32 differ between backends.
    key0, key1 = random_key(seed.to(tl.int64).to(tl.uint32), step.to(tl.uint32))

    scalars_ptr += tensors * SCALAR_COLUMNS
    tl.store(scalars_ptr + STEP_SIZE, (lr / _one_minus_exp(bias_rate * t)).to(tl.float32), mask=mask)
    tl.store(scalars_ptr + ONE_MINUS_BETA1, one_minus_beta1.to(tl.float32), mask=mask)
    tl.store(scalars_ptr + EXP_AVG_SQ_WEIGHT, weight.to(tl.float32), mask=mask)
    tl.store(scalars_ptr + EPS, eps.to(tl.float32), mask=mask)
    tl.store(scalars_ptr + DECAY, (lr * decoupled_decay).to(tl.float32), mask=mask)
    tl.store(scalars_ptr + L2, l2.to(tl.float32), mask=mask)
    tl.store(scalars_ptr + GRAD_FACTOR, (grad_sign * clip / grad_scale).to(tl.float32), mask=mask)
    tl.store(scalars_ptr + RANDOM_KEY0, from_bits(key0), mask=mask)
    tl.store(scalars_ptr + RANDOM_KEY1, from_bits(key1), mask=mask)
    tl.store(scalars_ptr + SKIP, skip, mask=mask)
    tl.store(count_ptr, tl.where(taken, step, count), mask=mask)


def prepare_step(
    rows: torch.Tensor,
    groups: torch.Tensor,
    scalars: torch.Tensor,
    report: torch.Tensor,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    squares: torch.Tensor | None = None,
    max_grad_norm: float = float("inf"),
) -> None:
    """Take or skip a step: advance step counts and write scalars.

    A step is skipped if `found_inf` is not 0, or if gradients are clipped and their norm is not finite. All tensors are
    on one device and contiguous.

    Args:
        rows: (n, 3) int64, see `tables.ROW_COLUMNS`: the address of the tensor's step count, 0-d int64; the row of
            `groups`; the address of its learning rate, float32, or 0 to use the group's. No two rows have the same
            step count.
        groups: (k, 14) float64: the fields of `adax_triton.update.coefficients.DeviceCoefficients` in order.
        scalars: (n, 10) float32, written: see `tables.SCALAR_COLUMNS`, for step t = count + 1. `grad_factor` is
            multiplied by the clip factor and divided by the scale.
        report: (3,) float32, written:
            [0] the norm of the unscaled gradients, or NaN if it is not measured;
            [1] the clip factor `min(1, max_grad_norm / (norm + 1e-6))` of `torch.nn.utils.clip_grad_norm_`, or 1;
            [2] 1 if the step is skipped, else 0.
        grad_scale: scale of the gradients, 1 element, float32 or float64. Default: None, which means 1.
        found_inf: overflow flag, 1 element, float32 or float64. Default: None, which means 0.
        squares: (m,) float64, their sum is the sum of squares of the gradients, still scaled. Default: None, do not
            measure or clip.
        max_grad_norm: limit of the norm, used with `squares`. Default: inf, measure the norm and do not clip.

    The caller keeps all tensors of the table alive until the launch is enqueued.
    """
    n, square_count = rows.shape[0], 0 if squares is None else squares.numel()
    programs = max(1, triton.cdiv(n, BLOCK_SIZE))  # at least one, which writes the report
    launch(
        prepare_step_kernel,
        programs,
        (rows, groups, grad_scale, found_inf, squares, scalars, report, square_count, max_grad_norm, n),
        tuple([None if tensor is None else tensor.dtype for tensor in (grad_scale, found_inf, squares)]),
        lambda: {"BLOCK_SIZE": BLOCK_SIZE},
        {},
    )
