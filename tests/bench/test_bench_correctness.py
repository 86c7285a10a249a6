"""The correctness check: correct optimizers pass in every mode, wrong ones fail."""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from adax_triton.bench.harness import correctness, providers
from adax_triton.bench.harness.modes import FP32, MODES, Mode
from adax_triton.bench.harness.providers import PROVIDERS, Provider, Rule, Step
from adax_triton.bench.step import measure as step
from torch import Tensor

from adax_triton import AdaXW

CPU = torch.device("cpu")
Wrong = Callable[[Mode, list[Tensor], Rule], Step]
each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))


@pytest.fixture(autouse=True)
def few_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit the large tensor to the smallest quantized size; interpretation is slow."""
    monkeypatch.setattr(correctness, "SHAPES", [(16, 256), (3,)])


def adaxw(mode: Mode) -> Provider:
    return next(provider for provider in PROVIDERS if provider.name == providers.OURS and provider.mode == mode)


def without_decay(mode: Mode, params: list[Tensor], rule: Rule) -> Step:
    return adaxw(mode).build(params, rule | {"weight_decay": 0.0})


def wrong_second_moment(mode: Mode, params: list[Tensor], rule: Rule) -> Step:
    states, master_weights = mode.precision
    kept = {"states": states, "master_weights": master_weights, "weight_rounding": mode.weight_rounding}
    return AdaXW(params, second_moment="adafactor", **(rule | {"betas": (0.9, 0.5)}), **kept).step


def without_last_tensor(mode: Mode, params: list[Tensor], rule: Rule) -> Step:
    return adaxw(mode).build(params[:-1], rule)


def writes_nan(mode: Mode, params: list[Tensor], rule: Rule) -> Step:
    return lambda: params[-1].data.view(-1)[1].fill_(float("nan"))


@each_mode
def test_adaxw_passes_the_check(mode: Mode, device: torch.device) -> None:
    passed = correctness.check(adaxw(mode), device)
    assert passed.error <= passed.tolerance == correctness.tolerance(mode)
    assert passed.compile_s > 0


@pytest.mark.parametrize(
    ("wrong", "mode"),
    [
        *((wrong_second_moment, mode) for mode in MODES),
        *itertools.product((without_decay, without_last_tensor, writes_nan), ("fp32", "bf16 + 8bit")),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_wrong_update_is_rejected(wrong: Wrong, mode: str, native_cpu: torch.device) -> None:
    provider = dataclasses.replace(adaxw(MODES[mode]), build=functools.partial(wrong, MODES[mode]))
    with pytest.raises(correctness.WrongResultError, match="AdaX-W rule"):
        correctness.check(provider, native_cpu)


@each_mode
def test_first_step_of_timed_tensors_passes(mode: Mode, device: torch.device) -> None:
    params = step.make_params([(5000,), (3,)], device, seed=0, dtype=mode.param_dtype)
    step.Entry(adaxw(mode)).start(params, device)


@pytest.mark.parametrize("name", ["fused", "foreach"])
@pytest.mark.parametrize("mode", ["fp32", "bf16 + bfloat16"])
def test_torch_adamw_passes_only_as_adamw(name: str, mode: str) -> None:
    (provider,) = (one for one in PROVIDERS if one.name == f"torch AdamW {name}" and one.mode.name == mode)
    assert correctness.check(provider, CPU).error < correctness.tolerance(provider.mode)
    with pytest.raises(correctness.WrongResultError):
        correctness.check(dataclasses.replace(provider, second_moment="adax"), CPU)


def test_skipped_tail_of_timed_tensors_is_detected(device: torch.device) -> None:
    def without_tail(params: list[Tensor], rule: Rule) -> Step:
        views = []
        for param in params:
            assert param.grad is not None
            view = param.detach()[: -correctness.END_ELEMENTS // 2].requires_grad_()
            view.grad = param.grad[: -correctness.END_ELEMENTS // 2]
            views.append(view)
        return AdaXW(views, **rule).step

    params = step.make_params([(1000,), (2000,)], device, seed=0)
    entry = step.Entry(dataclasses.replace(adaxw(FP32), build=without_tail))
    with pytest.raises(correctness.WrongResultError, match="AdaX-W rule"):
        entry.start(params, device)
    step.Entry(adaxw(FP32)).start(params, device)


def test_provider_labels_are_unique() -> None:
    labels = [(provider.label, kind) for provider in PROVIDERS for kind in provider.device_types]
    assert len(set(labels)) == len(labels)
    assert {provider.mode.name for provider in PROVIDERS} == set(MODES)
