"""Test parameters, gradients and states with shared, freed or unwritable memory.

Oracle: torch's AdamW.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adax_triton import AdamW, AdaXW
from adax_triton.step.backend import uses_triton
from adax_triton.step.external_grads import ExternalGrads

# On a GPU torch's default updates all parameters in the same launches, which race on shared memory.
one_at_a_time = functools.partial(torch.optim.AdamW, foreach=False)


def set_gradients(params: list[nn.Parameter], scale: float = 1.0) -> None:
    for index, param in enumerate(params):
        param.grad = torch.full_like(param, scale * (index + 1))


@pytest.mark.parametrize("numel", [100, 40_000])
def test_parameters_with_the_same_memory_step_in_order(numel: int, backend: torch.device) -> None:
    def run(optimizer_class: Callable[..., torch.optim.Optimizer]) -> Tensor:
        params = [nn.Parameter(torch.ones(numel, device=backend)) for _ in range(3)]
        params[2].data = params[0].data
        optimizer = optimizer_class(params, lr=0.1)
        for step in range(4):
            set_gradients(params, 1.0 + step)
            optimizer.step()
        return params[0].detach()

    torch.testing.assert_close(run(AdamW), run(one_at_a_time))


def test_overlapping_parameters_step_in_order(backend: torch.device) -> None:
    # On a CPU, large enough for several chunks per thread.
    rows = 20 if backend.type == "cuda" or uses_triton(torch.empty(1, device=backend)) else 200

    def run(optimizer_class: Callable[..., torch.optim.Optimizer]) -> Tensor:
        weights = torch.ones(2 * rows, 1000, device=backend)
        params = [nn.Parameter(weights), nn.Parameter(weights[rows:]), nn.Parameter(weights[:rows])]
        optimizer = optimizer_class(params, lr=0.1)
        for step in range(3):
            set_gradients(params, 1.0 + step)
            optimizer.step()
        return weights

    expected = run(one_at_a_time)
    for _ in range(4):
        torch.testing.assert_close(run(AdamW), expected)


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("bytes_left", [0, 8])
@pytest.mark.parametrize("kind", ["gradient", "parameter", "state", "external"])
def test_freed_storage_raises(kind: str, bytes_left: int, steps_before: int, backend: torch.device) -> None:
    params = [nn.Parameter(torch.ones(100, device=backend)) for _ in range(2)]
    optimizer = AdaXW(params)

    def step(gradient: Tensor) -> None:
        if kind == "external":
            optimizer.set_external_grads(
                [ExternalGrads(params[0], [torch.ones_like(gradient)]), ExternalGrads(params[1], [gradient])]
            )
        else:
            params[0].grad, params[1].grad = torch.ones_like(gradient), gradient
        optimizer.step()

    if kind == "state" or steps_before:
        for _ in range(max(1, steps_before)):
            step(torch.ones(100, device=backend))
    before = copy.deepcopy((params[0], optimizer.state_dict()["state"].get(0)))
    gradient = torch.ones(100, device=backend)
    freed = {"parameter": params[1].data, "state": optimizer.state[params[1]].get("exp_avg")}.get(kind, gradient)
    freed.untyped_storage().resize_(bytes_left)
    with pytest.raises(ValueError, match=f"has {bytes_left} of 400 bytes|exp_avg"):
        step(gradient)
    assert torch.equal(params[0], before[0])
    assert optimizer.state.get(params[0], {}).get("step", 0) == (before[1] or {}).get("step", 0)


@pytest.mark.parametrize("states", ["float32", "bfloat16", "8bit_v16"])
def test_own_states_load_in_another_order(states: str, backend: torch.device) -> None:
    params = [nn.Parameter(torch.ones(64, 64, device=backend)) for _ in range(2)]
    optimizer = AdaXW(params, states=states)
    set_gradients(params)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    saved = optimizer.state_dict()
    saved["state"] = {0: saved["state"][1], 1: saved["state"][0]}
    optimizer.load_state_dict(saved)
    for param, state in zip(params, (before["state"][1], before["state"][0]), strict=True):
        assert all(torch.equal(optimizer.state[param][name], state[name]) for name in state if name != "step")


def expanded(state: Tensor) -> Tensor:
    return torch.zeros(1, device=state.device).expand(state.shape)


def overlapping(state: Tensor) -> Tensor:
    return torch.zeros(20, device=state.device).unfold(0, 8, 4)[:4]


def inference_tensor(state: Tensor) -> Tensor:
    with torch.inference_mode():
        return state.clone()


WRONG_MEMORY = {
    "share memory": [expanded, overlapping],
    "inference": [inference_tensor],
    "sparse": [lambda state: state.to_sparse()],
}
CASES = [(words, make) for words, makers in WRONG_MEMORY.items() for make in makers]


@pytest.mark.parametrize("tensor_name", ["exp_avg", "param"])
@pytest.mark.parametrize(("words", "make"), CASES)
def test_unwritable_memory_raises(words: str, make: Any, tensor_name: str, backend: torch.device) -> None:
    if tensor_name == "param" and words == "sparse":
        return  # torch does not allow dense gradients for a sparse parameter
    params = [nn.Parameter(torch.ones(4, 8, device=backend)) for _ in range(2)]
    optimizer = AdaXW(params)
    set_gradients(params)
    optimizer.step()
    if tensor_name == "param":
        params[1].data = make(params[1].data)
    else:
        optimizer.state[params[1]][tensor_name] = make(optimizer.state[params[1]][tensor_name])
    before = params[0].detach().clone(), optimizer.state[params[0]]["exp_avg"].clone()
    set_gradients(params)
    for _ in range(2):
        with pytest.raises(ValueError, match=words):
            optimizer.step()
    assert torch.equal(params[0], before[0]) and torch.equal(optimizer.state[params[0]]["exp_avg"], before[1])
    assert optimizer.state[params[0]]["step"] == 1


def test_external_gradients_are_checked_again_at_the_step(backend: torch.device) -> None:
    def shorter(param: nn.Parameter, grad: Tensor) -> None:
        param.data = param.data[:8]

    def longer(param: nn.Parameter, grad: Tensor) -> None:
        param.data = torch.ones(8192, device=param.device)

    def other_gradient(param: nn.Parameter, grad: Tensor) -> None:
        grad.data = torch.ones(8, device=param.device)

    def other_dtype(param: nn.Parameter, grad: Tensor) -> None:
        param.data = param.data.bfloat16()

    for change in (shorter, longer, other_gradient, other_dtype):
        param, grad = nn.Parameter(torch.ones(4096, device=backend)), torch.ones(4096, device=backend)
        optimizer = AdaXW([param])
        optimizer.set_external_grads(
            [ExternalGrads(param, [grad], torch.zeros(4096, dtype=torch.bfloat16, device=backend))]
        )
        change(param, grad)
        with pytest.raises((TypeError, ValueError), match=r"parts\[0\]"):
            optimizer.step()
        assert not optimizer.state
