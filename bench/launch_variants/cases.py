"""The tensors of a section, on which variants are launched and compared."""

from __future__ import annotations

import functools
from typing import Any

import torch
from adax_triton.bench.harness.timing import Call
from adax_triton.bench.step.measure import make_params
from torch import Tensor

from adax_triton.state.allocation import allocate_states, local_state_tensors
from adax_triton.state.precision import bytes_loaded, bytes_stored
from adax_triton.step.device_tables import chunk_table
from adax_triton.update.coefficients import step_scalars
from adax_triton.update.rounding import random_key

from .variants import Section, Variant

SAME, DIFFERS = "same", "DIFFERS"
COLUMNS = ("param", "grad", "exp_avg", "exp_avg_sq", "master", "group_exponents")  # addresses, in the kernel's order


class Case:
    """One parameter of `numel` elements with its gradient and states, in the dtypes of a section."""

    def __init__(self, section: Section, numel: int, device: torch.device) -> None:
        self._mode, self._numel, self.device = section.mode, numel, device
        (param,) = make_params([(numel,)], device, seed=1, dtype=self._mode.param_dtype)
        assert param.grad is not None
        self._grad = param.grad  # kept alive: the kernel only knows the address
        states = local_state_tensors(allocate_states([param], [self._mode.precision])[0])
        self.tensors: dict[str, Tensor] = {"param": param.detach(), **states}
        read = {"grad": self._grad, **self.tensors}
        addresses = [read[name].data_ptr() if name in read else 0 for name in COLUMNS]
        self._table = torch.tensor([[*addresses, 0, numel, 0]], dtype=torch.int64, device=device)
        self._scalars = [_scalars(step).to(device) for step in section.steps]
        self._start = {name: tensor.clone() for name, tensor in self.tensors.items()}
        self._expected: dict[str, Tensor] = {}

    def call(self, variant: Variant, compile_only: bool = False) -> Call:
        """Return the launch of a variant, of the last step by default; it returns the compiled kernel."""
        from adax_triton.kernels.adax_step import adax_step_kernel
        from adax_triton.kernels.launch import LaunchShape
        from adax_triton.kernels.variants import StepVariant

        chunks = chunk_table([self._numel], variant.chunk).to(self.device)
        mode, master = self._mode, self.tensors.get("master")
        compiled = StepVariant(
            mode.param_dtype,
            mode.param_dtype,
            mode.precision.states,
            None if master is None else str(master.dtype).removeprefix("torch."),
            stochastic=mode.weight_rounding == "stochastic",
            skip_unchanged_v=variant.skip_unchanged_v,
        )
        shape = LaunchShape(variant.chunk, variant.options["num_warps"], variant.elements_per_thread)
        options, grid = compiled.constants(shape) | variant.options, (chunks.numel(),)
        run: Any = functools.partial(adax_step_kernel.warmup, grid=grid) if compile_only else adax_step_kernel[grid]
        return lambda scalars=self._scalars[-1]: run(self._table, chunks, scalars, None, **options)

    def check(self, launch: Call) -> str:
        """Run all steps from the start and compare with the first variant checked."""
        for name, tensor in self.tensors.items():
            tensor.copy_(self._start[name])
        for scalars in self._scalars:
            launch(scalars)
        expected = self._expected = self._expected or {name: tensor.clone() for name, tensor in self.tensors.items()}
        different = [
            name
            for name, tensor in self.tensors.items()
            if not torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8))
        ]
        if not different:
            return SAME
        apart = _distance(self.tensors["param"], expected["param"]) / _distance(expected["param"], self._start["param"])
        return f"{DIFFERS} {', '.join(different)}; param by {apart:.1e} of the largest update"

    def bytes_moved(self, variant: Variant) -> float:
        """Return the bytes that a launch reads and writes, by formula."""
        dtype, precision = self._mode.param_dtype, self._mode.precision
        stored = bytes_stored(dtype, precision, skip_unchanged_v=variant.skip_unchanged_v)
        return self._numel * (bytes_loaded(dtype, dtype, precision) + stored)


def _scalars(step: int) -> Tensor:
    rule: Any = {"second_moment": "adax", "eps_placement": "normalized", "maximize": False}
    rule |= {"lr": 1e-3, "betas": (0.9, 1e-4), "eps": 1e-12, "weight_decay": 0.05, "decoupled_weight_decay": True}
    row = step_scalars(step=step, **rule)
    row = row._replace(grad_factor=1.0 / step)  # with equal gradients v would not change after the first step
    words = torch.tensor(random_key(0, step)).to(torch.int32).view(torch.float32)
    return torch.cat([torch.tensor(row), words, torch.zeros(1)])


def _distance(left: Tensor, right: Tensor) -> float:
    return (left.float() - right.float()).abs().max().item()
