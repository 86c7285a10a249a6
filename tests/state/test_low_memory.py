"""Test training in the low-memory modes.

Oracles: the other backend, the float64 update within the error bounds of the formats, and float32 weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from adax_triton import AdaX, AdaXW
from adax_triton.state.allocation import local_state_tensors
from adax_triton.state.memory_layout import is_dense
from adax_triton.state.precision import STATES, Precision, state_bytes
from adax_triton.step.reference_steps import CHUNK_SIZE
from adax_triton.step.scalars import scalars_of
from adax_triton.update.quantized_update import load_master, load_moments
from adax_triton.update.reference import adax_update


class Mode(NamedTuple):
    dtype: torch.dtype
    states: str = "float32"
    master_weights: str | None = None
    weight_rounding: str = "nearest"

    def options(self) -> dict[str, Any]:
        return {key: value for key, value in self._asdict().items() if key != "dtype"}


MODES = {
    "bf16 states": Mode(torch.float32, "bfloat16"),
    "8bit_v16": Mode(torch.float32, "8bit_v16"),
    "8bit": Mode(torch.float32, "8bit"),
    "stochastic": Mode(torch.bfloat16, "float32", None, "stochastic"),
    "8bit_v16, stochastic": Mode(torch.bfloat16, "8bit_v16", None, "stochastic"),
    "24bit": Mode(torch.bfloat16, "float32", "24bit"),
    "8bit, 24bit": Mode(torch.bfloat16, "8bit", "24bit"),
    "bf16 states, master": Mode(torch.bfloat16, "bfloat16", "float32"),
    "8bit_v16, master of float16": Mode(torch.float16, "8bit_v16", "float32"),
}
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
every_states = pytest.mark.parametrize("states", STATES)
SHAPES: dict[str, Callable[[], Tensor]] = {
    "small": lambda: normal(7, 11),
    "4096": lambda: normal(4096),
    "4097": lambda: normal(4097),
    "(64, 96)": lambda: normal(64, 96),
    "(41, 100)": lambda: normal(41, 100),
    "channels_last": lambda: normal(4, 32, 4, 8).contiguous(memory_format=torch.channels_last),
    "transposed": lambda: normal(100, 41).t(),
    "gaps": lambda: normal(70, 120)[:, ::2],
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_params(device: torch.device, dtype: torch.dtype, names: Iterable[str] = SHAPES) -> dict[str, Tensor]:
    found = {}
    for name in names:
        tensor = SHAPES[name]()
        # .to() would make the tensor contiguous.
        placed = torch.empty_strided((tensor.stride(0) * len(tensor),), (1,), dtype=dtype, device=device)
        found[name] = tensor.to(device, dtype) if name != "gaps" else placed.as_strided(tensor.shape, tensor.stride())
        found[name] = found[name].copy_(tensor).requires_grad_()
    return found


def gradient(name: str, step: int, param: Tensor) -> Tensor:
    """Return a gradient of many magnitudes, some 0.

    It depends only on name, step and shape.
    """
    seed = 1000 * step + list(SHAPES).index(name)
    scales = 10.0 ** (-3 * torch.rand(param.shape, generator=torch.Generator().manual_seed(len(name))))
    grad = normal(*param.shape, seed=seed) * scales
    return grad.where(scales < 0.9, 0.0).to(param.device, param.dtype)


def train(optimizer: AdaX, params: dict[str, Tensor], steps: Iterable[int] = (1, 2)) -> AdaX:
    for step in steps:
        for name, param in params.items():
            param.grad = gradient(name, step, param)
        optimizer.step()
    return optimizer


def train_new(device: torch.device, mode: Mode, names: Iterable[str] = SHAPES, **options: Any) -> tuple[dict, AdaX]:
    params = make_params(device, mode.dtype, names)
    optimizer = AdaX(list(params.values()), lr=0.01, **{**mode.options(), **options})
    return params, train(optimizer, params)


def all_tensors(optimizer: AdaX, params: dict[str, Tensor]) -> dict[tuple[str, str], Tensor]:
    """Return copies of parameters and state tensors by (parameter name, tensor name)."""
    found = {(name, "param"): param.detach().cpu().clone() for name, param in params.items()}
    for name, param in params.items():
        state = optimizer.state[param]
        found |= {(name, key): value.cpu().clone() for key, value in state.items() if key != "step"}
    return found


def weights(optimizer: AdaX, param: Tensor) -> Tensor:
    return load_master(param.detach(), local_state_tensors(optimizer.state[param]).get("master"))


def rows_of_32(tensor: Tensor) -> Tensor:
    return pad(tensor.detach().flatten(), (0, -tensor.numel() % 32)).view(-1, 32)


def dequantized(state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    state = local_state_tensors(state)
    return load_moments(*(rows_of_32(state[name]) for name in ("exp_avg", "exp_avg_sq")), state.get("group_exponents"))


@every_mode
def test_kernel_and_cpu_agree(mode: Mode, device: torch.device, request: pytest.FixtureRequest) -> None:
    names = ["small", "4096", "4097", "(41, 100)", "channels_last", "gaps"]
    kernel_params, by_kernel = train_new(device, mode, names)
    cpu_params, by_cpu = train_new(request.getfixturevalue("native_cpu"), mode, names)
    left, right = all_tensors(by_kernel, kernel_params), all_tensors(by_cpu, cpu_params)
    assert left.keys() == right.keys()
    for (name, key), found in left.items():
        expected = right[name, key]
        assert found.dtype == expected.dtype and found.stride() == expected.stride()
        if key in ("exp_avg", "exp_avg_sq", "group_exponents"):
            # A square root that is off by one unit may flip a stochastic rounding.
            close = torch.isclose(found, expected, rtol=1e-6) if found.dtype == torch.float32 else found == expected
            assert (~close).double().mean() < 1e-3, (name, key)
    unit = 2.0**-7 if mode.dtype == torch.bfloat16 and mode.master_weights is None else 2.0**-15
    unit = 2.0**-21 if mode.master_weights == "float32" or mode.dtype == torch.float32 else unit
    for name, param in kernel_params.items():
        ours, theirs = weights(by_kernel, param).cpu(), weights(by_cpu, cpu_params[name])
        differs = ~torch.isclose(ours, theirs, rtol=unit, atol=1e-7)
        if device.type == "cuda":
            # The GPU uses fused multiply-adds and another square root, so a few codes differ, and with them updates.
            assert differs.double().mean() < 1e-3 and torch.allclose(ours, theirs, rtol=unit, atol=0.01 / 4), name
        else:
            assert not differs.any() and (ours != theirs).double().mean() < 0.05, name


def first_moment_bound(states: str, m: Tensor, v_found: Tensor) -> Tensor:
    if states in ("float32", "bfloat16"):
        return m.abs() * (0.0 if states == "float32" else 2.0**-8)
    root = torch.exp2(torch.floor((torch.frexp(v_found)[1] + 126).double() / 2))
    return (m / root).abs().amax(dim=1, keepdim=True) * root / 127.5


def second_moment_bound(states: str, v: Tensor) -> Tensor:
    unit = {"float32": 0.0, "bfloat16": 2.0**-7, "8bit_v16": 2.0**-8, "8bit": 2.0**-3}[states]
    floor = v.amax(dim=1, keepdim=True) * (2.0**-30 if states == "8bit" else 0.0)  # range of the codes of a group
    return torch.maximum(v * unit, floor)


@every_mode
def test_step_is_as_accurate_as_its_formats(mode: Mode, backend: torch.device) -> None:
    params, optimizer = train_new(backend, mode, ["small", "4097", "(41, 100)"])
    units = {None: 2.0**-7, "24bit": 2.0**-15, "float32": 2.0**-23}  # one unit, as rounding is stochastic
    unit = 2.0**-23 if mode.dtype == torch.float32 else units[mode.master_weights]
    before = {}
    for name, param in params.items():
        param.grad = gradient(name, 3, param)
        values = (weights(optimizer, param), param.grad)
        before[name] = [*map(rows_of_32, values), *dequantized(optimizer.state[param])]
    scalars = scalars_of(optimizer.param_groups[0], 3)._asdict()
    optimizer.step()
    for name, param in params.items():
        states = mode.states if param.numel() >= 4096 else "float32"
        exact, working = ([each.to(dtype) for each in before[name]] for dtype in (torch.float64, torch.float32))
        for quad in (exact, working):
            adax_update(*quad, **scalars)
        found = [rows_of_32(weights(optimizer, param)), *dequantized(optimizer.state[param])]
        bounds = [
            exact[0].abs() * unit,
            first_moment_bound(states, exact[2], found[2]),
            second_moment_bound(states, exact[3]),
        ]
        for value, index, bound in zip(found, (0, 2, 3), bounds, strict=True):
            error = (value.double() - exact[index]).abs()
            reference = (working[index].double() - exact[index]).abs().max()
            assert bool((error <= bound * 1.001 + 2 * reference).all()), (name, index)


def index_order(param: Tensor) -> Tensor:
    """Return element indices in the order in which the kernel reads codes."""
    return torch.arange(param.numel(), device=param.device)


def memory_order(param: Tensor) -> Tensor:
    """Return element indices in memory order.

    The kernel reads float states in this order.
    """
    if not is_dense(param):
        return index_order(param)
    place = torch.empty_strided(param.shape, param.stride(), dtype=torch.int64, device=param.device)
    place.as_strided((param.numel(),), (1,)).copy_(torch.arange(param.numel()))
    return place.flatten().argsort()


@pytest.mark.parametrize("name", ["8bit_v16", "stochastic", "8bit, 24bit", "8bit_v16, master of float16"])
def test_any_layout_equals_its_flat_copy(name: str, backend: torch.device) -> None:
    mode = MODES[name]
    params = make_params(backend, mode.dtype, ["channels_last", "transposed", "gaps"])
    order = index_order if mode.states in ("8bit_v16", "8bit") else memory_order
    orders = {name: order(param) for name, param in params.items()}
    flat = {name: param.detach().flatten()[orders[name]].requires_grad_() for name, param in params.items()}
    optimizers = [AdaX(list(each.values()), lr=0.01, **mode.options()) for each in (params, flat)]
    for step in (1, 2):
        for each, param in params.items():
            param.grad = gradient(each, step, param)
            flat[each].grad = param.grad.flatten()[orders[each]]
        for optimizer in optimizers:
            optimizer.step()
    for each, param in params.items():
        assert torch.equal(param.detach().flatten()[orders[each]], flat[each]), each
        assert torch.equal(weights(optimizers[0], param).flatten()[orders[each]], weights(optimizers[1], flat[each]))


@every_states
def test_float32_masters_equal_float32_weights(states: str, backend: torch.device) -> None:
    for dtype, steps in ((torch.bfloat16, 8), (torch.float16, 2)):
        half = make_params(backend, dtype, ["4096"])
        full = {name: param.detach().float().requires_grad_() for name, param in half.items()}
        optimizers = [
            AdaXW(list(params.values()), states=states, master_weights=master, lr=0.01)
            for params, master in ((half, "float32"), (full, None))
        ]
        for step in range(1, steps + 1):
            for name, param in half.items():
                param.grad = gradient(name, step, param)
                full[name].grad = param.grad.float()
            for optimizer in optimizers:
                optimizer.step()
        for name, param in half.items():
            assert torch.equal(weights(optimizers[0], param), full[name])
            tie = (full[name].view(torch.int32) & 0xFFFF) == 0x8000
            assert torch.equal(param[~tie], full[name].to(dtype)[~tie])
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(optimizers[0].state[param][key], optimizers[1].state[full[name]][key])


def test_many_small_float32_masters_equal_float32_weights(native_cpu: torch.device) -> None:
    # Equal only if the compiler fuses no multiply-add.
    half = [normal(4000, seed=seed).bfloat16().requires_grad_() for seed in range(9)]
    full = [param.detach().float().requires_grad_() for param in half]
    for seed, (param, other) in enumerate(zip(half, full, strict=True)):
        param.grad = normal(4000, seed=10 + seed).bfloat16()
        other.grad = param.grad.float()
    optimizers = AdaX(half, master_weights="float32"), AdaX(full)
    for optimizer in optimizers * 3:
        optimizer.step()
    assert all(torch.equal(weights(optimizers[0], param), other) for param, other in zip(half, full, strict=True))


@every_mode
def test_native_step_equals_the_reference(
    mode: Mode, native_cpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for by_reference in (True, False):
        param = normal(CHUNK_SIZE + 32_775).to(mode.dtype).requires_grad_()
        optimizer = AdaX([param], lr=0.01, **mode.options())
        with monkeypatch.context() as patch:
            if by_reference:
                patch.setattr("adax_triton.step.launch.native_kernel", lambda variant: None)
            for step in (1, 2):
                param.grad = normal(param.numel(), seed=step).to(mode.dtype)
                optimizer.step()
        runs.append((param.detach(), optimizer.state[param]))
    assert torch.equal(runs[0][0], runs[1][0])
    for key, value in runs[0][1].items():
        assert key == "step" or torch.equal(value, runs[1][1][key]), key


@pytest.mark.parametrize("path", ["native_cpu", "reference_cpu"])
def test_step_allocates_no_tensor_of_the_parameters_size(path: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(path)
    mode, numel = MODES["8bit, 24bit"], 16 * CHUNK_SIZE
    param = torch.ones(numel, dtype=mode.dtype, requires_grad=True)
    optimizer = AdaX([param], **mode.options())
    param.grad = torch.ones_like(param)
    optimizer.step()
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= (numel * 4 // 8 + 4096 if path == "reference_cpu" else 4096)


@every_mode
def test_states_have_the_documented_bytes(mode: Mode, native_cpu: torch.device) -> None:
    params, optimizer = train_new(native_cpu, mode, ["4096", "(64, 96)"])
    for param in params.values():
        state = optimizer.state[param]
        found = sum(value.nbytes for value in state.values() if isinstance(value, Tensor)) / param.numel()
        assert found == state_bytes(mode.dtype, Precision(mode.states, mode.master_weights))
