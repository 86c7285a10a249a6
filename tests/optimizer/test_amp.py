"""An unmodified torch.amp.GradScaler; with fused=True the step unscales gradients and skips overflows.

Oracle: the same optimizer with unscaled gradients, without the overflow steps. Results match bit for bit, because
scales are powers of two and host and device compute the same scalars.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from tensor_bits import bits, contents
from torch import Tensor
from torch.nn import Parameter

from adax_triton import AdamW, AdaX, AdaXW
from adax_triton.step.backend import TRITON, backend_of

SHAPES = ((5, 7), (), (0,), (4097,))
INFINITE, FROZEN, STEPS = (1, 3), (2,), range(5)


class Mode(NamedTuple):
    dtype: torch.dtype
    states: str = "float32"
    master_weights: str | None = None
    weight_rounding: str = "nearest"

    def optimizer(self, params: Sequence[Tensor], **options: Any) -> AdaX:
        known = {key: value for key, value in self._asdict().items() if key != "dtype"}
        return AdaXW(params, lr=0.01, seed=3, fused=True, **known, **options)


MODES = {
    "fp32": Mode(torch.float32),
    "bf16": Mode(torch.bfloat16),
    "fp16": Mode(torch.float16),
    "bf16 states, stochastic": Mode(torch.bfloat16, "bfloat16", None, "stochastic"),
    "8bit_v16, fp16 master": Mode(torch.float16, "8bit_v16", "float32"),
    "8bit, 24bit": Mode(torch.bfloat16, "8bit", "24bit"),
}
each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


@pytest.fixture(autouse=True)
def scaler_checks_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make GradScaler check bfloat16 gradients in float32, as PyTorch 2.11 needs."""
    check = torch._amp_foreach_non_finite_check_and_unscale_

    def check_in_float32(grads: list[Tensor], found_inf: Tensor, inv_scale: Tensor) -> None:
        wide = [grad.float() if grad.dtype == torch.bfloat16 else grad for grad in grads]
        check(wide, found_inf, inv_scale)
        for grad, unscaled in zip(grads, wide, strict=True):
            grad.copy_(unscaled)

    if torch.cuda.is_available():
        monkeypatch.setattr(torch, "_amp_foreach_non_finite_check_and_unscale_", check_in_float32)


def parameters(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES]


def gradient(param: Tensor, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + param.numel())
    return torch.randn(param.shape, generator=generator).to(param.device, param.dtype)


def backward(params: Sequence[Tensor], step: int, scaler: torch.amp.GradScaler, infinite: bool = False) -> None:
    """Backpropagate `gradient` times the scale; at FROZEN, freeze the first parameter."""
    trained = params[step in FROZEN :]
    for param in params:
        param.grad = None
    loss = torch.stack([(param.float() * gradient(param, step).float()).sum() for param in trained]).sum()
    if infinite:
        loss = loss + trained[-1].float()[-1] * torch.inf
    scaler.scale(loss).backward()


def train_scaled(
    optimizer: AdaX, params: Sequence[Tensor], steps: Iterable[int], infinite: Collection[int] = ()
) -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler(params[0].device.type, init_scale=2.0**10, growth_interval=2)
    for step in steps:
        backward(params, step, scaler, step in infinite)
        scaler.step(optimizer)
        scaler.update()
    return scaler


def train(optimizer: AdaX, params: Sequence[Tensor], steps: Iterable[int]) -> None:
    for step in steps:
        for index, param in enumerate(params):
            param.grad = None if index == 0 and step in FROZEN else gradient(param, step)
        optimizer.step()


def finite(steps: Iterable[int]) -> list[int]:
    return [step for step in steps if step not in INFINITE]


@each_mode
def test_scaled_steps_equal_unscaled_steps_without_overflow(mode: Mode, backend: torch.device) -> None:
    params, twins = parameters(backend, mode.dtype), parameters(backend, mode.dtype)
    optimizer, twin = mode.optimizer(params), mode.optimizer(twins)
    scaler = train_scaled(optimizer, params, STEPS, INFINITE)
    train(twin, twins, finite(STEPS))
    assert contents(optimizer) == contents(twin)
    counts = [state["step"] for state in optimizer.state_dict()["state"].values()]
    assert counts == [2, 3, 3, 3] and all(type(count) is int for count in counts)
    assert scaler.get_scale() == 2.0**8  # halved twice


