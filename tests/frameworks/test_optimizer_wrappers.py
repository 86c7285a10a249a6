"""Optimizer wrappers of pytorch_optimizer and schedulefree.

Oracle: the same wrapper around torch's AdamW. With AdaXW, a resumed run equals the uninterrupted one bit for bit.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adax_triton import AdamW, AdaXW

po = pytest.importorskip("pytorch_optimizer")
schedulefree = pytest.importorskip("schedulefree")

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = {"lr": 3e-3, "weight_decay": 0.1}
STEPS, SAVED_AT = 9, 5  # the save is in the middle of an interval of Lookahead and LookSAM


class Run:
    """Trains a small model with a wrapped optimizer."""

    def __init__(self, name: str, optimizer_class: type[Optimizer]) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(16, 32, bias=False), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 4))
        self.wrapper = WRAPPERS[name](self.model, optimizer_class)
        if hasattr(self.wrapper, "train"):
            self.wrapper.train()
        self.take = STEP_WITH.get(name, step_after_backward)

    def train(self, steps: Iterable[int]) -> Run:
        for step in steps:
            torch.manual_seed(step)
            x = torch.randn(8, 16)
            self.take(self.wrapper, self.model, x, x[:, :4] + 3)
        return self

    def saved(self) -> io.BytesIO:
        file = io.BytesIO()
        torch.save([self.wrapper.state_dict(), self.model.state_dict()], file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> Run:
        state_dict, weights = torch.load(file, weights_only=False)
        self.model.load_state_dict(weights)
        self.wrapper.load_state_dict(state_dict)
        return self

    def tensors(self) -> Iterator[Tensor]:
        return iter(self.model.state_dict().values())


def error(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(model(x), y)


def step_after_backward(wrapper: Any, model: nn.Module, x: Tensor, y: Tensor) -> None:
    wrapper.zero_grad()
    error(model, x, y).backward()
    wrapper.step()


def step_with_closure(wrapper: Any, model: nn.Module, x: Tensor, y: Tensor) -> None:
    def closure() -> Tensor:
        wrapper.zero_grad()
        loss = error(model, x, y)
        loss.backward()
        return loss

    closure()
    wrapper.step(closure)


def step_with_gsam(wrapper: Any, model: nn.Module, x: Tensor, y: Tensor) -> None:
    wrapper.set_closure(nn.functional.mse_loss, x, y)
    wrapper.step()
    wrapper.update_rho_t()


def step_of_two_tasks(wrapper: Any, model: nn.Module, x: Tensor, y: Tensor) -> None:
    wrapper.zero_grad()
    wrapper.pc_backward([error(model, x, y), error(model, x, -2 * y)])
    wrapper.step()


def step_with_centralized_gradients(wrapper: Any, model: nn.Module, x: Tensor, y: Tensor) -> None:
    wrapper.zero_grad()
    error(model, x, y).backward()
    for param in model.parameters():
        po.centralize_gradient(param.grad, gc_conv_only=False)
    wrapper.step()


def gsam(model: nn.Module, optimizer_class: type[Optimizer]) -> Any:
    base = optimizer_class(model.parameters(), **OPTIONS)
    schedule = torch.optim.lr_scheduler.StepLR(base, 3, 0.5)
    rho = po.ProportionScheduler(schedule, max_lr=3e-3, min_lr=0.0, max_value=0.05, min_value=0.01)
    return po.GSAM(model.parameters(), base, model, rho)


def around_class(wrapper: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda model, optimizer_class: wrapper(model.parameters(), optimizer_class, **OPTIONS, **options)


def around_instance(wrapper: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda model, optimizer_class: wrapper(optimizer_class(model.parameters(), **OPTIONS), **options)


WRAPPERS: dict[str, Callable[[nn.Module, type[Optimizer]], Any]] = {
    "plain": around_instance(lambda optimizer: optimizer),
    "Lookahead": around_instance(po.Lookahead, k=3),
    "SAM": around_class(po.SAM),
    "SAM, adaptive and centralized": around_class(po.SAM, adaptive=True, use_gc=True),
    "FriendlySAM": around_class(po.FriendlySAM),
    "LookSAM": around_class(po.LookSAM, k=3),
    "GSAM": gsam,
    "WSAM": lambda model, each: po.WSAM(model, model.parameters(), each, **OPTIONS),
    "gradient centralization": around_instance(lambda optimizer: optimizer),
    "OrthoGrad": around_instance(po.OrthoGrad),
    "TRAC": around_instance(po.TRAC, s_prev=0.01),  # the default 1e-8 hardly moves a weight in a few steps
    "PCGrad": around_instance(po.PCGrad),
    "ScheduleFreeWrapper of pytorch_optimizer": around_instance(po.ScheduleFreeWrapper),
    "ScheduleFreeWrapper of schedulefree": around_instance(schedulefree.ScheduleFreeWrapper),
}
STEP_WITH = {
    **dict.fromkeys(["SAM", "SAM, adaptive and centralized", "FriendlySAM", "LookSAM", "WSAM"], step_with_closure),
    "GSAM": step_with_gsam,
    "PCGrad": step_of_two_tasks,
    "gradient centralization": step_with_centralized_gradients,
}
# schedulefree's wrapper writes into the states before the first step; torch's AdamW then raises KeyError: 'exp_avg'.
ORACLES = {"ScheduleFreeWrapper of schedulefree": "ScheduleFreeWrapper of pytorch_optimizer"}
# Its state dict has no states of the wrapper, so torch's AdamW does not resume either.
NOT_RESUMABLE = {"WSAM"}


def assert_close(found: Run, expected: Run, tolerance: float) -> None:
    for a, b in zip(found.tensors(), expected.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapper_around_adamw_equals_wrapper_around_torch(name: str, native_cpu: torch.device) -> None:
    start, expected = Run(name, torch.optim.AdamW), Run(ORACLES.get(name, name), torch.optim.AdamW).train(range(STEPS))
    assert (next(start.tensors()) - next(expected.tensors())).abs().max() > 1e-4  # the wrapper trains
    assert_close(Run(name, AdamW).train(range(STEPS)), expected, 2e-6)


def test_wrapper_of_schedulefree_raises_around_torchs_adamw() -> None:
    with pytest.raises(KeyError, match="exp_avg"):
        Run("ScheduleFreeWrapper of schedulefree", torch.optim.AdamW).train(range(1))


@pytest.mark.parametrize("name", [name for name in WRAPPERS if name not in NOT_RESUMABLE])
def test_wrapper_around_adaxw_resumes_bit_for_bit(name: str, native_cpu: torch.device) -> None:
    uninterrupted = Run(name, AdaXW).train(range(STEPS))
    saved = Run(name, AdaXW).train(range(SAVED_AT)).saved()
    resumed = Run(name, AdaXW).load(saved).train(range(SAVED_AT, STEPS))
    assert_close(resumed, uninterrupted, 0.0)
