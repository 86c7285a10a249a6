"""The scalars of a step computed on the device, where a step may be skipped or replayed without the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .control import StepControl
from .device_tables import DeviceTable
from .hyperparameters import as_float
from .schedule import GROUP_KEYS, DeviceSchedule, device_schedule


class DeviceRow(NamedTuple):
    """Where the scalars of a tensor come from: its step count, 0-d int64 on its device, and its parameter group."""

    step: Tensor
    group_index: int


class DeviceScalars:
    """Advances step counts and computes scalars on one device, in one small launch.

    Args:
        device: of the tensors to step.

    Attributes:
        report: (3,) float32: norm of the unscaled gradients, NaN unless asked for; clip factor; 1 if skipped, else 0.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rows = DeviceTable(device)
        self._groups = DeviceTable(device)
        self._inputs = DeviceTable(device)
        self._scalars = torch.empty(0, dtype=torch.float32, device=device)
        self._written: tuple[bool, ...] = ()
        self.report = torch.zeros(3, dtype=torch.float32, device=device)

    def prepare(
        self,
        rows: Sequence[DeviceRow],
        groups: Sequence[Mapping[str, Any]],
        control: StepControl,
        sum_of_squares: Tensor | None,
    ) -> Tensor:
        """Advance the counts of `rows`, unless the step is to be skipped, and return the scalars of each row.

        Args:
            rows: one per tensor. A list that was given before must be what it was, with the counts where they were.
            groups: the parameter groups.
            control: of this step.
            sum_of_squares: of all gradients as they are, float64; None unless `control` clips.

        Returns:
            (n, 10) float32, see `kernels.adax_step`.

        Raises:
            TypeError: a learning rate on this device that is not float32.
        """
        from adax_triton.kernels.schedule import SCALAR_COLUMNS, prepare_step

        used = _used_groups(rows, groups)
        constants = [_constants(groups[index], self._device) for index in used]
        addresses = [lr_address(groups[index], self._device) for index in used]
        place = {index: position for position, index in enumerate(used)}
        columns = len(DeviceSchedule._fields)
        # A list that is the very one of the last step, whose counts lie where they lay, is not gone through again.
        row_table = self._rows.set(
            (_Same(rows), addresses),
            lambda _: torch.tensor(
                [(row.step.data_ptr(), place[row.group_index], addresses[place[row.group_index]]) for row in rows],
                dtype=torch.int64,
                device="cpu",
            ).view(-1, 3),
        )
        group_table = self._groups.set(
            constants, lambda given: torch.tensor(given, dtype=torch.float64, device="cpu").view(-1, columns)
        )
        if self._scalars.shape[0] < len(rows):
            self._scalars = torch.empty(len(rows), SCALAR_COLUMNS, dtype=torch.float32, device=self._device)
        scalars = self._scalars[: len(rows)]
        prepare_step(row_table, group_table, self._filled_inputs(control, sum_of_squares), scalars, self.report)
        return scalars

    def is_prepared_for(self, rows: Sequence[DeviceRow], groups: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether a capture can `prepare` these rows: the last ones were as many, of as many groups."""
        counts = len(self._rows.tensor), len(self._groups.tensor)
        return counts == (len(rows), len(_used_groups(rows, groups)))

    def _filled_inputs(self, control: StepControl, sum_of_squares: Tensor | None) -> Tensor:
        given = (control.grad_scale, control.found_inf, sum_of_squares)
        present = tuple(value is not None for value in given)
        if present != self._written:
            self._inputs.forget()
            self._written = present
        limit = control.max_grad_norm or 0.0
        inputs = self._inputs.set(
            (1.0, 0.0, 0.0, limit), lambda given: torch.tensor(given, dtype=torch.float64, device="cpu")
        )
        for index, value in enumerate(given):
            if value is not None:
                inputs[index].copy_(value.detach().reshape(()), non_blocking=True)
        return inputs


def _used_groups(rows: Sequence[DeviceRow], groups: Sequence[Mapping[str, Any]]) -> list[int]:
    return sorted({row.group_index for row in rows}) if len(groups) > 1 else [0]


class _Same:
    """Equal to what holds the very same list."""

    def __init__(self, rows: Sequence[DeviceRow]) -> None:
        self.rows = rows

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.rows is self.rows


def _constants(group: Mapping[str, Any], device: torch.device) -> DeviceSchedule:
    known = {key: group[key] for key in GROUP_KEYS}
    known["lr"] = 0.0 if lr_address(group, device) else as_float(group["lr"], "lr")
    known |= {name: as_float(group[name], name) for name in ("eps", "weight_decay")}
    known["betas"] = tuple(as_float(beta, f"betas[{index}]") for index, beta in enumerate(group["betas"]))
    return device_schedule(**known, seed=group["seed"])


def lr_address(group: Mapping[str, Any], device: torch.device) -> int:
    """Return the address of a group's learning rate where that lies on a device, else 0.

    Raises:
        TypeError: it is not float32.
    """
    lr = group["lr"]
    if not isinstance(lr, Tensor) or lr.device != device:
        return 0
    if lr.dtype != torch.float32:
        raise TypeError(
            f"Invalid type of lr: on {device} a tensor is read by the kernel, expected float32, got {lr.dtype}"
        )
    return lr.data_ptr()
