"""The state tensors of parameters: created in flat buffers, checked against their parameter, handed to a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .dtensor import is_sharded, local_tensor, sharded_like
from .flat_buffer import FlatBuffer, why_not_writable
from .precision import HALF_DTYPES, Layout, Precision, is_quantized, precision_of, state_layouts

MOMENTS = ("exp_avg", "exp_avg_sq")
STATE_TENSORS = (*MOMENTS, "group_exponents", "master")
# The integers in a tensor of bytes, by its name and the bytes of each number.
_INTEGERS = {
    ("exp_avg", 1): torch.int8,
    ("exp_avg_sq", 1): torch.uint8,
    ("exp_avg_sq", 2): torch.int16,
    ("group_exponents", 1): torch.uint8,
    ("group_exponents", 2): torch.int16,
    ("master", 1): torch.int8,
    ("master", 2): torch.int16,
}


def allocate_states(params: Sequence[Tensor], precisions: Sequence[Precision]) -> list[dict[str, Any]]:
    """Return a state for each parameter, `step` 0 and moments 0.

    Tensors of one kind lie side by side in a buffer. A DTensor has its own: torch cannot deepcopy one whose shard
    starts within a storage.
    """
    states: list[dict[str, Any]] = [{"step": 0} for _ in params]
    shards = [local_tensor(param.detach()) for param in params]
    alike: dict[tuple[torch.device, str, torch.dtype, int | None], list[int]] = defaultdict(list)
    for index, (param, precision) in enumerate(zip(params, precisions, strict=True)):
        for name, layout in state_layouts(shards[index], precision).items():
            alike[param.device, name, layout.dtype, index if is_sharded(param) else None].append(index)
    for (_, name, dtype, _), indices in alike.items():
        models = [_model(shards[index], name, precisions[index]) for index in indices]
        for index, view in zip(indices, FlatBuffer(models, dtype=dtype.to_real()).views, strict=True):
            if name == "master" and dtype == torch.float32:
                view.copy_(shards[index])
            layout = state_layouts(params[index], precisions[index])[name]
            shard = torch.view_as_complex(view) if dtype.is_complex else view
            if layout.is_bytes:
                shard = shard.unsqueeze(-1).view(torch.uint8)
            states[index][name] = sharded_like(params[index], shard, layout.stored_shape)
    return states


def _model(shard: Tensor, name: str, precision: Precision) -> Tensor:
    layout: Layout = state_layouts(shard, precision)[name]
    if layout.dtype.is_complex:
        return torch.view_as_real(shard)
    if name != "master" and is_quantized(precision.states):
        return shard.new_empty(()).expand(layout.shape)  # a shape alone: codes are contiguous
    return shard


def local_state_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a state on this rank, bytes as the integers that they hold, on the same memory."""
    numbers = {}
    for name in STATE_TENSORS:
        if name in state:
            tensor = local_tensor(state[name])
            if tensor.dtype == torch.uint8:
                tensor = tensor.view(_INTEGERS[name, tensor.shape[-1]]).squeeze(-1)
            numbers[name] = tensor
    return numbers


def is_new(state: Mapping[str, Any]) -> bool:
    """Whether a parameter's state holds nothing of this package yet; others may keep keys of their own there."""
    return not any(name in state for name in ("step", *STATE_TENSORS))


def state_mismatch(state: Mapping[str, Any], param: Tensor) -> str | None:
    """Return why a parameter's state does not fit it, or None.

    States are reached by address: after `param.data = other`, a cast or `model.to(...)` they would be misread. Keys
    of others, such as a wrapper that keeps averages there, are ignored.
    """
    missing = [name for name in ("step", *MOMENTS) if name not in state]
    strange = [name for name in STATE_TENSORS if name in state and not isinstance(state[name], Tensor)]
    if missing or strange:
        return f"state has keys {sorted(map(str, state))}; expected step and the tensors exp_avg and exp_avg_sq"
    precision = precision_of(state)
    layouts = state_layouts(param, precision)
    if precision.master_weights is not None and param.dtype not in HALF_DTYPES:
        return (
            f"state['master']: belongs to 16-bit parameters, not to one of {param.dtype}; load the state dict into an "
            "optimizer made for the parameter as it is now"
        )
    if [name for name in STATE_TENSORS if name in state] != list(layouts):
        return f"state has keys {sorted(map(str, state))}; a parameter of {param.dtype} needs {['step', *layouts]}"
    for name, layout in layouts.items():
        tensor = state[name]
        wanted = layout.stored_shape, layout.stored_dtype, param.device
        if (tuple(tensor.shape), tensor.dtype, tensor.device) != wanted:
            return (
                f"state[{name!r}]: shape {tuple(tensor.shape)}, {tensor.dtype}, {tensor.device}; its parameter of "
                f"{param.dtype} needs shape {wanted[0]}, {wanted[1]}, {wanted[2]}"
            )
        problem = why_not_writable(tensor)
        if problem is not None:
            return f"state[{name!r}]: {problem}"
        in_order = tensor.is_contiguous() or (name == "master" and _holds_whole_numbers(tensor))
        if layout.is_bytes and not in_order:
            return f"state[{name!r}]: has strides {tensor.stride()}; codes are read in order, make them contiguous()"
    return None


def _holds_whole_numbers(tensor: Tensor) -> bool:
    *strides, last = tensor.stride()
    return last == 1 and all(number % tensor.shape[-1] == 0 for number in (*strides, tensor.storage_offset()))
