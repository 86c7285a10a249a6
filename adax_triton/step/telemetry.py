"""What a step says of itself: norms and counts from its own pass, kept on the device until they are asked for."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adax_triton.kernels.tables import SUM_COLUMNS

from .device_tables import PerStreamCache, is_capturing, on_device, run_table

_COLUMNS = len(SUM_COLUMNS)


class Telemetry(NamedTuple):
    """Of one step and one parameter, or one group of them; from float32 sums, so norms are finite up to 1.8e19.

    grad_norm: 2-norm of the gradients, unscaled and not clipped.
    update_norm: 2-norm of what the step changed in the parameters as they are stored, masters included.
    param_norm: 2-norm of the parameters after the step.
    update_ratio: `update_norm / param_norm`.
    unchanged_share: share of the elements that the step left as they were: lost to rounding, or without a gradient.
    nonfinite_grads: elements of the gradients that are NaN or infinite.
    """

    grad_norm: float
    update_norm: float
    param_norm: float
    update_ratio: float
    unchanged_share: float
    nonfinite_grads: int


class StepTelemetry(NamedTuple):
    """Of one step.

    skipped: whether it was skipped.
    groups: one for each parameter group; of a group without gradients all numbers are 0.
    params: by name, or by group and position as in "0.3" where the parameters have no names; empty unless asked for.
    """

    skipped: bool
    groups: list[Telemetry]
    params: dict[str, Telemetry]


class TelemetryRow(NamedTuple):
    """Whose sums a row holds: a parameter's group, name, number of elements and process groups (of a DTensor)."""

    group_index: int
    name: str
    numel: int
    process_groups: tuple[Any, ...]


class DeviceSums:
    """Adds up what the programs of one launch found, tensor by tensor and in a fixed order; 20 bytes per program."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._counts: Sequence[int] = ()
        self._stages: list[tuple[Tensor, Tensor]] = []

    def of_chunks(self, counts: Sequence[int]) -> Tensor:
        """Return the (programs, 5) float32 buffer that a launch writes, for tensors of so many chunks each."""
        if counts != self._counts or not self._stages:
            self._stages = list(self._plan(counts))
            self._counts = counts
        return self._stages[0][0]

    def _plan(self, counts: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        from adax_triton.kernels.telemetry import ROWS_PER_PROGRAM

        while True:
            rows = torch.zeros(sum(counts), _COLUMNS, dtype=torch.float32, device=self._device)
            if all(count <= ROWS_PER_PROGRAM for count in counts):
                yield rows, on_device(run_table(counts), self._device)
                return
            blocks = [
                min(ROWS_PER_PROGRAM, count - start) for count in counts for start in range(0, count, ROWS_PER_PROGRAM)
            ]
            yield rows, on_device(run_table(blocks), self._device)
            counts = [-(-count // ROWS_PER_PROGRAM) for count in counts]

    def add_up(self, sums: Tensor) -> None:
        """Write the sums of each tensor into `sums`, (tensors, 5) float32."""
        from adax_triton.kernels.telemetry import sum_rows

        targets = [*(rows for rows, _ in self._stages[1:]), sums]
        for (rows, runs), target in zip(self._stages, targets, strict=True):
            sum_rows(rows, runs, target)


class StepSums:
    """The sums of the last step, one row of five per tensor, in one small buffer per device and stream."""

    def __init__(self) -> None:
        self._owners: Sequence[TelemetryRow] = ()
        self._kept: PerStreamCache[Tensor] = PerStreamCache()
        self._captured: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}
        # By device: the buffer of the step, and the owners of its rows.
        self._written: dict[torch.device, tuple[Tensor, list[int]]] = {}
        self._grad_scale: Tensor | None = None
        self._skip: Tensor | bool | None = None

    def begin(self, owners: Sequence[TelemetryRow]) -> None:
        """Forget the last step; the next one has tensors of these owners."""
        self._owners, self._written, self._skip = owners, {}, None

    def rows(self, device: torch.device, indices: Sequence[int]) -> Tensor:
        """Return (n, 5) float32 on a device, to be written: the rows of the owners of these indices."""
        if device not in self._written:
            self._written[device] = self._memory(device, (len(self._owners), _COLUMNS), torch.float32), []
        buffer, order = self._written[device]
        start = len(order)
        order.extend(indices)
        return buffer[start : len(order)]

    def _memory(self, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        key = device, shape
        if key in self._captured:  # replays write it, and what is read is of the last step, replayed or not
            return self._captured[key]
        memory = self._kept.get(key, device, functools.partial(torch.zeros, shape, dtype=dtype, device=device))
        if is_capturing(device):
            self._captured[key] = memory
        return memory

    def end(self, skip: Tensor | bool, grad_scale: Tensor | None) -> None:
        """Note whether the step was skipped, and the scale of its gradients."""
        if grad_scale is None:
            self._grad_scale = None
        else:  # a copy: its owner may write the next step's scale into it before this one is read
            self._grad_scale = self._memory(grad_scale.device, (), torch.float64)
            self._grad_scale.copy_(grad_scale.reshape(()), non_blocking=True)
        self._skip = skip

    def read(self, group_count: int, per_parameter: bool) -> StepTelemetry:
        """Return the numbers; the host waits for the devices, and for the other ranks where parameters are sharded.

        Raises:
            RuntimeError: there has been no step yet, or the last one raised.
        """
        if self._skip is None:
            raise RuntimeError("read_telemetry(): there has been no step yet, or the last one raised")
        for device in self._written:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # the step may have been on another stream than this
        scale = 1.0 if self._grad_scale is None else float(self._grad_scale)
        rows = self._all_rows()
        groups = [[0.0] * (_COLUMNS + 1) for _ in range(group_count)]
        params = {}
        for owner, row in zip(self._owners, rows, strict=True):
            with_numel = [*row, float(owner.numel)]
            groups[owner.group_index] = [
                total + part for total, part in zip(groups[owner.group_index], with_numel, strict=True)
            ]
            if per_parameter:
                params[owner.name] = _telemetry(with_numel, scale)
        return StepTelemetry(bool(self._skip), [_telemetry(row, scale) for row in groups], params)

    def _all_rows(self) -> list[list[float]]:
        rows: list[list[float]] = [[0.0] * _COLUMNS for _ in self._owners]
        for found, order in self._written.values():
            sharded: dict[tuple[Any, ...], list[tuple[int, int]]] = defaultdict(list)
            # In the order of the owners, which is that of all ranks; launches may differ from rank to rank.
            for index, position in sorted((index, position) for position, index in enumerate(order)):
                sharded[self._owners[index].process_groups].append((index, position))
            for process_groups, places in sharded.items():
                part = found[[position for _, position in places]]
                for process_group in process_groups:
                    part = part.double()
                    torch.distributed.all_reduce(part, group=process_group)
                for (index, _), row in zip(places, part.tolist(), strict=True):
                    rows[index] = row
        return rows


def _telemetry(row: Sequence[float], scale: float) -> Telemetry:
    grads, updates, params, unchanged, nonfinite, numel = row
    update_norm, param_norm = math.sqrt(updates), math.sqrt(params)
    ratio = update_norm / param_norm if param_norm > 0.0 else math.inf if update_norm > 0.0 else 0.0
    share = unchanged / numel if numel else 0.0
    return Telemetry(math.sqrt(grads) / scale, update_norm, param_norm, ratio, share, int(nonfinite))
