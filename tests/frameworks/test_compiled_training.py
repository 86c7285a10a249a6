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

from adax_triton import AdamW, AdaX, AdaXW, GradientRelease

STEPS = 5


def build(device: torch.device, **options: Any) -> tuple[AdaX, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(device)
    return AdaXW(model.parameters(), **{"lr": 0.01, **options}), model


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


@pytest.mark.parametrize("whole", [True, False], ids=["optimizer.step", "lambda"])
def test_compiled_step_equals_the_uncompiled_one(whole: bool, native_cpu: torch.device) -> None:
    (optimizer, model), (twin, twin_model) = (build(native_cpu, lr=torch.tensor(0.01)) for _ in range(2))
    compiled = torch.compile(optimizer.step if whole else lambda: optimizer.step(), backend="aot_eager")
    with frames() as counts:
        for step in range(STEPS):
            for trained, its_model, take in ((optimizer, model, compiled), (twin, twin_model, twin.step)):
                trained.param_groups[0]["lr"].fill_(0.01 / (1 + step))
                its_model(torch.full((3, 8), 1.0 + step)).square().mean().backward()
                take()
                trained.zero_grad()
            if step == 1:
                known = counts()
        assert counts() == known
    for param, other in zip(model.parameters(), twin_model.parameters(), strict=True):
        assert torch.equal(param, other)


def test_compiled_model_trains_as_its_compiled_twin_with_torch(native_cpu: torch.device) -> None:
    trained = []
    for optimizer_class in (AdamW, torch.optim.AdamW):
        _, model = build(native_cpu)
        compiled = torch.compile(model, backend="aot_eager")
        optimizer = optimizer_class(compiled.parameters(), lr=0.01)
        for step in range(STEPS):
            optimizer.zero_grad()
            compiled(torch.full((3, 8), 1.0 + step)).square().mean().backward()
            optimizer.step()
        trained.append(list(model.parameters()))
    for param, other in zip(*trained, strict=True):
        torch.testing.assert_close(param, other, rtol=0.0, atol=2e-6)
