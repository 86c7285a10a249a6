"""The torch.optim contract; other files test memory layouts, schedulers and checkpoints.

The classes differ only in the scalars of a step. Tests with groups run for all classes, others for one.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from adax_triton import Adam, AdamW, AdaX, AdaXW

CLASSES = (AdaX, AdaXW, Adam, AdamW)
every_class = pytest.mark.parametrize("optimizer_class", CLASSES, ids=lambda cls: cls.__name__)
SHAPES = ((3, 5), (7,), (), (2, 1, 4))


def parameters(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator, dtype=dtype).to(device)) for shape in SHAPES]


def gradient(param: Tensor, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(param.shape, generator=generator, dtype=param.dtype).to(param.device)


def train(optimizer: Optimizer, params: Iterable[Tensor], steps: Iterable[int] = range(4)) -> None:
    for step in steps:
        for param in params:
            param.grad = gradient(param, step)
        optimizer.step()


def assert_same(left: Iterable[Tensor], right: Iterable[Tensor]) -> None:
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


@every_class
def test_group_equals_a_separate_optimizer(optimizer_class: type, backend: torch.device) -> None:
    own = {"lr": 0.02, "betas": (0.5, 0.07), "eps": 1e-3, "weight_decay": 0.3, "maximize": True}
    params, separate = parameters(backend), parameters(backend)
    train(optimizer_class([{"params": params[:2]}, {"params": params[2:], **own}], lr=0.1), params)
    train(optimizer_class(separate[:2], lr=0.1), separate[:2])
    train(optimizer_class(separate[2:], **own), separate[2:])
    assert_same(params, separate)


def test_group_added_later_counts_from_its_first_step(backend: torch.device) -> None:
    params, late = parameters(backend), parameters(backend)
    optimizer = AdaXW(params[:2])
    train(optimizer, params[:2])
    optimizer.add_param_group({"params": params[2:], "lr": 0.5})
    train(optimizer, params[2:])
    train(AdaXW(late[2:], lr=0.5), late[2:])
    assert_same(params[2:], late[2:])


def test_parameter_names_are_kept_and_change_no_result(backend: torch.device) -> None:
    model, twin = (torch.nn.Linear(3, 2, device=backend) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    optimizer = AdaXW(model.named_parameters())
    train(optimizer, list(model.parameters()))
    train(AdaXW(twin.parameters()), list(twin.parameters()))
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    assert_same(model.parameters(), twin.parameters())


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_tensor_lr_is_read_at_each_step(shape: tuple[int, ...], backend: torch.device) -> None:
    params, twin = parameters(backend), parameters(backend)
    lr = torch.full(shape, 0.5)
    optimizer, plain = AdaXW(params, lr=lr), AdaXW(twin, lr=0.5)
    for step, number in enumerate((0.5, 0.25, 0.125)):  # exact in float32
        lr.fill_(number)
        plain.param_groups[0]["lr"] = number
        train(optimizer, params, [step])
        train(plain, twin, [step])
    assert_same(params, twin)


def test_closure_runs_with_gradients_enabled(backend: torch.device) -> None:
    param = Parameter(torch.tensor([2.0, -3.0], device=backend))
    optimizer = AdaXW([param], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        losses = [float(optimizer.step(closure)) for _ in range(3)]
    assert losses[0] == 13.0 and losses == sorted(losses, reverse=True) and losses[0] > losses[2]


def test_maximize_equals_descent_along_the_negated_gradient(backend: torch.device) -> None:
    params, twin = parameters(backend), parameters(backend)
    up, down = AdaXW(params, maximize=True), AdaXW(twin)
    for step in range(4):
        for param, other in zip(params, twin, strict=True):
            param.grad, other.grad = gradient(param, step), -gradient(param, step)
        up.step()
        down.step()
    assert_same(params, twin)


def test_hooks_run_around_the_step(backend: torch.device) -> None:
    params = parameters(backend)
    optimizer, seen = AdaXW(params), []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: seen.append(params[0].detach().clone())),
        optimizer.register_step_post_hook(lambda *_: seen.append(params[0].detach().clone())),
    ]
    before = params[0].detach().clone()
    train(optimizer, params, [0])
    assert_same(seen, [before, params[0].detach()])
    for handle in handles:
        handle.remove()
    train(optimizer, params, [1])
    assert len(seen) == 2


def test_frozen_parameter_does_not_change_or_count_steps(backend: torch.device) -> None:
    params, separate = parameters(backend), parameters(backend)
    optimizer = AdaXW(params, weight_decay=0.5)
    frozen, *others = params
    train(optimizer, params, [0])
    frozen.grad, before = None, frozen.detach().clone()
    train(optimizer, others, [1])
    assert torch.equal(frozen, before)
    train(optimizer, params, [2])
    train(AdaXW(separate[:1], weight_decay=0.5), separate[:1], [0, 2])
    train(AdaXW(separate[1:], weight_decay=0.5), separate[1:], [0, 1, 2])
    assert_same(params, separate)
    assert [optimizer.state[param]["step"] for param in params] == [2, 3, 3, 3]


def test_duplicate_parameter_is_stepped_once(backend: torch.device) -> None:
    params, once = parameters(backend)[:1], parameters(backend)[:1]
    with pytest.warns(UserWarning, match="duplicate parameters"):
        twice = AdaXW(params * 2)
    train(twice, params)
    train(AdaXW(once), once)
    assert_same(params, once)


@pytest.mark.parametrize("found_inf", [False, True], ids=["finite", "inf"])
def test_grad_scaler_unscales_and_skips(found_inf: bool, backend: torch.device) -> None:
    params, twin = parameters(backend), parameters(backend)
    optimizer = AdaXW(params, fused=True)
    scaler = torch.amp.GradScaler(backend.type, init_scale=1024.0)
    loss = sum((param * gradient(param, 0)).sum() for param in params)
    scaler.scale(loss).backward()
    if found_inf:
        params[1].grad[3] = torch.inf
    else:
        train(AdaXW(twin), twin, [0])
    scaler.step(optimizer)
    scaler.update()
    assert_same(params, twin)
    assert all(state["step"] == (0 if found_inf else 1) for state in optimizer.state_dict()["state"].values())
    assert scaler.get_scale() == (512.0 if found_inf else 1024.0)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize(("weight_decay", "maximize"), list(product([0.0, 0.1], [False, True])))
def test_adam_equals_torch_over_100_steps(name: str, weight_decay: float, maximize: bool, device: torch.device) -> None:
    options = {"lr": 0.01, "betas": (0.8, 0.99), "weight_decay": weight_decay, "maximize": maximize}
    params, by_torch = parameters(device, torch.float64), parameters(device, torch.float64)
    train({"Adam": Adam, "AdamW": AdamW}[name](params, **options), params, range(100))
    train(getattr(torch.optim, name)(by_torch, foreach=False, **options), by_torch, range(100))
    for param, expected in zip(params, by_torch, strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-12, atol=1e-12)
