"""Test that converted state dicts continue training with the same numbers.

Oracles: torch's optimizers, and the paper's released code on the raw moment, written out here.
"""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from adax_triton import Adam, AdamW, AdaX, AdaXW
from adax_triton.convert.state_dicts import (
    adax_from_adam,
    from_released_adax,
    from_torch_adam,
    to_released_adax,
    to_torch_adam,
)
from adax_triton.update.coefficients import exp_avg_sq_weight

# Use the native kernel: Triton's interpreter truncates float32 to bfloat16.
pytestmark = pytest.mark.usefixtures("native_cpu")
STEPS = 50
UNNORMALIZED = {"eps_placement": "unnormalized"}
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6}


class ReleasedAdaX(Optimizer):
    """Algorithms 1 and 2 of the paper, as in the released code.

    The second moment is raw, and eps is added to its root.
    """

    decoupled = False

    def __init__(self, params: Any, lr: float = 0.01, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 1e-4), "eps": 1e-6, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            (b1, b2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
            for param in (param for param in group["params"] if param.grad is not None):
                state = self.state[param]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param))
                state["step"] += 1
                grad = param.grad if self.decoupled else param.grad + decay * param
                state["exp_avg"].mul_(b1).add_((1 - b1) * grad)
                raw = state["exp_avg_sq"].mul_(1 + b2).add_(b2 * grad * grad)
                if self.decoupled:
                    param.sub_(lr * decay * param)
                step_size = lr * math.sqrt((1 + b2) ** state["step"] - 1)
                param.sub_(step_size * state["exp_avg"] / (raw.sqrt() + group["eps"]))


class ReleasedAdaXW(ReleasedAdaX):
    decoupled = True


def conversions_of(source: type) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    """Return from_*, to_*, the options of from_*, and hyper-parameters of both optimizers."""
    shared_options = {"lr": 0.01, "weight_decay": 0.1}
    if issubclass(source, ReleasedAdaX):
        return from_released_adax, to_released_adax, {"decoupled_weight_decay": source.decoupled}, shared_options
    return from_torch_adam, to_torch_adam, {}, {**shared_options, "betas": (0.8, 0.99), "maximize": True}


def parameters(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    reals = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, 3), (7,), (), (2,))]
    return [Parameter(real.to(dtype).t() if real.dim() == 2 else real.to(dtype)) for real in reals]


def groups(params: list[Parameter]) -> list[dict[str, Any]]:
    named = [(f"layer.{index}", param) for index, param in enumerate(params)]
    return [{"params": named[:1]}, {"params": named[1:], "lr": 0.003, "weight_decay": 0.02}]


def params_of(optimizer: Optimizer) -> list[Any]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def copies_of_params(optimizer: Optimizer) -> list[Parameter]:
    return [Parameter(param.detach().clone()) for param in params_of(optimizer)]


def train(optimizer: Optimizer, first: int, steps: int = STEPS) -> None:
    """Train while the second and the last parameter lack gradients.

    The second parameter has a gradient in two of three steps, the last has none.
    """
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for index, param in enumerate(params_of(optimizer)):
            grad = 10.0 ** (index - 1) * torch.randn(param.shape, generator=generator, dtype=param.dtype)
            param.grad = None if index == 3 or (index == 1 and step % 3 == 0) else grad
        optimizer.step()


def saved(optimizer_class: type, **options: Any) -> dict[str, Any]:
    optimizer = optimizer_class(parameters()[:2], **options)
    train(optimizer, 1, 3)
    return copy.deepcopy(optimizer.state_dict())


