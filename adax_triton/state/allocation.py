"""Create state tensors and check them against their parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .dtensor import local_tensor, sharded_like
from .memory_layout import write_problem, zeros_with_strides_of
from .precision import HALF_DTYPES, Precision, is_quantized, precision_of, state_layouts

MOMENTS = ("exp_avg", "exp_avg_sq")
STATE_TENSORS = (*MOMENTS, "group_exponents", "master")
# (name, bytes per integer) of a state tensor stored as uint8 -> dtype of its integers.
_INTEGER_DTYPES = {
    ("exp_avg", 1): torch.int8,
    ("exp_avg_sq", 1): torch.uint8,
    ("exp_avg_sq", 2): torch.int16,
    ("group_exponents", 1): torch.uint8,
    ("group_exponents", 2): torch.int16,
    ("master", 1): torch.int8,
    ("master", 2): torch.int16,
}


def allocate_states(params: Sequence[Tensor], precisions: Sequence[Precision]) -> list[dict[str, Any]]:
    """Return each parameter's new state: `step` 0, zero moments, exact masters.

    Each state tensor has its own memory, so that you can save, move or free the state of one parameter.
    """
    return [_new_state(param, precision) for param, precision in zip(params, precisions, strict=True)]


def _new_state(param: Tensor, precision: Precision) -> dict[str, Any]:
    state: dict[str, Any] = {"step": 0}
    shard, layouts = local_tensor(param.detach()), state_layouts(param, precision)
    for name, layout in state_layouts(shard, precision).items():
        if is_quantized(precision.states) and name != "master":
            tensor = torch.zeros(layout.shape, dtype=layout.dtype, device=shard.device)
        else:
            tensor = zeros_with_strides_of(shard, layout.dtype)
        if name == "master" and layout.dtype == torch.float32:
            tensor.copy_(shard)
        if layout.is_bytes:
            tensor = tensor.unsqueeze(-1).view(torch.uint8)
        state[name] = sharded_like(param, tensor, layouts[name].stored_shape)
    return state


def local_state_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return this rank's state tensors by name, with bytes viewed as integers."""
    tensors = {}
    for name in STATE_TENSORS:
        if name in state:
            tensor = local_tensor(state[name])
            if tensor.dtype == torch.uint8:
                tensor = tensor.view(_INTEGER_DTYPES[name, tensor.shape[-1]]).squeeze(-1)
            tensors[name] = tensor
    return tensors


def is_new(state: Mapping[str, Any]) -> bool:
    """Return whether a state has no keys of this package.

    Other libraries may add keys.
    """
    return not any(name in state for name in ("step", *STATE_TENSORS))


def state_mismatch(state: Mapping[str, Any], param: Tensor) -> str | None:
    """Return why a parameter's state does not match it, or None.

    Kernels read states by address, so after `param.data = other`, a cast or `model.to(...)` they would read wrong
    memory. Keys that other libraries added, such as weight averages, are ignored.
    """
    missing = [name for name in ("step", *MOMENTS) if name not in state]
    non_tensors = [name for name in STATE_TENSORS if name in state and not isinstance(state[name], Tensor)]
    if missing or non_tensors:
        return f"state has keys {sorted(map(str, state))}; expected step and the tensors exp_avg and exp_avg_sq"
    precision = precision_of(state)
    layouts = state_layouts(param, precision)
    if precision.master_weights is not None and param.dtype not in HALF_DTYPES:
        return (
            f"state['master'] exists, but the parameter is {param.dtype}; only bfloat16 and float16 parameters have "
            "masters; load the saved state dict into a new optimizer"
        )
    if [name for name in STATE_TENSORS if name in state] != list(layouts):
        return f"state has keys {sorted(map(str, state))}; a parameter of {param.dtype} needs {['step', *layouts]}"
    for name, layout in layouts.items():
        tensor = state[name]
        wanted = layout.stored_shape, layout.stored_dtype, param.device
        if (tuple(tensor.shape), tensor.dtype, tensor.device) != wanted:
            return (
                f"state[{name!r}] has shape {tuple(tensor.shape)}, {tensor.dtype}, on {tensor.device}; a parameter of "
                f"{param.dtype} needs shape {wanted[0]}, {wanted[1]}, on {wanted[2]}"
            )
        problem = write_problem(tensor)
        if problem is not None:
            return f"state[{name!r}]: {problem}"
        readable = tensor.is_contiguous() or (name == "master" and _can_be_viewed_as_integers(tensor))
        if layout.is_bytes and not readable:
            return f"state[{name!r}] has strides {tensor.stride()}; expected a contiguous tensor; call contiguous()"
    return None


def _can_be_viewed_as_integers(tensor: Tensor) -> bool:
    *strides, last = tensor.stride()
    return last == 1 and all(number % tensor.shape[-1] == 0 for number in (*strides, tensor.storage_offset()))