@each_mode
def test_skipped_step_changes_nothing(mode: Mode, backend: torch.device) -> None:
    params = parameters(backend, mode.dtype)
    optimizer = mode.optimizer(params)
    scaler = train_scaled(optimizer, params, [0, 1])
    before = contents(optimizer)
    backward(params, 3, scaler, infinite=True)
    grads = [bits(param.grad) for param in params]
    scaler.step(optimizer)
    assert contents(optimizer) == before
    assert [bits(param.grad) for param in params] == grads
    scaler.update()
    assert scaler.get_scale() == 2.0**10  # doubled after two steps, then halved


@pytest.mark.parametrize("fused", [None, False])
def test_scaler_unscales_gradients_unless_fused(fused: bool | None, backend: torch.device) -> None:
    params, twins = parameters(backend), parameters(backend)
    optimizer, twin = AdaXW(params, fused=fused), AdaXW(twins, fused=True)
    train_scaled(optimizer, params, STEPS, INFINITE)
    train_scaled(twin, twins, STEPS, INFINITE)
    assert torch.equal(params[0].grad, gradient(params[0], STEPS[-1]))
    assert not torch.equal(twins[0].grad, params[0].grad)
    for param, other in zip(params, twins, strict=True):
        param.grad = other.grad = None
    assert contents(optimizer) == contents(twin)


def test_scaler_needs_fused_for_float16_gradients(backend: torch.device) -> None:
    params = parameters(backend, torch.float16)
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):  # as for torch's AdamW
        train_scaled(AdaXW(params, master_weights="float32"), params, [0])
    assert all(
        torch.equal(param, fresh) for param, fresh in zip(params, parameters(backend, torch.float16), strict=True)
    )


def test_zero_scale_skips_the_step_or_gives_nonfinite_weights(backend: torch.device) -> None:
    for found_inf, max_grad_norm in ((1.0, None), (1.0, 1.0), (0.0, 1.0), (0.0, None)):
        param = Parameter(torch.ones(8, device=backend))
        optimizer = AdaXW([param], max_grad_norm=max_grad_norm)
        param.grad = torch.ones_like(param)
        optimizer.grad_scale = torch.zeros((), device=backend)
        optimizer.found_inf = torch.full((), found_inf, device=backend)
        optimizer.step()
        skipped = found_inf == 1.0 or max_grad_norm is not None  # a non-finite norm also skips
        assert int(optimizer.state[param]["step"]) == (0 if skipped else 1)
        assert bool((param == 1).all()) if skipped else not bool(param.isfinite().any())


def test_step_after_a_skipped_first_step_equals_a_first_step(backend: torch.device) -> None:
    params, twins = parameters(backend), parameters(backend)
    optimizer, twin = AdaX(params, lr=0.01, fused=True), AdaX(twins, lr=0.01)
    train_scaled(optimizer, params, [1], INFINITE)
    assert all(torch.equal(param, twin) for param, twin in zip(params, twins, strict=True))
    train_scaled(optimizer, params, [4])
    train(twin, twins, [4])
    assert contents(optimizer) == contents(twin)


@pytest.mark.parametrize("mode", [MODES["fp32"], MODES["8bit, 24bit"]], ids=["fp32", "8bit, 24bit"])
def test_user_may_unscale_and_clip_gradients(mode: Mode, backend: torch.device) -> None:
    params, twins = parameters(backend, mode.dtype), parameters(backend, mode.dtype)
    optimizer, twin = mode.optimizer(params), mode.optimizer(twins)
    scaler = torch.amp.GradScaler(backend.type, init_scale=2.0**10)
    for step in STEPS:
        backward(params, step, scaler, infinite=step in INFINITE)
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        scaler.step(optimizer)
        scaler.update()
    for step in finite(STEPS):
        for index, param in enumerate(twins):
            param.grad = None if index == 0 and step in FROZEN else gradient(param, step)
        torch.nn.utils.clip_grad_norm_(twins, 1.0)
        twin.step()
    assert contents(optimizer) == contents(twin)


def test_step_does_not_change_scaled_gradients(backend: torch.device) -> None:
    params = parameters(backend)
    optimizer, scaler = AdaX(params, fused=True), torch.amp.GradScaler(backend.type, init_scale=2.0**10)
    backward(params, 0, scaler)
    before = [bits(param.grad) for param in params]
    scaler.step(optimizer)
    assert [bits(param.grad) for param in params] == before
    assert torch.equal(params[0].grad, 1024 * gradient(params[0], 0))


