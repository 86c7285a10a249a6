"""Steps of the tensors that PyTorch updates: those on a CPU, and those of dtypes that the kernel does not take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import cpu
from .compiled import call_compiled
from .control import TAKEN, Decision
from .cpu import COMPILE_FROM_NUMEL, GATHERED_NUMEL, update_cpu, update_eager, update_small_cpu, update_stored
from .schedule import StepScalars
from .stored import load_master
from .tensor_step import TensorStep


class HostRows(NamedTuple):
    """Rows of scalars that the host knows: one per (group, step), with its random key, see `rounding.random_key`."""

    scalars: list[StepScalars]
    keys: list[tuple[int, int]]


def run_steps(steps: Sequence[TensorStep], rows: HostRows, decision: Decision = TAKEN) -> None:
    """Update tensors in place, unless the step is skipped.

    Args:
        steps: on 1-D contiguous tensors; each names its row.
        rows: of the step.
        decision: whether to skip, and the factor of all gradients.
    """
    if decision.skip:
        return
    scalars = _scaled(rows.scalars, decision)
    small: dict[tuple[int, torch.dtype, torch.dtype], list[tuple[Tensor, Tensor, Tensor, Tensor]]] = defaultdict(list)
    for step in steps:
        if step.is_plain and step.param.device.type == "cpu" and step.param.numel() < COMPILE_FROM_NUMEL:
            small[step.scalar_row, step.param.dtype, step.grad.dtype].append(step.tensors)
        else:
            _run(step, scalars[step.scalar_row], rows.keys[step.scalar_row])
    for (scalar_row, _, _), quads in small.items():
        update_small_cpu(quads, scalars[scalar_row])


def run_steps_with_sums(steps: Sequence[TensorStep], rows: HostRows, decision: Decision, sums: Tensor) -> None:
    """Update tensors as `run_steps` does, and write the sums of `kernels.telemetry.tile_sums` of each into a row.

    Args:
        steps, rows, decision: see `run_steps`.
        sums: (n, 5) float32 on the tensors' device.
    """
    scalars = _scaled(rows.scalars, decision)
    for step, row in zip(steps, sums, strict=True):
        row.zero_()
        # In parts, for the sake of the copies.
        for start in range(0, step.param.numel(), GATHERED_NUMEL):
            part = step.part(start, min(start + GATHERED_NUMEL, step.param.numel()))
            wide = torch.float64 if part.param.dtype == torch.float64 else torch.float32
            before = _weights(part).to(wide, copy=True)
            if not decision.skip:
                _run(part, scalars[part.scalar_row], rows.keys[part.scalar_row])
            tensors = part.grad, before, _weights(part)
            row += call_compiled(_sums, tensors) if cpu._worth_compiling(part.param) else _sums(*tensors)


def _scaled(scalars: list[StepScalars], decision: Decision) -> list[StepScalars]:
    return [row._replace(grad_factor=row.grad_factor * decision.grad_factor) for row in scalars]


def _run(step: TensorStep, scalars: StepScalars, key: tuple[int, int]) -> None:
    if not step.is_plain:
        update_stored(step, scalars, key)
    elif step.param.device.type != "cpu":
        update_eager(*step.tensors, scalars)
    else:
        update_cpu(*step.tensors, scalars)


def _weights(step: TensorStep) -> Tensor:
    if step.master is None:
        return step.param
    return step.master if step.master.dtype == torch.float32 else load_master(step.param, step.master)


def _sums(grad: Tensor, before: Tensor, after: Tensor) -> Tensor:
    after, grad = after.to(before.dtype), grad.to(before.dtype)
    update = after - before
    columns = (grad.square(), update.square(), after.square(), update == 0, grad - grad != 0)
    return torch.stack([column.to(before.dtype).sum() for column in columns]).float()
