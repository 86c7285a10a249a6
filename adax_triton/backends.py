"""Which code steps a tensor, and how a list of tensors is handed to it."""

from __future__ import annotations

import functools
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from struct import Struct
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor

from .compiled import compiler_problem
from .control import TAKEN, Decision, StepControl
from .cpu import COMPILE_FROM_NUMEL
from .device_scalars import DeviceRow, DeviceScalars
from .device_tables import UNPREPARED, DeviceTable, KeptByStream, is_capturing
from .gradient_norm import sum_of_squares
from .launches import KernelLaunch, Launches
from .pytorch_steps import HostRows, prepare_steps_with_sums, prepared_steps, run_steps_with_sums
from .schedule import StepScalars
from .telemetry import StepSums
from .tensor_step import TensorStep, laid_out_alike
from .uninterrupted import Uninterrupted

# A row for the kernel: floats, the two words of the key, then 0, which skips nothing.
_SCALAR_ROW = Struct("7f2I4x").pack
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GRAD_FACTOR_COLUMN = StepScalars._fields.index("grad_factor")


def uses_kernel(device: torch.device, param_dtype: torch.dtype, param: Tensor | None = None) -> bool:
    """Whether the Triton kernel steps a parameter of this kind; CPU tensors only in Triton's interpreter.

    Args:
        device: of the parameter.
        param_dtype: of its real numbers.
        param: the parameter, because no kernel steps a fake one: it has no memory.
    """
    if param is not None and is_fake(param):
        return False
    return param_dtype in _KERNEL_DTYPES and (device.type == "cuda" or (device.type == "cpu" and _interpreting()))


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor, or what a DTensor shards, has a shape and a device but no memory."""
    return type(tensor) not in (Tensor, nn.Parameter) and fake_tensor.is_fake(tensor)


def explain_backend(device: torch.device, param_dtype: torch.dtype) -> tuple[str, str]:
    """Return `"triton"`, `"compiled"` or `"eager"`, what steps parameters of this kind, and why it is this one."""
    if uses_kernel(device, param_dtype):
        interpreted = ", in the interpreter because TRITON_INTERPRET is set" if device.type == "cpu" else ""
        return "triton", f"the fused kernel{interpreted}"
    if device.type != "cpu":
        return "eager", f"uncompiled PyTorch: the kernel does not take {param_dtype} on {device.type}"
    problem = compiler_problem()
    if problem is not None:
        return "eager", f"uncompiled PyTorch: {problem}"
    return "compiled", f"one compiled pass; less than {COMPILE_FROM_NUMEL:,} elements uncompiled"


def _interpreting() -> bool:
    if os.environ.get("TRITON_INTERPRET", "0") == "0":
        return False
    from adax_triton.kernels.launch import is_interpreted

    return is_interpreted()


class DeviceRows(NamedTuple):
    """Rows of scalars that are computed on the devices: one per tensor there; the parameter groups they refer to."""

    rows: dict[torch.device, list[DeviceRow]]
    groups: Sequence[Mapping[str, Any]]


class Work(NamedTuple):
    """The tensors of a step.

    kernel: those that the kernel takes, with rows of the host or, if something may skip the step, of the device.
    others: those that PyTorch steps, with rows of the host.
    launches: refreshed, instead of `kernel`, and the parameters that they step.
    """

    kernel: Sequence[TensorStep]
    kernel_rows: HostRows | DeviceRows
    others: Sequence[TensorStep]
    other_rows: HostRows
    launches: tuple[Sequence[KernelLaunch], Sequence[Tensor]] | None = None


class StepResult(NamedTuple):
    """What came of a step.

    taken: whether the tensors that the host schedules were stepped.
    skipped: the same for those that the device schedules, as a tensor there, not 0 if they were not; None without any.
    grad_norm: of all gradients, 0-d float32 on a device that has some, until the next step; None unless measured.
    launches: of the kernel's tensors, if they are stepped where they lie; None if copies stood in for some.
    """

    taken: bool
    skipped: Tensor | None
    grad_norm: Tensor | None
    launches: Sequence[KernelLaunch] | None


class Stepper:
    """Runs one step's tensors, and keeps what launches need between steps."""

    def __init__(self) -> None:
        self._launches = Launches()
        self._device_scalars: KeptByStream[DeviceScalars] = KeptByStream()
        self._host_scalars: KeptByStream[DeviceTable] = KeptByStream()

    def run(
        self,
        work: Work,
        control: StepControl = StepControl(),  # noqa: B008 - immutable
        error_if_nonfinite: bool = False,
        sums: StepSums | None = None,
        host_states: Sequence[dict[str, Any]] = (),
    ) -> StepResult:
        """Update every tensor in place: one launch per bucket on the kernel's devices, else one by one.

        Args:
            work: the tensors and their rows.
            control: what may clip or skip the step, the same for all tensors.
            error_if_nonfinite: raise instead of skipping when the norm is not finite; the host then waits for it.
            sums: written for telemetry; None for none.
            host_states: whose `step` advances if the host takes the step. Ctrl-C waits for it, too.

        Raises:
            RuntimeError: the norm of the gradients is not finite, and an error was asked for; or a CUDA graph is being
                captured without a step of the same parameters before it. Nothing has changed.
        """
        copies: list[tuple[Tensor, Tensor]] = []
        fake = any(is_fake(step.param) for step in work.others)
        kernel = [laid_out_alike(step, copies) for step in work.kernel]
        others = [laid_out_alike(step, copies).as_runs() for step in work.others]
        launches, params = work.launches or self._launches_of(kernel, work.kernel_rows, sums is not None)
        squares = None
        if control.max_grad_norm is not None:
            squares = sum_of_squares([launch for launch, _ in launches], others, control.norm_ranks)
            if error_if_nonfinite and not fake and squares is not None and not bool(squares.isfinite()):
                raise RuntimeError(
                    "The norm of the gradients is not finite, so they cannot be clipped; to skip such steps instead, "
                    "set error_if_nonfinite=False"
                )
        # A fake tensor has no value to decide by.
        decision = control.read(squares) if others and not fake and not control.is_idle else TAKEN
        # Whatever may fail comes before the first write.
        if sums is None:
            run_others = prepared_steps(others, work.other_rows, decision)
        else:
            prepare_steps_with_sums(others, work.other_rows, decision)
            run_others = functools.partial(self._run_with_sums, others, len(params), work.other_rows, decision, sums)
        launch = functools.partial(self._run_launches, launches, work.kernel_rows, control, squares, sums)
        # Those of a plan have run before.
        run_launches = _prepared(launch) if work.launches is None and _are_compiled(launches) else launch
        with Uninterrupted():
            # The kernel writes behind autograd's back; a backward that still needs the old values must fail.
            torch.autograd.graph.increment_version(params)
            run_others()
            report = run_launches()
            # Of a skipped step the copies are what they were.
            for original, copy in copies:
                original.copy_(copy)
            if not decision.skip:
                for state in host_states:
                    state["step"] += 1
        grad_norm = None
        if squares is not None:
            grad_norm = control.norm(squares) if report is None else report[0]
        skipped = None if report is None else report[2]
        return StepResult(not decision.skip, skipped, grad_norm, None if copies else launches)

    def _launches_of(
        self, kernel: Sequence[TensorStep], rows: HostRows | DeviceRows, telemetry: bool
    ) -> tuple[Sequence[KernelLaunch], Sequence[Tensor]]:
        if not kernel:
            return [], []
        host_scalars = None
        if isinstance(rows, HostRows):
            host_scalars = rows.scalars
        else:
            self._refuse_unprepared(rows)
        return self._launches.of(kernel, host_scalars, telemetry), [step.param for step in kernel]

    @staticmethod
    def _run_with_sums(
        steps: Sequence[TensorStep], first_index: int, rows: HostRows, decision: Decision, sums: StepSums
    ) -> None:
        alike: dict[torch.device, list[int]] = defaultdict(list)
        for index, step in enumerate(steps):
            alike[step.param.device].append(index)
        for device, indices in alike.items():
            found = sums.rows(device, [first_index + index for index in indices])
            run_steps_with_sums([steps[index] for index in indices], rows, decision, found)

    def _run_launches(
        self,
        launches: Sequence[KernelLaunch],
        rows: HostRows | DeviceRows,
        control: StepControl,
        squares: Tensor | None,
        sums: StepSums | None,
    ) -> Tensor | None:
        report = None
        scalars: dict[torch.device, Tensor] = {}
        for device in dict.fromkeys(launch.bucket.device for launch, _ in launches):
            if isinstance(rows, HostRows):
                uploaded = self._uploaded(device, rows)
                factor = control.grad_factor
                scalars[device] = uploaded if factor is None else _scaled(uploaded, factor)
            else:
                prepared = self._prepared(device, rows.rows[device])
                local = None if squares is None else squares.to(device, non_blocking=True)
                scalars[device] = prepared.prepare(rows.rows[device], rows.groups, control, local)
                report = prepared.report if report is None else report
        for launch, indices in launches:
            launch.run(
                scalars[launch.bucket.device], None if sums is None else sums.rows(launch.bucket.device, indices)
            )
        return report

    def _uploaded(self, device: torch.device, rows: HostRows) -> Tensor:
        table = self._host_scalars.get(device, device, lambda: DeviceTable(device))
        return table.set((rows.scalars, rows.keys), _scalar_table)

    def _prepared(self, device: torch.device, rows: Sequence[DeviceRow]) -> DeviceScalars:
        return self._device_scalars.get(_device_key(device, rows), device, lambda: DeviceScalars(device))

    def _refuse_unprepared(self, rows: DeviceRows) -> None:
        for device, some in rows.rows.items():
            if is_capturing(device):
                prepared = self._device_scalars.prepared(_device_key(device, some))
                if prepared is None or not prepared.is_prepared_for(some, rows.groups):
                    raise RuntimeError(UNPREPARED)