def leaves(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [value, *(leaf for item in inner for leaf in leaves(item))]


def contents(value: Any) -> list[str]:
    return [f"{leaf.dtype} {leaf.tolist()}" if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves(value)]


def identities(value: Any) -> set[int]:
    tensors = {leaf.untyped_storage().data_ptr() for leaf in leaves(value) if isinstance(leaf, Tensor)}
    return tensors | {id(leaf) for leaf in leaves(value) if isinstance(leaf, (dict, list))}


def convert_and_reload(convert: Any, state_dict: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Convert a state dict and reload it through a file.

    Check that the input is unchanged and not shared.
    """
    before = contents(state_dict)
    result = convert(state_dict, **options)
    assert contents(state_dict) == before
    assert not identities(state_dict) & identities(result)
    torch.save(result, file := io.BytesIO())
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def assert_raises(convert: Any, given: Any, words: list[str], error: type = ValueError, **options: Any) -> None:
    before = contents(given)
    with pytest.raises(error) as caught:
        convert(given, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert contents(given) == before


PAIRS = [(torch.optim.Adam, Adam), (torch.optim.AdamW, AdamW), (ReleasedAdaX, AdaX), (ReleasedAdaXW, AdaXW)]
every_pair = pytest.mark.parametrize(("source_class", "target_class"), PAIRS, ids=["Adam", "AdamW", "AdaX", "AdaXW"])
every_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


@every_dtype
@every_pair
def test_run_continues_after_conversion_there_and_back(
    source_class: type, target_class: type, dtype: torch.dtype
) -> None:
    convert, convert_back, options, shared_options = conversions_of(source_class)
    source = source_class(groups(parameters(dtype)), **shared_options)
    train(source, 0)
    target = target_class(groups(copies_of_params(source)))
    target.load_state_dict(convert_and_reload(convert, source.state_dict(), **options))
    for optimizer in (source, target):
        train(optimizer, STEPS)
    resumed = source_class(groups(copies_of_params(target)))
    resumed.load_state_dict(convert_and_reload(convert_back, target.state_dict()))
    counts = [[int(state["step"]) for state in each.state.values()] for each in (source, target, resumed)]
    assert counts[0] == counts[1] == counts[2] and len(set(counts[0])) == 2
    for twin in (target, resumed):
        for a, b in zip(params_of(source), params_of(twin), strict=True):
            assert torch.allclose(a, b, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
        for optimizer in (source, resumed):
            train(optimizer, 2 * STEPS)


@every_dtype
@every_pair
def test_round_trip_is_within_one_ulp(source_class: type, target_class: type, dtype: torch.dtype) -> None:
    convert, convert_back, options, shared_options = conversions_of(source_class)
    eps_options = UNNORMALIZED | {"eps": 1e-6} if source_class in (ReleasedAdaX, ReleasedAdaXW) else {}
    source = source_class(groups(parameters(dtype)), **shared_options)
    target = target_class(groups(parameters(dtype)), **shared_options, **eps_options)
    for optimizer in (source, target):
        torch.optim.lr_scheduler.StepLR(optimizer, 10)
    for steps in (1, 2, STEPS):
        train(source, 1, steps)
        before, converted = source.state_dict(), convert_and_reload(convert, source.state_dict(), **options)
        assert converted["param_groups"] == target.state_dict()["param_groups"]
        reloaded = convert_and_reload(convert_back, converted)
        assert reloaded["param_groups"] == before["param_groups"] and list(reloaded["state"]) == list(before["state"])
        for state, expected in zip(reloaded["state"].values(), before["state"].values(), strict=True):
            assert type(state["step"]) is type(expected["step"]) and state["step"] == expected["step"]
            assert torch.equal(state["exp_avg"], expected["exp_avg"])
            raw, other = state["exp_avg_sq"], expected["exp_avg_sq"]
            above, below = (torch.nextafter(other, torch.full_like(other, limit)) for limit in (math.inf, -math.inf))
            assert raw.dtype == other.dtype and bool(((below <= raw) & (raw <= above)).all())


@pytest.mark.parametrize("decoupled", [False, True])
def test_decoupled_argument_fills_the_missing_key_of_old_torch(decoupled: bool) -> None:
    given = saved(torch.optim.AdamW if decoupled else torch.optim.Adam)
    expected = from_torch_adam(given)["param_groups"]
    assert from_torch_adam(given, decoupled_weight_decay=decoupled)["param_groups"] == expected
    assert_raises(
        from_torch_adam, given, ["decoupled_weight_decay=", "True", "False"], decoupled_weight_decay=not decoupled
    )
    for key in ("decoupled_weight_decay", "maximize", "amsgrad", "fused", "capturable", "differentiable"):
        del given["param_groups"][0][key]
    assert from_torch_adam(given, decoupled_weight_decay=decoupled)["param_groups"] == expected
    assert_raises(from_torch_adam, given, ["param_groups'][0]", "no 'decoupled_weight_decay'"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex128], ids=str)
def test_low_precision_becomes_float32_and_complex_stays(dtype: torch.dtype) -> None:
    source = torch.optim.AdamW(parameters(dtype), lr=torch.tensor(0.01))
    train(source, 1, 2)
    result = convert_and_reload(from_torch_adam, source.state_dict())
    assert torch.equal(result["param_groups"][0]["lr"], torch.tensor(0.01))
    for state, own in zip(source.state.values(), result["state"].values(), strict=True):
        wide = dtype if dtype.is_complex else torch.float32
        assert torch.equal(own["exp_avg"], state["exp_avg"].to(wide)) and own["exp_avg_sq"].dtype == wide
        assert torch.allclose(own["exp_avg_sq"] * (1 - 0.999**2), state["exp_avg_sq"].to(wide), rtol=1e-6, atol=0)
    AdamW(copies_of_params(source)).load_state_dict(result)


@pytest.mark.parametrize("target_class", [AdaX, AdaXW])
def test_warm_start_keeps_adams_estimates_and_follows_adax(target_class: type) -> None:
    adam = AdamW(parameters(torch.float64), lr=0.01, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.0)
    train(adam, 0)
    target = target_class(copies_of_params(adam))
    target.load_state_dict(convert_and_reload(adax_from_adam, adam.state_dict(), beta2=1e-3))
    group = [target.param_groups[0][key] for key in ("lr", "betas", "eps", "weight_decay", "second_moment")]
    assert group == [0.01, (0.8, 1e-3), 1e-6, 0.0, "adax"]
    train(target, STEPS, 1)
    for source, param in zip(params_of(adam)[:3], params_of(target), strict=False):
        step, m, v = (adam.state[source][name] for name in ("step", "exp_avg", "exp_avg_sq"))
        m = 0.8 * m / (1 - 0.8**step) + 0.2 * param.grad
        v = v + exp_avg_sq_weight("adax", 1e-3, step + 1) * (param.grad.square() - v)
        assert torch.allclose(param, source - 0.01 * m / (v.sqrt() + 1e-6), rtol=1e-13, atol=1e-13)
    assert_raises(adax_from_adam, saved(Adam), ["beta2=0.999"], beta2=0.999)


CONVERSIONS = {
    from_torch_adam: (torch.optim.Adam, {}, {}),
    to_torch_adam: (Adam, {}, {}),
    from_released_adax: (ReleasedAdaX, {}, {"decoupled_weight_decay": True}),
    to_released_adax: (AdaX, UNNORMALIZED, {}),
    adax_from_adam: (Adam, {}, {}),
}
every_conversion = pytest.mark.parametrize("convert", CONVERSIONS, ids=lambda each: each.__name__)


@every_conversion
def test_missing_keys_and_bad_states_raise(convert: Any) -> None:
    optimizer_class, optimizer_options, options = CONVERSIONS[convert]
    given = saved(optimizer_class, **optimizer_options)
    dicts = {"state_dict": given, "param_groups'][0]": given["param_groups"][0], "state'][1]": given["state"][1]}
    needed = ("state param_groups", "params lr betas eps weight_decay", "step exp_avg exp_avg_sq")
    for (where, container), keys in zip(dicts.items(), needed, strict=True):
        for key in keys.split():
            value = container.pop(key)
            assert_raises(convert, given, [f"{where} has no {key!r}"], **options)
            container[key] = value
    changes: list[tuple[dict[str, Any], type, str]] = [
        ({"exp_avg": torch.zeros(7, 1, dtype=torch.uint8)}, ValueError, "states='float32'"),
        ({"exp_avg_sq": torch.zeros(7, 2, dtype=torch.uint8)}, ValueError, "states='float32'"),
        ({"group_exponents": torch.zeros(1)}, ValueError, "states='float32'"),
        ({"exp_avg": [0.0] * 7}, TypeError, "expected a tensor"),
        *(({"step": step}, TypeError, "expected a count") for step in (-1, 1.5, True, "3", math.nan, torch.ones(2))),
    ]
    for change, error, words in changes:
        states = {**given["state"], 1: {**given["state"][1], **change}}
        assert_raises(convert, {**given, "state": states}, ["state'][1]", *change, words], error, **options)
    assert_raises(convert, {**given, "state": {5: given["state"][1]}}, ["state'][5]", "no parameter"], **options)
    assert_raises(convert, None, ["state_dict is a NoneType"], TypeError, **options)


@every_conversion
def test_empty_states_and_states_at_step_0_are_kept(convert: Any) -> None:
    optimizer_class, optimizer_options, options = CONVERSIONS[convert]
    zeros = {"step": 0, "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}
    given = {"note": ["kept"], **saved(optimizer_class, **optimizer_options), "state": {0: zeros, 1: {}}}
    result = convert_and_reload(convert, given, **options)
    assert result["note"] == ["kept"] and result["state"][1] == {} and result["state"][0]["step"] == 0
    assert not result["state"][0]["exp_avg"].any() and not result["state"][0]["exp_avg_sq"].any()


UNSUPPORTED: list[tuple[Any, type, dict[str, Any], list[str]]] = [
    (from_torch_adam, torch.optim.Adam, {"amsgrad": True}, ["amsgrad", "True"]),
    (from_torch_adam, torch.optim.Adam, {"betas": (0.9, 1e-4)}, ["param_groups'][0]", "0.0001"]),
    (from_torch_adam, Adam, {}, ["second_moment", "'adam'"]),
    (from_released_adax, AdaX, {}, ["second_moment", "'adax'"]),
    (from_released_adax, torch.optim.Adam, {}, ["0.999", "use AdamW of adax_triton"]),
    (to_torch_adam, AdaX, {}, ["second_moment", "'adax'"]),
    (to_torch_adam, AdaX, {"second_moment": "adam", "betas": (0.9, 0.9), **UNNORMALIZED}, ["'unnormalized'"]),
    (to_released_adax, Adam, {}, ["second_moment", "'adam'"]),
    (to_released_adax, AdaX, {}, ["eps_placement", "'normalized'"]),
    (to_released_adax, AdaX, {"maximize": True, **UNNORMALIZED}, ["maximize", "True"]),
    (adax_from_adam, AdaX, {}, ["second_moment", "'adax'"]),
    (adax_from_adam, torch.optim.AdamW, {}, ["no 'second_moment'", "from_torch_adam first"]),
]


@pytest.mark.parametrize(("convert", "optimizer_class", "optimizer_options", "words"), UNSUPPORTED)
def test_unsupported_options_raise(convert: Any, optimizer_class: Any, optimizer_options: Any, words: Any) -> None:
    assert_raises(convert, saved(optimizer_class, **optimizer_options), words, **CONVERSIONS[convert][2])


def test_raw_moment_that_overflows_raises() -> None:
    given = saved(AdaX, **UNNORMALIZED)
    given["state"][1].update(step=880_000, exp_avg_sq=torch.ones(7))
    raw = to_released_adax(given)["state"][1]["exp_avg_sq"]
    assert raw.tolist() == pytest.approx([math.expm1(880_000 * math.log1p(1e-4))] * 7, rel=1e-7)
    for step in (890_000, 8_000_000):
        given["state"][1]["step"] = step
        assert_raises(
            to_released_adax, given, ["state'][1]['exp_avg_sq']", f"step {step}", "float32 at about step 887"]
        )
    for value, words in ((math.inf, ["state'][0]['exp_avg_sq']", "step 3", "not finite"]), (1j, ["complex"])):
        given = saved(ReleasedAdaX)
        given["state"][0]["exp_avg_sq"] = given["state"][0]["exp_avg_sq"] + value
        assert_raises(from_released_adax, given, words, decoupled_weight_decay=False)
    assert_raises(from_released_adax, saved(ReleasedAdaX), ["None"], TypeError, decoupled_weight_decay=None)
