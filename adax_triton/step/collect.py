"""Collect and check a step's parameters and gradients before anything changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adax_triton.state.allocation import is_new, state_mismatch
from adax_triton.state.memory_layout import storage_problem, write_problem
from adax_triton.state.parameters import check_param, checked_gradient
from adax_triton.state.step_counts import can_increment_on_device, check_count_without_sync, normalized_count

from .backend import is_fake, uses_triton
from .device_tables import CAPTURE_NEEDS_WARM_UP, is_capturing
from .gradient_handling import GradientHandling
from .scalars import lr_address


class ParamWithGrad(NamedTuple):
    """A parameter that a step updates.

    param: the parameter.
    group_index: index of its group.
    grads: dense tensors. Concatenated, their elements are the gradient.
    low_precision_copy: receives the new weights in another dtype. Default: None, no copy.
    is_external: whether the gradients are from `set_external_grads()`, maybe in pieces. Default: False, `param.grad`.
    """

    param: Tensor
    group_index: int
    grads: tuple[Tensor, ...]
    low_precision_copy: Tensor | None = None
    is_external: bool = False


class Collected(NamedTuple):
    """The parameters of a step."""

    params: list[ParamWithGrad]
    counts_on_device: bool  # whether the step counts of Triton tensors are on their devices


def collect(
    param_groups: Sequence[Mapping[str, Any]],
    states: Mapping[Tensor, Mapping[str, Any]],
    handling: GradientHandling,
    keep_float32: Callable[[Tensor], bool] | None,
    only: Mapping[Tensor, int] | None = None,
) -> Collected:
    """Return the parameters that have a gradient. Nothing changes.

    Steps are counted on the device if there is a GradScaler, clipping, `capturable=True` or a learning rate on the GPU,
    or if `step` is already a device tensor.

    Args:
        param_groups: the optimizer's groups.
        states: the optimizer's states.
        handling: scaling, skipping and clipping of the step.
        keep_float32: see `AdaX`.
        only: {parameter: group index} to collect; each has a `grad`. Default: None, all parameters with a `grad`.

    Raises:
        TypeError, ValueError: a parameter is not supported; a gradient or state does not fit its parameter; a group
            with `capturable=True` has a parameter that the Triton kernel does not support.
        RuntimeError: a CUDA graph is being captured, and a group has `capturable=False` or a parameter has no state
            with a step count on its device. A state created during the capture would get values only at replay.
    """
    # A dict, because a group may list a parameter twice (torch only warns): two updates in one launch would race.
    group_of = only or {
        param: group_index
        for group_index, group in enumerate(param_groups)
        for param in group["params"]
        if param.grad is not None
    }
    counts_on_device = False
    capturing = any(map(is_capturing, {param.device for param in group_of if not is_fake(param)}))
    params = []
    for param, group_index in group_of.items():
        group, state = param_groups[group_index], states.get(param, {})
        if capturing and not group["capturable"]:
            raise RuntimeError(
                f"step(): a CUDA graph is being captured, but param_groups[{group_index}] has capturable=False; set "
                "capturable=True"
            )
        grad = _check_and_get_grad(param, group_index, group, state, keep_float32)
        params.append(ParamWithGrad(param, group_index, (grad,)))
        if uses_triton(param):
            counted_on_device = can_increment_on_device(state.get("step"), param)
            if capturing and not counted_on_device:
                raise RuntimeError(CAPTURE_NEEDS_WARM_UP)
            counts_on_device |= not handling.is_default or group_counts_on_device(group) or counted_on_device
        elif group["capturable"] and not is_fake(param):
            raise ValueError(
                f"param_groups[{group_index}]['capturable'] is True, but the Triton kernel does not support its "
                f"parameter of {param.dtype} on {param.device}; set capturable=False"
            )
    if counts_on_device:
        for item in params:
            if uses_triton(item.param):
                lr_address(param_groups[item.group_index], item.param.device)  # raises if not float32
    return Collected(params, counts_on_device)


def _check_and_get_grad(
    param: Tensor,
    group_index: int,
    group: Mapping[str, Any],
    state: Mapping[str, Any],
    keep_float32: Callable[[Tensor], bool] | None,
) -> Tensor:
    name, new = f"param_groups[{group_index}], a parameter of shape {tuple(param.shape)}", is_new(state)
    if new:
        check_param(param, name, group, keep_float32)
    grad = checked_gradient(param)
    if not new:
        check_state(state, param)
    problem = write_problem(param)
    if problem is not None:
        raise ValueError(f"{name}: {problem}")
    problem = storage_problem(grad)
    if problem is not None:
        raise ValueError(f"{name}: its gradient {problem}")
    return grad


def check_state(state: Mapping[str, Any], param: Tensor) -> None:
    """Check the state of a parameter.

    Raises:
        TypeError, ValueError: a tensor does not fit the parameter, or `step` is not a count.
    """
    problem = state_mismatch(state, param)
    if problem is not None:
        raise ValueError(problem)
    check_count_without_sync(state["step"], param)


def normalize_counts(params: Sequence[ParamWithGrad], states: Mapping[Tensor, dict[str, Any]]) -> None:
    """Convert step counts to int, or to 0-d int64 on the device."""
    addresses = set()
    for item in params:
        state = states.get(item.param, {})
        if type(state.get("step", 0)) is not int:
            count = normalized_count(state["step"], item.param, uses_triton(item.param))
            if isinstance(count, Tensor):
                if count.data_ptr() in addresses:  # each parameter needs a count of its own
                    count = count.clone()
                addresses.add(count.data_ptr())
            state["step"] = count


def group_counts_on_device(group: Mapping[str, Any]) -> bool:
    """Return whether a group is capturable or has a GPU lr."""
    return group["capturable"] or (isinstance(group["lr"], torch.Tensor) and group["lr"].device.type != "cpu")
