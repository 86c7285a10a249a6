"""The gate of the step benchmark: right optimizers pass in every mode, wrong ones get no time in any."""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from adax_triton.bench.harness import correctness as gate
from adax_triton.bench.harness import providers
from adax_triton.bench.harness.modes import FP32, MODES, Mode
from adax_triton.bench.harness.peers import PEERS
from adax_triton.bench.harness.providers import PROVIDERS, Provider, Rule, Step
from adax_triton.bench.step import measure as step
from torch import Tensor

from adax_triton import AdaXW

CPU = torch.device("cpu")
Wrong = Callable[[Mode, list[Tensor], Rule], Step]
each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))


@pytest.fixture(autouse=True)
def few_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes a large tensor of no more elements than codes need: the interpreter is slow."""
    monkeypatch.setattr(gate, "SHAPES", [(16, 256), (3,)])


def ours(mode: Mode) -> Provider:
    return next(provider for provider in PROVIDERS if provider.name == providers.OURS and provider.mode == mode)


def without_decay(mode: Mode, params: list[Tensor], rule: Rule) -> Step:
    return ours(mode).build(params, rule | {"weight_decay": 0.0})


def another_second_moment(mode: Mode, params: list[Tensor], rule: Rule) -> Step:
    states, master_weights = mode.precision
    kept = {"states": states, "master_weights": master_weights, "weight_rounding": mode.weight_rounding}
    return AdaXW(params, second_moment="adafactor", **(rule | {"betas": (0.9, 0.5)}), **kept).step


def last_tensor_left_out(mode: Mode, params: list[Tensor], rule: Rule) -> Step:
    return ours(mode).build(params[:-1], rule)


def not_a_number(mode: Mode, params: list[Tensor], rule: Rule) -> Step:
    return lambda: params[0].data.view(-1)[7].fill_(float("nan"))


@each_mode
def test_ours_passes(mode: Mode, device: torch.device) -> None:
    passed = gate.check(ours(mode), device)
    assert passed.error <= passed.tolerance == gate.tolerance(mode)
    assert passed.compile_s > 0


@pytest.mark.parametrize(
    ("wrong", "mode"),
    [
        *((another_second_moment, mode) for mode in MODES),
        *itertools.product((without_decay, last_tensor_left_out, not_a_number), ("fp32", "bf16 + 8bit")),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_what_is_wrong_is_rejected(wrong: Wrong, mode: str, native_cpu: torch.device) -> None:
    provider = dataclasses.replace(ours(MODES[mode]), build=functools.partial(wrong, MODES[mode]))
    with pytest.raises(gate.WrongResultError, match="AdaX-W rule"):
        gate.check(provider, native_cpu)


@each_mode
def test_first_step_on_the_tensors_that_are_timed_passes(mode: Mode, device: torch.device) -> None:
    params = step.make_params([(5000,), (3,)], device, seed=0, dtype=mode.param_dtype)
    step.Entry(ours(mode)).start(params, device)


@pytest.mark.parametrize("name", ["fused", "foreach"])
@pytest.mark.parametrize("mode", ["fp32", "bf16 + bfloat16"])
def test_adamw_of_torch_is_adamw_and_not_adax(name: str, mode: str) -> None:
    (provider,) = (one for one in PROVIDERS if one.name == f"torch AdamW {name}" and one.mode.name == mode)
    assert gate.check(provider, CPU).error < gate.tolerance(provider.mode)
    with pytest.raises(gate.WrongResultError):
        gate.check(dataclasses.replace(provider, second_moment="adax"), CPU)


def test_a_tail_left_out_is_found_on_the_tensors_that_are_timed(device: torch.device) -> None:
    def all_but_the_tail(params: list[Tensor], rule: Rule) -> Step:
        views = []
        for param in params:
            assert param.grad is not None
            view = param.detach()[: -gate.ENDS // 2].requires_grad_()
            view.grad = param.grad[: -gate.ENDS // 2]
            views.append(view)
        return AdaXW(views, **rule).step

    params = step.make_params([(1000,), (2000,)], device, seed=0)
    entry = step.Entry(dataclasses.replace(ours(FP32), build=all_but_the_tail))
    with pytest.raises(gate.WrongResultError, match="at an end of a tensor"):
        entry.start(params, device)
    step.Entry(ours(FP32)).start(params, device)


def test_providers_are_told_apart() -> None:
    labels = [(provider.label, kind) for provider in (*PROVIDERS, *PEERS) for kind in provider.device_types]
    assert len(set(labels)) == len(labels)
    assert {provider.mode.name for provider in (*PROVIDERS, *PEERS)} == set(MODES)
