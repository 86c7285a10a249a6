"""The tensors of a section, on which variants are launched and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from adax_triton.bench.harness.timing import Call
from adax_triton.bench.step.measure import COPY, COPY_BYTES_PER_ELEMENT, MOST_COPIED, copying, make_params
from torch import Tensor

from adax_triton.state.allocation import allocate_states, local_state_tensors
from adax_triton.state.precision import bytes_loaded, bytes_stored
from adax_triton.step.device_tables import chunk_table
from adax_triton.update.coefficients import step_scalars
from adax_triton.update.rounding import random_key

from .kernel_rewrites import EXACT, rewritten_kernel
from .variants import Section, Variant

SAME, DIFFERS = "same", "DIFFERS"
NORM_TOLERANCE = 1e-5  # float32 sums of 1e5 squares, in any order


class KernelCall(NamedTuple):
    """A prepared launch of a Triton kernel."""

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


class Case:
    """One parameter with its gradient, and its states unless the section is of the norm kernel.

    Args:
        section: variants to compare.
        numel: elements of the parameter.
        device: of the tensors.
        folder: for rewritten sources.
    """

    def __init__(self, section: Section, numel: int, device: torch.device, folder: Path) -> None:
        self._section, self._mode, self._numel, self._device = section, section.mode, numel, device
        self._folder = folder
        (param,) = make_params([(numel,)], device, seed=1, dtype=self._mode.param_dtype)
        assert param.grad is not None
        self.grad = param.grad  # kept alive: the kernel only knows the address
        self.tensors: dict[str, Tensor] = {"param": param.detach()}
        if section.steps is None:
            self._norm = torch.linalg.vector_norm(self.grad, dtype=torch.float64).item()
        else:
            self.tensors |= local_state_tensors(allocate_states([param], [self._mode.precision])[0])
        read = {"grad": self.grad, **self.tensors}
        columns = ("param", "grad", "exp_avg", "exp_avg_sq", "master", "group_exponents")
        addresses = [read[name].data_ptr() if name in read else 0 for name in columns]
        self._table = torch.tensor([[*addresses, 0, numel, 0]], dtype=torch.int64, device=device)
        self._scalars = [_scalars(step).to(device) for step in section.steps or ()]
        self._start = {name: tensor.clone() for name, tensor in self.tensors.items()}
        self._expected: dict[str, Tensor] = {}

    def call(self, variant: Variant) -> KernelCall:
        """Return the launch of a variant: of the last step, or of the norm's sums of squares."""
        chunks = chunk_table([self._numel], variant.chunk).to(self._device)
        return (self._step_call if self._section.steps else self._norm_call)(variant, chunks)

    def _step_call(self, variant: Variant, chunks: Tensor) -> KernelCall:
        from adax_triton.kernels.adax_step import adax_step_kernel
        from adax_triton.kernels.launch import LaunchShape
        from adax_triton.kernels.variants import StepVariant

        kernel = rewritten_kernel(variant.rewrite, self._folder) if variant.rewrite else adax_step_kernel
        mode, master = self._mode, self.tensors.get("master")
        compiled = StepVariant(
            mode.param_dtype,
            mode.param_dtype,
            mode.precision.states,
            None if master is None else str(master.dtype).removeprefix("torch."),
            stochastic=mode.weight_rounding == "stochastic",
            skip_unchanged_v=variant.skip_unchanged_v,
        )
        constants = compiled.constants(
            LaunchShape(variant.chunk, variant.options["num_warps"], variant.elements_per_thread)
        )
        arguments = (self._table, chunks, self._scalars[-1], None)
        return KernelCall(kernel, chunks.numel(), arguments, constants | variant.options)

    def _norm_call(self, variant: Variant, chunks: Tensor) -> KernelCall:
        from adax_triton.kernels.grad_norm import grad_norm_kernel
        from adax_triton.kernels.variants import TRITON_DTYPES

        assert variant.programs is not None
        dtype = TRITON_DTYPES[self.grad.dtype]
        partials = torch.empty(min(variant.programs, chunks.numel()), device=self._device)
        vector = min(128 // dtype.primitive_bitwidth, variant.elements_per_thread)
        constants = {"GRAD_DTYPE": dtype, "CHUNK_SIZE": variant.chunk, "VECTOR": vector}
        arguments = (self._table, chunks, partials, chunks.numel())
        return KernelCall(grad_norm_kernel, partials.numel(), arguments, constants | variant.options)

    def check(self, variant: Variant, call: KernelCall) -> str:
        """Run all steps from the start and compare with the first variant checked; a norm with PyTorch's in float64."""
        if self._section.steps is None:
            call.launch()
            error = abs(call.arguments[2].double().sum().sqrt().item() / self._norm - 1)
            return f"{SAME if error <= NORM_TOLERANCE else DIFFERS}, relative error {error:.1e}"
        for name, tensor in self.tensors.items():
            tensor.copy_(self._start[name])
        table, chunks, _, sums = call.arguments
        for scalars in self._scalars:
            call._replace(arguments=(table, chunks, scalars, sums)).launch()
        expected = self._expected = self._expected or {name: tensor.clone() for name, tensor in self.tensors.items()}
        bits = {
            name: (tensor.view(torch.uint8), expected[name].view(torch.uint8)) for name, tensor in self.tensors.items()
        }
        different = [name for name, pair in bits.items() if not torch.equal(*pair)]
        if not different:
            return SAME
        update = _distance(expected["param"], self._start["param"])
        apart = _distance(self.tensors["param"], expected["param"]) / update
        verdict = DIFFERS if variant.rewrite in {None, *EXACT} else "other"
        return f"{verdict} {', '.join(different)}; param by {apart:.1e} of the largest update"

    def bytes_moved(self, variant: Variant) -> float:
        """Return the bytes that a launch reads and writes, by formula."""
        if self._section.steps is None:
            return self.grad.nbytes
        dtype, precision = self._mode.param_dtype, self._mode.precision
        stored = bytes_stored(dtype, precision, skip_unchanged_v=variant.skip_unchanged_v)
        return self._numel * (bytes_loaded(dtype, dtype, precision) + stored)

    def references(self) -> dict[str, tuple[Call, float]]:
        """Return operations to compare bandwidth with, and their bytes: a copy, and PyTorch's sum of a gradient."""
        moved = int(self._numel * self._mode.bytes_per_element) if self._section.steps else self.grad.nbytes
        numel = min(moved // COPY_BYTES_PER_ELEMENT, MOST_COPIED)
        found: dict[str, tuple[Call, float]] = {COPY: (copying(numel, self._device), numel * COPY_BYTES_PER_ELEMENT)}
        if self._section.steps is None:
            found["torch.sum"] = (lambda: torch.sum(self.grad), self.grad.nbytes)
        return found


def _scalars(step: int) -> Tensor:
    rule: Any = {"second_moment": "adax", "eps_placement": "normalized", "maximize": False}
    rule |= {"lr": 1e-3, "betas": (0.9, 1e-4), "eps": 1e-12, "weight_decay": 0.05, "decoupled_weight_decay": True}
    row = step_scalars(step=step, **rule)
    row = row._replace(grad_factor=1.0 / step)  # with equal gradients v would not change after the first step
    words = torch.tensor(random_key(0, step)).to(torch.int32).view(torch.float32)
    return torch.cat([torch.tensor(row), words, torch.zeros(1)])


def _distance(left: Tensor, right: Tensor) -> float:
    return (left.float() - right.float()).abs().max().item()
