"""Plan, run and reuse the kernel launches of a step."""

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

from adax_triton.kernels.tables import SCALAR_COLUMNS
from adax_triton.state.dtensor import local_tensor

from .backend import is_fake, uses_triton
from .collect import Collected, ParamWithGrad, group_counts_on_device
from .delayed_interrupt import DelayedInterrupt
from .device_tables import CAPTURE_NEEDS_WARM_UP, DeviceTable, current_stream, is_capturing
from .external_grads import tensor_steps
from .grad_norm import gradient_squares
from .gradient_handling import DEFAULT_DECISION, GradientHandling, StepDecision
from .launch import (
    ALIGNED_BYTES,
    LaunchCache,
    NativeLaunch,
    ReferenceLaunch,
    TableLaunch,
    TritonLaunch,
    should_skip_unchanged_v,
)
from .reuse_check import ReuseCheck, has_plain_tensors
from .scalars import DeviceRow, DeviceScalars, HostScalars, move_counts_to_device
from .telemetry import StepSums, TelemetryRow
from .tensor_step import TensorStep, with_matching_strides


class StepResult(NamedTuple):
    """The outcome of a step.

    taken: whether the host-counted parameters were updated.
    skipped: 0-d float32 on a device: 1 if the device-counted parameters were skipped, else 0. None without such
        parameters.
    grad_norm: norm of all gradients, 0-d float32. The next step overwrites it. None if the norm was not measured.
    """

    taken: bool
    skipped: Tensor | None
    grad_norm: Tensor | None


