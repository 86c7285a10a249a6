"""A step like the last one: what is checked of its tensors before the tables of the last one serve again.

To look at a parameter, check it and put it into tables costs the host tens of microseconds. In training nothing of that
changes from step to step but counts and the addresses of gradients, and whether that is so is found out in bulk.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import chain, compress
from operator import attrgetter, is_, itemgetter, or_
from typing import Any

from torch import Tensor, nn

from .backends import Work
from .control import StepControl
from .device_tables import current_stream, is_capturing
from .launches import ALIGNED_BYTES, KernelLaunch, is_settled
from .pytorch_steps import HostRows
from .step_work import Assembly, needs_device, rows_of

_gradient = attrgetter("grad")
_dtype = attrgetter("dtype")
_options = itemgetter("weight_rounding", "capturable")
_list_of_params = itemgetter("params")


class StepPlan:
    """What one step found out of its tensors; see `next`. Make it by `plan_of`."""

    def __init__(
        self,
        assembly: Assembly,
        launches: Sequence[KernelLaunch],
        param_groups: Sequence[Mapping[str, Any]],
        states: Mapping[Tensor, dict[str, Any]],
    ) -> None:
        self._launches = launches
        self._kernel_rows = assembly.work.kernel_rows
        self._revisions = [launch.revision for launch, _ in launches]
        self._owners = assembly.owners
        self._param_names = _param_names(param_groups)
        self._group_options = list(map(_options, param_groups))
        self._group_sizes = _group_sizes(param_groups)
        self._all_params = _params(param_groups)
        self._all_states = list(states.values())
        self._grad_types = [type(param.grad) for param in self._all_params]
        self._has_grad = [param.grad is not None for param in self._all_params]
        self._params = list(compress(self._all_params, self._has_grad))
        self._devices = list({param.device for param in self._params})
        self._streams = list(map(current_stream, self._devices))
        self._numels = list(map(Tensor.numel, self._params))
        self._grad_dtypes = [param.grad.dtype for param in self._params if param.grad is not None]
        self._grad_addresses = array("q")
        self._aligned = any(launch.bucket.aligned for launch, _ in launches)
        self._param_addresses = list(map(Tensor.data_ptr, self._params))
        self._states = [states[param] for param in self._params]
        values = list(chain.from_iterable(map(dict.values, self._states)))
        self._is_count = [not isinstance(value, Tensor) for value in values]
        self._is_tensor = [isinstance(value, Tensor) for value in values]
        self._state_addresses = list(map(Tensor.data_ptr, compress(values, self._is_tensor)))
        self._row_of = [step.scalar_row for step in assembly.work.kernel]
        self._groups = [group_index for group_index, _ in assembly.places]
        self._first_of_row = [self._row_of.index(row) for row in range(len(self._groups))]
        self._kinds = sorted({(step.scalar_row, step.states) for step in assembly.work.kernel})
        self._settled = self._settled_kinds(assembly.rows)

    def next(
        self, param_groups: Sequence[Mapping[str, Any]], states: Mapping[Tensor, dict[str, Any]], control: StepControl
    ) -> Assembly | None:
        """Return the next step, if it has the same tensors as the planned one but for where gradients lie; else None.

        Args:
            param_groups: of the optimizer.
            states: of all its parameters.
            control: of the step.
        """
        if not (self._fits_groups(param_groups, control) and self._fits_states(states)):
            return None
        addresses = self._addresses_of_gradients()
        if addresses is None:
            return None
        work_rows, places, rows = self._kernel_rows, {}, HostRows([], [])
        if isinstance(work_rows, HostRows):
            counts = self._counts_of_rows()
            if counts is None:
                return None
            places = {
                (group, count + 1): row for row, (group, count) in enumerate(zip(self._groups, counts, strict=True))
            }
            if len(places) != len(counts):  # two rows of a group have come to the same step
                return None
            work_rows = rows = rows_of(places, param_groups)
            if self._settled_kinds(rows) != self._settled:
                return None
        else:
            work_rows = work_rows._replace(groups=param_groups)
        if addresses != self._grad_addresses:
            self._grad_addresses = addresses
            for launch, indices in self._launches:
                whole = len(indices) == len(addresses)
                launch.refresh_gradients(addresses if whole else array("q", [addresses[index] for index in indices]))
        work = Work([], work_rows, [], HostRows([], []), (self._launches, self._params))
        return Assembly(work, places, rows, self._states if places else [], self._owners)

    def _fits_groups(self, param_groups: Sequence[Mapping[str, Any]], control: StepControl) -> bool:
        if any(map(is_capturing, self._devices)) or list(map(_options, param_groups)) != self._group_options:
            return False
        # The tables belong to one stream, and another step, even one that raised, may have filled them since.
        if list(map(current_stream, self._devices)) != self._streams or self._revisions != [
            launch.revision for launch, _ in self._launches
        ]:
            return False
        if self._owners and _param_names(param_groups) != self._param_names:
            return False
        if isinstance(self._kernel_rows, HostRows) and not (
            control.is_idle and not any(map(needs_device, param_groups))
        ):
            return False
        return (
            _group_sizes(param_groups) == self._group_sizes
            and _are_same(_params(param_groups), self._all_params)
            and list(map(Tensor.numel, self._params)) == self._numels
            and list(map(Tensor.data_ptr, self._params)) == self._param_addresses
            and all(map(Tensor.is_contiguous, self._params))
        )

    def _fits_states(self, states: Mapping[Tensor, dict[str, Any]]) -> bool:
        if not _are_same(list(states.values()), self._all_states):
            return False
        self._values = list(chain.from_iterable(map(dict.values, self._states)))
        if len(self._values) != len(self._is_tensor):
            return False
        try:
            return list(map(Tensor.data_ptr, compress(self._values, self._is_tensor))) == self._state_addresses
        except TypeError:  # a count where there was a tensor
            return False

    def _addresses_of_gradients(self) -> array[int] | None:
        gradients = list(map(_gradient, self._all_params))
        if list(map(type, gradients)) != self._grad_types:
            return None
        if len(self._params) != len(gradients):
            gradients = list(compress(gradients, self._has_grad))
        try:
            if list(map(_dtype, gradients)) != self._grad_dtypes or not all(map(Tensor.is_contiguous, gradients)):
                return None
            addresses = list(map(Tensor.data_ptr, gradients))
        except RuntimeError:  # a sparse one
            return None
        return None if self._aligned and reduce(or_, addresses) % ALIGNED_BYTES else array("q", addresses)

    def _counts_of_rows(self) -> list[int] | None:
        counts = list(compress(self._values, self._is_count))
        # Not what a tensor among them would make of the sum, or of being compared.
        if type(sum(counts)) is not int:
            return None
        of_rows = [counts[first] for first in self._first_of_row]
        return of_rows if counts == list(map(of_rows.__getitem__, self._row_of)) else None

    def _settled_kinds(self, rows: HostRows) -> list[bool]:
        if isinstance(self._kernel_rows, HostRows):
            return [is_settled(states, rows.scalars[row].exp_avg_sq_weight) for row, states in self._kinds]
        return []


def plan_of(
    assembly: Assembly,
    launches: Sequence[KernelLaunch] | None,
    param_groups: Sequence[Mapping[str, Any]],
    states: Mapping[Tensor, dict[str, Any]],
) -> StepPlan | None:
    """Return a plan for steps like one just assembled, or None where tensors are not stepped just as they lie.

    Args:
        assembly: of the step, assembled and not planned itself.
        launches: of the step; None if copies stood in for some of its tensors.
        param_groups: of the optimizer.
        states: of all its parameters.
    """
    params = _params(param_groups)
    due = [param for param in params if param.grad is not None]
    kernel = assembly.work.kernel
    if launches is None or not kernel or len(due) != len(kernel) or any(map(is_capturing, {p.device for p in due})):
        return None
    for param, step in zip(due, kernel, strict=True):
        plain = type(param) in (Tensor, nn.Parameter) and type(param.grad) is Tensor and param.grad is step.grad
        if not (plain and param.is_contiguous() and step.grad.is_contiguous()):
            return None
    return StepPlan(assembly, launches, param_groups, states)


def _params(param_groups: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    return list(chain.from_iterable(map(_list_of_params, param_groups)))


def _param_names(param_groups: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [list(group.get("param_names") or ()) for group in param_groups]


def _group_sizes(param_groups: Sequence[Mapping[str, Any]]) -> list[int]:
    return list(map(len, map(_list_of_params, param_groups)))


def _are_same(left: Sequence[object], right: Sequence[object]) -> bool:
    return len(left) == len(right) and all(map(is_, left, right))
