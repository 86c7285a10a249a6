"""Compute step scalars and advance step counts, on host or device."""

from __future__ import annotations

import math
from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adax_triton.kernels.tables import ROW_COLUMNS, SCALAR_COLUMNS, scalar_row
from adax_triton.state.dtensor import is_dtensor
from adax_triton.state.validation import as_float
from adax_triton.update.coefficients import (
    COEFFICIENT_KEYS,
    DeviceCoefficients,
    StepScalars,
    device_coefficients,
    step_scalars,
)
from adax_triton.update.rounding import random_key

from .device_tables import DeviceTable, upload
from .gradient_handling import DEFAULT_DECISION, GradientHandling, StepDecision

_GRAD_FACTOR = SCALAR_COLUMNS.index("grad_factor")


class HostScalars:
    """Scalars of host-counted parameters, one row per (group, step).

    Args:
        group_steps: (group index, next step number) of each parameter.

    Attributes:
        row_of_param: row index of each parameter.
        groups: group index of each row.
        steps: next step number of each row.
        rows: scalars of each row, set by `compute`.
        needs_keys: whether a kernel rounds stochastically and so needs random keys. Default: True.
    """

    def __init__(self, group_steps: Sequence[tuple[int, int]]) -> None:
        row_of = {group_step: row for row, group_step in enumerate(dict.fromkeys(group_steps))}
        self.row_of_param = [row_of[group_step] for group_step in group_steps]
        self.groups = [group_index for group_index, _ in row_of]
        self.steps = [step for _, step in row_of]
        self.rows: list[StepScalars] = []
        self.needs_keys = True
        self._keys: list[tuple[int, int]] = []
        self._first_param = [self.row_of_param.index(row) for row in range(len(self.steps))]
        self._tables: dict[bool, tuple[bytearray, Tensor]] = {}

    def update_counts(self, counts: list[Any]) -> bool:
        """Set `steps` and return whether the counts still fit.

        They do not fit if parameters of one row now have different counts.
        """
        if set(map(type, counts)) != {int}:
            return False
        row_counts = [counts[first] for first in self._first_param]
        if len(row_counts) == 1:
            fits = counts.count(row_counts[0]) == len(counts)
        else:
            fits = counts == list(map(row_counts.__getitem__, self.row_of_param))
            fits = fits and len(set(zip(self.groups, row_counts, strict=True))) == len(row_counts)
        self.steps = [count + 1 for count in row_counts]
        return fits and min(row_counts) >= 0

    def compute(self, param_groups: Sequence[Mapping[str, Any]]) -> None:
        """Compute the scalars and the random key of each row.

        Raises:
            TypeError, ValueError: a hyper-parameter is not a number.
        """
        self.rows, self._keys = [], []
        for index, step in zip(self.groups, self.steps, strict=True):
            group = param_groups[index]
            self.rows.append(scalars_of(group, step))
            self._keys.append(random_key(group["seed"], step) if self.needs_keys else (0, 0))

    def cpu_table(self, float64: bool, decision: StepDecision = DEFAULT_DECISION) -> Tensor:
        """Return the CPU scalar table, (rows, 10). The next call overwrites it.

        Args:
            float64: return a float64 table, for float64 parameters; False: float32.
            decision: gradient factor and skip flag. Default: factor 1, no skip.
        """
        if float64 not in self._tables:
            memory = bytearray(self._packed(float64, decision))
            dtype = torch.float64 if float64 else torch.float32
            self._tables[float64] = memory, torch.frombuffer(memory, dtype=dtype).view(-1, len(SCALAR_COLUMNS))
        memory, table = self._tables[float64]
        memory[:] = self._packed(float64, decision)
        return table

    def device_table(self, table: DeviceTable, grad_factor: Tensor | None) -> Tensor:
        """Return the device scalar table, (rows, 10) float32.

        Args:
            table: device table that receives the scalars.
            grad_factor: factor of all gradients, 1 element on any device; the host does not wait for it. None means 1.
        """
        scalars = table.set((self.rows, self._keys), lambda: self._packed(False, DEFAULT_DECISION))
        if grad_factor is not None:
            factor = grad_factor.detach().reshape(()).to(scalars.device, non_blocking=True)
            scalars[:, _GRAD_FACTOR].mul_(factor)
            table.invalidate()
        return scalars

    def rows_with_grad_factor(self, decision: StepDecision) -> tuple[list[StepScalars], list[tuple[int, int]]]:
        """Return each row's scalars with the gradient factor, and its random key."""
        factor = decision.grad_factor
        return [row._replace(grad_factor=row.grad_factor * factor) for row in self.rows], self._keys

    def _packed(self, float64: bool, decision: StepDecision) -> bytes:
        packed = []
        rows = self.rows if decision is DEFAULT_DECISION else self.rows_with_grad_factor(decision)[0]
        for scalars, key in zip(rows, self._keys, strict=True):
            packed.append(scalar_row(scalars, key, decision.skip, float64))
        return packed[0] if len(packed) == 1 else b"".join(packed)

    def advance(self, states: Sequence[dict[str, Any]]) -> None:
        """Write the new step counts into the states of the parameters."""
        if len(self.steps) == 1:
            (step,) = self.steps
            for state in states:
                state["step"] = step
        else:
            for state, row in zip(states, self.row_of_param, strict=True):
                state["step"] = self.steps[row]