def _are_compiled(launches: Sequence[KernelLaunch]) -> bool:
    return any(launch.bucket.device.type == "cuda" for launch, _ in launches)


def _prepared(run_launches: Callable[[], Tensor | None]) -> Callable[[], Tensor | None]:
    """Compile the kernels and fill the tables of launches; return what does the launches."""
    from adax_triton.kernels.launch import held_launches

    with held_launches() as held:
        report = run_launches()

    def run() -> Tensor | None:
        for launch in held:
            launch()
        return report

    return run


def _device_key(device: torch.device, rows: Sequence[DeviceRow]) -> tuple[torch.device, int]:
    return device, rows[0].step.data_ptr()


def _scaled(scalars: Tensor, grad_factor: Tensor) -> Tensor:
    # In a copy: the table is uploaded only when what the host knows changes.
    scaled = scalars.clone()
    scaled[:, _GRAD_FACTOR_COLUMN].mul_(grad_factor.detach().reshape(()).to(scalars.device, non_blocking=True))
    return scaled


def _scalar_table(rows: tuple[list[StepScalars], list[tuple[int, int]]]) -> Tensor:
    table = b"".join([_SCALAR_ROW(*scalars, *key) for scalars, key in zip(*rows, strict=True)])
    return torch.frombuffer(bytearray(table), dtype=torch.float32).view(len(rows[0]), -1)
