"""Which dtype each tensor of a step has, and the bytes that follow from it."""

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
STATES = ("float32", "bfloat16", "8bit_v16", "8bit")
MASTER_WEIGHTS = ("float32", "24bit")
WEIGHT_ROUNDINGS = ("nearest", "stochastic")
# Elements. A tensor with fewer keeps float32 states: biases and norms are a thousandth of a model, and sensitive.
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
_GROUP_DTYPES = {"8bit_v16": torch.uint8, "8bit": torch.int16}


class Precision(NamedTuple):
    """How the states of one tensor are kept.

    `states` is one of `STATES`. `master_weights` is `"float32"` or `"24bit"` where `master` stands beside a 16-bit
    parameter, and None where the parameter is all there is. `master` is what a bfloat16 parameter lacks, int16 or int8,
    or a float32 copy beside a float16 one.
    """

    states: str = "float32"
    master_weights: str | None = None


FLOAT32_STATES = Precision()


class Layout(NamedTuple):
    """Shape and dtype of the numbers in a state tensor.

    Integers are stored as bytes, uint8 with the bytes of each number along one more dimension: a library that loads a
    checkpoint in place cannot take them for floats, and NCCL and Gloo send them, which they do not do with int16.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def is_bytes(self) -> bool:
        """Whether the numbers are stored as bytes."""
        return not self.dtype.is_floating_point and not self.dtype.is_complex

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the tensor in the state."""
        return (*self.shape, self.dtype.itemsize) if self.is_bytes else self.shape

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of the tensor in the state."""
        return torch.uint8 if self.is_bytes else self.dtype


def is_quantized(states: str) -> bool:
    """Whether these states are codes in groups of `compact.GROUP` elements."""
    return states in _GROUP_DTYPES


def precision_for(param: Tensor, group: Mapping[str, Any], keep_float32: Callable[[Tensor], bool] | None) -> Precision:
    """Return the precision of a parameter's states under its group's choices.

    Tensors of less than `QUANTIZED_FROM_NUMEL` elements keep float32 states, and so do those that `keep_float32` names.
    float64 and complex parameters follow their own dtype. A float32 parameter is its own master.
    """
    plain = param.numel() < QUANTIZED_FROM_NUMEL or param.is_complex() or param.dtype == torch.float64
    states = "float32" if plain or (keep_float32 is not None and keep_float32(param)) else group["states"]
    return Precision(states, group["master_weights"] if param.dtype in HALF_DTYPES else None)


def precision_of(state: Mapping[str, Tensor]) -> Precision:
    """Return the precision in which a parameter's state is kept, from the dtypes and shapes of its tensors."""
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
    """Return the dtype of float32 states: that, or float64 for float64 parameters; complex for complex."""
    real = torch.float64 if param_dtype.to_real() == torch.float64 else torch.float32
    return real.to_complex() if param_dtype.is_complex else real


def state_layouts(param: Tensor, precision: Precision) -> dict[str, Layout]:
    """Return what the state of a parameter holds in addition to `step`.

    Moments in floats and masters have the parameter's shape and strides. Codes have its shape and are contiguous: a
    group is 32 elements in the order of indices, whatever the strides. A group's exponents stand in rows like the
    parameter's, if whole groups make up a row; any sharding by rows then shards both alike.
    """
    return _state_layouts(tuple(param.shape), param.dtype, precision)


@functools.lru_cache(maxsize=4096)
def _state_layouts(shape: tuple[int, ...], param_dtype: torch.dtype, precision: Precision) -> dict[str, Layout]:
    states, master_weights = precision
    layouts = {}
    if is_quantized(states):
        row = math.prod(shape[1:])
        whole_rows = len(shape) > 1 and row % GROUP == 0
        groups = (shape[0], row // GROUP) if whole_rows else (-(-math.prod(shape) // GROUP),)
        layouts["exp_avg"] = Layout(shape, _EXP_AVG_DTYPES[states])
        layouts["exp_avg_sq"] = Layout(shape, _EXP_AVG_SQ_DTYPES[states])
        layouts["group_exponents"] = Layout(groups, _GROUP_DTYPES[states])
    else:
        dtype = state_dtype(param_dtype) if states == "float32" else torch.bfloat16
        layouts["exp_avg"] = layouts["exp_avg_sq"] = Layout(shape, dtype)
    if master_weights is not None:
        layouts["master"] = Layout(shape, _master_dtype(param_dtype, master_weights))
    return layouts


def _master_dtype(param_dtype: torch.dtype, master_weights: str) -> torch.dtype:
    if param_dtype == torch.float16:  # its exponents are too few for a remainder to make up for
        return torch.float32
    return torch.int16 if master_weights == "float32" else torch.int8


def bytes_by_state(param_dtype: torch.dtype, precision: Precision = FLOAT32_STATES) -> dict[str, float]:
    """Return the bytes per element of each tensor in the state of a tensor large enough to be compact."""
    layouts = _state_layouts((GROUP, GROUP), param_dtype, precision)
    return {name: layout.dtype.itemsize * math.prod(layout.shape) / GROUP**2 for name, layout in layouts.items()}


def state_bytes(param_dtype: torch.dtype, precision: Precision = FLOAT32_STATES) -> float:
    """Return the bytes of state per element, group exponents included, of a tensor large enough to be compact."""
    return sum(bytes_by_state(param_dtype, precision).values())


def bytes_loaded(param_dtype: torch.dtype, grad_dtype: torch.dtype, precision: Precision = FLOAT32_STATES) -> float:
    """Return the bytes a step reads per element: parameter, gradient and states."""
    return param_dtype.itemsize + grad_dtype.itemsize + state_bytes(param_dtype, precision)


def bytes_stored(
    param_dtype: torch.dtype, precision: Precision = FLOAT32_STATES, skip_unchanged_v: bool = False
) -> float:
    """Return the bytes that a step writes per element: parameter and states, without v if it skips unchanged v."""
    kept = bytes_by_state(param_dtype, precision)["exp_avg_sq"] if skip_unchanged_v else 0
    return param_dtype.itemsize + state_bytes(param_dtype, precision) - kept
