"""Tensors on which variants of a kernel are compiled, compared and launched; see `launch_variants`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from adax_triton.bench.harness.timing import Call
from torch import Tensor

from adax_triton.state.allocation import allocate_states, local_state_tensors
from adax_triton.state.precision import bytes_loaded, bytes_stored
from adax_triton.step.device_tables import chunk_table
from adax_triton.update.coefficients import step_scalars
from adax_triton.update.rounding import random_key

from .kernel_rewrites import EXACT, rewritten_kernel
from .measure import COPY, COPY_BYTES_PER_ELEMENT, MOST_COPIED, copying, make_params, reason
from .variant_sections import Section, Variant

SAME, DIFFERS = "same", "DIFFERS"
NORM_TOLERANCE = 1e-5  # float32 sums of 1e5 squares, in any order
_COMPILED_NUMEL = 64  # the code depends on dtypes and alignment only


class KernelCall(NamedTuple):
    """A launch of a Triton kernel that is yet to be made."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def launch(self) -> Any:
        """Launch it; return the compiled kernel, or None in the interpreter."""
        return self.kernel[(self.programs,)](*self.arguments, **self.options)

    def compile(self) -> Any:
        """Compile without launching."""
        return self.kernel.warmup(*self.arguments, grid=(self.programs,), **self.options)


class Reference(NamedTuple):
    """What a variant's bandwidth is compared with."""

    name: str
    call: Call
    bytes: float


class StepCase:
    """One parameter of a mode with its gradient and states.

    Args:
        section: of the step's kernel.
        numel: elements of the parameter.
        device: where.
        folder: of rewritten sources.
    """

    def __init__(self, section: Section, numel: int, device: torch.device, folder: Path) -> None:
        self._mode, self._numel, self._device, self._folder = section.mode, numel, device, folder
        (param,) = make_params([(numel,)], device, seed=1, dtype=section.mode.param_dtype)
        state = local_state_tensors(allocate_states([param], [section.mode.precision])[0])
        self.tensors: dict[str, Tensor] = {"param": param.detach()}
        self.tensors |= state
        self._grad = param.grad  # kept alive: the kernel knows its address only
        read = {"grad": param.grad, **self.tensors}
        columns = ("param", "grad", "exp_avg", "exp_avg_sq", "master", "group_exponents")
        addresses = [0 if (tensor := read.get(name)) is None else tensor.data_ptr() for name in columns]
        self._table = torch.tensor([[*addresses, 0, numel, 0]], dtype=torch.int64, device=device)
        self._scalars = [_scalars(step, device) for step in section.steps]
        self._start = {name: tensor.clone() for name, tensor in self.tensors.items()}
        self._expected: dict[str, Tensor] = {}

    def call(self, variant: Variant) -> KernelCall:
        """Return the launch of the last step."""
        from adax_triton.kernels.adax_step import adax_step_kernel
        from adax_triton.kernels.launch import LaunchShape
        from adax_triton.kernels.variants import StepVariant

        kernel = rewritten_kernel(variant.rewrites, self._folder) if variant.rewrites else adax_step_kernel
        master = self.tensors.get("master")
        compiled = StepVariant(
            self._mode.param_dtype,
            self._mode.param_dtype,
            self._mode.precision.states,
            None if master is None else str(master.dtype).removeprefix("torch."),
            stochastic=self._mode.weight_rounding == "stochastic",
            skip_unchanged_v=variant.skip_unchanged_v,
        )
        constants = compiled.constants(LaunchShape(variant.chunk, variant.warps, variant.elements_per_thread))
        chunks = chunk_table([self._numel], variant.chunk).to(self._device)
        arguments = (self._table, chunks, self._scalars[-1], None)
        return KernelCall(kernel, chunks.numel(), arguments, constants | variant.options)

    def check(self, variant: Variant, call: KernelCall) -> str:
        """Take all steps from the start, and compare with the first variant that was checked."""
        for name, tensor in self.tensors.items():
            tensor.copy_(self._start[name])
        table, chunks, _, sums = call.arguments
        for scalars in self._scalars:
            call._replace(arguments=(table, chunks, scalars, sums)).launch()
        if not self._expected:
            self._expected = {name: tensor.clone() for name, tensor in self.tensors.items()}
        different = [name for name, tensor in self.tensors.items() if not _same_bits(tensor, self._expected[name])]
        if not different:
            return SAME
        expected = self._expected["param"]
        update = _largest_difference(expected, self._start["param"])
        apart = _largest_difference(self.tensors["param"], expected) / update
        verdict = DIFFERS if EXACT.issuperset(variant.rewrites) else "other"
        return f"{verdict} {', '.join(different)}; param by {apart:.1e} of the largest update"

    def bytes_moved(self, variant: Variant) -> float:
        """Return the bytes that a step reads and writes, by formula."""
        dtype, precision = self._mode.param_dtype, self._mode.precision
        stored = bytes_stored(dtype, precision, skip_unchanged_v=variant.skip_unchanged_v)
        return self._numel * (bytes_loaded(dtype, dtype, precision) + stored)

    def references(self) -> list[Reference]:
        """Return a copy that moves the same bytes."""
        return [_copy(self._numel * self._mode.bytes_per_element, self._device)]


