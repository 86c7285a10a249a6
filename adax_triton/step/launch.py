"""The launches of a step: which tensors share one, the tables they are reached by, and the kernel they go to."""

from __future__ import annotations

import functools
from array import array
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from adax_triton.kernels.tables import SUM_COLUMNS, TENSOR_COLUMNS
from adax_triton.update.coefficients import StepScalars

from .backend import NATIVE, REFERENCE, TRITON, backend_of, is_fake, native_kernel
from .cpu_kernel import CHUNK_SIZE, CpuKernel, CpuVariant
from .device_tables import CAPTURE_NEEDS_WARM_UP, AddressTable, DeviceTable, PerStreamCache, is_capturing
from .reference_steps import ReferenceLaunch
from .scalars import DeviceScalars
from .tensor_step import TensorStep

if TYPE_CHECKING:
    from .telemetry import DeviceSums

ALIGNED_BYTES = 16
_GRAD_COLUMN = TENSOR_COLUMNS.index("grad")
# Below these w_t about 10 % of the 32-element groups still change v, so the GPU kernel stores only those.
_SKIP_UNCHANGED_V_BELOW = {"float32": 2.0**-27, "bfloat16": 2.0**-15, "8bit_v16": 2.0**-16, "8bit": 2.0**-14}


class LaunchKey(NamedTuple):
    """What the tensors of one launch have in common: device, kernel, and the fields of `kernels.variants.StepVariant`.

    `kernel` is one of `backend.TRITON`, `NATIVE` and `REFERENCE`.
    """

    device: torch.device
    kernel: str
    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    states: str
    master: str | None
    stochastic: bool
    skip_unchanged_v: bool
    telemetry: bool
    aligned: bool
    param_is_copy: bool


