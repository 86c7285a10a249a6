"""Test that frozen and lazy parameters are accepted until they have gradients.

Their dtype may be any.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from adax_triton import AdaXW

FROZEN: dict[str, tuple[Tensor, dict[str, Any]]] = {
    "uint8": (torch.zeros(16, 16, dtype=torch.uint8), {}),
    "int8": (torch.zeros(16, 16, dtype=torch.int8), {"master_weights": "24bit"}),
    "bool": (torch.zeros(16, 16, dtype=torch.bool), {"states": "8bit_v16"}),
    "float8": (torch.zeros(16, 16).to(torch.float8_e4m3fn), {}),
    "float16, 24bit": (torch.zeros(16, 16, dtype=torch.float16), {"master_weights": "24bit"}),
    "float16, stochastic": (torch.zeros(16, 16, dtype=torch.float16), {"weight_rounding": "stochastic"}),
    "float64, 8bit_v16": (torch.zeros(64, 64, dtype=torch.float64), {"states": "8bit_v16"}),
    "wrapper": (TwoTensor(torch.zeros(4, 4), torch.zeros(4, 4)), {}),
}


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_parameters_of_any_dtype_are_ignored(name: str, backend: torch.device) -> None:
    tensor, options = FROZEN[name]
    frozen = nn.Parameter(tensor.clone().to(backend), requires_grad=False)
    trained = nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16, device=backend))
    model = nn.ParameterList([trained, frozen])
    optimizer = AdaXW(model.parameters(), **options)
    for _ in range(3):
        trained.grad = torch.ones_like(trained)
        optimizer.step()
    assert bool((trained != 0).all()) and frozen not in optimizer.state
    other = AdaXW(model.parameters(), **options)
    other.load_state_dict(optimizer.state_dict())
    if name != "wrapper":
        optimizer.load_master_state_dict(model, optimizer.master_state_dict(model))
    assert frozen not in optimizer.state


@pytest.mark.parametrize("name", ["float16, 24bit", "float16, stochastic", "float64, 8bit_v16", "wrapper"])
def test_unsupported_parameter_raises_once_it_has_a_gradient(name: str, backend: torch.device) -> None:
    tensor, options = FROZEN[name]
    frozen = nn.Parameter(tensor.clone().to(backend), requires_grad=False)
    trained = nn.Parameter(torch.zeros(8, device=backend))
    optimizer = AdaXW([trained, frozen], **options)
    frozen.requires_grad_(True)
    trained.grad, frozen.grad = torch.ones_like(trained), torch.ones_like(frozen)
    with pytest.raises((TypeError, ValueError), match=r"param_groups\[0\]"):
        optimizer.step()
    assert not optimizer.state and bool((trained == 0).all())


def test_lazy_modules_are_accepted_before_their_first_input(backend: torch.device) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(96), nn.Linear(96, 4)).to(backend)
    optimizer = AdaXW(model.parameters(), states="8bit", lr=0.01)
    losses = []
    for _ in range(6):
        loss = model(torch.ones(3, 64, device=backend)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert optimizer.state[model[0].weight]["exp_avg"].dtype == torch.uint8
