"""Sums for telemetry: taken by the step from what it has in registers, then added up per tensor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch
from .tables import SUM_COLUMNS

TELEMETRY_COLUMNS = tl.constexpr(len(SUM_COLUMNS))
# Rows that one program adds up at a time.
ROWS_PER_PROGRAM = 512


@triton.jit
def _sum(values, mask):
    return tl.sum(tl.ravel(tl.where(mask, values, 0.0)), axis=0)


@triton.jit
def tile_sums(grad, param_before, param, mask):
    """Return the sums over a tile of float32 values, in the order of `tables.SUM_COLUMNS`."""
    update = param - param_before
    return (
        _sum(grad * grad, mask),
        _sum(update * update, mask),
        _sum(param * param, mask),
        _sum((update == 0.0).to(tl.float32), mask),
        _sum((grad - grad != 0.0).to(tl.float32), mask),
    )


@triton.jit
def add_rows_kernel(rows_ptr, runs_ptr, sums_ptr, ROWS: tl.constexpr):
    """Add up one run of rows."""
    run_ptr = runs_ptr + tl.program_id(0) * 2
    start = tl.load(run_ptr)
    end = start + tl.load(run_ptr + 1)
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


def add_rows(rows: torch.Tensor, runs: torch.Tensor, sums: torch.Tensor) -> None:
    """Write into each row of `sums` the sum of a run of `rows`.

    Args:
        rows: (n, 5) float32.
        runs: (k, 2) int64: first row and number of rows of each run.
        sums: (k, 5) float32, written.
    """
    if runs.shape[0] == 0:
        return
    launch(
        add_rows_kernel,
        runs.shape[0],
        (rows, runs, sums),
        None,
        lambda: {"ROWS": ROWS_PER_PROGRAM},
        {"num_warps": 8},
    )