class TableLaunch:
    """One launch that reaches its tensors by a table of addresses; kept between steps.

    Args:
        bucket: of all its tensors.
        process_groups: over which the gradients of all its tensors are sharded.
        chunk_size: elements per entry of the chunk table.

    Attributes:
        revision: calls of `refresh`. A plan may reuse the tables as long as this stays the same.
    """

    def __init__(self, key: LaunchKey, process_groups: tuple[Any, ...], chunk_size: int) -> None:
        self.key = key
        self.device = key.device
        self.process_groups = process_groups
        self.revision = 0
        self._table = AddressTable(key.device, chunk_size)

    def refresh(self, steps: Sequence[TensorStep], addresses: Sequence[tuple[int, ...]]) -> None:
        """Take up the tensors of a step, of which only the addresses are kept.

        Args:
            steps: the tensors.
            addresses: of each step's tensors, in the order of `kernels.tables.TENSOR_COLUMNS`; 0 for what there is not.
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


class TritonLaunch(TableLaunch):
    """One launch of the Triton kernel."""

    def __init__(self, key: LaunchKey, process_groups: tuple[Any, ...]) -> None:
        from adax_triton.kernels.launch import chunk_size

        super().__init__(key, process_groups, chunk_size())
        self._partials = torch.empty(0, dtype=torch.float32, device=key.device)
        self._wide_partials = torch.empty(0, dtype=torch.float64, device=key.device)
        self._squares = torch.empty((), dtype=torch.float64, device=key.device)
        self._sums: DeviceSums | None = None

    def sum_of_squares(self) -> Tensor:
        """Return the sum of the squared gradients, 0-d float64 on their device; always the same tensor."""
        from adax_triton.kernels.grad_norm import grad_norm_partials, partial_count

        count = partial_count(self._table.chunks.numel())
        if self._partials.numel() != count:
            self._partials = torch.empty(count, dtype=torch.float32, device=self.key.device)
            self._wide_partials = torch.empty(count, dtype=torch.float64, device=self.key.device)
        grad_norm_partials(
            self._table.tensors, self._table.chunks, self._partials, self.key.grad_dtype, self.key.aligned
        )
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

        variant = StepVariant(*self.key[2:])
        if sums is None:
            adax_step(self._table.tensors, self._table.chunks, scalars, variant)
        else:
            if self._sums is None:
                from .telemetry import DeviceSums

                self._sums = DeviceSums(self.key.device)
            chunk_sums = self._sums.of_chunks(self._table.chunk_counts())
            adax_step(self._table.tensors, self._table.chunks, scalars, variant, chunk_sums)
            self._sums.add_up(sums)


class NativeLaunch(TableLaunch):
    """One call of the native CPU kernel.

    Args:
        kernel: of the bucket's variant.
    """

    def __init__(self, key: LaunchKey, process_groups: tuple[Any, ...], kernel: CpuKernel) -> None:
        super().__init__(key, process_groups, CHUNK_SIZE)
        self._kernel = kernel
        self.is_float64 = key.param_dtype == torch.float64

    def sum_of_squares(self) -> Tensor:
        """Return the sum of the squared gradients, 0-d float64 on the CPU; the same bits with any number of threads."""
        partials = torch.empty(self._table.chunks.numel(), dtype=torch.float64, device="cpu")
        self._kernel.sum_of_squares(self._table.tensors, self._table.chunks, partials)
        length = torch.tensor([partials.numel()], device="cpu")
        return torch.segment_reduce(partials, "sum", lengths=length, initial=0.0)[0]

    def run(self, scalars: Tensor, sums: Tensor | None) -> None:
        """Step the tensors.

        Args:
            scalars: (rows, 10) on the CPU, see `kernels.tables.SCALAR_COLUMNS`.
            sums: (n, 5) float32, written; see `kernels.tables.SUM_COLUMNS`. None for none.
        """
        if sums is None:
            return self._kernel.step(self._table.tensors, self._table.chunks, scalars)
        chunk_sums = torch.empty(self._table.chunks.numel(), len(SUM_COLUMNS), dtype=scalars.dtype, device="cpu")
        self._kernel.step(self._table.tensors, self._table.chunks, scalars, chunk_sums)
        counts = torch.tensor(self._table.chunk_counts(), device="cpu")
        sums.copy_(torch.segment_reduce(chunk_sums.double(), "sum", lengths=counts, initial=0.0))


# A launch, and the indices of its tensors among those of the step.
Launch = TritonLaunch | NativeLaunch | ReferenceLaunch
IndexedLaunch = tuple[Launch, list[int]]


class LaunchCache:
    """The tables on devices of all steps so far, by kind, first tensor and stream.

    Attributes:
        device_scalars: of steps that a device counts.
        host_scalars: tables on devices of scalars from the host.
    """

    def __init__(self) -> None:
        self._launches: PerStreamCache[TritonLaunch] = PerStreamCache()
        self.device_scalars: PerStreamCache[DeviceScalars] = PerStreamCache()
        self.host_scalars: PerStreamCache[DeviceTable] = PerStreamCache()

    def launches(
        self, steps: Sequence[TensorStep], scalars: Sequence[StepScalars] | None, telemetry: bool
    ) -> list[IndexedLaunch]:
        """Return the launches that step tensors, refreshed, each with the indices of its tensors.

        Args:
            steps: dense tensors.
            scalars: the rows of the steps, where the host counts those of the Triton kernel.
            telemetry: whether sums are wanted.

        Raises:
            RuntimeError: a CUDA graph is being captured without a step of the same parameters before it; no launch has
                changed then.
        """
        all_addresses: list[tuple[int, ...]] = []
        alike: dict[tuple[LaunchKey, tuple[Any, ...], int], list[int]] = defaultdict(list)
        for index, (step, turn) in enumerate(zip(steps, _turns(steps), strict=True)):
            weight = 1.0 if scalars is None else scalars[step.scalar_row].exp_avg_sq_weight
            key, addresses = _launch_key(step, weight, telemetry)
            all_addresses.append(addresses)
            alike[key, step.process_groups, turn].append(index)
        # ZeRO calls step() once per group, so several are live at once.
        keys = {kind: (*kind, all_addresses[indices[0]][0]) for kind, indices in alike.items()}
        for kind, indices in alike.items():
            if is_capturing(kind[0].device):
                prepared = self._launches.prepared(keys[kind])
                if prepared is None or not prepared.is_prepared_for([steps[index] for index in indices]):
                    raise RuntimeError(CAPTURE_NEEDS_WARM_UP)
        launches: list[IndexedLaunch] = []
        for kind, indices in alike.items():
            key, process_groups, _ = kind
            some = [steps[index] for index in indices]
            table: TritonLaunch | NativeLaunch | None = None
            if key.kernel == TRITON:
                make = functools.partial(TritonLaunch, key, process_groups)
                table = self._launches.get(keys[kind], key.device, make)
            elif key.kernel == NATIVE and (kernel := native_kernel(_cpu_variant(key))) is not None:
                table = NativeLaunch(key, process_groups, kernel)
            if table is not None:
                table.refresh(some, [all_addresses[index] for index in indices])
            launches.append((ReferenceLaunch(some, process_groups) if table is None else table, indices))
        return launches


def _turns(steps: Sequence[TensorStep]) -> list[int]:
    """Return how many launches each tensor waits for: parameters that share memory are stepped one after the other."""
    turns = [0] * len(steps)
    spans = sorted(
        (str(step.param.device), step.param.data_ptr(), step.param.nbytes, index)
        for index, step in enumerate(steps)
        if step.param.numel() and not is_fake(step.param)
    )
    device_before, end, sharing = "", 0, list[int]()
    for device, start, length, index in [*spans, ("", 0, 0, 0)]:
        if device != device_before or start >= end:
            for turn, member in enumerate(sorted(sharing)):
                turns[member] = turn
            device_before, end, sharing = device, 0, []
        end = max(end, start + length)
        sharing.append(index)
    return turns


def _cpu_variant(key: LaunchKey) -> CpuVariant:
    return CpuVariant(*(getattr(key, name) for name in CpuVariant._fields))


def skips_unchanged_v(states: str, exp_avg_sq_weight: float) -> bool:
    """Whether so little of second moments still changes in a step that the kernel looks before it writes."""
    return exp_avg_sq_weight < _SKIP_UNCHANGED_V_BELOW[states]


def _numels(steps: Sequence[TensorStep]) -> list[int]:
    return [step.param.numel() for step in steps]


def _launch_key(step: TensorStep, exp_avg_sq_weight: float, telemetry: bool) -> tuple[LaunchKey, tuple[int, ...]]:
    """Return what a launch of a step's tensors is for, and their addresses; 0 for what there is not."""
    kernel = backend_of(step.param.device, step.param.dtype, step.param)
    if kernel == REFERENCE:
        addresses: tuple[int, ...] = (id(step.param),)  # a fake tensor has no memory
    else:
        tensors = (*step.tensors, step.master, step.group_exponents)
        addresses = tuple([0 if tensor is None else tensor.data_ptr() for tensor in tensors])
    misaligned = 0
    if kernel == TRITON:
        for address in addresses[:-1]:
            misaligned |= address % ALIGNED_BYTES
    key = LaunchKey(
        step.param.device,
        kernel,
        step.param.dtype,
        step.grad.dtype,
        step.states,
        None if step.master is None else str(step.master.dtype).removeprefix("torch."),
        step.stochastic,
        kernel == TRITON and skips_unchanged_v(step.states, exp_avg_sq_weight),
        telemetry,
        misaligned == 0,
        step.param_is_copy,
    )
    return key, addresses