class NormCase:
    """One gradient of a dtype; the arguments are those of `StepCase`, of which `folder` stays unused."""

    def __init__(self, section: Section, numel: int, device: torch.device, folder: Path) -> None:
        (param,) = make_params([(numel,)], device, seed=1, dtype=section.mode.param_dtype)
        assert param.grad is not None
        self.grad = param.grad
        row = [0, self.grad.data_ptr(), 0, 0, 0, 0, 0, numel, 0]
        self._table = torch.tensor([row], dtype=torch.int64, device=device)
        self._expected = torch.linalg.vector_norm(self.grad, dtype=torch.float64).item()

    def call(self, variant: Variant) -> KernelCall:
        """Return the launch that sums up squares."""
        from adax_triton.kernels.grad_norm import grad_norm_kernel
        from adax_triton.kernels.variants import TRITON_DTYPES

        assert variant.programs is not None
        device, dtype = self.grad.device, TRITON_DTYPES[self.grad.dtype]
        chunks = chunk_table([self.grad.numel()], variant.chunk).to(device)
        partials = torch.empty(min(variant.programs, chunks.numel()), device=device)
        vector = min(128 // dtype.primitive_bitwidth, variant.elements_per_thread)
        constants = {"GRAD_DTYPE": dtype, "CHUNK_SIZE": variant.chunk, "VECTOR": vector}
        arguments = (self._table, chunks, partials, chunks.numel())
        return KernelCall(grad_norm_kernel, partials.numel(), arguments, constants | variant.options)

    def check(self, variant: Variant, call: KernelCall) -> str:
        """Compare the norm with PyTorch's in float64."""
        call.launch()
        error = abs(call.arguments[2].double().sum().sqrt().item() / self._expected - 1)
        return f"{SAME if error <= NORM_TOLERANCE else DIFFERS}, relative error {error:.1e}"

    def bytes_moved(self, variant: Variant) -> float:
        """Return the bytes of the gradient."""
        return self.grad.nbytes

    def references(self) -> list[Reference]:
        """Return a copy that moves the same bytes, and PyTorch's sum."""
        copy = _copy(self.grad.nbytes, self.grad.device)
        return [copy, Reference("torch.sum", lambda: torch.sum(self.grad), self.grad.nbytes)]


def case_of(section: Section, numel: int, device: torch.device, folder: Path) -> StepCase | NormCase:
    """Return the tensors of a section."""
    return (NormCase if section.norm else StepCase)(section, numel, device, folder)


def _scalars(step: int, device: torch.device) -> Tensor:
    row = step_scalars(
        step=step,
        lr=1e-3,
        betas=(0.9, 1e-4),
        eps=1e-12,
        weight_decay=0.05,
        decoupled_weight_decay=True,
        second_moment="adax",
        eps_placement="normalized",
        maximize=False,
    )
    row = row._replace(grad_factor=1.0 / step)  # else no step after the first would change v
    words = torch.tensor(random_key(0, step)).to(torch.int32).view(torch.float32)
    return torch.cat([torch.tensor(row), words, torch.zeros(1)]).to(device)


def _same_bits(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def _largest_difference(left: Tensor, right: Tensor) -> float:
    return (left.float() - right.float()).abs().max().item()


def _copy(moved: float, device: torch.device) -> Reference:
    numel = min(int(moved) // COPY_BYTES_PER_ELEMENT, MOST_COPIED)
    return Reference(COPY, copying(numel, device), numel * COPY_BYTES_PER_ELEMENT)


class AbsentDevice:
    """A driver that answers what Triton asks before it compiles; it needs no GPU and no CUDA context.

    Args:
        target: Triton's `GPUTarget`.
    """

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_device(self) -> int:
        """Return any index."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return any stream."""
        return 0

    def get_current_target(self) -> Any:
        """Return what to compile for."""
        return self._target


def compile_variant(section: Section, variant: Variant, target: Any) -> str | None:
    """Compile a variant into Triton's cache on disk; return why that failed, or None."""
    from triton.runtime import driver

    driver.set_active(AbsentDevice(target))
    try:
        with tempfile.TemporaryDirectory() as folder:
            case_of(section, _COMPILED_NUMEL, torch.device("cpu"), Path(folder)).call(variant).compile()
    except Exception as error:  # whatever stops it is what its row says
        return reason(error)
    return None
