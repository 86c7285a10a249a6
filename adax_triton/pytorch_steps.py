"""Steps of the tensors that PyTorch updates: those on a CPU, and those of dtypes that the kernel does not take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cpu
from .compiled import ANY, Program, compiled_program
from .control import Decision
from .cpu import (
    COMPILE_FROM_NUMEL,
    GATHERED_NUMEL,
    prepare_small_updates,
    prepare_update,
    update_cpu,
    update_eager,
    update_small_cpu,
    update_stored,
)
from .schedule import StepScalars
from .stored import load_master
from .tensor_step import TensorStep

_Small = dict[tuple[int, torch.dtype, torch.dtype], list[tuple[Tensor, Tensor, Tensor, Tensor]]]


class HostRows(NamedTuple):
    """Rows of scalars that the host knows: one per (group, step), with its random key, see `rounding.random_key`."""

    scalars: list[StepScalars]
    keys: list[tuple[int, int]]


def prepared_steps(steps: Sequence[TensorStep], rows: HostRows, decision: Decision) -> Callable[[], None]:
    """Compile all that a step needs, and return what updates its tensors in place, unless the step is skipped.

    Args:
        steps: on 1-D contiguous tensors; each names its row.
        rows: of the step.
        decision: whether to skip, and the factor of all gradients.
    """
    scalars = _scaled(rows.scalars, decision)
    large, small = _large_and_small(steps)
    for step in large:
        prepare_update(step, scalars[step.scalar_row])
    for (scalar_row, _, _), quads in small.items():
        prepare_small_updates(quads, scalars[scalar_row])

    def run() -> None:
        if decision.skip:
            return
        for step in large:
            _run(step, scalars[step.scalar_row], rows.keys[step.scalar_row])
        for (scalar_row, _, _), quads in small.items():
            update_small_cpu(quads, scalars[scalar_row])

    return run


def prepare_steps_with_sums(steps: Sequence[TensorStep], rows: HostRows, decision: Decision) -> None:
    """Compile all that `run_steps_with_sums` needs for these tensors."""
    scalars = _scaled(rows.scalars, decision)
    for step in steps:
        prepare_update(step, scalars[step.scalar_row])
        _sums_program(step)


def run_steps_with_sums(steps: Sequence[TensorStep], rows: HostRows, decision: Decision, sums: Tensor) -> None:
    """Update tensors as `prepared_steps` does, and write the sums of `kernels.telemetry.tile_sums` of each into a row.

    Args:
        steps, rows, decision: see `prepared_steps`.
        sums: (n, 5) float32 on the tensors' device.
    """
    scalars = _scaled(rows.scalars, decision)
    for step, row in zip(steps, sums, strict=True):
        row.zero_()
        # In parts, for the sake of the copies.
        for start in range(0, step.param.numel(), GATHERED_NUMEL):
            part = step.part(start, min(start + GATHERED_NUMEL, step.param.numel()))
            before = _weights(part).to(_wide_dtype(part), copy=True)
            if not decision.skip:
                _run(part, scalars[part.scalar_row], rows.keys[part.scalar_row])
            tensors = part.grad, before, _weights(part)
            row += (_sums_program(part) or _sums)(*tensors)


def _large_and_small(steps: Sequence[TensorStep]) -> tuple[list[TensorStep], _Small]:
    """Return the tensors that are stepped one by one, and those that are gathered, by row and dtypes."""
    large: list[TensorStep] = []
    small: _Small = defaultdict(list)
    gathered: set[tuple[Any, Any]] = set()
    for step in steps:
        address = step.param.untyped_storage()._cdata, step.param.storage_offset()
        alone = address not in gathered  # of two parameters on one memory, copies would lose a step
        if alone and step.is_plain and step.param.device.type == "cpu" and step.param.numel() < COMPILE_FROM_NUMEL:
            gathered.add(address)
            small[step.scalar_row, step.param.dtype, step.grad.dtype].append(step.tensors)
        else:
            large.append(step)
    return large, small


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
    return load_master(step.param, step.master, param_is_copy=step.param_is_copy)


def _sums_program(step: TensorStep) -> Program | None:
    if not cpu._worth_compiling(step.param):
        return None
    after = step.param.dtype if step.master is None else torch.float32
    return compiled_program(_sums, tuple((dtype, (ANY,)) for dtype in (step.grad.dtype, _wide_dtype(step), after)), ())


def _wide_dtype(step: TensorStep) -> torch.dtype:
    return torch.float64 if step.param.dtype == torch.float64 else torch.float32


def _sums(grad: Tensor, before: Tensor, after: Tensor) -> Tensor:
    after, grad = after.to(before.dtype), grad.to(before.dtype)
    update = after - before
    columns = (grad.square(), update.square(), after.square(), update == 0, grad - grad != 0)
    return torch.stack([column.to(before.dtype).sum() for column in columns]).float()
