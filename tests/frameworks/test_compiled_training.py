"""Training steps within torch.compile: the graph breaks at the optimizer, and nothing of a step is compiled with it.

Oracle: the same function, not compiled, bit for bit; and the frames that Dynamo has looked at, which must not grow.
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
    """A function that returns the numbers of frames and graphs so far."""
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
    # Autograd and all, but without a code generator, whose arithmetic may differ from the kernels that PyTorch brings.
    compiled = torch.compile(training_step, backend="aot_eager")
    with frames() as so_far:
        for step in range(STEPS):
            x = torch.full((3, 8), 1.0 + step, device=device)
            for each in (optimizer, twin):
                each.param_groups[0]["lr"] = 0.01 / (1 + step)
            assert torch.equal(compiled(optimizer, model, x), training_step(twin, twin_model, x))
            if step == 1:
                known = so_far()
        assert so_far() == known
        assert known[1] == 1  # of the loss
    for param, other in zip(model.parameters(), twin_model.parameters(), strict=True):
        assert torch.equal(param, other)
        assert all(
            torch.equal(torch.as_tensor(value), torch.as_tensor(twin.state[other][name]))
            for name, value in optimizer.state[param].items()
        )


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "telemetry": True}], ids=["plain", "clipping"])
def test_compiled_training_steps_as_written(options: dict[str, Any], backend: torch.device) -> None:
    check(backend, release=False, **options)


def test_compiled_training_releases_gradients_as_written(backend: torch.device) -> None:
    check(backend, release=True)


def test_compiled_training_advances_the_count_on_the_device(device: torch.device) -> None:
    check(device, release=False, capturable=True)
