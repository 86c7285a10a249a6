"""Reuse the previous step's launch tables when only gradient addresses and step counts changed.

To check a parameter and put it into tables costs the host tens of microseconds. In training nothing of that changes
from step to step but counts and where gradients lie, and whether that is so is found out in bulk.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import chain, compress
from operator import attrgetter, is_, itemgetter, or_
from typing import Any

from torch import Tensor, nn
from torch._C._dynamo import guards

from .backends import Work
from .control import StepControl
from .device_tables import current_stream, is_capturing
from .launches import ALIGNED_BYTES, KernelLaunch, is_settled
from .pytorch_steps import HostRows
from .state_tensors import STATE_TENSORS
from .step_work import Assembly, needs_device, rows_of

_gradient = attrgetter("grad")
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
        self._states = [states[param] for param in self._params]
        self._state_sizes = list(map(len, self._states))
        names = [name for name in ("step", *STATE_TENSORS) if any(name in state for state in self._states)]
        self._holders = {name: [state for state in self._states if name in state] for name in names}
        fixed = [*self._params, *self._state_values()[0]]
        self._fixed_addresses = list(map(Tensor.data_ptr, fixed))
        self._grad_addresses = array("q")
        self._aligned = any(launch.bucket.aligned for launch, _ in launches)
        self._metadata = _guards([*fixed, *map(_gradient, self._params)])
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
        if not self._fits_groups(param_groups, control) or not _are_same(list(states.values()), self._all_states):
            return None
        try:
            tensors, counts = self._state_values()
        except KeyError:  # one is gone
            return None
        addresses = self._addresses_of_gradients(tensors)
        if addresses is None:
            return None
        work_rows, places, rows = self._kernel_rows, {}, HostRows([], [])
        if isinstance(work_rows, HostRows):
            of_rows = self._counts_of_rows(counts)
            if of_rows is None:
                return None
            places = {
                (group, count + 1): row for row, (group, count) in enumerate(zip(self._groups, of_rows, strict=True))
            }
            if len(places) != len(of_rows):  # two rows of a group have come to the same step
                return None
            work_rows = rows = rows_of(places, param_groups)
            if self._settled_kinds(rows) != self._settled:
                return None
        else:
            work_rows = work_rows._replace(groups=param_groups)
        if addresses != self._grad_addresses:
            self._grad_addresses = array("q")  # of no step, should a table not be refreshed
            for launch, indices in self._launches:
                whole = len(indices) == len(addresses)
                launch.refresh_gradients(addresses if whole else array("q", [addresses[index] for index in indices]))
            self._grad_addresses = addresses
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
        return _group_sizes(param_groups) == self._group_sizes and _are_same(_params(param_groups), self._all_params)

    def _state_values(self) -> tuple[list[Tensor], list[Any]]:
        """Return the tensors of all states, and the counts that the host keeps.

        Raises:
            KeyError: one is gone.
        """
        values = {name: list(map(itemgetter(name), holders)) for name, holders in self._holders.items()}
        counts = values.pop("step") if isinstance(self._kernel_rows, HostRows) else []
        return list(chain.from_iterable(values.values())), counts

    def _addresses_of_gradients(self, state_tensors: Sequence[Tensor]) -> array[int] | None:
        """Return where gradients lie, or None if anything but that has changed of any tensor."""
        gradients = list(map(_gradient, self._all_params))
        if list(map(type, gradients)) != self._grad_types or list(map(len, self._states)) != self._state_sizes:
            return None
        if len(self._params) != len(gradients):
            gradients = list(compress(gradients, self._has_grad))
        fixed = [*self._params, *state_tensors]
        # Types, dtypes, devices, sizes, strides, and whether they are sparse, conjugated, negated or fake.
        if not self._metadata.check(*fixed, *gradients) or list(map(Tensor.data_ptr, fixed)) != self._fixed_addresses:
            return None
        addresses = list(map(Tensor.data_ptr, gradients))
        return None if self._aligned and reduce(or_, addresses) % ALIGNED_BYTES else array("q", addresses)

    def _counts_of_rows(self, counts: Sequence[Any]) -> list[int] | None:
        if set(map(type, counts)) != {int}:
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


def _guards(tensors: Sequence[Any]) -> Any:
    """Return PyTorch's own comparison of all that tensors are but where they lie, one call for all of them."""
    make: Any = guards.TensorGuards
    return make(
        *tensors,
        dynamic_dims_sizes=[list(tensor.shape) for tensor in tensors],
        dynamic_dims_strides=[list(tensor.stride()) for tensor in tensors],
    )


def _params(param_groups: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    return list(chain.from_iterable(map(_list_of_params, param_groups)))


def _param_names(param_groups: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [list(group.get("param_names") or ()) for group in param_groups]


def _group_sizes(param_groups: Sequence[Mapping[str, Any]]) -> list[int]:
    return list(map(len, map(_list_of_params, param_groups)))


def _are_same(left: Sequence[object], right: Sequence[object]) -> bool:
    return len(left) == len(right) and all(map(is_, left, right))
