"""Parameters, gradients and states that share memory, or whose memory cannot be written."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adax_triton import AdamW, AdaXW
from adax_triton.step.external_grads import Beside


def give(params: list[nn.Parameter], scale: float = 1.0) -> None:
    for index, param in enumerate(params):
        param.grad = torch.full_like(param, scale * (index + 1))


@pytest.mark.parametrize("numel", [100, 40_000])
def test_parameters_on_one_memory_are_stepped_one_after_the_other(numel: int, backend: torch.device) -> None:
    def run(optimizer_class: type) -> Tensor:
        params = [nn.Parameter(torch.ones(numel, device=backend)) for _ in range(3)]
        params[2].data = params[0].data
        optimizer = optimizer_class(params, lr=0.1)
        for step in range(4):
            give(params, 1.0 + step)
            optimizer.step()
        return params[0].detach()

    torch.testing.assert_close(run(AdamW), run(torch.optim.AdamW))


@pytest.mark.parametrize("states", ["float32", "bfloat16", "low"])
def test_states_of_its_own_load_in_another_order(states: str, backend: torch.device) -> None:
    params = [nn.Parameter(torch.ones(64, 64, device=backend)) for _ in range(2)]
    optimizer = AdaXW(params, states=states)
    give(params)
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


def of_inference(state: Tensor) -> Tensor:
    with torch.inference_mode():
        return state.clone()


WRONG_MEMORY = {
    "share memory": [expanded, overlapping],
    "inference": [of_inference],
    "sparse": [lambda state: state.to_sparse()],
}
CASES = [(words, make) for words, makers in WRONG_MEMORY.items() for make in makers]


@pytest.mark.parametrize("place", ["exp_avg", "param"])
@pytest.mark.parametrize(("words", "make"), CASES)
def test_memory_that_cannot_be_written_is_named(words: str, make: Any, place: str, backend: torch.device) -> None:
    if place == "param" and words == "sparse":
        return  # torch has no such parameter to be trained by dense gradients
    params = [nn.Parameter(torch.ones(4, 8, device=backend)) for _ in range(2)]
    optimizer = AdaXW(params)
    give(params)
    optimizer.step()
    if place == "param":
        params[1].data = make(params[1].data)
    else:
        optimizer.state[params[1]][place] = make(optimizer.state[params[1]][place])
    before = params[0].detach().clone(), optimizer.state[params[0]]["exp_avg"].clone()
    give(params)
    for _ in range(2):
        with pytest.raises(ValueError, match=words):
            optimizer.step()
    assert torch.equal(params[0], before[0]) and torch.equal(optimizer.state[params[0]]["exp_avg"], before[1])
    assert optimizer.state[params[0]]["step"] == 1


def test_external_gradients_are_checked_again_when_they_are_used(backend: torch.device) -> None:
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
        optimizer.lay_beside([Beside(param, [grad], torch.zeros(4096, dtype=torch.bfloat16, device=backend))])
        change(param, grad)
        with pytest.raises((TypeError, ValueError), match=r"parts\[0\]"):
            optimizer.step()
        assert not optimizer.state
