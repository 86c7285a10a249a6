"""The launches of a step: which tensors share one, and the tables they are reached by."""

from __future__ import annotations

import functools
from array import array
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .device_tables import UNPREPARED, AddressTable, KeptByStream, is_capturing
from .schedule import StepScalars
from .tensor_step import TensorStep

if TYPE_CHECKING:
    from .telemetry import DeviceSums

ALIGNED_BYTES = 16
_GRAD_COLUMN = 1  # of the kernel's table of tensors
# Weights of the newest squared gradient below which about one group of 32 elements in ten, or fewer, still changes a
# bit of its second moment in a step: the coarser the code, the earlier. From here the kernel writes only those.
_SETTLED_BELOW = {"float32": 2.0**-27, "bfloat16": 2.0**-15, "low": 2.0**-16, "lowest": 2.0**-14}


class Bucket(NamedTuple):
    """What the tensors of one launch have in common: their device, and the fields of `kernels.variants.StepVariant`."""

    device: torch.device
    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    states: str
    master: str | None
    stochastic: bool
    settled: bool
    telemetry: bool
    aligned: bool
    param_is_copy: bool


class Launch:
    """One launch, with its tables; kept between steps.

    Args:
        bucket: of all its tensors.
        process_groups: over which the gradients of all its tensors are sharded.
        chunk_size: elements per program.

    Attributes:
        revision: calls of `refresh`. A plan may reuse the tables as long as this stays the same.
    """

    def __init__(self, bucket: Bucket, process_groups: tuple[Any, ...], chunk_size: int) -> None:
        self.bucket = bucket
        self.process_groups = process_groups
        self.revision = 0
        self._table = AddressTable(bucket.device, chunk_size)
        self._partials = torch.empty(0, dtype=torch.float32, device=bucket.device)
        self._wide_partials = torch.empty(0, dtype=torch.float64, device=bucket.device)
        self._squares = torch.empty((), dtype=torch.float64, device=bucket.device)
        self._sums: DeviceSums | None = None

    def refresh(self, steps: Sequence[TensorStep], addresses: Sequence[tuple[int, ...]]) -> None:
        """Take up the tensors of a step, of which only the addresses are kept.

        Args:
            steps: the tensors.
            addresses: of each step's tensors, see `addresses_of`.
        """
        rows = [
            (*address, step.first_element, step.param.numel(), step.scalar_row)
            for step, address in zip(steps, addresses, strict=True)
        ]
        self.revision += 1
        self._table.refresh(rows, _numels(steps))

    def is_prepared_for(self, steps: Sequence[TensorStep]) -> bool:
        """Return whether a capture can step these tensors: the last ones were as many, and as large."""
        return self._table.numels == _numels(steps)

    def refresh_gradients(self, addresses: array[int]) -> None:
        """Take up the tensors of the last `refresh` with gradients that lie elsewhere."""
        self._table.refresh_column(_GRAD_COLUMN, addresses)

    def sum_of_squares(self) -> Tensor:
        """Return the sum of the squared gradients, 0-d float64 on their device; always the same tensor."""
        from adax_triton.kernels.grad_stats import grad_stats, partial_count

        count = partial_count(self._table.chunks.numel())
        if self._partials.numel() != count:
            self._partials = torch.empty(count, dtype=torch.float32, device=self.bucket.device)
            self._wide_partials = torch.empty(count, dtype=torch.float64, device=self.bucket.device)
        grad_stats(self._table.tensors, self._table.chunks, self._partials, self.bucket.grad_dtype, self.bucket.aligned)
        # Summed up in float64 as they are, float32 numbers would be converted into memory got for it at each step.
        return torch.sum(self._wide_partials.copy_(self._partials), dim=0, out=self._squares)

    def run(self, scalars: Tensor, sums: Tensor | None) -> None:
        """Step the tensors.

        Args:
            scalars: on the device, see `kernels.adax_step`.
            sums: (n, 5) float32 on the device, written; the rows of `kernels.telemetry` of each tensor, or None.
        """
        from adax_triton.kernels.adax_step import adax_step
        from adax_triton.kernels.variants import StepVariant

        variant = StepVariant(*self.bucket[1:])
        if sums is None:
            adax_step(self._table.tensors, self._table.chunks, scalars, variant)
        else:
            if self._sums is None:
                from .telemetry import DeviceSums

                self._sums = DeviceSums(self.bucket.device)
            chunk_sums = self._sums.of_chunks(self._table.chunk_counts())
            adax_step(self._table.tensors, self._table.chunks, scalars, variant, chunk_sums)
            self._sums.add_up(sums)


