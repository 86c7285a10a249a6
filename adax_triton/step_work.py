"""From parameters with gradients to the work of a step: checked first, scheduled by the host or by the device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import DeviceRows, Work, is_fake, uses_kernel
from .control import StepControl
from .device_scalars import DeviceRow, lr_address
from .device_tables import UNPREPARED, is_capturing
from .flat_buffer import unwritable
from .hyperparameters import as_float
from .parameters import check_param, checked_gradient
from .pytorch_steps import HostRows
from .rounding import random_key
from .schedule import StepScalars, step_scalars
from .state_tensors import is_new, misfit, tensor_step
from .step_counts import check_count, count_on_device, is_on_device, settled_count
from .telemetry import Owner
from .tensor_step import TensorStep


class Due(NamedTuple):
    """A parameter that is to be stepped, with its dense gradient and the index of its group."""

    param: Tensor
    grad: Tensor
    group_index: int


class Assembly(NamedTuple):
    """All that a step needs.

    work: for the stepper.
    places: the row of each (group, step) that the host schedules, and `rows`, their scalars.
    host_states: of the parameters that the host schedules; their counts advance if the step is taken.
    owners: of the rows of telemetry.
    """

    work: Work
    places: dict[tuple[int, int], int]
    rows: HostRows
    host_states: Sequence[dict[str, Any]]
    owners: Sequence[Owner]


class DueParams(NamedTuple):
    """The parameters of a step, by who steps and who schedules them.

    kernel: those that the kernel takes.
    others: those that PyTorch steps; the host schedules them.
    on_device: whether the device schedules those of the kernel: their `step` is a tensor there.
    """

    kernel: list[Due]
    others: list[Due]
    on_device: bool

    @property
    def all(self) -> list[Due]:
        """All of them, those of the kernel first."""
        return self.kernel + self.others

    @property
    def of_host(self) -> list[Due]:
        """Those that the host schedules."""
        return self.others if self.on_device else self.all


def due_params(
    param_groups: Sequence[Mapping[str, Any]],
    states: Mapping[Tensor, Mapping[str, Any]],
    control: StepControl,
    keep_float32: Callable[[Tensor], bool] | None,
    only: Mapping[Tensor, int] | None = None,
) -> DueParams:
    """Return the parameters that have a gradient, or `only` these, given with their groups; nothing changes.

    The device schedules a step that it may have to skip, that a CUDA graph may replay, or whose learning rate only it
    knows; and parameters whose `step` is there already.

    Raises:
        TypeError, ValueError: a parameter for which there is no step, a gradient or a state that does not fit its
            parameter, or a group with `capturable=True` that has a parameter which the kernel does not take.
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
    kernel, others = [], []
    on_device = not control.is_idle
    capturing = any(map(is_capturing, {param.device for param in group_of if not is_fake(param)}))
    for param, group_index in group_of.items():
        group, state = param_groups[group_index], states.get(param, {})
        if capturing and not group["capturable"]:
            raise RuntimeError(
                f"step(): a CUDA graph is being captured, but param_groups[{group_index}] has capturable=False"
            )
        due = Due(param, _checked_gradient(param, group_index, group, state, keep_float32), group_index)
        if uses_kernel(param.device, param.dtype.to_real(), param):
            kernel.append(due)
            counted_there = is_on_device(state.get("step"), param)
            if capturing and not counted_there:
                raise RuntimeError(UNPREPARED)
            on_device = on_device or needs_device(group) or counted_there
        else:
            others.append(due)
            if group["capturable"] and not is_fake(param):
                raise ValueError(
                    f"param_groups[{group_index}]['capturable'] is True, but no kernel takes its parameter of "
                    f"{param.dtype} on {param.device}: it would be stepped by the host"
                )
    if on_device:
        for due in kernel:
            lr_address(param_groups[due.group_index], due.param.device)  # refuses one that the kernel cannot read
    return DueParams(kernel, others, on_device)


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
    problem = unwritable(param)
    if problem is not None:
        raise ValueError(f"{name}: {problem}")
    return grad


def check_state(state: Mapping[str, Any], param: Tensor) -> None:
    """Check the state of a parameter.

    Raises:
        TypeError, ValueError: a tensor that does not fit the parameter, or a step that is no count.
    """
    problem = misfit(state, param)
    if problem is not None:
        raise ValueError(problem)
    check_count(state["step"], param)


