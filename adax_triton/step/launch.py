"""Group tensors into kernel launches and keep the launches' address tables."""

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
from .cpu_kernel import CHUNK_SIZE, CpuKernel, KernelVariant
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
    """Key of a launch: tensors with equal keys share it.

    device: device of the tensors.
    backend: `backend.TRITON`, `NATIVE` or `REFERENCE`.
    variant: compile-time options that all backends have.
    skip_unchanged_v, aligned: further options of the Triton kernel, see `kernels.variants.StepVariant`.
    """

    device: torch.device
    backend: str
    variant: KernelVariant
    skip_unchanged_v: bool
    aligned: bool


class TableLaunch:
    """A kernel launch with a table of tensor addresses, reused between steps.

    Args:
        key: key that all its tensors share.
        process_groups: process groups that shard the gradients of all its tensors.
        chunk_size: elements per entry of the chunk table.

    Attributes:
        revision: number of `refresh` calls. A plan may reuse the tables while this stays the same.
    """

    def __init__(self, key: LaunchKey, process_groups: tuple[Any, ...], chunk_size: int) -> None:
        self.key = key
        self.device = key.device
        self.process_groups = process_groups
        self.revision = 0
        self._table = AddressTable(key.device, chunk_size)

    def refresh(self, steps: Sequence[TensorStep], addresses: Sequence[tuple[int, ...]]) -> None:
        """Write the addresses of a step's tensors into the tables.

        This does not keep the tensors alive.

        Args:
            steps: the tensors.
            addresses: tensor addresses for each step, in the order of `kernels.tables.TENSOR_COLUMNS`; 0 if absent.
        """
        rows = [
            (*address, step.first_element, step.param.numel(), step.scalar_row)
            for step, address in zip(steps, addresses, strict=True)
        ]
        self.revision += 1
        self._table.refresh(rows, _numels(steps))

    def is_prepared_for(self, steps: Sequence[TensorStep]) -> bool:
        """Return whether a capture of these tensors can use the tables."""
        return self._table.numels == _numels(steps)

    def refresh_gradients(self, addresses: array[int]) -> None:
        """Update only the gradient addresses, (n,) int64."""
        self._table.refresh_column(_GRAD_COLUMN, addresses)


class TritonLaunch(TableLaunch):
    """A launch of the Triton kernel."""

    def __init__(self, key: LaunchKey, process_groups: tuple[Any, ...]) -> None:
        from adax_triton.kernels.launch import chunk_size
        from adax_triton.kernels.variants import StepVariant

        super().__init__(key, process_groups, chunk_size())
        self._variant = StepVariant(**key.variant._asdict(), skip_unchanged_v=key.skip_unchanged_v, aligned=key.aligned)
        self._partials = torch.empty(0, dtype=torch.float64, device=key.device)
        self._sums: DeviceSums | None = None

    def squares(self) -> Tensor:
        """Return numbers that add up to the sum of squared gradients, (k,) float64. The next call overwrites them."""
        from adax_triton.kernels.grad_norm import grad_norm_partials, partial_count

        count = partial_count(self._table.chunks.numel())
        if self._partials.numel() != count:
            self._partials = torch.empty(count, dtype=torch.float64, device=self.key.device)
        grad_norm_partials(
            self._table.tensors, self._table.chunks, self._partials, self.key.variant.grad_dtype, self.key.aligned
        )
        return self._partials

    def run(self, scalars: Tensor, sums: Tensor | None) -> None:
        """Update the tensors.

        Args:
            scalars: (rows, 10) float32 on the device, see `kernels.tables.SCALAR_COLUMNS`.
            sums: (n, 5) float32 on the device; receives telemetry sums, see `kernels.tables.SUM_COLUMNS`. None: no
                telemetry.
        """
        from adax_triton.kernels.adax_step import adax_step

        if sums is None:
            adax_step(self._table.tensors, self._table.chunks, scalars, self._variant)
        else:
            if self._sums is None:
                from .telemetry import DeviceSums

                self._sums = DeviceSums(self.key.device)
            chunk_sums = self._sums.chunk_sums(self._table.chunk_counts())
            adax_step(self._table.tensors, self._table.chunks, scalars, self._variant, chunk_sums)
            self._sums.add_up(sums)


class NativeLaunch(TableLaunch):
    """A call of the native CPU kernel.

    Args:
        kernel: compiled kernel of `key.variant`.
    """

    def __init__(self, key: LaunchKey, process_groups: tuple[Any, ...], kernel: CpuKernel) -> None:
        super().__init__(key, process_groups, CHUNK_SIZE)
        self._kernel = kernel
        self.is_float64 = key.variant.param_dtype == torch.float64

    def squares(self) -> Tensor:
        """Return the sum of squared gradients, (1,) float64 on the CPU."""
        partials = torch.empty(self._table.chunks.numel(), dtype=torch.float64, device="cpu")
        self._kernel.sum_of_squares(self._table.tensors, self._table.chunks, partials)
        length = torch.tensor([partials.numel()], device="cpu")
        return torch.segment_reduce(partials, "sum", lengths=length, initial=0.0)

    def run(self, scalars: Tensor, sums: Tensor | None) -> None:
        """Update the tensors.

        Args:
            scalars: (rows, 10) float32 or float64 on the CPU, see `kernels.tables.SCALAR_COLUMNS`.
            sums: (n, 5) float32; receives telemetry sums, see `kernels.tables.SUM_COLUMNS`. None: no
                telemetry.
        """
        if sums is None:
            return self._kernel.step(self._table.tensors, self._table.chunks, scalars)
        chunk_sums = torch.empty(self._table.chunks.numel(), len(SUM_COLUMNS), dtype=scalars.dtype, device="cpu")
        self._kernel.step(self._table.tensors, self._table.chunks, scalars, chunk_sums)
        counts = torch.tensor(self._table.chunk_counts(), device="cpu")
        sums.copy_(torch.segment_reduce(chunk_sums.double(), "sum", lengths=counts, initial=0.0))