class StepPlan:
    """The launches of one step.

    Later steps reuse them while only gradient addresses and step counts change.

    Args:
        collected: checked parameters; their states must exist.
        host_scalars: computed scalars of the host-counted parameters, in the order of `collected.params`.
        param_groups: the optimizer's groups.
        states: the optimizer's states.
        launch_cache: launches and tables of earlier steps.
        telemetry: whether kernels write telemetry sums. Default: False.
        norm_process_group: process group that shards plain-tensor gradients. Default: None, they are not sharded.
        covers_all_params: whether the step updates every parameter that has a `grad`. Default: True.

    Attributes:
        host_scalars: see Args.
        device_rows: step counts and group indices of the device-counted parameters, by device.
        is_reusable: whether a later step can reuse the plan; False, for example, if a tensor had to be copied.

    Raises:
        RuntimeError: a CUDA graph is being captured without a warm-up step of the same parameters.
    """

    def __init__(
        self,
        collected: Collected,
        host_scalars: HostScalars,
        param_groups: Sequence[Mapping[str, Any]],
        states: MutableMapping[Tensor, dict[str, Any]],
        launch_cache: LaunchCache,
        telemetry: bool = False,
        norm_process_group: Any = None,
        covers_all_params: bool = True,
    ) -> None:
        params = collected.params
        self.host_scalars = host_scalars
        self._launch_cache = launch_cache
        self._params = [item.param for item in params]
        self._is_fake = any(map(is_fake, self._params))
        param_states = self._param_states = [states[item.param] for item in params]
        counted_on_device = [collected.counts_on_device and uses_triton(param) for param in self._params]
        move_counts_to_device(list(compress(param_states, counted_on_device)))
        self._host_states = list(compress(param_states, [not on_device for on_device in counted_on_device]))
        self.device_rows, rows = _assign_rows(params, param_states, counted_on_device, host_scalars)
        self._check_capture_warm_up()
        steps = [
            step
            for item, state, row in zip(params, param_states, rows, strict=True)
            for step in tensor_steps(item, state, row, param_groups[item.group_index], norm_process_group)
        ]
        host_scalars.needs_keys = any(step.needs_random_bits for step in steps)
        self._copies: list[tuple[Tensor, Tensor]] = []  # (original, copy that the kernel writes)
        dense_steps = [with_matching_strides(step, self._copies) for step in steps]
        host_rows = None if collected.counts_on_device else host_scalars.rows
        self._launches = launch_cache.launches(dense_steps, host_rows, telemetry)
        self._triton = [launch for launch, _ in self._launches if isinstance(launch, TritonLaunch)]
        self._non_triton_launches = [
            (launch, indices) for launch, indices in self._launches if not isinstance(launch, TritonLaunch)
        ]
        self._telemetry_rows = _telemetry_rows(params, steps, param_groups) if telemetry else []
        self._squares: Tensor | None = None
        self._is_new = True
        tables = [launch for launch, _ in self._launches if isinstance(launch, TableLaunch)]
        self.is_reusable = (
            len(tables) == len(self._launches) > 0
            and _without_copies(params, steps, dense_steps)
            and (not covers_all_params or _are_all_params(params, param_groups))
            and not any(map(is_capturing, {param.device for param in self._params}))
        )
        # The tables store only addresses, so the plan keeps copied tensors alive.
        self._kept_alive = [] if self.is_reusable else dense_steps
        if not self.is_reusable:
            return
        self._reuse_check = ReuseCheck(params, param_states, counted_on_device, param_groups, states, covers_all_params)
        self._grad_addresses = array("q", _grad_addresses(params))
        self._grads_may_move = covers_all_params or all(len(item.grads) == 1 for item in params)
        self._aligned = any(launch.key.aligned for launch in self._triton)
        self._revisions = [launch.revision for launch in self._triton]
        self._devices = list({launch.device for launch in self._triton})
        self._streams = list(map(current_stream, self._devices))
        host_steps = [] if collected.counts_on_device else [step for step in steps if uses_triton(step.param)]
        self._rows_and_formats = sorted({(step.scalar_row, step.states) for step in host_steps})
        self._known_v_skips = self._which_skip_unchanged_v()
        self._param_names = _param_names(param_groups)

    def try_reuse(
        self,
        param_groups: Sequence[Mapping[str, Any]],
        states: Mapping[Tensor, dict[str, Any]],
        handling: GradientHandling,
        params_with_grads: Sequence[ParamWithGrad] | None = None,
    ) -> bool:
        """Prepare the next step. Return False if it needs a new plan.

        A new plan is needed if anything except gradient addresses and step counts changed.

        Args:
            param_groups: the optimizer's groups.
            states: the optimizer's states.
            handling: scaling, clipping and skipping of this step.
            params_with_grads: the parameters, if the plan does not cover all of them. Default: None, all parameters
                with a `grad`.

        Raises:
            TypeError, ValueError: a hyper-parameter is not a number.
        """
        # The tables belong to one stream. Another step may have overwritten them, even if it raised.
        if self._devices and not self._tables_are_current(param_groups, handling):
            return False
        if self._telemetry_rows and _param_names(param_groups) != self._param_names:
            return False
        addresses = self._reuse_check.gradient_addresses(param_groups, states, params_with_grads, self._grad_addresses)
        if addresses is None:
            return False
        moved = addresses != self._grad_addresses
        if moved and (not self._grads_may_move or (self._aligned and reduce(or_, addresses) % ALIGNED_BYTES)):
            return False
        if self._host_states:
            if not self.host_scalars.update_counts(self._reuse_check.counts):
                return False
            self.host_scalars.compute(param_groups)
            if self._rows_and_formats and self._which_skip_unchanged_v() != self._known_v_skips:
                return False
        if moved:
            self._grad_addresses = array("q")  # invalid until all tables are refreshed
            for launch, indices in self._launches:
                assert isinstance(launch, TableLaunch)
                has_all = len(indices) == len(addresses)
                launch.refresh_gradients(addresses if has_all else array("q", [addresses[index] for index in indices]))
            self._grad_addresses = addresses
        return True

    def _tables_are_current(self, param_groups: Sequence[Mapping[str, Any]], handling: GradientHandling) -> bool:
        if any(map(is_capturing, self._devices)) or list(map(current_stream, self._devices)) != self._streams:
            return False
        if [launch.revision for launch in self._triton] != self._revisions:
            return False
        return bool(self.device_rows) or (handling.is_default and not any(map(group_counts_on_device, param_groups)))

    def belongs_to(self, states: Mapping[Tensor, Mapping[str, Any]]) -> bool:
        """Return whether `states` still holds the states of this plan's parameters."""
        return all(map(is_, map(states.get, self._params), self._param_states))

    def _which_skip_unchanged_v(self) -> list[bool]:
        """For each entry of `_rows_and_formats`, return whether the kernel skips unchanged v."""
        return [
            should_skip_unchanged_v(states, self.host_scalars.rows[row].exp_avg_sq_weight)
            for row, states in self._rows_and_formats
        ]

    def run(
        self,
        param_groups: Sequence[Mapping[str, Any]],
        handling: GradientHandling,
        error_if_nonfinite: bool = False,
        sums: StepSums | None = None,
    ) -> StepResult:
        """Update every tensor in place and advance the step counts.

        Args:
            param_groups: the optimizer's groups.
            handling: scaling, clipping and skipping, the same for all tensors.
            error_if_nonfinite: raise if the norm is not finite; the host waits for the norm. Default: False, skip.
            sums: receives the telemetry. Default: None, no telemetry.

        Raises:
            RuntimeError: `error_if_nonfinite` is set and the gradient norm is not finite. Nothing has changed.
        """
        if sums is not None:
            sums.begin(self._telemetry_rows)
        squares = None
        if handling.max_grad_norm is not None:
            launches = [launch for launch, _ in self._launches]
            squares = self._squares = gradient_squares(launches, handling.norm_ranks, self._squares)
            if error_if_nonfinite and not self._is_fake and squares is not None and not bool(squares.sum().isfinite()):
                raise RuntimeError(
                    "The norm of the gradients is not finite, so the step cannot clip them; "
                    "set error_if_nonfinite=False to skip such steps"
                )
        # Fake tensors have no values, so the host cannot decide.
        host_decides = not handling.is_default and bool(self._non_triton_launches) and not self._is_fake
        decision = handling.decide(squares) if host_decides else DEFAULT_DECISION
        # Do everything that can fail before the first write.
        non_triton_launches = self._prepare_non_triton_launches(decision, sums) if self._non_triton_launches else []
        launch_triton: Callable[[], tuple[Tensor, ...] | None] | None = None
        if self._triton:
            launch_triton = partial(self._launch_triton, param_groups, handling, squares, sums)
            if self._is_new and needs_compilation(self._triton):
                launch_triton = _compile_first(launch_triton)
            self._is_new = False
        with DelayedInterrupt():
            # Autograd does not see kernel writes. Without this, a backward that needs the old values would not raise.
            torch.autograd.graph.increment_version(self._params)
            for launch, arguments in non_triton_launches:
                launch.run(*arguments)
            norm_clip_skip = None if launch_triton is None else launch_triton()
            # After a skipped step the copies are unchanged.
            for original, copy in self._copies:
                original.copy_(copy)
            if not decision.skip:
                self.host_scalars.advance(self._host_states)
        if sums is not None:
            sums.end(decision.skip if norm_clip_skip is None else norm_clip_skip[2], handling.grad_scale)
        grad_norm = None
        if squares is not None:
            grad_norm = handling.norm(squares) if norm_clip_skip is None else norm_clip_skip[0]
        return StepResult(not decision.skip, None if norm_clip_skip is None else norm_clip_skip[2], grad_norm)

    def _prepare_non_triton_launches(
        self, decision: StepDecision, sums: StepSums | None
    ) -> list[tuple[NativeLaunch | ReferenceLaunch, tuple[Any, ...]]]:
        """Return the native and reference launches with their arguments."""
        if decision.skip and sums is None:
            return []
        prepared: list[tuple[NativeLaunch | ReferenceLaunch, tuple[Any, ...]]] = []
        for launch, indices in self._non_triton_launches:
            sum_rows = None if sums is None else sums.rows(launch.device, indices)
            if isinstance(launch, NativeLaunch):
                prepared.append((launch, (self.host_scalars.cpu_table(launch.is_float64, decision), sum_rows)))
            else:
                prepared.append((launch, (*self.host_scalars.rows_with_grad_factor(decision), decision, sum_rows)))
        return prepared

    def _launch_triton(
        self,
        param_groups: Sequence[Mapping[str, Any]],
        handling: GradientHandling,
        squares: Tensor | None,
        sums: StepSums | None,
    ) -> tuple[Tensor, ...] | None:
        norm_clip_skip = None
        scalars: dict[torch.device, Tensor] = {}
        for device in dict.fromkeys(launch.device for launch in self._triton):
            if self.device_rows:
                rows = self.device_rows[device]
                cache = self._launch_cache.device_scalars
                device_scalars = cache.get(_scalars_key(device, rows), device, partial(DeviceScalars, device))
                squares_here = None if squares is None else squares.to(device, non_blocking=True)
                scalars[device] = device_scalars.prepare(rows, param_groups, handling, squares_here)
                norm_clip_skip = norm_clip_skip or device_scalars.norm_clip_skip
            else:
                make_table = partial(DeviceTable, device, torch.float32, len(SCALAR_COLUMNS))
                table = self._launch_cache.host_computed_scalars.get(device, device, make_table)
                scalars[device] = self.host_scalars.device_table(table, handling.grad_factor)
        for launch, indices in self._launches:
            if isinstance(launch, TritonLaunch):
                launch.run(scalars[launch.device], None if sums is None else sums.rows(launch.device, indices))
        return norm_clip_skip

    def _check_capture_warm_up(self) -> None:
        for device, rows in self.device_rows.items():
            if is_capturing(device):
                latest = self._launch_cache.device_scalars.latest(_scalars_key(device, rows))
                if latest is None or not latest.is_prepared_for(rows):
                    raise RuntimeError(CAPTURE_NEEDS_WARM_UP)