def scalars_of(group: Mapping[str, Any], step: int) -> StepScalars:
    """Return a group's scalars at step number `step`, counted from 1."""
    beta1, beta2 = group["betas"]
    return step_scalars(
        step=step,
        lr=as_float(group["lr"], "lr"),
        betas=(as_float(beta1, "betas[0]"), as_float(beta2, "betas[1]")),
        eps=as_float(group["eps"], "eps"),
        weight_decay=as_float(group["weight_decay"], "weight_decay"),
        decoupled_weight_decay=group["decoupled_weight_decay"],
        second_moment=group["second_moment"],
        eps_placement=group["eps_placement"],
        maximize=group["maximize"],
    )


class DeviceRow(NamedTuple):
    """The inputs to a device-counted parameter's scalars."""

    step: Tensor  # 0-d int64 on the device, the step count
    group_index: int


class DeviceScalars:
    """Advances step counts and computes scalars in one launch on a device.

    Args:
        device: device of the parameters.

    Attributes:
        norm_clip_skip: three 0-d float32: norm of the unscaled gradients, NaN without clipping; clip factor; 1 if
            skipped, else 0. `prepare` overwrites them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._given_rows: Sequence[DeviceRow] = ()
        self._used_groups: list[int] = []
        self._rows = DeviceTable(device, torch.int64, len(ROW_COLUMNS))
        self._groups = DeviceTable(device, torch.float64, len(DeviceCoefficients._fields))
        self._scalars = torch.empty(0, dtype=torch.float32, device=device)
        self._report = torch.zeros(3, dtype=torch.float32, device=device)
        self.norm_clip_skip = self._report.unbind()

    def prepare(
        self,
        rows: Sequence[DeviceRow],
        groups: Sequence[Mapping[str, Any]],
        handling: GradientHandling,
        squares: Tensor | None,
    ) -> Tensor:
        """Advance step counts unless the step is skipped, and return the scalars.

        Args:
            rows: one per parameter. Do not modify a list that was passed before; its counts must keep their addresses.
            groups: the parameter groups.
            handling: scaling, skipping and clipping of this step.
            squares: see `grad_norm.gradient_squares`, of the scaled gradients, on this device; None without clipping.

        Returns:
            (n, 10) float32 on the device, see `kernels.tables.SCALAR_COLUMNS`.

        Raises:
            TypeError: a learning rate on this device is not float32.
        """
        from adax_triton.kernels.prepare_step import prepare_step

        if rows is not self._given_rows:
            self._given_rows, self._used_groups = rows, _used_groups(rows)
        used = self._used_groups
        addresses = [lr_address(groups[index], self._device) for index in used]
        given = [_numbers(groups[index], address) for index, address in zip(used, addresses, strict=True)]
        positions = {index: position for position, index in enumerate(used)}
        # Compare `rows` by identity, so that a step with unchanged rows does not loop over all parameters.
        row_table = self._rows.set((_ListByIdentity(rows), addresses), lambda: _packed_rows(rows, positions, addresses))
        group_table = self._groups.set(
            given,
            lambda: array("d", chain.from_iterable(device_coefficients(**numbers) for numbers in given)).tobytes(),
        )
        if self._scalars.shape[0] != len(rows):
            self._scalars = torch.empty(len(rows), len(SCALAR_COLUMNS), dtype=torch.float32, device=self._device)
        grad_scale, found_inf = self._scaler_value(handling.grad_scale), self._scaler_value(handling.found_inf)
        limit = math.inf if handling.max_grad_norm is None else handling.max_grad_norm
        prepare_step(row_table, group_table, self._scalars, self._report, grad_scale, found_inf, squares, limit)
        return self._scalars

    def is_prepared_for(self, rows: Sequence[DeviceRow]) -> bool:
        """Return whether a capture of these rows can use the tables."""
        return (len(self._rows.tensor), len(self._groups.tensor)) == (len(rows), len(_used_groups(rows)))

    def _scaler_value(self, value: Tensor | None) -> Tensor | None:
        """Return a 1-element tensor of a GradScaler as the kernel reads it, itself if possible."""
        if value is None:
            return None
        dtype = value.dtype if value.dtype in (torch.float32, torch.float64) else torch.float64
        plain: Tensor = value.full_tensor() if is_dtensor(value) else value  # type: ignore[attr-defined]
        return plain.to(self._device, dtype, non_blocking=True)


def _used_groups(rows: Sequence[DeviceRow]) -> list[int]:
    return sorted({row.group_index for row in rows})


def _packed_rows(rows: Sequence[DeviceRow], positions: Mapping[int, int], lr_addresses: Sequence[int]) -> bytes:
    """Return the row table of `prepare_step`, see `kernels.tables.ROW_COLUMNS`."""
    packed = array("q")
    for step, group_index in rows:
        position = positions[group_index]
        packed.extend((step.data_ptr(), position, lr_addresses[position]))
    return packed.tobytes()


class _ListByIdentity:
    """Compares a list by identity."""

    def __init__(self, rows: Sequence[DeviceRow]) -> None:
        self.rows = rows

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ListByIdentity) and other.rows is self.rows


def _numbers(group: Mapping[str, Any], lr_address: int) -> dict[str, Any]:
    """Return the arguments of `device_coefficients` for a group; lr is 0 if the device reads it."""
    numbers = {key: group[key] for key in (*COEFFICIENT_KEYS, "seed")}
    numbers["lr"] = 0.0 if lr_address else as_float(group["lr"], "lr")
    numbers |= {name: as_float(group[name], name) for name in ("eps", "weight_decay")}
    numbers["betas"] = tuple(as_float(beta, f"betas[{index}]") for index, beta in enumerate(group["betas"]))
    return numbers


def lr_address(group: Mapping[str, Any], device: torch.device) -> int:
    """Return the address of a learning rate on `device`, else 0.

    Raises:
        TypeError: the tensor is not float32.
    """
    lr = group["lr"]
    if not isinstance(lr, Tensor) or lr.device != device:
        return 0
    if lr.dtype != torch.float32:
        raise TypeError(f"Invalid type of lr: a tensor on {device} must be float32, got {lr.dtype}")
    return lr.data_ptr()


def move_counts_to_device(states: Iterable[dict[str, Any]]) -> None:
    """Replace int step counts by device tensors. The host does not wait."""
    by_device: dict[torch.device, list[dict[str, Any]]] = defaultdict(list)
    for state in states:
        if not isinstance(state["step"], Tensor):
            by_device[state["exp_avg"].device].append(state)
    for device, members in by_device.items():
        counts = torch.tensor([state["step"] for state in members], dtype=torch.int64, device="cpu")
        for state, count in zip(members, upload(counts, device), strict=True):
            state["step"] = count