# A launch, and the indices of its tensors among those of the step.
KernelLaunch = tuple[Launch, list[int]]


class Launches:
    """The launches of all steps so far, each found again by its kind and first tensor."""

    def __init__(self) -> None:
        self._kept: KeptByStream[Launch] = KeptByStream()

    def of(
        self, steps: Sequence[TensorStep], scalars: Sequence[StepScalars] | None, telemetry: bool
    ) -> list[KernelLaunch]:
        """Return the launches that step tensors, refreshed, each with the indices of its tensors.

        Args:
            steps: tensors that the kernel takes, dense.
            scalars: the rows of the steps, where the host knows them.
            telemetry: whether sums are wanted.

        Raises:
            RuntimeError: a CUDA graph is being captured without a step of the same parameters before it; no launch has
                changed then.
        """
        from adax_triton.kernels.launch import chunk_size

        all_addresses = [addresses_of(step) for step in steps]
        alike: dict[tuple[Bucket, tuple[Any, ...], int], list[int]] = defaultdict(list)
        turns: dict[int, int] = defaultdict(int)
        for index, (step, addresses) in enumerate(zip(steps, all_addresses, strict=True)):
            weight = 1.0 if scalars is None else scalars[step.scalar_row].exp_avg_sq_weight
            bucket = _bucket(step, addresses, weight, telemetry)
            # Parameters on one memory are stepped one after the other, each by a launch.
            turn = turns[addresses[0]] if step.param.numel() else 0
            turns[addresses[0]] += 1
            alike[bucket, step.process_groups, turn].append(index)
        # ZeRO calls step() once per group, so several are live at once.
        keys = {kind: (*kind, all_addresses[indices[0]][0]) for kind, indices in alike.items()}
        for kind, indices in alike.items():
            if is_capturing(kind[0].device):
                prepared = self._kept.prepared(keys[kind])
                if prepared is None or not prepared.is_prepared_for([steps[index] for index in indices]):
                    raise RuntimeError(UNPREPARED)
        launches = []
        for kind, indices in alike.items():
            launch = self._kept.get(keys[kind], kind[0].device, functools.partial(Launch, *kind[:2], chunk_size()))
            launch.refresh([steps[index] for index in indices], [all_addresses[index] for index in indices])
            launches.append((launch, indices))
        return launches


def is_settled(states: str, exp_avg_sq_weight: float) -> bool:
    """Whether so little of second moments still changes in a step that the kernel looks before it writes."""
    return exp_avg_sq_weight < _SETTLED_BELOW[states]


def _numels(steps: Sequence[TensorStep]) -> list[int]:
    return [step.param.numel() for step in steps]


def addresses_of(step: TensorStep) -> tuple[int, ...]:
    """Return where a step's tensors lie, in the order of the kernel's table; 0 for what there is not."""
    return tuple(
        0 if tensor is None else tensor.data_ptr() for tensor in (*step.tensors, step.master, step.group_exponents)
    )


def _bucket(step: TensorStep, addresses: tuple[int, ...], exp_avg_sq_weight: float, telemetry: bool) -> Bucket:
    misaligned = 0
    for address in addresses[:-1]:
        misaligned |= address % ALIGNED_BYTES
    return Bucket(
        step.param.device,
        step.param.dtype,
        step.grad.dtype,
        step.states,
        None if step.master is None else str(step.master.dtype).removeprefix("torch."),
        step.stochastic,
        is_settled(step.states, exp_avg_sq_weight),
        telemetry,
        misaligned == 0,
        step.param_is_copy,
    )
