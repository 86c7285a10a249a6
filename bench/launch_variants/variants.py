"""Launch variants of the step kernel, and tensors to compare them on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from adax_triton.bench.harness.modes import MODES, Mode
from adax_triton.bench.step.measure import make_params
from torch import Tensor

from adax_triton.state.allocation import allocate_states, local_state_tensors
from adax_triton.state.precision import bytes_loaded, bytes_stored
from adax_triton.step.device_tables import chunk_table
from adax_triton.update.coefficients import step_scalars
from adax_triton.update.rounding import random_key

WARP = 32  # threads, on NVIDIA
LATE_STEP = 1_000_000  # w_t is 0 in float32, so no second moment changes
SAME, DIFFERS = "same", "DIFFERS"
COLUMNS = ("param", "grad", "exp_avg", "exp_avg_sq", "master", "group_exponents")  # addresses, in the kernel's order


class Variant(NamedTuple):
    """How the kernel is compiled and launched."""

    label: str  # `CHUNKxWARPS [rREGISTERS] [settled]`, as in tables and on the command line
    chunk: int  # elements per program
    options: dict[str, int]  # options of Triton's compiler: warps, register limit per thread
    skip_unchanged_v: bool  # store only the second moments that changed; `settled` in the label

    @property
    def elements_per_thread(self) -> int:
        """Elements of a chunk per thread."""
        return self.chunk // (WARP * self.options["num_warps"])


def parse(label: str) -> Variant:
    """Return the variant of a label."""
    shape, *words = label.split()
    chunk, warps = map(int, shape.split("x"))
    options = {"num_warps": warps}
    if words and words[0].startswith("r"):
        options["maxnreg"] = int(words[0][1:])
    return Variant(label, chunk, options, "settled" in words)


class Section(NamedTuple):
    """Variants that are compared on the same tensors."""

    name: str  # the title of its table
    mode: Mode
    labels: str  # the most promising variants first, separated by commas
    steps: tuple[int, ...] = (1, 2)  # to run before comparing; the last one is timed

    def variants(self, chosen: list[str] | None = None) -> dict[str, Variant]:
        """Return the variants by label.

        The first is the one that the package launches. `chosen` limits the others to these labels.
        """
        from adax_triton.kernels.launch import current_backend, launch_shape

        shape = launch_shape(current_backend())
        others = [label for label in self.labels.split(", ") if not chosen or label in chosen]
        return {label: parse(label) for label in [f"{shape.chunk_size}x{shape.num_warps}", *others]}


_QUANTIZED = "1024x4, 2048x8 r48, 1024x8, 2048x4, 1024x4 r48, 2048x8 r64, 512x4, 4096x8"
_LATE = "2048x8 settled, 2048x8 r48, 2048x8 r48 settled, 1024x4 r48, 1024x4 r48 settled"
_LABELS = {
    "fp32": "2048x8 r48, 1024x8, 1024x4 r48, 2048x8 r40, 1024x4, 2048x8 r64, 2048x4, 512x4, 4096x16",
    "bf16 + float32 + 24-bit masters": "2048x8 r48, 1024x4 r48, 1024x8, 2048x8 r64, 1024x4, 2048x4, 4096x8",
    "bf16 + bfloat16": "2048x8 r48, 1024x4, 2048x4, 1024x8, 2048x8 r64, 1024x4 r48, 4096x8",
    "bf16 + 8bit_v16 + 24-bit masters": _QUANTIZED,
    "bf16 + 8bit + 24-bit masters": _QUANTIZED,
}
SECTIONS = {name: Section(name, MODES[name], labels) for name, labels in _LABELS.items()}
SECTIONS |= {
    f"{mode}, frozen": Section(f"{mode}, frozen", MODES[mode], _LATE, (1, 2, LATE_STEP))
    for mode in ("fp32", "bf16 + bfloat16")
}


class Case:
    """One parameter of `numel` elements with its gradient and states.

    The dtypes are those of the section.
    """

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

    def call(self, variant: Variant, compile_only: bool = False) -> Callable[..., Any]:
        """Return a function that launches a variant.

        It takes the scalars of a step, by default of the last, and returns the compiled kernel.
        """
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

        def launch(scalars: Tensor = self._scalars[-1]) -> Any:
            return run(self._table, chunks, scalars, None, **options)

        return launch

    def check(self, launch: Callable[..., Any]) -> str:
        """Run all steps anew and compare with the first variant checked."""
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