Launch = TritonLaunch | NativeLaunch | ReferenceLaunch
IndexedLaunch = tuple[Launch, list[int]]  # a launch and the indices of its tensors in the step


class LaunchCache:
    """Launches and device tables of earlier steps, by key and stream.

    Attributes:
        device_scalars: scalars that a device computes, for device-counted parameters.
        host_computed_scalars: device tables with scalars that the host computes.
    """

    def __init__(self) -> None:
        self._launches: PerStreamCache[TritonLaunch] = PerStreamCache()
        self.device_scalars: PerStreamCache[DeviceScalars] = PerStreamCache()
        self.host_computed_scalars: PerStreamCache[DeviceTable] = PerStreamCache()

    def launches(
        self, steps: Sequence[TensorStep], scalars: Sequence[StepScalars] | None, telemetry: bool
    ) -> list[IndexedLaunch]:
        """Group tensors into launches, update their tables and return them.

        Args:
            steps: steps on dense tensors.
            scalars: scalars of each row, or None if the device counts the steps.
            telemetry: whether kernels write telemetry sums.

        Returns:
            Launches, each with the indices of its tensors in `steps`.

        Raises:
            RuntimeError: a CUDA graph is being captured without a warm-up step of the same parameters. No launch has
                changed.
        """
        all_addresses: list[tuple[int, ...]] = []
        indices_by_launch: dict[tuple[LaunchKey, tuple[Any, ...], int], list[int]] = defaultdict(list)
        for index, (step, number) in enumerate(zip(steps, _launch_order(steps), strict=True)):
            weight = 1.0 if scalars is None else scalars[step.scalar_row].exp_avg_sq_weight
            key, addresses = _launch_key(step, weight, telemetry)
            all_addresses.append(addresses)
            indices_by_launch[key, step.process_groups, number].append(index)
        # The first address separates the launches of ZeRO, which calls step() once per group.
        cache_keys = {
            launch_id: (*launch_id, all_addresses[indices[0]][0]) for launch_id, indices in indices_by_launch.items()
        }
        for launch_id, indices in indices_by_launch.items():
            if is_capturing(launch_id[0].device):
                latest = self._launches.latest(cache_keys[launch_id])
                if latest is None or not latest.is_prepared_for([steps[index] for index in indices]):
                    raise RuntimeError(CAPTURE_NEEDS_WARM_UP)
        launches: list[IndexedLaunch] = []
        for launch_id, indices in indices_by_launch.items():
            key, process_groups, _ = launch_id
            members = [steps[index] for index in indices]
            table: TritonLaunch | NativeLaunch | None = None
            if key.backend == TRITON:
                make = functools.partial(TritonLaunch, key, process_groups)
                table = self._launches.get(cache_keys[launch_id], key.device, make)
            elif key.backend == NATIVE and (kernel := native_kernel(key.variant)) is not None:
                table = NativeLaunch(key, process_groups, kernel)
            if table is not None:
                table.refresh(members, [all_addresses[index] for index in indices])
            launches.append((ReferenceLaunch(members, process_groups) if table is None else table, indices))
        return launches


def _launch_order(steps: Sequence[TensorStep]) -> list[int]:
    """Return a launch number per step.

    Parameters that share memory get 0, 1, ...; all others get 0.
    """
    order = [0] * len(steps)
    spans = sorted(
        (str(step.param.device), step.param.data_ptr(), step.param.nbytes, index)
        for index, step in enumerate(steps)
        if step.param.numel() and not is_fake(step.param)
    )
    device_before, end, sharing = "", 0, list[int]()
    for device, start, length, index in [*spans, ("", 0, 0, 0)]:
        if device != device_before or start >= end:
            for number, member in enumerate(sorted(sharing)):
                order[member] = number
            device_before, end, sharing = device, 0, []
        end = max(end, start + length)
        sharing.append(index)
    return order


def should_skip_unchanged_v(states: str, exp_avg_sq_weight: float) -> bool:
    """Return whether the kernel stores v only where it changed."""
    return exp_avg_sq_weight < _SKIP_UNCHANGED_V_BELOW[states]


def _numels(steps: Sequence[TensorStep]) -> list[int]:
    return [step.param.numel() for step in steps]


def _launch_key(step: TensorStep, exp_avg_sq_weight: float, telemetry: bool) -> tuple[LaunchKey, tuple[int, ...]]:
    """Return a step's launch key and its tensor addresses, 0 if absent."""
    backend = backend_of(step.param.device, step.param.dtype, step.param)
    if backend == REFERENCE:
        addresses: tuple[int, ...] = (id(step.param),)  # a fake tensor has no address
    else:
        tensors = (*step.tensors, step.master, step.group_exponents)
        addresses = tuple([0 if tensor is None else tensor.data_ptr() for tensor in tensors])
    misaligned = 0
    if backend == TRITON:
        for address in addresses[:-1]:
            misaligned |= address % ALIGNED_BYTES
    variant = KernelVariant(
        step.param.dtype,
        step.grad.dtype,
        step.states,
        None if step.master is None else str(step.master.dtype).removeprefix("torch."),
        step.stochastic,
        telemetry,
        step.param_is_copy,
    )
    skip_unchanged_v = backend == TRITON and should_skip_unchanged_v(step.states, exp_avg_sq_weight)
    return LaunchKey(step.param.device, backend, variant, skip_unchanged_v, misaligned == 0), addresses
