"""Each scheduler of torch, with learning rates in numbers and tensors."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer, lr_scheduler, swa_utils

from adax_triton import Adam, AdamW, AdaX, AdaXW, adax_update, step_scalars
from adax_triton.update.coefficients import COEFFICIENT_KEYS

CLASSES = (AdaX, AdaXW, Adam, AdamW)
STEPS, SAVED_AT = 7, 4


def parameters(device: torch.device) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator).to(device)) for shape in ((3, 5), (7,), (), (2, 1, 4))]


def gradient(param: Tensor, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(param.shape, generator=generator).to(param.device)


def _sequential(optimizer: Optimizer) -> lr_scheduler.LRScheduler:
    parts = [lr_scheduler.ConstantLR(optimizer, 0.1, 2), lr_scheduler.ExponentialLR(optimizer, 0.5)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])


def _chained(optimizer: Optimizer) -> lr_scheduler.LRScheduler:
    parts = [lr_scheduler.ConstantLR(optimizer, 0.1, 2), lr_scheduler.ExponentialLR(optimizer, 0.5)]
    return lr_scheduler.ChainedScheduler(parts, optimizer)


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.8),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 4], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.3, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "SequentialLR": _sequential,
    "ChainedScheduler": _chained,
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2, base_momentum=0.6, max_momentum=0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.01, anneal_epochs=3),
}


def train(optimizer: Optimizer, scheduler: Any, steps: Iterable[int]) -> list[tuple[float, float]]:
    """Train with a scheduler; return (lr, betas[0]) of each step."""
    group, used = optimizer.param_groups[0], []
    for step in steps:
        used.append((float(group["lr"]), group["betas"][0]))
        for param in group["params"]:
            param.grad = gradient(param, step)
        optimizer.step()
        scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    return used


def test_each_scheduler_of_torch_is_listed() -> None:
    classes = [getattr(lr_scheduler, name) for name in lr_scheduler.__all__]
    found = {each.__name__ for each in classes if inspect.isclass(each)} - {"LRScheduler"}
    assert found == SCHEDULERS.keys() - {"SWALR"}


@pytest.mark.parametrize("optimizer_class", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduled_steps_equal_the_reference_update(optimizer_class: type, name: str, native_cpu: torch.device) -> None:
    params = parameters(native_cpu)
    optimizer = optimizer_class(params, lr=0.1)
    truth = [(param.detach().cpu().double(), *torch.zeros(2, *param.shape, dtype=torch.float64)) for param in params]
    train(optimizer, SCHEDULERS[name](optimizer), range(STEPS))
    # torch's optimizer with the same scheduler gives the expected lr and betas[0].
    by_torch = torch.optim.Adam(parameters(native_cpu), lr=0.1)
    expected_values = train(by_torch, SCHEDULERS[name](by_torch), range(STEPS))
    assert len(set(expected_values)) > 1  # the scheduler has an effect
    constant = {key: optimizer.defaults[key] for key in COEFFICIENT_KEYS if key not in ("lr", "betas")}
    for step, (lr, beta1) in enumerate(expected_values):
        scalars = step_scalars(step=step + 1, lr=lr, betas=(beta1, optimizer.defaults["betas"][1]), **constant)
        for param, like in zip(truth, params, strict=True):
            adax_update(param[0], gradient(like, step).cpu(), *param[1:], **scalars._asdict())
    for param, (expected, _, _) in zip(params, truth, strict=True):
        torch.testing.assert_close(param.detach().cpu(), expected.float(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_resumed_schedule_continues_bit_for_bit(name: str, lr: float | Tensor, native_cpu: torch.device) -> None:
    def start() -> tuple[Optimizer, Any]:
        optimizer = AdaXW(parameters(native_cpu), lr=lr.clone() if isinstance(lr, Tensor) else lr)
        return optimizer, SCHEDULERS[name](optimizer)

    optimizer, scheduler = start()
    train(optimizer, scheduler, range(SAVED_AT))
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), scheduler.state_dict(), optimizer.param_groups[0]["params"]], file)
    file.seek(0)
    resumed, resumed_scheduler = start()
    states, schedule, weights = torch.load(file, weights_only=False)
    resumed.load_state_dict(states)
    resumed_scheduler.load_state_dict(schedule)
    for param, weight in zip(resumed.param_groups[0]["params"], weights, strict=True):
        param.data.copy_(weight.data)
    rest = range(SAVED_AT, STEPS)
    assert train(resumed, resumed_scheduler, rest) == train(optimizer, scheduler, rest)
    for param, other in zip(resumed.param_groups[0]["params"], optimizer.param_groups[0]["params"], strict=True):
        assert torch.equal(param, other)