def test_scale_need_not_be_a_power_of_two(backend: torch.device) -> None:
    params = parameters(backend)
    exact = [Parameter(param.detach().double()) for param in params]
    optimizer, twin = AdaX(params, lr=0.01), AdaX(exact, lr=0.01)
    for step in range(3):
        for param, other in zip(params, exact, strict=True):
            param.grad, other.grad = 3000 * gradient(param, step), gradient(param, step).double()
        optimizer.grad_scale, optimizer.found_inf = torch.full((), 3000.0, device=backend), None
        optimizer.step()
        twin.step()
    for param, expected in zip(params, exact, strict=True):
        torch.testing.assert_close(param.detach().double(), expected.detach(), rtol=1e-6, atol=1e-6)


def test_scaler_skips_an_optimizer_without_gradients(backend: torch.device) -> None:
    params, idle = parameters(backend), parameters(backend)
    optimizer, other = AdaX(params, fused=True), AdaX(idle, fused=True)
    scaler = torch.amp.GradScaler(backend.type, init_scale=2.0**10)
    backward(params, 0, scaler)
    scaler.step(optimizer)
    scaler.step(other)
    scaler.update()
    assert all(torch.equal(param, fresh) for param, fresh in zip(idle, parameters(backend), strict=True))
    assert len(other.state) == 0


@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
@pytest.mark.parametrize("value", [1.0, True, "1", torch.ones(2), [1.0]], ids=repr)
def test_wrong_type_raises_an_error_that_names_it(name: str, value: object, backend: torch.device) -> None:
    params = parameters(backend)
    optimizer = AdaX(params)
    train(optimizer, params, [0])
    before = contents(optimizer)
    setattr(optimizer, name, value)
    with pytest.raises(TypeError, match=f"Invalid type of {name}: "):
        optimizer.step()
    assert contents(optimizer) == before


def test_step_counts_with_and_without_scaler(backend: torch.device) -> None:
    params, twins = parameters(backend), parameters(backend)
    optimizer, twin = AdamW(params, lr=0.01, fused=True), AdamW(twins, lr=0.01)
    train(optimizer, params, [0, 2])
    train_scaled(optimizer, params, [4, 5], [4])
    train(optimizer, params, [3])
    train(twin, twins, [0, 2, 5, 3])
    assert [state["step"] for state in optimizer.state_dict()["state"].values()] == [3, 4, 4, 4]
    assert contents(optimizer) == contents(twin)


@pytest.mark.parametrize("mode", [MODES["fp32"], MODES["8bit, 24bit"]], ids=["fp32", "8bit, 24bit"])
def test_copies_step_bit_for_bit_equal(mode: Mode, backend: torch.device) -> None:
    params = parameters(backend, mode.dtype)
    optimizer = mode.optimizer(params)
    train_scaled(optimizer, params, [0, 1], INFINITE)
    loaded = [Parameter(param.detach().clone()) for param in params]
    twin = mode.optimizer(loaded)
    saved = pickle.loads(pickle.dumps(optimizer.state_dict()))
    assert {type(state["step"]) for state in saved["state"].values()} == {int}
    twin.load_state_dict(saved)
    both = params, optimizer
    copies = {"state dict": (loaded, twin), "deepcopy": copy.deepcopy(both), "pickle": pickle.loads(pickle.dumps(both))}
    train_scaled(optimizer, params, [4])
    for way, (twins, twin) in copies.items():
        train_scaled(twin, twins, [4])
        assert contents(optimizer) == contents(twin), way


def test_load_state_dict_writes_device_counts_in_place(backend: torch.device) -> None:
    params, source = parameters(backend), parameters(backend)
    optimizer, saved = AdaX(params, lr=0.01, fused=True), AdaX(source, lr=0.01)
    train_scaled(optimizer, params, [0])
    train(saved, source, [0, 1])
    counts = [optimizer.state[param]["step"] for param in params]
    optimizer.load_state_dict(saved.state_dict())
    assert [optimizer.state[param]["step"] for param in params] == [2] * len(params)
    if backend_of(backend, torch.float32) == TRITON:
        assert all(optimizer.state[param]["step"] is count for param, count in zip(params, counts, strict=True))


@pytest.mark.parametrize("max_grad_norm", [None, 1e9])
def test_a_subclass_may_define_the_scale_as_a_property(max_grad_norm: float | None, device: torch.device) -> None:
    class Scaled(AdaXW):
        @property
        def grad_scale(self) -> Tensor:  # type: ignore[override]
            return torch.full((1,), 1024.0, device=device)

    steps = []
    for optimizer_class, scale in ((Scaled, 1024.0), (AdaXW, 1.0)):
        (param,) = params = parameters(device)[:1]
        param.grad = gradient(param, 0) * scale
        optimizer_class(params, fused=True, max_grad_norm=max_grad_norm).step()
        steps.append(param)
    assert torch.equal(*steps)
