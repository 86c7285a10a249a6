"""The state tensors of parameters: created in flat buffers, checked against their parameter, handed to a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .flat_buffer import FlatBuffer
from .precision import HALF_DTYPES, Layout, Precision, precision_of, state_layouts
from .sharding import first_element, is_sharded, local, local_gradient, shard_groups, sharded_like
from .tensor_step import TensorStep

MOMENTS = ("exp_avg", "exp_avg_sq")


def new_states(params: Sequence[Tensor], precisions: Sequence[Precision]) -> list[dict[str, Any]]:
    """Return a state for each parameter, `step` 0 and moments 0.

    Tensors of one kind lie side by side in a buffer. A DTensor has its own: torch cannot deepcopy one whose shard
    starts within a storage.
    """
    states: list[dict[str, Any]] = [{"step": 0} for _ in params]
    shards = [local(param.detach()) for param in params]
    alike: dict[tuple[torch.device, str, torch.dtype, int | None], list[int]] = defaultdict(list)
    for index, (param, precision) in enumerate(zip(params, precisions, strict=True)):
        for name, layout in state_layouts(shards[index], precision).items():
            alike[param.device, name, layout.dtype, index if is_sharded(param) else None].append(index)
    for (_, name, dtype, _), indices in alike.items():
        models = [_model(shards[index], name, precisions[index]) for index in indices]
        for index, view in zip(indices, FlatBuffer(models, dtype=dtype.to_real()).views, strict=True):
            if name == "master" and dtype == torch.float32:
                view.copy_(shards[index])
            whole = state_layouts(params[index], precisions[index])[name].shape
            shard = torch.view_as_complex(view) if dtype.is_complex else view
            states[index][name] = sharded_like(params[index], shard, whole)
    return states


def _model(shard: Tensor, name: str, precision: Precision) -> Tensor:
    layout: Layout = state_layouts(shard, precision)[name]
    if layout.dtype.is_complex:
        return torch.view_as_real(shard)
    if layout.shape == tuple(shard.shape):
        return shard
    return shard.new_empty(()).expand(layout.shape)  # a shape alone


def misfit(state: Mapping[str, Any], param: Tensor) -> str | None:
    """Return what about a parameter's state does not fit it any more, or None.

    States are reached by address: after `param.data = other`, a cast or `model.to(...)` they would be misread.
    """
    if not set(MOMENTS) <= set(state):
        return f"state has keys {sorted(map(str, state))}; expected step, exp_avg and exp_avg_sq"
    precision = precision_of(state)
    layouts = state_layouts(param, precision)
    if precision.master_weights is not None and param.dtype not in HALF_DTYPES:
        return f"state['master']: stands beside 16-bit parameters, not beside {param.dtype}"
    if set(state) != {"step", *layouts}:
        return f"state has keys {sorted(map(str, state))}; a parameter of {param.dtype} needs {['step', *layouts]}"
    for name, layout in layouts.items():
        tensor = state[name]
        if tuple(tensor.shape) != layout.shape or tensor.dtype != layout.dtype or tensor.device != param.device:
            return (
                f"state[{name!r}]: shape {tuple(tensor.shape)}, {tensor.dtype}, {tensor.device}; its parameter of "
                f"{param.dtype} needs shape {layout.shape}, {layout.dtype}, {param.device}"
            )
    return None


def tensor_step(
    param: Tensor, grad: Tensor, state: Mapping[str, Any], scalar_row: int, group: Mapping[str, Any]
) -> TensorStep:
    """Return one parameter's share of a step, on the tensors of this rank."""
    master, group_exponents = state.get("master"), state.get("group_exponents")
    step = TensorStep(
        local(param.detach()),
        local_gradient(grad, param),
        local(state["exp_avg"]),
        local(state["exp_avg_sq"]),
        scalar_row,
        precision_of(state).states,
        None if master is None else local(master),
        None if group_exponents is None else local(group_exponents),
        group["weight_rounding"] == "stochastic" and master is None and param.dtype == torch.bfloat16,
        first_element(param),
        shard_groups(param),
    )
    return step.mapped(torch.view_as_real) if param.is_complex() else step
