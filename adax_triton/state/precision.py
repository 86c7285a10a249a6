"""Dtypes, shapes and sizes of state tensors in each precision mode."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adax_triton.update.quantization import GROUP

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALF_DTYPES = (torch.bfloat16, torch.float16)
STATES = ("float32", "bfloat16", "8bit_v16", "8bit")  # 8bit_v16: 8-bit m and 16-bit v; 8bit: both 8-bit
MASTER_WEIGHTS = ("float32", "24bit")
WEIGHT_ROUNDINGS = ("nearest", "stochastic")
# In elements. Smaller tensors keep float32 states: biases and norm weights are sensitive to rounding, and they are only
# about 0.1 % of a model.
QUANTIZED_FROM_NUMEL = 4096

_EXP_AVG_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "8bit_v16": torch.int8,
    "8bit": torch.int8,
}
_EXP_AVG_SQ_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "8bit_v16": torch.int16,
    "8bit": torch.uint8,
}
_EXPONENT_DTYPES = {"8bit_v16": torch.uint8, "8bit": torch.int16}


class Precision(NamedTuple):
    """Storage precision of one parameter's states.

    states: format of the moments, one of `STATES`.
    master_weights: `"float32"` or `"24bit"` if the state has a `master`, else None. The master of a bfloat16 parameter
        is the remainder of its float32 weights, int16 for `"float32"` and int8 for `"24bit"`. The master of a float16
        parameter is a float32 copy.
    """

    states: str = "float32"
    master_weights: str | None = None


FLOAT32_STATES = Precision()


class Layout(NamedTuple):
    """Shape and dtype of a state tensor's values.

    Integers are stored as uint8, with the bytes of each integer along an extra last dimension. In-place checkpoint
    loaders then cannot mistake them for floats of the same shape. NCCL and Gloo support uint8, but not int16.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def is_bytes(self) -> bool:
        """Whether the values are integers, stored as bytes."""
        return not self.dtype.is_floating_point and not self.dtype.is_complex

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the stored tensor."""
        return (*self.shape, self.dtype.itemsize) if self.is_bytes else self.shape

    @property
    def stored_dtype(self) -> torch.dtype:
        """Dtype of the stored tensor."""
        return torch.uint8 if self.is_bytes else self.dtype


def is_quantized(states: str) -> bool:
    """Return whether the moments are integer codes in groups of 32 elements."""
    return states in _EXPONENT_DTYPES


def precision_for(param: Tensor, group: Mapping[str, Any], keep_float32: Callable[[Tensor], bool] | None) -> Precision:
    """Return a new state's precision, from the options of its group.

    The states are `"float32"` if the tensor has fewer than `QUANTIZED_FROM_NUMEL` elements, is float64 or complex, or
    `keep_float32` returns True for it; see `state_dtype`. Only 16-bit parameters have a master.
    """
    unquantized = param.numel() < QUANTIZED_FROM_NUMEL or param.is_complex() or param.dtype == torch.float64
    states = "float32" if unquantized or (keep_float32 is not None and keep_float32(param)) else group["states"]
    return Precision(states, group["master_weights"] if param.dtype in HALF_DTYPES else None)


def precision_of(state: Mapping[str, Tensor]) -> Precision:
    """Return the precision of an existing state, from its dtypes and shapes."""
    first, second, master = state["exp_avg"], state["exp_avg_sq"], state.get("master")
    states = "float32"
    if first.dtype == torch.uint8 and second.dtype == torch.uint8:
        states = "8bit_v16" if second.shape[-1] == 2 else "8bit"
    elif torch.bfloat16 in (first.dtype, second.dtype):
        states = "bfloat16"
    if master is None:
        return Precision(states)
    upper_byte = master.dtype == torch.uint8 and master.shape[-1] == 1
    return Precision(states, "24bit" if upper_byte else "float32")


def state_dtype(param_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of unquantized moments: float32 or float64.

    It is complex if the parameter is.
    """
    real = torch.float64 if param_dtype.to_real() == torch.float64 else torch.float32
    return real.to_complex() if param_dtype.is_complex else real


def state_layouts(param: Tensor, precision: Precision) -> dict[str, Layout]:
    """Return {name: layout} of a parameter's state tensors; `step` is not one.

    Float moments and masters have the parameter's shape and strides. Codes have its shape and are contiguous: a group
    is 32 elements in index order, for any strides of the parameter. `group_exponents` has shape (rows, groups per row)
    if a row is a multiple of 32 elements; sharding along dim 0 then splits codes and exponents alike. Otherwise it
    has shape (groups,).
    """
    return _state_layouts(tuple(param.shape), param.dtype, precision)


@functools.lru_cache(maxsize=4096)
def _state_layouts(shape: tuple[int, ...], param_dtype: torch.dtype, precision: Precision) -> dict[str, Layout]:
    states, master_weights = precision
    layouts = {}
    if is_quantized(states):
        row = math.prod(shape[1:])
        by_rows = len(shape) > 1 and row % GROUP == 0
        groups = (shape[0], row // GROUP) if by_rows else (-(-math.prod(shape) // GROUP),)
        layouts["exp_avg"] = Layout(shape, _EXP_AVG_DTYPES[states])
        layouts["exp_avg_sq"] = Layout(shape, _EXP_AVG_SQ_DTYPES[states])
        layouts["group_exponents"] = Layout(groups, _EXPONENT_DTYPES[states])
    else:
        dtype = state_dtype(param_dtype) if states == "float32" else torch.bfloat16
        layouts["exp_avg"] = layouts["exp_avg_sq"] = Layout(shape, dtype)
    if master_weights is not None:
        layouts["master"] = Layout(shape, _master_dtype(param_dtype, master_weights))
    return layouts


def _master_dtype(param_dtype: torch.dtype, master_weights: str) -> torch.dtype:
    if param_dtype == torch.float16:  # its exponent range is too small for a remainder
        return torch.float32
    return torch.int16 if master_weights == "float32" else torch.int8


def bytes_by_state(param_dtype: torch.dtype, precision: Precision = FLOAT32_STATES) -> dict[str, float]:
    """Return {state tensor: bytes per element} of a parameter.

    The parameter is large enough to be quantized.
    """
    layouts = _state_layouts((GROUP, GROUP), param_dtype, precision)
    return {name: layout.dtype.itemsize * math.prod(layout.shape) / GROUP**2 for name, layout in layouts.items()}


def state_bytes(param_dtype: torch.dtype, precision: Precision = FLOAT32_STATES) -> float:
    """Return the state bytes per element of a parameter.

    The parameter is large enough to be quantized.
    """
    return sum(bytes_by_state(param_dtype, precision).values())


def bytes_loaded(param_dtype: torch.dtype, grad_dtype: torch.dtype, precision: Precision = FLOAT32_STATES) -> float:
    """Return the bytes that a step reads per element.

    Counts the parameter, the gradient and the states.
    """
    return param_dtype.itemsize + grad_dtype.itemsize + state_bytes(param_dtype, precision)


def bytes_stored(
    param_dtype: torch.dtype, precision: Precision = FLOAT32_STATES, skip_unchanged_v: bool = False
) -> float:
    """Return the bytes that a step writes per element: parameter and states.

    Args:
        param_dtype: dtype of the parameter.
        precision: precision of its states. Default: float32.
        skip_unchanged_v: leave out v; the kernel does not write groups of v that did not change. Default: False.
    """
    skipped = bytes_by_state(param_dtype, precision)["exp_avg_sq"] if skip_unchanged_v else 0
    return param_dtype.itemsize + state_bytes(param_dtype, precision) - skipped