def settle_counts(due: Sequence[Due], states: Mapping[Tensor, dict[str, Any]]) -> None:
    """Bring the step counts of checked parameters into the form in which the step keeps them."""
    seen = set()
    for param, _, _ in due:
        state = states.get(param, {})
        if type(state.get("step", 0)) is not int:
            on_kernel = uses_kernel(param.device, param.dtype.to_real(), param)
            count = settled_count(state["step"], param, on_kernel)
            if isinstance(count, Tensor):
                if count.data_ptr() in seen:  # a tensor for several parameters would count the steps of all
                    count = count.clone()
                seen.add(count.data_ptr())
            state["step"] = count


def needs_device(group: Mapping[str, Any]) -> bool:
    """Whether only the device can schedule a group: for a CUDA graph, or with a learning rate that only it knows."""
    return group["capturable"] or (isinstance(group["lr"], Tensor) and group["lr"].device.type != "cpu")


def scalars_of(group: Mapping[str, Any], step: int) -> StepScalars:
    """Return the scalars of step `step` of a parameter group."""
    return step_scalars(
        step=step,
        lr=as_float(group["lr"], "lr"),
        betas=(as_float(group["betas"][0], "betas[0]"), as_float(group["betas"][1], "betas[1]")),
        eps=as_float(group["eps"], "eps"),
        weight_decay=as_float(group["weight_decay"], "weight_decay"),
        decoupled_weight_decay=group["decoupled_weight_decay"],
        second_moment=group["second_moment"],
        eps_placement=group["eps_placement"],
        maximize=group["maximize"],
    )


def host_places(due: Sequence[Due], states: Mapping[Tensor, Mapping[str, Any]]) -> dict[tuple[int, int], int]:
    """Return the row of each (group, step) among parameters that the host schedules."""
    places: dict[tuple[int, int], int] = {}
    for param, _, group_index in due:
        state = states.get(param, {})
        step = 1 if is_new(state) else state["step"] + 1
        places.setdefault((group_index, step), len(places))
    return places


def rows_of(places: Mapping[tuple[int, int], int], param_groups: Sequence[Mapping[str, Any]]) -> HostRows:
    """Return the rows of these places."""
    scalars = [scalars_of(param_groups[group_index], step) for group_index, step in places]
    keys = [random_key(param_groups[group_index]["seed"], step) for group_index, step in places]
    return HostRows(scalars, keys)


def work_of(
    due: DueParams,
    states: MutableMapping[Tensor, dict[str, Any]],
    param_groups: Sequence[Mapping[str, Any]],
    places: Mapping[tuple[int, int], int],
    rows: HostRows,
    norm_process_group: Any,
) -> Work:
    """Return the work of a step of parameters that have their states; moves step counts to the device if need be.

    Args:
        due: the parameters.
        states: theirs.
        param_groups: of the optimizer.
        places, rows: from `host_places` and `rows_of`.
        norm_process_group: over which the gradients of parameters that are no DTensors are sharded, or None.
    """

    def step(one: Due, row: int) -> TensorStep:
        made = tensor_step(one.param, one.grad, states[one.param], row, param_groups[one.group_index])
        if norm_process_group is None or made.process_groups:
            return made
        return made._replace(process_groups=(norm_process_group,))

    def host_steps(some: Sequence[Due]) -> list[TensorStep]:
        return [step(one, places[one.group_index, states[one.param]["step"] + 1]) for one in some]

    others = host_steps(due.others)
    if not due.on_device:
        return Work(host_steps(due.kernel), rows, others, rows)
    count_on_device([states[one.param] for one in due.kernel])
    device_rows: dict[torch.device, list[DeviceRow]] = defaultdict(list)
    kernel = []
    for one in due.kernel:
        here = device_rows[one.param.device]
        kernel.append(step(one, len(here)))
        here.append(DeviceRow(states[one.param]["step"], one.group_index))
    return Work(kernel, DeviceRows(device_rows, param_groups), others, rows)


def owners_of(due: DueParams, work: Work, param_groups: Sequence[Mapping[str, Any]]) -> list[Owner]:
    """Return whose sums the rows of a step's telemetry are, in the order of its work."""
    names = {}
    for group_index, group in enumerate(param_groups):
        for position, param in enumerate(group["params"]):
            given = group.get("param_names")
            names[param] = given[position] if given else f"{group_index}.{position}"
    steps = [*work.kernel, *work.others]
    return [
        Owner(one.group_index, names[one.param], _real_numel(one.param), step.process_groups)
        for one, step in zip(due.all, steps, strict=True)
    ]


def _real_numel(param: Tensor) -> int:
    return param.numel() * (2 if param.is_complex() else 1)
