"""Collect the parameters of a step with their gradients, checked; nothing changes until all are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adax_triton.state.allocation import is_new, state_mismatch
from adax_triton.state.flat_buffer import storage_problem, why_not_writable
from adax_triton.state.parameters import check_param, checked_gradient
from adax_triton.state.step_counts import check_count, is_on_device, normalized_count

from .backend import is_fake, uses_triton
from .conditions import StepConditions
from .device_tables import CAPTURE_NEEDS_WARM_UP, is_capturing
from .scalars import lr_address


class ParamWithGrad(NamedTuple):
    """A parameter that a step updates.

    param: the parameter.
    group_index: of its group.
    grads: dense; their elements, one tensor after another, are the gradient.
    image: gets the new weights in another dtype; None for none.
    is_external: whether the gradients are not the parameter's own; they may be in pieces then.
    """

    param: Tensor
    group_index: int
    grads: tuple[Tensor, ...]
    low_precision_copy: Tensor | None = None
    is_external: bool = False


class Collected(NamedTuple):
    """The parameters of a step, and whether the device counts the steps of those on the Triton kernel."""

    params: list[ParamWithGrad]
    on_device: bool


def collect(
    param_groups: Sequence[Mapping[str, Any]],
    states: Mapping[Tensor, Mapping[str, Any]],
    conditions: StepConditions,
    keep_float32: Callable[[Tensor], bool] | None,
    only: Mapping[Tensor, int] | None = None,
) -> Collected:
    """Return the parameters that have a gradient; nothing changes.

    The device counts steps that it may have to skip, that a CUDA graph may replay, or whose learning rate only it
    knows; and those of parameters whose `step` is there already.

    Args:
        param_groups: of the optimizer.
        states: of its parameters.
        control: of the step.
        keep_float32: see `AdaX`.
        only: these parameters instead, with the indices of their groups; all have gradients.

    Raises:
        TypeError, ValueError: a parameter for which there is no step, a gradient or a state that does not fit its
            parameter, or a group with `capturable=True` that has a parameter which the Triton kernel does not take.
        RuntimeError: a CUDA graph is being captured without `capturable=True`, or with a parameter that has no state
            and no step count on its device yet: made now, they would be filled by replays only.
    """
    # A dict, because a group may name a parameter twice (torch only warns): two updates in one launch would race.
    group_of = only or {
        param: group_index
        for group_index, group in enumerate(param_groups)
        for param in group["params"]
        if param.grad is not None
    }
    on_device = False
    capturing = any(map(is_capturing, {param.device for param in group_of if not is_fake(param)}))
    params = []
    for param, group_index in group_of.items():
        group, state = param_groups[group_index], states.get(param, {})
        if capturing and not group["capturable"]:
            raise RuntimeError(
                f"step(): a CUDA graph is being captured, but param_groups[{group_index}] has capturable=False"
            )
        grad = _checked_gradient(param, group_index, group, state, keep_float32)
        params.append(ParamWithGrad(param, group_index, (grad,)))
        if uses_triton(param):
            counted_there = is_on_device(state.get("step"), param)
            if capturing and not counted_there:
                raise RuntimeError(CAPTURE_NEEDS_WARM_UP)
            on_device = on_device or not conditions.is_default or needs_device(group) or counted_there
        elif group["capturable"] and not is_fake(param):
            raise ValueError(
                f"param_groups[{group_index}]['capturable'] is True, but the Triton kernel does not take its parameter "
                f"of {param.dtype} on {param.device}: the host would step it"
            )
    if on_device:
        for one in params:
            if uses_triton(one.param):
                lr_address(param_groups[one.group_index], one.param.device)  # refuses one that the kernel cannot read
    return Collected(params, on_device)


def _checked_gradient(
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
    problem = why_not_writable(param)
    if problem is not None:
        raise ValueError(f"{name}: {problem}")
    problem = storage_problem(grad)
    if problem is not None:
        raise ValueError(f"{name}: its gradient {problem}")
    return grad


def check_state(state: Mapping[str, Any], param: Tensor) -> None:
    """Check the state of a parameter.

    Raises:
        TypeError, ValueError: a tensor that does not fit the parameter, or a step that is no count.
    """
    problem = state_mismatch(state, param)
    if problem is not None:
        raise ValueError(problem)
    check_count(state["step"], param)


def normalize_counts(params: Sequence[ParamWithGrad], states: Mapping[Tensor, dict[str, Any]]) -> None:
    """Bring the step counts of checked parameters into the form in which the step keeps them."""
    seen = set()
    for one in params:
        state = states.get(one.param, {})
        if type(state.get("step", 0)) is not int:
            count = normalized_count(state["step"], one.param, uses_triton(one.param))
            if isinstance(count, Tensor):
                if count.data_ptr() in seen:  # a tensor for several parameters would count the steps of all
                    count = count.clone()
                seen.add(count.data_ptr())
            state["step"] = count


def needs_device(group: Mapping[str, Any]) -> bool:
    """Return whether only the device can count a group's steps: for a CUDA graph, or as only it knows the lr."""
    return group["capturable"] or (isinstance(group["lr"], torch.Tensor) and group["lr"].device.type != "cpu")
