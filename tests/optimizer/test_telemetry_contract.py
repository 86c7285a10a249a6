"""Telemetry changes no step or state dict; invalid reads raise."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from adax_triton import AdaX, AdaXW

MODES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "bf16, 8bit_v16": (torch.bfloat16, {"states": "8bit_v16"}),
    "stochastic, bf16 states": (torch.bfloat16, {"weight_rounding": "stochastic", "states": "bfloat16"}),
    "24bit, 8bit_v16": (torch.bfloat16, {"master_weights": "24bit", "states": "8bit_v16"}),
    "fp16 master, 8bit": (torch.float16, {"master_weights": "float32", "states": "8bit"}),
}
SHAPES = ((), (0,), (1,), (5, 7), (2049,), (4, 1027))


def values(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters(device: torch.device, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]]) -> list[Parameter]:
    return [Parameter(values(*shape, seed=seed).to(device, dtype)) for seed, shape in enumerate(shapes)]


def set_gradients(params: Sequence[Tensor], step: int) -> None:
    for index, param in enumerate(params):
        param.grad = values(*param.shape, seed=1000 * step + index).to(param)


def assert_grad_norm(optimizer: AdaX) -> None:
    grads = [param.grad.flatten().double() for param in optimizer.param_groups[0]["params"]]
    found = optimizer.read_telemetry().groups[0].grad_norm
    assert found == pytest.approx(float(torch.cat(grads).norm()), rel=1e-5)


def test_gradients_that_the_user_unscaled_are_not_unscaled_again(backend: torch.device) -> None:
    params = parameters(backend, torch.float32, ((5, 7),))
    optimizer = AdaX(params, telemetry=True, fused=True)
    scaler = torch.amp.GradScaler(backend.type, init_scale=1024.0)
    scaler.scale(params[0].sum()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert optimizer.read_telemetry().groups[0].grad_norm == pytest.approx(math.sqrt(35.0), rel=1e-6)


def test_scale_changed_in_place_after_the_step_is_ignored(backend: torch.device) -> None:
    params = parameters(backend, torch.float32, ((5, 7),))
    optimizer = AdaX(params, telemetry=True)
    scale = torch.tensor([4.0], device=backend)
    for _ in range(2):
        scale.fill_(4.0)
        params[0].grad = torch.full((5, 7), 8.0, device=backend)
        optimizer.grad_scale = scale
        optimizer.step()
        scale.fill_(1024.0)
        assert optimizer.read_telemetry().groups[0].grad_norm == pytest.approx(2.0 * math.sqrt(35.0), rel=1e-6)


def stored_bits(optimizer: AdaX, params: Sequence[Tensor]) -> list[bytes]:
    found = [tensor for param in params for tensor in (param, *map(torch.as_tensor, optimizer.state[param].values()))]
    return [tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() for tensor in found]


@pytest.mark.parametrize("name", MODES)
def test_telemetry_does_not_change_the_step(name: str, backend: torch.device) -> None:
    dtype, options = MODES[name]
    runs = []
    for telemetry in (True, False):
        params = parameters(backend, dtype, SHAPES)
        optimizer = AdaXW(params, lr=0.01, max_grad_norm=50.0, telemetry=telemetry, **options)
        for step in range(2):
            set_gradients(params, step)
            optimizer.step()
        runs.append(stored_bits(optimizer, params))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("path", ["native_cpu", "reference_cpu"])
def test_telemetry_does_not_change_the_step_of_a_long_tensor(path: str, request: pytest.FixtureRequest) -> None:
    device = request.getfixturevalue(path)
    runs = []
    for telemetry in (True, False):
        params = parameters(device, torch.float32, ((2**17 + 1003,), *[(9000,)] * 5))
        optimizer = AdaXW(params, lr=0.01, telemetry=telemetry)
        for step in range(2):
            set_gradients(params, step)
            optimizer.step()
        runs.append(stored_bits(optimizer, params))
    assert runs[0] == runs[1]


def test_read_telemetry_raises_when_off_or_before_a_step(backend: torch.device) -> None:
    params = parameters(backend, torch.float32, ((5, 7),))
    without, fresh = AdaX(params), AdaX(params, telemetry=True)
    set_gradients(params, 0)
    without.step()
    with pytest.raises(RuntimeError, match="no telemetry was recorded"):
        without.read_telemetry()
    with pytest.raises(RuntimeError, match="no step"):
        fresh.read_telemetry()
    for value in (1, "yes", None):
        with pytest.raises(TypeError, match="telemetry"):
            AdaX(params, telemetry=value)


def test_read_telemetry_raises_after_a_failed_step(backend: torch.device) -> None:
    params = parameters(backend, torch.float32, ((5, 7),))
    optimizer = AdaX(params, max_grad_norm=1.0, error_if_nonfinite=True, telemetry=True)
    set_gradients(params, 0)
    optimizer.step()
    assert_grad_norm(optimizer)
    params[0].grad.fill_(math.nan)
    with pytest.raises(RuntimeError, match="not finite"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="raised"):
        optimizer.read_telemetry()
    set_gradients(params, 1)
    optimizer.step()
    assert_grad_norm(optimizer)


def test_telemetry_is_copied_but_not_saved(backend: torch.device) -> None:
    params = parameters(backend, torch.float32, ((5, 7), (2049,)))
    optimizer, without = AdaX(params, telemetry=True), AdaX(params)
    set_gradients(params, 0)
    optimizer.step()
    assert optimizer.state_dict()["param_groups"] == without.state_dict()["param_groups"]
    assert {key for state in optimizer.state.values() for key in state} == {"step", "exp_avg", "exp_avg_sq"}
    without.load_state_dict(optimizer.state_dict())
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        with pytest.raises(RuntimeError, match="no step"):
            copied.read_telemetry()
        copies = copied.param_groups[0]["params"]
        set_gradients(copies, 1)
        copied.step()
        assert_grad_norm(copied)


def test_kernel_steps_reuse_their_buffers(device: torch.device) -> None:
    params = parameters(device, torch.float32, ((5, 7), (2049 * 3,)))
    optimizer = AdaX(params, max_grad_norm=10.0, telemetry=True)

    def buffers() -> list[int]:
        (plan,) = optimizer._plans.values()
        tensors = [tensor for launch, _ in plan._launches for stage in launch._sums._stages for tensor in stage]
        tensors += [buffer for buffer, _ in optimizer._sums._written.values()]
        return [tensor.data_ptr() for tensor in tensors]

    found = []
    for step in range(4):
        set_gradients(params, step)
        optimizer.grad_scale = torch.tensor([2.0], device=device)
        optimizer.step()
        found.append([*buffers(), optimizer._sums._grad_scale.data_ptr()])
    assert found == found[:1] * 4
