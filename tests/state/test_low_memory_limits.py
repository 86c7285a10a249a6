"""Test precision options: errors, exceptions and defaults.

Also test second moments that rarely or never change.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from adax_triton import Adam, AdamW, AdaX, AdaXW
from adax_triton.state.allocation import allocate_states, local_state_tensors
from adax_triton.state.precision import STATES, Precision
from adax_triton.update.coefficients import StepScalars
from adax_triton.update.horizon import steps_until_frozen
from adax_triton.update.rounding import random_key

pytest.importorskip("triton")

from adax_triton.kernels import adax_step as step_module
from adax_triton.kernels.launch import current_backend, is_interpreted, launch_shape
from adax_triton.kernels.variants import StepVariant

from adax_triton.step.device_tables import chunk_table

every_class = pytest.mark.parametrize("optimizer_class", (AdaX, AdaXW, Adam, AdamW), ids=lambda each: each.__name__)
FLOAT16, DOUBLE = torch.float16, torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def zeros(numel: int, dtype: torch.dtype = torch.float32) -> Parameter:
    return Parameter(torch.zeros(numel, dtype=dtype))


# Errors

ARGUMENTS: list[tuple[dict[str, Any], type, list[str]]] = [
    ({"states": "float16"}, ValueError, ["states", "'float16'", "8bit"]),
    ({"states": None}, TypeError, ["states", "None"]),
    ({"states": torch.bfloat16}, TypeError, ["states", "torch.bfloat16"]),
    ({"master_weights": "bfloat16"}, ValueError, ["master_weights", "'bfloat16'", "24bit"]),
    ({"master_weights": True}, TypeError, ["master_weights", "True"]),
    ({"weight_rounding": "up"}, ValueError, ["weight_rounding", "'up'", "stochastic"]),
    ({"weight_rounding": None}, TypeError, ["weight_rounding", "None"]),
    ({"weight_rounding": "stochastic", "master_weights": "24bit"}, ValueError, ["weight_rounding", "'24bit'"]),
    ({"weight_rounding": "stochastic", "master_weights": "float32"}, ValueError, ["weight_rounding", "'float32'"]),
    ({"seed": -1}, ValueError, ["seed", "-1"]),
    ({"seed": 2**32}, ValueError, ["seed", str(2**32)]),
    ({"seed": 0.5}, TypeError, ["seed", "0.5"]),
    ({"seed": True}, TypeError, ["seed", "True"]),
]


@every_class
@pytest.mark.parametrize(("options", "error", "words"), ARGUMENTS, ids=[str(case[0]) for case in ARGUMENTS])
def test_bad_option_raises(optimizer_class: type, options: dict[str, Any], error: type, words: list[str]) -> None:
    with pytest.raises(error) as caught:
        optimizer_class([zeros(2)], **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@every_class
def test_bad_keep_float32_raises(optimizer_class: type) -> None:
    with pytest.raises(TypeError, match=r"keep_float32.*'embed'"):
        optimizer_class([zeros(2)], keep_float32="embed")


PARAMETERS: list[tuple[torch.dtype, dict[str, Any], list[str]]] = [
    (FLOAT16, {"master_weights": "24bit"}, ["params[0]", "24bit", "float16"]),
    (FLOAT16, {"weight_rounding": "stochastic"}, ["params[0]", "stochastic", "float16"]),
    *((DOUBLE, {"states": states}, ["params[0]", states, "float64", "keep_float32"]) for states in STATES[1:]),
    *((torch.complex64, {"states": states}, ["params[0]", states, "complex64"]) for states in STATES[1:]),
]


@pytest.mark.parametrize(("dtype", "options", "words"), PARAMETERS, ids=[str(case[:2]) for case in PARAMETERS])
def test_unsupported_precision_raises(
    dtype: torch.dtype, options: dict[str, Any], words: list[str], native_cpu: torch.device
) -> None:
    param = zeros(4096, dtype)
    with pytest.raises(ValueError) as caught:
        AdaX([param], **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    optimizer = AdaX([zeros(8)])
    with pytest.raises(ValueError, match=r"params\[0\]"):
        optimizer.add_param_group({"params": param, **options})
    assert len(optimizer.param_groups) == 1 and not optimizer.state
    if "states" in options:
        AdaX([param], keep_float32=lambda each: each is param, **options)
        AdaX([zeros(4095, dtype)], **options)


BAD_STATES: dict[str, Callable[[dict[str, Any], Tensor], Any]] = {
    "exp_avg_sq": lambda state, _: state.update(exp_avg_sq=state["exp_avg_sq"][..., 0].long()),
    "group_exponents": lambda state, _: state.pop("group_exponents"),
    "master": lambda state, param: setattr(param, "data", param.data.float()),
}


@pytest.mark.parametrize("word", BAD_STATES)
def test_step_with_mismatched_state_changes_nothing(word: str, native_cpu: torch.device) -> None:
    params = [normal(4096, seed=seed).bfloat16().requires_grad_() for seed in range(2)]
    optimizer = AdaX(params, states="8bit_v16", master_weights="24bit")
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    BAD_STATES[word](optimizer.state[params[1]], params[1])
    params[1].grad = None
    params[1].grad = torch.ones_like(params[1])
    before = [param.tolist() for param in params], [repr(state) for state in optimizer.state.values()]
    with pytest.raises(ValueError, match=word):
        optimizer.step()
    assert ([param.tolist() for param in params], [repr(state) for state in optimizer.state.values()]) == before


# Precision of each parameter


def test_precision_of_groups_small_tensors_and_exceptions(native_cpu: torch.device) -> None:
    named = {
        "8bit_v16": (zeros(4096), (torch.uint8, (4096, 2))),
        "small": (zeros(4095), (torch.float32, (4095,))),
        "kept": (zeros(5000), (torch.float32, (5000,))),
        "8bit": (zeros(4096), (torch.uint8, (4096, 1))),
        "bfloat16": (zeros(4096), (torch.bfloat16, (4096,))),
        "double": (zeros(4096, DOUBLE), (torch.float64, (4096,))),
    }
    params = {name: param for name, (param, _) in named.items()}
    groups = [
        {"params": [params["8bit_v16"], params["small"], params["kept"]]},
        {"params": [params["8bit"]], "states": "8bit"},
        {"params": [params["bfloat16"]], "states": "bfloat16"},
        {"params": [params["double"]], "states": "float32"},
    ]
    optimizer = AdaX(
        groups, states="8bit_v16", master_weights="24bit", keep_float32=lambda param: param is params["kept"]
    )
    for param in params.values():
        param.grad = torch.ones_like(param)
    optimizer.step()
    second = {name: optimizer.state[param]["exp_avg_sq"] for name, param in params.items()}
    found = {name: (moment.dtype, tuple(moment.shape)) for name, moment in second.items()}
    assert found == {name: layout for name, (_, layout) in named.items()}
    # Only 16-bit parameters have masters.
    assert not any("master" in state for state in optimizer.state.values())


# Second moments that rarely change

SCALARS = StepScalars(0.01, one_minus_beta1=0.1, exp_avg_sq_weight=1e-9, eps=1e-8, decay=0.0, l2=0.0, grad_factor=1.0)
FORMATS = [
    *((torch.float32, states, None) for states in STATES),
    (torch.bfloat16, "8bit_v16", "24bit"),
    (torch.bfloat16, "float32", "float32"),
]
NUMEL = 2048 + 32 * 5 + 7


def launch(param: Tensor, grad: Tensor, state: dict[str, Any], variant: StepVariant, scalars: StepScalars) -> None:
    tensors = [param, grad, state["exp_avg"], state["exp_avg_sq"], state.get("master"), state.get("group_exponents")]
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    words = torch.tensor([random_key(0, 9)]).to(torch.int32).view(torch.float32)
    step_module.adax_step(
        torch.tensor([[*addresses, 0, param.numel(), 0]], device=param.device),
        chunk_table([param.numel()], launch_shape(current_backend()).chunk_size).to(param.device),
        torch.cat([torch.tensor([scalars]), words, torch.zeros(1, 1)], dim=1).to(param.device),
        variant,
    )


def param_and_state_after_first_step(
    dtype: torch.dtype, states: str, master: str | None, device: torch.device
) -> tuple[Tensor, dict]:
    param = normal(NUMEL).to(device, dtype)
    state = local_state_tensors(allocate_states([param], [Precision(states, master)])[0])
    name = str(state["master"].dtype).removeprefix("torch.") if master else None
    variant = StepVariant(dtype, dtype, states, name, aligned=False)
    launch(param, normal(NUMEL, seed=1).to(param), state, variant, SCALARS._replace(exp_avg_sq_weight=1.0))
    return param, {**state, "variant": variant}


@pytest.mark.parametrize(
    ("dtype", "states", "master"), FORMATS, ids=[f"{kind[0]} {kind[1]} {kind[2]}" for kind in FORMATS]
)
def test_skipping_unchanged_v_gives_the_same_bits(
    dtype: torch.dtype, states: str, master: str | None, device: torch.device
) -> None:
    spikes = [5, 2100, NUMEL - 1]  # in the first, a later and the last group; the last has fewer than 32 elements
    zeroed = slice(512, 1024)
    for weight in (1e-9, 1e-3):
        found = []
        for skip_unchanged_v in (False, True):
            param, state = param_and_state_after_first_step(dtype, states, master, device)
            before = state["exp_avg_sq"].clone()
            grad = normal(NUMEL, seed=2).to(param)
            grad[spikes], grad[zeroed] = 1e8, 0.0
            variant = state["variant"]._replace(skip_unchanged_v=skip_unchanged_v)
            launch(param, grad, state, variant, SCALARS._replace(exp_avg_sq_weight=weight))
            found.append([param, *(value for value in state.values() if isinstance(value, Tensor))])
            changed = (state["exp_avg_sq"] != before).nonzero().flatten().tolist()
            assert {*spikes} <= {*changed}
        assert all(torch.equal(left, right) for left, right in zip(*found, strict=True))
    assert {*changed} & {*range(512, 1024)}


@pytest.mark.skipif(not is_interpreted(), reason="only the interpreter stores in a known order")
@pytest.mark.parametrize("states", ["float32", "bfloat16", "8bit"])
def test_skipping_unchanged_v_writes_only_changed_groups(states: str, device: torch.device) -> None:
    # Both moments share memory. The kernel stores m first, so m stays wherever v is not stored.
    spikes = {5: 0, 2100: 2100 // 32}
    for skip_unchanged_v in (False, True):
        param = torch.ones(NUMEL, device=device)
        state = local_state_tensors(allocate_states([torch.ones(NUMEL)], [Precision(states)])[0])
        variant = StepVariant(torch.float32, torch.float32, states, aligned=False)
        launch(param, torch.ones_like(param), state, variant, SCALARS._replace(exp_avg_sq_weight=1.0))
        shared = state["exp_avg_sq"]  # codes of v = 1, which a weight of 2^-40 does not change
        before = shared.clone()
        state["exp_avg"] = shared.view(torch.int8) if states == "8bit" else shared
        grad = normal(NUMEL, seed=2)
        grad[[*spikes]] = 7e5  # raises v to 1.45; the group's exponent and its other codes stay the same
        scalars = SCALARS._replace(exp_avg_sq_weight=2.0**-40, one_minus_beta1=0.5)
        launch(param, grad, state, variant._replace(skip_unchanged_v=skip_unchanged_v), scalars)
        unchanged = (shared == before)[: NUMEL // 32 * 32].view(-1, 32)
        written = (unchanged.sum(dim=1) >= 31).nonzero().flatten().tolist()
        assert written == ([*spikes.values()] if skip_unchanged_v else [*range(NUMEL // 32)])


@pytest.mark.parametrize("optimizer_class", [AdaX, AdaXW])
def test_frozen_second_moments_warn_once(optimizer_class: type, native_cpu: torch.device) -> None:
    frozen = steps_until_frozen(0.1)
    param = Parameter(torch.ones(4))
    optimizer = optimizer_class([{"params": [param]}, {"params": [Parameter(torch.ones(2))]}], betas=(0.9, 0.1))
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.ones_like(group["params"][0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(frozen - 1):
            optimizer.step()
        assert caught == []
        for _ in range(3):
            optimizer.step()
    assert [warning.filename for warning in caught] == [__file__]
    assert all(word in str(caught[0].message) for word in (f"step {frozen}", "0.1", "beta2_for_horizon"))


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"capturable": True}, {"lr": "tensor"}], ids=str)
def test_frozen_second_moments_warn_with_any_step_counts(options: dict[str, Any], device: torch.device) -> None:
    options = {key: torch.tensor(0.01, device=device) if value == "tensor" else value for key, value in options.items()}
    param = Parameter(torch.ones(8, device=device))
    optimizer = AdaXW([param], **options)
    param.grad = torch.ones_like(param)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
        assert caught == []
        optimizer.state[param]["step"] = torch.tensor(150_000)
        for _ in range(5):
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
    assert [warning.filename for warning in caught] == [__file__]
    assert "are frozen" in str(caught[0].message)


def test_rules_that_do_not_freeze_do_not_warn(native_cpu: torch.device) -> None:
    optimizers = [
        Adam([Parameter(torch.ones(4))], betas=(0.9, 1 - 2**-31)),
        AdaX([Parameter(torch.ones(4))], second_moment="adafactor", betas=(0.9, 1.0)),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for optimizer in optimizers:
            param = optimizer.param_groups[0]["params"][0]
            for _ in range(2):
                param.grad = torch.ones_like(param)
                optimizer.step()
                optimizer.state[param]["step"] = 2**31
