"""Telemetry sums of the step kernel.

The step kernel writes them per chunk; `sum_rows_kernel` adds them per tensor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch
from .tables import SUM_COLUMNS

TELEMETRY_COLUMNS = tl.constexpr(len(SUM_COLUMNS))
# Rows that one program adds at a time.
ROWS_PER_PROGRAM = 512


@triton.jit
def _sum(values, mask):
    return tl.sum(tl.ravel(tl.where(mask, values, 0.0)), axis=0)


@triton.jit
def tile_sums(grad, param_before, param, mask):
    """Return the sums over a tile, in the order of `tables.SUM_COLUMNS`."""
    update = param - param_before
    return (
        _sum(grad * grad, mask),
        _sum(update * update, mask),
        _sum(param * param, mask),
        _sum((update == 0.0).to(tl.float32), mask),
        _sum((grad - grad != 0.0).to(tl.float32), mask),
    )


@triton.jit
def add_sums(left, right):
    """Return the sums of two tiles together."""
    return left[0] + right[0], left[1] + right[1], left[2] + right[2], left[3] + right[3], left[4] + right[4]


@triton.jit
def sum_rows_kernel(rows_ptr, ranges_ptr, sums_ptr, ROWS: tl.constexpr):
    """Sum one range of rows; see `sum_rows`."""
    range_ptr = ranges_ptr + tl.program_id(0) * 2
    start = tl.load(range_ptr)
    end = start + tl.load(range_ptr + 1)
    sums_ptr += tl.program_id(0) * TELEMETRY_COLUMNS
    columns = tl.arange(0, 8)[None, :]
    total = tl.zeros([ROWS, 8], dtype=tl.float32)
    while start < end:
        rows = start + tl.arange(0, ROWS)[:, None]
        mask = (rows < end) & (columns < TELEMETRY_COLUMNS)
        total += tl.load(rows_ptr + rows * TELEMETRY_COLUMNS + columns, mask=mask, other=0.0)
        start += ROWS
    columns = tl.arange(0, 8)
    tl.store(sums_ptr + columns, tl.sum(total, axis=0), mask=columns < TELEMETRY_COLUMNS)


def sum_rows(rows: torch.Tensor, ranges: torch.Tensor, sums: torch.Tensor) -> None:
    """Write `sums[i] = rows[start_i : start_i + count_i].sum(0)` for each range.

    Args:
        rows: (n, 5) float32.
        ranges: (k, 2) int64, the first row and the number of rows of each range.
        sums: (k, 5) float32, written.
    """
    if ranges.shape[0] == 0:
        return
    launch(
        sum_rows_kernel,
        ranges.shape[0],
        (rows, ranges, sums),
        None,
        lambda: {"ROWS": ROWS_PER_PROGRAM},
        {"num_warps": 8},
    )
