"""Plan the launches of a step, run them, and reuse them while only gradient addresses and step counts change."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import partial, reduce
from itertools import compress
from operator import is_, or_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend import is_fake, uses_triton
from .collect import Collected, ParamWithGrad, needs_device
from .conditions import UNCHANGED_GRADIENTS, Decision, StepConditions
from .delayed_interrupt import DelayedInterrupt
from .device_tables import CAPTURE_NEEDS_WARM_UP, DeviceTable, current_stream, is_capturing
from .external_grads import tensor_steps
from .grad_norm import sum_of_squares
from .launch import (
    ALIGNED_BYTES,
    LaunchCache,
    NativeLaunch,
    ReferenceLaunch,
    TableLaunch,
    TritonLaunch,
    skips_unchanged_v,
)
from .reuse_check import ReuseCheck, is_plain
from .scalars import DeviceRow, DeviceScalars, HostScalars, count_on_device
from .telemetry import StepSums, TelemetryRow
from .tensor_step import TensorStep, with_matching_strides


class StepResult(NamedTuple):
    """The outcome of a step.

    taken: whether the parameters that the host counts were stepped.
    skipped: 0-d on a device, not 0 if the parameters that it counts were not stepped; None without any.
    grad_norm: of all gradients, 0-d float32 on a device that has some, until the next step; None unless measured.
    """

    taken: bool
    skipped: Tensor | None
    grad_norm: Tensor | None


class StepPlan:
    """The launches of a step, and what they were made for.

    Args:
        collected: the parameters, checked; they have their states.
        host: the scalars of those whose steps the host counts, in order, computed.
        param_groups: of the optimizer.
        states: of all its parameters.
        memory: tables of earlier steps.
        telemetry: whether sums are wanted.
        norm_process_group: over which the gradients of parameters that are no DTensors are sharded, or None.
        is_whole: whether these are all parameters of the groups that have a gradient, each with its own.

    Attributes:
        host: as given.
        device_rows: where the device finds the scalars of the parameters that it counts, by device.
        is_reusable: whether `matches` may return True: tensors are stepped just as they lie.

    Raises:
        RuntimeError: a CUDA graph is being captured without a step of the same parameters before it.
    """

    def __init__(
        self,
        collected: Collected,
        host: HostScalars,
        param_groups: Sequence[Mapping[str, Any]],
        states: MutableMapping[Tensor, dict[str, Any]],
        memory: LaunchCache,
        telemetry: bool = False,
        norm_process_group: Any = None,
        is_whole: bool = True,
    ) -> None:
        params = collected.params
        self.host = host
        self._memory = memory
        self._params = [one.param for one in params]
        self._is_fake = any(map(is_fake, self._params))
        own_states = self._own_states = [states[one.param] for one in params]
        counted_there = [collected.on_device and uses_triton(param) for param in self._params]
        count_on_device(list(compress(own_states, counted_there)))
        self._host_states = list(compress(own_states, [not there for there in counted_there]))
        self.device_rows, rows = _rows(params, own_states, counted_there, host)
        self._refuse_unprepared(param_groups)
        steps = [
            step
            for one, state, row in zip(params, own_states, rows, strict=True)
            for step in tensor_steps(one, state, row, param_groups[one.group_index], norm_process_group)
        ]
        host.needs_keys = any(step.draws_bits for step in steps)
        self._copies: list[tuple[Tensor, Tensor]] = []
        laid_out = [with_matching_strides(step, self._copies) for step in steps]
        self._launches = memory.launches(laid_out, None if collected.on_device else host.rows, telemetry)
        self._triton = [launch for launch, _ in self._launches if isinstance(launch, TritonLaunch)]
        self._others = [(launch, indices) for launch, indices in self._launches if not isinstance(launch, TritonLaunch)]
        self._owners = _owners(params, [step.process_groups for step in steps], param_groups) if telemetry else []
        self._is_new = True
        tables = [launch for launch, _ in self._launches if isinstance(launch, TableLaunch)]
        self.is_reusable = (
            len(tables) == len(self._launches) > 0
            and _lie_as_given(params, steps, laid_out)
            and (not is_whole or _are_all(params, param_groups))
            and not any(map(is_capturing, {param.device for param in self._params}))
        )
        # Tables hold addresses alone, also those of copies made for this step.
        self._kept_alive = [] if self.is_reusable else laid_out
        if not self.is_reusable:
            return
        self._reuse_check = ReuseCheck(params, own_states, counted_there, param_groups, states, is_whole)
        self._grad_addresses = array("q", [grad.data_ptr() for one in params for grad in one.grads])
        self._may_move = is_whole or all(len(one.grads) == 1 for one in params)
        self._aligned = any(launch.key.aligned for launch in self._triton)
        self._revisions = [launch.revision for launch in self._triton]
        self._devices = list({launch.device for launch in self._triton})
        self._streams = list(map(current_stream, self._devices))
        of_host = [] if collected.on_device else [step for step in steps if uses_triton(step.param)]
        self._kinds = sorted({(step.scalar_row, step.states) for step in of_host})
        self._settled = self._settled_kinds()
        self._param_names = _param_names(param_groups)

    def matches(
        self,
        param_groups: Sequence[Mapping[str, Any]],
        states: Mapping[Tensor, dict[str, Any]],
        conditions: StepConditions,
        given: Sequence[ParamWithGrad] | None = None,
    ) -> bool:
        """Prepare the next step, if only gradient addresses and step counts have changed; else return False.

        Args:
            param_groups: of the optimizer.
            states: of all its parameters.
            control: of the step.
            given: the parameters of a step that is not whole. Default: None, all that have gradients.

        Raises:
            TypeError, ValueError: a hyper-parameter that is not a number.
        """
        # The tables belong to one stream, and another step, even one that raised, may have filled them since.
        if self._devices and not self._fits_devices(param_groups, conditions):
            return False
        if self._owners and _param_names(param_groups) != self._param_names:
            return False
        addresses = self._reuse_check.gradient_addresses(param_groups, states, given, self._grad_addresses)
        if addresses is None:
            return False
        moved = addresses != self._grad_addresses
        if moved and (not self._may_move or (self._aligned and reduce(or_, addresses) % ALIGNED_BYTES)):
            return False
        if self._host_states:
            if not self.host.follows(self._reuse_check.counts):
                return False
            self.host.compute(param_groups)
            if self._kinds and self._settled_kinds() != self._settled:
                return False
        if moved:
            self._grad_addresses = array("q")  # of no step, should a table not be refreshed
            for launch, indices in self._launches:
                assert isinstance(launch, TableLaunch)
                whole = len(indices) == len(addresses)
                launch.refresh_gradients(addresses if whole else array("q", [addresses[index] for index in indices]))
            self._grad_addresses = addresses
        return True

    def _fits_devices(self, param_groups: Sequence[Mapping[str, Any]], conditions: StepConditions) -> bool:
        if any(map(is_capturing, self._devices)) or list(map(current_stream, self._devices)) != self._streams:
            return False
        if [launch.revision for launch in self._triton] != self._revisions:
            return False
        return bool(self.device_rows) or (conditions.is_default and not any(map(needs_device, param_groups)))

    def belongs_to(self, states: Mapping[Tensor, Mapping[str, Any]]) -> bool:
        """Return whether an optimizer still has the states of all parameters."""
        return all(map(is_, map(states.get, self._params), self._own_states))

    def _settled_kinds(self) -> list[bool]:
        return [skips_unchanged_v(states, self.host.rows[row].exp_avg_sq_weight) for row, states in self._kinds]

    def run(
        self,
        param_groups: Sequence[Mapping[str, Any]],
        conditions: StepConditions,
        error_if_nonfinite: bool = False,
        sums: StepSums | None = None,
    ) -> StepResult:
        """Update every tensor in place, and advance the counts of the parameters.

        Args:
            param_groups: of the optimizer.
            control: what may clip or skip the step, the same for all tensors.
            error_if_nonfinite: raise instead of skipping when the norm is not finite; the host then waits for it.
            sums: written for telemetry; None for none.

        Raises:
            RuntimeError: the norm of the gradients is not finite, and an error was asked for. Nothing has changed.
        """
        if sums is not None:
            sums.begin(self._owners)
        squares = None
        if conditions.max_grad_norm is not None:
            squares = sum_of_squares([launch for launch, _ in self._launches], conditions.norm_ranks)
            if error_if_nonfinite and not self._is_fake and squares is not None and not bool(squares.isfinite()):
                raise RuntimeError(
                    "The norm of the gradients is not finite, so they cannot be clipped; to skip such steps instead, "
                    "set error_if_nonfinite=False"
                )
        # A fake tensor has no value to decide by.
        host_decides = not conditions.is_default and bool(self._others) and not self._is_fake
        decision = conditions.read(squares) if host_decides else UNCHANGED_GRADIENTS
        # Whatever may fail comes before the first write.
        others = self._prepared(decision, sums) if self._others else []
        launch_triton: Callable[[], Tensor | None] | None = None
        if self._triton:
            launch_triton = partial(self._launch_triton, param_groups, conditions, squares, sums)
            if self._is_new and are_compiled(self._triton):
                launch_triton = _held(launch_triton)
            self._is_new = False
        with DelayedInterrupt():
            # Kernels write behind autograd's back; a backward that still needs the old values must fail.
            torch.autograd.graph.increment_version(self._params)
            for launch, arguments in others:
                launch.run(*arguments)
            report = None if launch_triton is None else launch_triton()
            # Of a skipped step the copies are what they were.
            for original, copy in self._copies:
                original.copy_(copy)
            if not decision.skip:
                self.host.advance(self._host_states)
        if sums is not None:
            sums.end(decision.skip if report is None else report[2], conditions.grad_scale)
        grad_norm = None
        if squares is not None:
            grad_norm = conditions.norm(squares) if report is None else report[0]
        return StepResult(not decision.skip, None if report is None else report[2], grad_norm)

    def _prepared(
        self, decision: Decision, sums: StepSums | None
    ) -> list[tuple[NativeLaunch | ReferenceLaunch, tuple[Any, ...]]]:
        """Return the launches of all but the Triton kernel, with their arguments."""
        if decision.skip and sums is None:
            return []
        prepared: list[tuple[NativeLaunch | ReferenceLaunch, tuple[Any, ...]]] = []
        for launch, indices in self._others:
            rows = None if sums is None else sums.rows(launch.device, indices)
            if isinstance(launch, NativeLaunch):
                prepared.append((launch, (self.host.on_cpu(launch.is_float64, decision), rows)))
            else:
                prepared.append((launch, (*self.host.scaled(decision), decision, rows)))
        return prepared

    def _launch_triton(
        self,
        param_groups: Sequence[Mapping[str, Any]],
        conditions: StepConditions,
        squares: Tensor | None,
        sums: StepSums | None,
    ) -> Tensor | None:
        report = None
        scalars: dict[torch.device, Tensor] = {}
        for device in dict.fromkeys(launch.device for launch in self._triton):
            if self.device_rows:
                rows = self.device_rows[device]
                prepared = self._memory.device_scalars.get(_key(device, rows), device, partial(DeviceScalars, device))
                squares_here = None if squares is None else squares.to(device, non_blocking=True)
                scalars[device] = prepared.prepare(rows, param_groups, conditions, squares_here)
                report = prepared.report if report is None else report
            else:
                table = self._memory.host_scalars.get(device, device, partial(DeviceTable, device))
                scalars[device] = self.host.on_device(table, conditions.grad_factor)
        for launch, indices in self._launches:
            if isinstance(launch, TritonLaunch):
                launch.run(scalars[launch.device], None if sums is None else sums.rows(launch.device, indices))
        return report

    def _refuse_unprepared(self, param_groups: Sequence[Mapping[str, Any]]) -> None:
        for device, rows in self.device_rows.items():
            if is_capturing(device):
                prepared = self._memory.device_scalars.prepared(_key(device, rows))
                if prepared is None or not prepared.is_prepared_for(rows, param_groups):
                    raise RuntimeError(CAPTURE_NEEDS_WARM_UP)


def _rows(
    params: Sequence[ParamWithGrad],
    own_states: Sequence[Mapping[str, Any]],
    counted_there: Sequence[bool],
    host: HostScalars,
) -> tuple[dict[torch.device, list[DeviceRow]], list[int]]:
    """Return the rows of scalars that devices fill, and the row of each parameter."""
    of_device: dict[torch.device, list[DeviceRow]] = defaultdict(list)
    of_host = iter(host.row_of_param)
    rows = []
    for one, state, there in zip(params, own_states, counted_there, strict=True):
        if there:
            rows.append(len(of_device[one.param.device]))
            of_device[one.param.device].append(DeviceRow(state["step"], one.group_index))
        else:
            rows.append(next(of_host))
    return dict(of_device), rows


def _lie_as_given(params: Sequence[ParamWithGrad], steps: Sequence[TensorStep], laid_out: Sequence[TensorStep]) -> bool:
    """Return whether a step reads and writes its parameters and gradients themselves, and no copies of them."""
    given = {grad.data_ptr() for one in params for grad in one.grads}
    return (
        all(map(is_plain, params))
        and all(map(is_, laid_out, steps))
        and all(step.grad.data_ptr() in given for step in steps)
    )


def _are_all(params: Sequence[ParamWithGrad], param_groups: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether these are all parameters with gradients, each named once, and the gradients their own."""
    given = [param for group in param_groups for param in group["params"] if param.grad is not None]
    return len(given) == len(params) and all(one.grads[0] is one.param.grad for one in params)