def _assign_rows(
    params: Sequence[ParamWithGrad],
    param_states: Sequence[Mapping[str, Any]],
    counted_on_device: Sequence[bool],
    host_scalars: HostScalars,
) -> tuple[dict[torch.device, list[DeviceRow]], list[int]]:
    """Return each device's scalar rows, and the row index of each parameter."""
    device_rows: dict[torch.device, list[DeviceRow]] = defaultdict(list)
    host_rows = iter(host_scalars.row_of_param)
    rows = []
    for item, state, on_device in zip(params, param_states, counted_on_device, strict=True):
        if on_device:
            rows.append(len(device_rows[item.param.device]))
            device_rows[item.param.device].append(DeviceRow(state["step"], item.group_index))
        else:
            rows.append(next(host_rows))
    return dict(device_rows), rows


def _without_copies(
    params: Sequence[ParamWithGrad], steps: Sequence[TensorStep], dense_steps: Sequence[TensorStep]
) -> bool:
    """Return whether the step reads and writes the original tensors, not copies."""
    if not all(map(has_plain_tensors, params)) or not all(map(is_, dense_steps, steps)):
        return False
    given = set(_grad_addresses(params))
    return all(step.grad.data_ptr() in given for step in steps)


def _grad_addresses(params: Sequence[ParamWithGrad]) -> list[int]:
    return [local_tensor(grad).data_ptr() for item in params for grad in item.grads]


