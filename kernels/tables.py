"""Layout of the tables that the step kernels read: columns, scalar rows, chunk entries."""

from __future__ import annotations

import ctypes
import struct

# int64. Addresses of param to group_exponents, 0 where there are none; the index of the first element in its parameter,
# for the random bits; the number of elements; the row of the scalar table.
TENSOR_COLUMNS = (
    *("param", "grad", "exp_avg", "exp_avg_sq", "master", "group_exponents"),
    *("first_element", "numel", "scalar_row"),
)
# 32-bit words: `schedule.StepScalars` in order, the two words of `rounding.random_key`, and a flag. Where `skip` is not
# 0, nothing is written. float64 parameters read a row of float64, whose keys are unused.
SCALAR_COLUMNS = (
    *("step_size", "one_minus_beta1", "exp_avg_sq_weight", "eps", "decay", "l2", "grad_factor"),
    *("random_key0", "random_key1", "skip"),
)
# Sums over one chunk. The parameters are those that are stored; before the step and after it for the updates.
SUM_COLUMNS = ("grad_squares", "update_squares", "param_squares", "unchanged", "nonfinite_grads")
# An entry of the chunk table is `tensor << CHUNK_BITS | chunk`.
CHUNK_BITS = 32
# Elements that follow each other in memory and share their exponents; see `compact`.
GROUP = 32

_SCALAR_ROW = struct.Struct("7f2If")
_FLOAT64_SCALAR_ROW = struct.Struct("10d")


def scalar_row(
    scalars: tuple[float, ...], key: tuple[int, int] = (0, 0), skip: bool = False, float64: bool = False
) -> bytes:
    """Return one packed row of the scalar table.

    Args:
        scalars: the seven fields of `schedule.StepScalars`, in order.
        key: two 32-bit words from `rounding.random_key`.
        skip: write nothing.
        float64: pack the row for float64 parameters, 80 bytes instead of 40; `key` is then unused.
    """
    if float64:
        return _FLOAT64_SCALAR_ROW.pack(*scalars, 0.0, 0.0, float(skip))
    try:
        return _SCALAR_ROW.pack(*scalars, *key, float(skip))
    except OverflowError:  # struct refuses what a cast to float32 makes an infinity
        return _SCALAR_ROW.pack(*(ctypes.c_float(value).value for value in scalars), *key, float(skip))


def definitions() -> dict[str, int]:
    """Return the layout as preprocessor definitions of the C++ kernel, such as `PARAM_COLUMN` and `TENSOR_COLUMNS`."""
    columns = {
        f"{name.upper()}_COLUMN": index
        for names in (TENSOR_COLUMNS, SCALAR_COLUMNS, SUM_COLUMNS)
        for index, name in enumerate(names)
    }
    return columns | {
        "TENSOR_COLUMNS": len(TENSOR_COLUMNS),
        "SCALAR_COLUMNS": len(SCALAR_COLUMNS),
        "SUM_COLUMNS": len(SUM_COLUMNS),
        "CHUNK_BITS": CHUNK_BITS,
        "GROUP": GROUP,
    }