def _owners(
    params: Sequence[ParamWithGrad],
    process_groups: Sequence[tuple[Any, ...]],
    param_groups: Sequence[Mapping[str, Any]],
) -> list[TelemetryRow]:
    names = {}
    for group_index, group in enumerate(param_groups):
        for position, param in enumerate(group["params"]):
            given = group.get("param_names")
            names[param] = given[position] if given else f"{group_index}.{position}"
    return [
        TelemetryRow(
            one.group_index, names[one.param], one.param.numel() * (2 if one.param.is_complex() else 1), groups
        )
        for one, groups in zip(params, process_groups, strict=True)
    ]


def _param_names(param_groups: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [list(group.get("param_names") or ()) for group in param_groups]


def _key(device: torch.device, rows: Sequence[DeviceRow]) -> tuple[torch.device, int]:
    return device, rows[0].step.data_ptr()


def are_compiled(launches: Sequence[TritonLaunch]) -> bool:
    """Return whether launches need their kernels compiled before the first of them runs."""
    return any(launch.device.type == "cuda" for launch in launches)


def _held(launch: Callable[[], Tensor | None]) -> Callable[[], Tensor | None]:
    """Compile the kernels and fill the tables of launches; return what does the launches."""
    from adax_triton.kernels.launch import deferred_launches

    with deferred_launches() as held:
        report = launch()

    def run() -> Tensor | None:
        for one in held:
            one()
        return report

    return run
