"""Update tensors with plain PyTorch where no kernel is available."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from adax_triton.update.coefficients import StepScalars
from adax_triton.update.quantization import GROUP
from adax_triton.update.quantized_update import load_master, quantized_update
from adax_triton.update.reference import adax_update

from .gradient_handling import StepDecision
from .tensor_step import TensorStep

# Elements per update, a multiple of GROUP: few enough that temporaries stay in the CPU cache.
CHUNK_SIZE = 65_536


class ReferenceLaunch:
    """Updates tensors of one device with the PyTorch reference, one after another.

    Args:
        steps: steps on dense tensors.
        process_groups: process groups that shard the gradients of all these tensors.
    """

    def __init__(self, steps: Sequence[TensorStep], process_groups: tuple[Any, ...]) -> None:
        self.process_groups = process_groups
        self.device = steps[0].param.device
        self._steps = [step.flattened() for step in steps]

    def squares(self) -> Tensor:
        """Return the sum of squares of each gradient, (n,) float64 on their device."""
        norms = torch._foreach_norm([step.grad for step in self._steps], 2, dtype=torch.float64)
        return torch.stack(norms).square()

    def run(
        self, rows: Sequence[StepScalars], keys: Sequence[tuple[int, int]], decision: StepDecision, sums: Tensor | None
    ) -> None:
        """Update the tensors.

        Args:
            rows: scalars of each row, gradient factor included.
            keys: random key of each row, see `rounding.random_key`.
            decision: gradient factor and skip flag. Only the flag is used.
            sums: (n, 5) float32 on the device; receives telemetry sums, see `kernels.tables.SUM_COLUMNS`. None: no
                telemetry.
        """
        for index, step in enumerate(self._steps):
            scalars, key = rows[step.scalar_row], keys[step.scalar_row]
            total = None if sums is None else sums[index].zero_()
            for start in range(0, step.param.numel(), CHUNK_SIZE):
                part = step.part(start, min(start + CHUNK_SIZE, step.param.numel()))
                before = None if total is None else _weights(part)
                if not decision.skip:
                    _update(part, scalars, key)
                if total is not None and before is not None:
                    total += _sums(part.grad, before, _weights(part))


def _update(part: TensorStep, scalars: StepScalars, key: tuple[int, int]) -> None:
    if part.is_plain:
        return adax_update(*part.tensors, **scalars._asdict())
    missing = 0 if part.group_exponents is None else -part.param.numel() % GROUP
    if not missing:
        return _update_quantized(part, scalars, key)
    padded = part.map_tensors(lambda tensor: pad(tensor, (0, missing)))
    _update_quantized(padded, scalars, key)
    for original, updated in zip(part.written, padded.written, strict=True):
        original.copy_(updated[: original.numel()])


def _update_quantized(part: TensorStep, scalars: StepScalars, key: tuple[int, int]) -> None:
    exponents = part.group_exponents
    if exponents is not None:
        part = part.map_tensors(lambda tensor: tensor.view(-1, GROUP))
    quantized_update(
        *part.tensors,
        part.master,
        exponents,
        scalars,
        (part.first_element, *key),
        part.stochastic,
        part.param_is_copy,
    )


def _weights(part: TensorStep) -> Tensor:
    """Return a float32 copy of the weights; float64 for float64 parameters."""
    if part.param.dtype == torch.float64:
        return part.param.clone()
    return load_master(part.param, part.master, part.param_is_copy)


def _sums(grad: Tensor, before: Tensor, after: Tensor) -> Tensor:
    grad, update = grad.to(before.dtype), after - before
    columns = (grad.square(), update.square(), after.square(), update == 0, grad - grad != 0)
    return torch.stack([column.to(before.dtype).sum() for column in columns]).float()