def _are_all_params(params: Sequence[ParamWithGrad], param_groups: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether `params` are all parameters with a `grad`, once each."""
    given = [param for group in param_groups for param in group["params"] if param.grad is not None]
    return len(given) == len(params) and all(item.grads[0] is item.param.grad for item in params)


def _telemetry_rows(
    params: Sequence[ParamWithGrad], steps: Sequence[TensorStep], param_groups: Sequence[Mapping[str, Any]]
) -> list[TelemetryRow]:
    names = {}
    for group_index, group in enumerate(param_groups):
        for position, param in enumerate(group["params"]):
            given = group.get("param_names")
            names[param] = given[position] if given else f"{group_index}.{position}"
    rows = []
    for (param, group_index, *_), step in zip(params, steps, strict=True):
        numel = param.numel() * (2 if param.is_complex() else 1)
        rows.append(TelemetryRow(group_index, names[param], numel, step.process_groups))
    return rows


def _param_names(param_groups: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [list(group.get("param_names") or ()) for group in param_groups]


def _scalars_key(device: torch.device, rows: Sequence[DeviceRow]) -> tuple[torch.device, int]:
    return device, rows[0].step.data_ptr()


def needs_compilation(launches: Sequence[TritonLaunch]) -> bool:
    """Return whether kernels must be compiled before the first launch."""
    return any(launch.device.type == "cuda" for launch in launches)


def _compile_first(launch: Callable[[], tuple[Tensor, ...] | None]) -> Callable[[], tuple[Tensor, ...] | None]:
    """Compile kernels and fill tables now; return a function that launches."""
    from adax_triton.kernels.launch import deferred_launches

    with deferred_launches() as deferred:
        norm_clip_skip = launch()

    def run() -> tuple[Tensor, ...] | None:
        for item in deferred:
            item()
        return norm_clip_skip

    return run
