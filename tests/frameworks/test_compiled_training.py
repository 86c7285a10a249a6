"""Training inside torch.compile; the graph breaks at the optimizer, which runs uncompiled.

Oracle: the uncompiled function, bit for bit. Dynamo's frame count must not grow after two steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adax_triton import AdaX, AdaXW, GradientRelease

STEPS = 5


def build(device: torch.device, **options: Any) -> tuple[AdaX, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(device)
    return AdaXW(model.parameters(), lr=0.01, **options), model


def training_step(optimizer: AdaX, model: nn.Module, x: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss


@contextlib.contextmanager
def frames() -> Iterator[Callable[[], tuple[int, int]]]:
    """Yield a function that returns Dynamo's counts of frames and graphs."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    yield lambda: (counters["frames"]["total"], counters["stats"]["unique_graphs"])
    torch._dynamo.reset()


def check(device: torch.device, release: bool, **options: Any) -> None:
    (optimizer, model), (twin, twin_model) = build(device, **options), build(device, **options)
    if release:
        GradientRelease(optimizer)
        GradientRelease(twin)
    # "aot_eager" compiles autograd but generates no code, so its arithmetic equals PyTorch's.
    compiled = torch.compile(training_step, backend="aot_eager")
    with frames() as counts:
        for step in range(STEPS):
            x = torch.full((3, 8), 1.0 + step, device=device)
            for trained in (optimizer, twin):
                trained.param_groups[0]["lr"] = 0.01 / (1 + step)
            assert torch.equal(compiled(optimizer, model, x), training_step(twin, twin_model, x))
            if step == 1:
                known = counts()
        assert counts() == known
        assert known[1] == 1  # the graph of the loss
    for param, other in zip(model.parameters(), twin_model.parameters(), strict=True):
        assert torch.equal(param, other)
        assert all(
            torch.equal(torch.as_tensor(value), torch.as_tensor(twin.state[other][name]))
            for name, value in optimizer.state[param].items()
        )


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "telemetry": True}], ids=["plain", "clipping"])
def test_compiled_training_equals_uncompiled_training(options: dict[str, Any], backend: torch.device) -> None:
    check(backend, release=False, **options)


def test_compiled_gradient_release_equals_the_uncompiled_one(backend: torch.device) -> None:
    check(backend, release=True)


def test_compiled_training_with_capturable_equals_uncompiled_training(device: torch.device) -> None:
    check(device, release=False, capturable=True)
