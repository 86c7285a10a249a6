"""Layout of the kernels' tables and of the quantized states."""

from __future__ import annotations

import ctypes
import struct

# Tensor table, int64. param to group_exponents are addresses, 0 if absent; first_element is the index of the first
# element in the whole parameter, for the random bits; scalar_row is the row of the scalar table.
TENSOR_COLUMNS = (
    *("param", "grad", "exp_avg", "exp_avg_sq", "master", "group_exponents"),
    *("first_element", "numel", "scalar_row"),
)
# Scalar table, 32-bit words: the fields of `coefficients.StepScalars`, the two words of `rounding.random_key`, and a
# flag: if `skip` is not 0, parameters and states stay unchanged. float64 parameters read a row of float64 and
# ignore the key.
SCALAR_COLUMNS = (
    *("step_size", "one_minus_beta1", "exp_avg_sq_weight", "eps", "decay", "l2", "grad_factor"),
    *("random_key0", "random_key1", "skip"),
)
# Row table of `prepare_step`, int64: address of the step count, row of the group, address of the learning rate or 0.
ROW_COLUMNS = ("step", "group", "lr")
# Telemetry sums of one chunk, over the weights as they are stored; an update is the weight after the step minus the
# weight before it.
SUM_COLUMNS = ("grad_squares", "update_squares", "param_squares", "unchanged", "nonfinite_grads")
# An entry of the chunk table is `tensor << CHUNK_BITS | chunk`.
CHUNK_BITS = 32
# Quantized states; `adax_triton/update/quantization.py` describes the format and has the same constants.
GROUP = 32  # consecutive elements that share one exponent word
V16_DROPPED_BITS = 15  # low bits of a float32 v that "8bit_v16" drops
MIN_FRACTION_BITS = 3  # of v in "8bit"
MAX_V_CODE = 255  # of v in "8bit"
SCALE_ORIGIN = 133  # a group has scale 0 if its largest u has this float32 exponent
MIN_SCALE = 48  # scale that "8bit" stores as 0
MAX_STORED_SCALE = 63  # of "8bit"
# Exponent word of "8bit", from bit 0: largest exponent of v (8 bits), fraction bits minus 3 (2 bits), scale (6 bits).
FRACTION_SHIFT, SCALE_SHIFT = 8, 10

_SCALAR_ROW = struct.Struct("7f2If")
_FLOAT64_SCALAR_ROW = struct.Struct("10d")


def scalar_row(
    scalars: tuple[float, ...], key: tuple[int, int] = (0, 0), skip: bool = False, float64: bool = False
) -> bytes:
    """Return one packed row of the scalar table.

    Args:
        scalars: the seven fields of `coefficients.StepScalars`, in order.
        key: two 32-bit words from `rounding.random_key`.
        skip: make the kernel write nothing.
        float64: pack 80 bytes for float64 parameters instead of 40; `key` is ignored.
    """
    if float64:
        return _FLOAT64_SCALAR_ROW.pack(*scalars, 0.0, 0.0, float(skip))
    try:
        return _SCALAR_ROW.pack(*scalars, *key, float(skip))
    except OverflowError:  # struct.pack raises if a value overflows float32; a cast gives inf
        return _SCALAR_ROW.pack(*(ctypes.c_float(value).value for value in scalars), *key, float(skip))


def definitions() -> dict[str, int]:
    """Return the layout as C++ macros, such as `PARAM_COLUMN` and `TENSOR_COLUMNS`."""
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
        "V16_DROPPED_BITS": V16_DROPPED_BITS,
        "MIN_FRACTION_BITS": MIN_FRACTION_BITS,
        "MAX_V_CODE": MAX_V_CODE,
        "SCALE_ORIGIN": SCALE_ORIGIN,
        "MIN_SCALE": MIN_SCALE,
        "MAX_STORED_SCALE": MAX_STORED_SCALE,
        "FRACTION_SHIFT": FRACTION_SHIFT,
        "SCALE_SHIFT": SCALE_SHIFT,
    }
