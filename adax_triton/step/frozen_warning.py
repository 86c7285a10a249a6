"""Warn once when the second moments stop changing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adax_triton.state.validation import as_float
from adax_triton.update.coefficients import exp_avg_sq_weight
from adax_triton.update.horizon import FROZEN_WEIGHT

from .device_tables import is_capturing
from .scalars import DeviceRow

# Read device step counts at the first 4 steps, for resumed runs, then every 1024 steps.
_INITIAL_COUNT_READS, _COUNT_READ_INTERVAL = 4, 1024


class FrozenWarning:
    """Warns once when a group's second moments freeze, without waiting for devices."""

    def __init__(self) -> None:
        self._warned = False
        self._steps = 0
        self._copies: list[tuple[int, Tensor, torch.cuda.Event]] = []

    def after_host_step(
        self, counts: Iterable[tuple[int, int]], param_groups: Sequence[Mapping[str, Any]]
    ) -> str | None:
        """Return the warning when the first group freezes, else None.

        Args:
            counts: (group index, step number) pairs of the step.
            param_groups: the optimizer's groups.
        """
        if self._warned:
            return None
        messages = (_message(step, index, param_groups) for index, step in counts)
        message = next((text for text in messages if text is not None), None)
        self._warned = message is not None
        return message

    def after_device_step(
        self, rows: Mapping[torch.device, Sequence[DeviceRow]], param_groups: Sequence[Mapping[str, Any]]
    ) -> str | None:
        """Return the warning for device-counted steps, or None.

        It reads one step count per group, at the first 4 steps and then at every 1024th. On a GPU the warning comes a
        few steps late.
        """
        self._steps += 1
        is_due = self._steps <= _INITIAL_COUNT_READS or self._steps % _COUNT_READ_INTERVAL == 0
        if self._warned or not (is_due or self._copies) or any(map(is_capturing, rows)):
            return None
        known = [(index, int(count)) for index, count, event in self._copies if event.query()]
        if known:
            self._copies.clear()
        if is_due:
            first = {row.group_index: row.step for device_rows in rows.values() for row in reversed(device_rows)}
            known += [(index, int(step)) for index, step in first.items() if step.device.type == "cpu"]
            self._copies = [_copy(index, step) for index, step in first.items() if step.device.type != "cpu"]
        return self.after_host_step(known, param_groups)


def _copy(index: int, step: Tensor) -> tuple[int, Tensor, torch.cuda.Event]:
    count = torch.empty(step.shape, dtype=step.dtype, device="cpu", pin_memory=True)
    event = torch.cuda.Event()
    with torch.cuda.device(step.device):
        count.copy_(step, non_blocking=True)
        event.record()
    return index, count, event


def _message(step: int, group_index: int, param_groups: Sequence[Mapping[str, Any]]) -> str | None:
    group = param_groups[group_index]
    if group["second_moment"] != "adax" or step < 1:
        return None
    beta2 = as_float(group["betas"][1], "betas[1]")
    if exp_avg_sq_weight("adax", beta2, step) >= FROZEN_WEIGHT:
        return None
    return (
        f"At step {step} with betas[1]={beta2} the second moments of param_groups[{group_index}] are frozen: they no "
        "longer change, so AdaX acts as momentum with fixed step sizes. To avoid this, train with "
        "betas[1]=adax_triton.beta2_for_horizon(total_steps)."
    )
