"""Test reproducible low-memory training, and loading states into every other mode.

Oracles: the bits of an uninterrupted run, and the moments before loading within the error bounds of the formats.
"""

from __future__ import annotations

import copy
import functools
import io
import itertools
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from adax_triton.kernels.tables import scalar_row
from torch import Tensor, nn

from adax_triton import AdaX
from adax_triton.state.allocation import local_state_tensors
from adax_triton.state.precision import STATES
from adax_triton.step.launch import LaunchCache
from adax_triton.step.tensor_step import TensorStep
from adax_triton.update.coefficients import StepScalars
from adax_triton.update.quantized_update import load_master, load_moments
from adax_triton.update.rounding import random_key

Params = dict[str, Tensor]
LOW_MEMORY: dict[str, dict[str, Any]] = {
    "8bit_v16, stochastic": {"states": "8bit_v16", "weight_rounding": "stochastic"},
    "8bit, 24bit": {"states": "8bit", "master_weights": "24bit"},
}
every_low_memory = pytest.mark.parametrize("options", LOW_MEMORY.values(), ids=LOW_MEMORY)
PAIRS = list(itertools.product(STATES, (None, "24bit", "float32")))
# (source, target): from and to float32 without masters, and between master formats with equal states.
CONVERSIONS = [
    (source, target)
    for source, target in itertools.product(PAIRS, repeat=2)
    if source[0] == target[0] or ("float32", None) in (source, target)
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_params(device: torch.device, shapes: dict[str, tuple[int, ...]]) -> Params:
    return {
        name: normal(*shape, seed=len(name)).to(device, torch.bfloat16).requires_grad_()
        for name, shape in shapes.items()
    }


def two_params(device: torch.device) -> Params:
    return make_params(device, {"row": (4096,), "matrix": (65, 64)})


def train(optimizer: AdaX, params: Params, steps: Iterable[int]) -> AdaX:
    for step in steps:
        for name, param in params.items():
            scale = 10.0 ** -torch.arange(param.numel()).remainder(4).view(param.shape)
            param.grad = (normal(*param.shape, seed=100 * step + len(name)) * scale).to(param.device, param.dtype)
        optimizer.step()
    return optimizer


def bits(optimizer: AdaX, params: Params) -> dict[Any, bytes]:
    found = {name: param.detach().cpu().view(torch.int16).numpy().tobytes() for name, param in params.items()}
    for name, param in params.items():
        state = optimizer.state[param]
        found |= {(name, key): state[key].cpu().view(torch.uint8).numpy().tobytes() for key in state if key != "step"}
        found[name, "step"] = bytes(state["step"])
    return found


def renamed(optimizer: AdaX, params: Params) -> Params:
    """Return the parameters of a copied optimizer by the names in `params`."""
    return dict(zip(params, optimizer.param_groups[0]["params"], strict=True))


def through_file(optimizer: AdaX) -> AdaX:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    group = optimizer.param_groups[0]
    fresh = AdaX(
        [param.detach().clone().requires_grad_() for param in group["params"]],
        **{key: group[key] for key in ("states", "master_weights", "weight_rounding")},
    )
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


COPIES: dict[str, Callable[[AdaX], AdaX]] = {
    "state_dict": through_file,
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
}


@every_low_memory
def test_bits_do_not_depend_on_copies_order_or_grouping(options: dict[str, Any], backend: torch.device) -> None:
    params = two_params(backend)
    optimizer = train(AdaX(list(params.values()), seed=7, lr=0.01, **options), params, (1, 2))
    twins = {method: copied(optimizer) for method, copied in COPIES.items()}
    expected = bits(train(optimizer, params, (3, 4)), params)
    for method, twin in twins.items():
        twin_params = renamed(twin, params)
        assert bits(train(twin, twin_params, (3, 4)), twin_params) == expected, method
    # In reverse order, in two groups, with a third parameter in the same launch.
    other = two_params(backend)
    third = make_params(backend, {"third": (33,)})
    groups = [{"params": [other["matrix"], *third.values()], "lr": 0.01}, {"params": [other["row"]], "lr": 0.01}]
    assert bits(train(AdaX(groups, seed=7, **options), {**other, **third}, (1, 2, 3, 4)), other) == expected


@every_low_memory
def test_bits_depend_only_on_the_seed(options: dict[str, Any], native_cpu: torch.device) -> None:
    results = []
    for seed in (0, 0, 1, 2**32 - 1):
        params = two_params(native_cpu)
        results.append(bits(train(AdaX(list(params.values()), seed=seed, **options), params, (1, 2)), params))
    assert results[0] == results[1]
    for left, right in ((0, 2), (0, 3), (2, 3)):
        assert results[left]["row", "exp_avg_sq"] != results[right]["row", "exp_avg_sq"]


@pytest.mark.parametrize("states", ["bfloat16", "8bit_v16", "8bit"])
def test_part_of_a_parameter_equals_the_full_parameter(states: str, backend: torch.device) -> None:
    scalars = StepScalars(0.5, one_minus_beta1=0.1, exp_avg_sq_weight=0.3, eps=1e-3, decay=0.01, l2=0, grad_factor=1)
    options = {"states": states, "weight_rounding": "stochastic", "seed": 3}
    param = normal(6144).to(backend, torch.bfloat16).requires_grad_()
    state = local_state_tensors(train(AdaX([param], **options), {"row": param}, [1]).state[param])
    parts = [(0, 6144), (0, 2080), (2080, 6144)]
    found = []
    for start, end in parts:
        tensors = [
            each.detach()[start:end].clone() for each in (param, param.grad, state["exp_avg"], state["exp_avg_sq"])
        ]
        exponents = state["group_exponents"][start // 32 : end // 32].clone() if "group_exponents" in state else None
        step = TensorStep(*tensors, 0, states, None, exponents, stochastic=True, first_element=start)
        ((launch, _),) = LaunchCache().launches([step], [scalars], telemetry=False)
        row = bytearray(scalar_row(scalars, random_key(3, 2)))
        launch.run(torch.frombuffer(row, dtype=torch.float32).view(1, -1).to(backend), None)
        found.append(step)
    for index in (0, 2, 3):
        full = found[0].tensors[index]
        assert torch.equal(full, torch.cat([found[1].tensors[index], found[2].tensors[index]]))


# Loading across modes


def make_strided_params(device: torch.device) -> Params:
    params = make_params(device, {"small": (40,), "row": (4099,), "matrix": (65, 64)})
    layouts = {"transposed": normal(65, 70).t(), "gaps": normal(70, 120)[:, ::2], "filters": normal(8, 32, 4, 5)}
    layouts["filters"] = layouts["filters"].contiguous(memory_format=torch.channels_last)
    for name, tensor in layouts.items():
        memory = torch.zeros(2 * tensor.numel(), dtype=torch.bfloat16, device=device)
        params[name] = memory.as_strided(tensor.shape, tensor.stride()).copy_(tensor).requires_grad_()
    return params


@functools.cache
def trained(states: str, master_weights: str | None, device: torch.device) -> tuple[Params, AdaX]:
    params = make_strided_params(device)
    optimizer = AdaX(list(params.values()), lr=0.01, seed=11, states=states, master_weights=master_weights)
    return params, train(optimizer, params, (1, 2))


def moments(state: dict[str, Any], param: Tensor) -> list[Tensor]:
    """Return m and v, (numel / 32, 32) float64, in index order.

    They are padded with zeros.
    """
    tensors = local_state_tensors(state)
    exponents = tensors.get("group_exponents")
    flat = [tensors[name].flatten() for name in ("exp_avg", "exp_avg_sq")]
    padded = [nn.functional.pad(moment, (0, -len(moment) % 32)) for moment in flat]
    inside = (torch.arange(len(padded[0])) < param.numel()).view(-1, 32)
    return [moment.view(-1, 32).double() * inside for moment in load_moments(*padded, exponents)]


def bounds(states: str, m: Tensor, v: Tensor, v_found: Tensor) -> tuple[Tensor, Tensor]:
    """Return error bounds of m and v rounded to nearest.

    The unit of m follows from the rounded v.
    """
    if states in ("float32", "bfloat16"):
        relative = 0.0 if states == "float32" else 2.0**-8
        return m.abs() * relative, v * relative
    root = torch.exp2(torch.floor((torch.frexp(v_found)[1] + 126).double() / 2))
    m_bound = (m / root).abs().amax(dim=1, keepdim=True) * root / 127.5 * 1.001
    if states == "8bit_v16":
        return m_bound, v * 2.0**-9
    return m_bound, torch.maximum(v * 2.0**-4, v.amax(dim=1, keepdim=True) * 2.0**-30)


@pytest.mark.parametrize(("source", "target"), CONVERSIONS, ids=lambda pair: f"{pair[0]} {pair[1]}")
def test_states_load_into_any_other_mode(
    source: tuple[str, str | None], target: tuple[str, str | None], native_cpu: torch.device
) -> None:
    params, optimizer = trained(*source, native_cpu)
    native = trained(*target, native_cpu)[1]
    loaded = make_strided_params(native_cpu)
    for name, param in loaded.items():
        param.detach().copy_(params[name].detach())
    twin = AdaX(list(loaded.values()), states=target[0], master_weights=target[1])
    twin.load_state_dict(optimizer.state_dict())
    group = twin.param_groups[0]
    assert (group["states"], group["master_weights"], group["seed"], group["lr"]) == (*target, 11, 0.01)
    for (name, param), native_param in zip(loaded.items(), native.param_groups[0]["params"], strict=True):
        before, after = optimizer.state[params[name]], twin.state[param]
        assert after.keys() == native.state[native_param].keys() and after["step"] == 2
        for key, value in after.items():
            expected = native.state[native_param][key]
            if key != "step":
                assert (value.dtype, value.shape, value.stride()) == (expected.dtype, expected.shape, expected.stride())
        (m, v), (m_found, v_found) = moments(before, params[name]), moments(after, param)
        states = target[0] if param.numel() >= 4096 and source[0] != target[0] else "float32"
        for found, exact, bound in zip((m_found, v_found), (m, v), bounds(states, m, v, v_found), strict=True):
            assert bool(((found - exact).abs() <= bound).all()), name
        assert torch.equal(param, params[name])
        weights = load_master(params[name].detach(), local_state_tensors(before).get("master"))
        found = load_master(param.detach(), local_state_tensors(after).get("master"))
        if target[1] == "float32" or source[1] == target[1] or source[1] is None:
            assert torch.equal(found, weights if target[1] else param.float())
        elif target[1] == "24bit":
            assert bool(((found - weights).abs() <= weights.abs() * 2.0**-15).all())
    train(twin, loaded, [3])
    assert all(bool(param.isfinite().all()) for param in loaded.values())


@pytest.mark.parametrize("states", STATES)
def test_checkpoint_without_precision_options_loads(states: str, native_cpu: torch.device) -> None:
    params, optimizer = trained("float32", None, native_cpu)
    state_dict = copy.deepcopy(optimizer.state_dict())
    for key in ("states", "master_weights", "weight_rounding", "seed"):
        del state_dict["param_groups"][0][key]
    loaded = make_strided_params(native_cpu)
    twin = AdaX(list(loaded.values()), states=states, weight_rounding="stochastic")
    twin.load_state_dict(state_dict)
    group = twin.param_groups[0]
    assert (group["states"], group["weight_rounding"], group["seed"]) == (states, "stochastic", 0)
    for name, param in loaded.items():
        (m, v), (m_found, v_found) = (
            moments(optimizer.state[params[name]], params[name]),
            moments(twin.state[param], param),
        )
        m_bound, v_bound = bounds(states if param.numel() >= 4096 else "float32", m, v, v_found)
        assert bool(((m_found - m).abs() <= m_bound).all()) and bool(((v_found - v).abs() <= v_bound).all())
    train(twin, loaded, [3])
