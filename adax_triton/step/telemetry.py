"""Telemetry: norms and counts computed in the step, for `read_telemetry`."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adax_triton.kernels.tables import SUM_COLUMNS

from .device_tables import PerStreamCache, is_capturing, row_ranges, upload

_COLUMNS = len(SUM_COLUMNS)


class Telemetry(NamedTuple):
    """Norms and counts of one parameter or group in one step.

    Sums are float32, so a norm above 1.8e19 is inf.

    grad_norm: 2-norm of the gradients, without the loss scale and before clipping.
    update_norm: 2-norm of the change of the stored parameters, master weights included.
    param_norm: 2-norm of the parameters after the step.
    update_ratio: `update_norm / param_norm`.
    unchanged_share: fraction of elements that the step did not change, for example because of rounding.
    nonfinite_grads: number of gradient elements that are NaN or infinite.
    """

    grad_norm: float
    update_norm: float
    param_norm: float
    update_ratio: float
    unchanged_share: float
    nonfinite_grads: int


class StepTelemetry(NamedTuple):
    """Telemetry of one step.

    skipped: whether the step was skipped.
    groups: one entry per parameter group; all zeros for a group without gradients.
    params: {name: entry}. An unnamed parameter is "group.position", such as "0.3". Empty unless `per_parameter` is set.
    """

    skipped: bool
    groups: list[Telemetry]
    params: dict[str, Telemetry]


class TelemetryRow(NamedTuple):
    """The parameter that a row of sums belongs to."""

    group_index: int
    name: str
    numel: int
    process_groups: tuple[Any, ...]  # the parameter is sharded over them


class DeviceSums:
    """Adds up a launch's sums per tensor, in a fixed order.

    Args:
        device: device of the launch. The buffers take 20 bytes per Triton program.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._counts: Sequence[int] = ()
        self._stages: list[tuple[Tensor, Tensor]] = []

    def chunk_sums(self, counts: Sequence[int]) -> Tensor:
        """Return the buffer that a launch writes, (chunks, 5) float32.

        `counts` lists the chunks per tensor.
        """
        if counts != self._counts or not self._stages:
            self._stages = list(self._make_stages(counts))
            self._counts = counts
        return self._stages[0][0]

    def _make_stages(self, counts: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each reduction stage's input rows and row ranges.

        There is one row range per sum.
        """
        from adax_triton.kernels.telemetry import ROWS_PER_PROGRAM

        while True:
            rows = torch.zeros(sum(counts), _COLUMNS, dtype=torch.float32, device=self._device)
            if all(count <= ROWS_PER_PROGRAM for count in counts):
                yield rows, upload(row_ranges(counts), self._device)
                return
            blocks = [
                min(ROWS_PER_PROGRAM, count - start) for count in counts for start in range(0, count, ROWS_PER_PROGRAM)
            ]
            yield rows, upload(row_ranges(blocks), self._device)
            counts = [-(-count // ROWS_PER_PROGRAM) for count in counts]

    def add_up(self, sums: Tensor) -> None:
        """Write the sums of each tensor into `sums`, (tensors, 5) float32."""
        from adax_triton.kernels.telemetry import sum_rows

        targets = [*(rows for rows, _ in self._stages[1:]), sums]
        for (rows, ranges), target in zip(self._stages, targets, strict=True):
            sum_rows(rows, ranges, target)


class StepSums:
    """The sums of the last step, five for each parameter.

    Each device and stream has a buffer of its own.
    """

    def __init__(self) -> None:
        self._telemetry_rows: Sequence[TelemetryRow] = ()
        self._buffers: PerStreamCache[Tensor] = PerStreamCache()
        self._captured: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}
        # By device: the buffer of the step, and the parameter index of each row.
        self._written: dict[torch.device, tuple[Tensor, list[int]]] = {}
        self._grad_scale: Tensor | None = None
        self._skip: Tensor | bool | None = None

    def begin(self, telemetry_rows: Sequence[TelemetryRow]) -> None:
        """Start a new step with these parameters."""
        self._telemetry_rows, self._written, self._skip = telemetry_rows, {}, None

    def rows(self, device: torch.device, indices: Sequence[int]) -> Tensor:
        """Return the (n, 5) float32 output rows of these parameters."""
        if device not in self._written:
            self._written[device] = self._buffer(device, (len(self._telemetry_rows), _COLUMNS), torch.float32), []
        buffer, order = self._written[device]
        start = len(order)
        order.extend(indices)
        return buffer[start : len(order)]

    def _buffer(self, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        key = device, shape
        if key in self._captured:  # graph replays write this buffer, so other steps must too
            return self._captured[key]
        buffer = self._buffers.get(key, device, functools.partial(torch.zeros, shape, dtype=dtype, device=device))
        if is_capturing(device):
            self._captured[key] = buffer
        return buffer

    def end(self, skip: Tensor | bool, grad_scale: Tensor | None) -> None:
        """Record whether the step was skipped, and the scale of its gradients."""
        if grad_scale is None:
            self._grad_scale = None
        else:  # a copy, because GradScaler may overwrite the scale before it is read
            self._grad_scale = self._buffer(grad_scale.device, (), torch.float64)
            self._grad_scale.copy_(grad_scale.reshape(()), non_blocking=True)
        self._skip = skip

    def read(self, group_count: int, per_parameter: bool) -> StepTelemetry:
        """Return the telemetry of the last step.

        The host waits for the devices. If parameters are sharded, all ranks must call this.

        Args:
            group_count: number of parameter groups.
            per_parameter: whether to fill `params`.

        Raises:
            RuntimeError: there was no step yet, or the last one raised.
        """
        if self._skip is None:
            raise RuntimeError("read_telemetry(): there was no step yet, or the last one raised; call step() first")
        for device in self._written:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # the step may have run on another stream
        scale = 1.0 if self._grad_scale is None else float(self._grad_scale)
        rows = self._all_rows()
        groups = [[0.0] * (_COLUMNS + 1) for _ in range(group_count)]
        params = {}
        for telemetry_row, row in zip(self._telemetry_rows, rows, strict=True):
            with_numel = [*row, float(telemetry_row.numel)]
            groups[telemetry_row.group_index] = [
                total + part for total, part in zip(groups[telemetry_row.group_index], with_numel, strict=True)
            ]
            if per_parameter:
                params[telemetry_row.name] = _telemetry(with_numel, scale)
        return StepTelemetry(bool(self._skip), [_telemetry(row, scale) for row in groups], params)

    def _all_rows(self) -> list[list[float]]:
        rows: list[list[float]] = [[0.0] * _COLUMNS for _ in self._telemetry_rows]
        for found, order in self._written.values():
            sharded: dict[tuple[Any, ...], list[tuple[int, int]]] = defaultdict(list)
            # Use parameter order: it is the same on all ranks, unlike launch order.
            for index, position in sorted((index, position) for position, index in enumerate(order)):
                sharded[self._telemetry_rows[index].process_groups].append((index, position))
            for process_groups, pairs in sharded.items():
                part = found[[position for _, position in pairs]]
                for process_group in process_groups:
                    part = part.double()
                    torch.distributed.all_reduce(part, group=process_group)
                for (index, _), row in zip(pairs, part.tolist(), strict=True):
                    rows[index] = row
        return rows


def _telemetry(row: Sequence[float], scale: float) -> Telemetry:
    grads, updates, params, unchanged, nonfinite, numel = row
    update_norm, param_norm = math.sqrt(updates), math.sqrt(params)
    ratio = update_norm / param_norm if param_norm > 0.0 else math.inf if update_norm > 0.0 else 0.0
    share = unchanged / numel if numel else 0.0
    return Telemetry(math.sqrt(grads) / scale, update_norm, param_norm, ratio, share, int(nonfinite))
