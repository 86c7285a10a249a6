"""Convert state dicts between this package, torch's Adam and the released AdaX.

    from_torch_adam      torch.optim.Adam, AdamW    ->  Adam, AdamW
    to_torch_adam        Adam, AdamW                ->  torch.optim.Adam, AdamW
    from_released_adax   the paper's AdaX, AdaXW    ->  AdaX, AdaXW
    to_released_adax     AdaX, AdaXW                ->  the paper's AdaX, AdaXW
    adax_from_adam       Adam, AdamW                ->  AdaX, AdaXW; a warm start, not the same optimizer
    adam_from_adax       AdaX, AdaXW                ->  Adam, AdamW; a warm start, not the same optimizer

This package stores exp_avg_sq divided by its bias factor; the others store the raw moment. Factors are computed in
float64. Each moment is rounded once, to float64 if it was float64, else to float32. A conversion checks everything
before it computes anything. It does not modify its input, and its output shares no memory with it.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adax_triton.state.step_counts import checked_count
from adax_triton.state.validation import OLD_CHECKPOINT_DEFAULTS, as_float, validate_group
from adax_triton.update.coefficients import one_minus_power

_ADAM = {"second_moment": "adam", "eps_placement": "normalized"}
_RELEASED_ADAX = {"second_moment": "adax", "eps_placement": "unnormalized"}
_SHARED_KEYS = ("lr", "betas", "eps", "weight_decay")  # in the groups of every optimizer
_OWN_KEYS = (*_SHARED_KEYS, *_ADAM)  # in the groups of this package's optimizers
HYPERPARAMETERS = (*_OWN_KEYS, *OLD_CHECKPOINT_DEFAULTS)
_TORCH_FLAGS = {"amsgrad": False, "foreach": None, "capturable": False, "differentiable": False, "fused": None}
_STATE_KEYS = ("step", "exp_avg", "exp_avg_sq")
_LARGEST_EXPONENT = 709.0  # exp() of this is finite in float64; exp(710) is not
_ConvertGroup = Callable[[Mapping[str, Any], str], dict[str, Any]]  # (group, its name in messages) -> converted group


class _MomentConversion(NamedTuple):
    """How the moments of one state become those of another."""

    factors: Callable[[float, float, int], tuple[float, float]]  # of (b1, b2, t), for exp_avg and exp_avg_sq
    combine: Callable[[Any, Any], Any]  # truediv or mul
    raw_adax: bool = False  # one side is AdaX's raw moment, which overflows
    count: Callable[[int], Any] = int  # what the other program keeps as step


def from_torch_adam(state_dict: Mapping[str, Any], *, decoupled_weight_decay: bool | None = None) -> dict[str, Any]:
    """Return a `torch.optim.Adam` or `AdamW` state dict as one that this package's `Adam` and `AdamW` load.

        m = exp_avg,   v = exp_avg_sq / (1 - b2^step)

    Groups keep their hyper-parameters and what schedulers wrote into them, but not torch's choices of implementation
    (`foreach`, `fused`, `capturable`, `differentiable`). bfloat16 and float16 states become float32. DeepSpeed's Adam
    is taken for torch's.

    Args:
        state_dict: of the torch optimizer.
        decoupled_weight_decay: whether it was an AdamW, for groups of DeepSpeed and of older versions of torch, which
            do not say it themselves. Default: None, all groups say it.

    Raises:
        ValueError: keys are missing, or a state has further ones; `amsgrad`; no bias correction; moments that are not
            floating-point; a group that does not say which weight decay it has, or contradicts the argument; a value
            that `Adam` refuses.
        TypeError: a value of the wrong type.

    Source: `torch.optim.Adam`; Kingma & Ba 2015, arXiv:1412.6980, algorithm 1.
    """

    def convert_group(group: Mapping[str, Any], where: str) -> dict[str, Any]:
        if group.get("amsgrad"):
            raise ValueError(
                f"{where}['amsgrad'] is {group['amsgrad']!r}; its maximum of v has no place in this package"
            )
        own = group.get("decoupled_weight_decay", decoupled_weight_decay)
        if own is None:
            raise ValueError(f"{where} has no 'decoupled_weight_decay': give the argument, True for an AdamW")
        if decoupled_weight_decay is not None and own != decoupled_weight_decay:
            raise ValueError(f"decoupled_weight_decay={decoupled_weight_decay!r}, but {where} says {own!r}")
        if not group.get("bias_correction", True):
            raise ValueError(f"{where}['bias_correction'] is False; without it moments have other factors")
        maximize = group.get("maximize", False)
        group = {key: value for key, value in group.items() if key != "bias_correction"}
        return _group_of_this_package(group, where, {**_ADAM, "decoupled_weight_decay": own, "maximize": maximize})

    return _convert_state_dict(
        state_dict, _SHARED_KEYS, convert_group, _MomentConversion(_adam_factors, operator.truediv)
    )


def to_torch_adam(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return an `Adam` or `AdamW` state dict of this package as one that `torch.optim.Adam` and `AdamW` load.

        exp_avg = m,   exp_avg_sq = v (1 - b2^step)

    The inverse of `from_torch_adam`, to one unit in the last place. torch's choices of implementation get their
    defaults, and `step` is a float32 tensor, as torch has it.

    Args:
        state_dict: of the rule `second_moment="adam"`.

    Raises:
        ValueError: keys are missing, or a state has further ones; another rule or place of eps than torch's;
            moments that are not floating-point.
        TypeError: a value of the wrong type.

    Source: `torch.optim.Adam`; Kingma & Ba 2015, arXiv:1412.6980, algorithm 1.
    """

    def convert_group(group: Mapping[str, Any], where: str) -> dict[str, Any]:
        own = _validated_group(group, where, _ADAM)
        kept = (*_SHARED_KEYS, "decoupled_weight_decay", "maximize")
        return copy.deepcopy({**_extra_keys(group), **{key: own[key] for key in kept}, **_TORCH_FLAGS})

    rule = _MomentConversion(
        _adam_factors, operator.mul, count=lambda step: torch.tensor(float(step), dtype=torch.float32)
    )
    return _convert_state_dict(state_dict, _OWN_KEYS, convert_group, rule)


def from_released_adax(state_dict: Mapping[str, Any], *, decoupled_weight_decay: bool) -> dict[str, Any]:
    """Return a state dict of the program released with the paper as one that this package's `AdaX` and `AdaXW` load.

        m = exp_avg,   v = exp_avg_sq / ((1 + b2)^step - 1)

    Their program adds eps to the root of the raw moment; groups get `eps_placement="unnormalized"`, and the run goes on
    with the same numbers. bfloat16 and float16 states become float32.

    Args:
        state_dict: of their `AdaX` or `AdaXW`.
        decoupled_weight_decay: False for their `AdaX`, True for their `AdaXW`, which has the same keys.

    Raises:
        ValueError: keys are missing, or a state has further ones; a second moment that is not finite: in
            float32, at b2 = 1e-4, it overflows at step 887,000; moments that are complex or not floating-point; a
            hyper-parameter that `AdaX` refuses, such as Adam's 0.999 for b2.
        TypeError: a value of the wrong type.

    Source: Li et al. 2020, arXiv:2004.09740, algorithms 1 and 2, and the program released with it.
    """

    def convert_group(group: Mapping[str, Any], where: str) -> dict[str, Any]:
        return _group_of_this_package(
            group, where, {**_RELEASED_ADAX, "decoupled_weight_decay": decoupled_weight_decay}
        )

    return _convert_state_dict(
        state_dict, _SHARED_KEYS, convert_group, _MomentConversion(_adax_factors, operator.truediv, raw_adax=True)
    )


def to_released_adax(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return an `AdaX` or `AdaXW` state dict of this package as one that the program released with the paper loads.

        exp_avg = m,   exp_avg_sq = v ((1 + b2)^step - 1)

    The inverse of `from_released_adax`, to one unit in the last place. Load it into their class with the same weight
    decay, which their groups do not name.

    Args:
        state_dict: with `second_moment="adax"` and `eps_placement="unnormalized"`.

    Raises:
        ValueError: keys are missing, or a state has further ones; another rule; eps beside the normalised root,
            or `maximize`, which their program does not have; a raw moment that overflows; moments that are complex or
            not floating-point.
        TypeError: a value of the wrong type.

    Source: as `from_released_adax`.
    """

    def convert_group(group: Mapping[str, Any], where: str) -> dict[str, Any]:
        own = _validated_group(group, where, {**_RELEASED_ADAX, "maximize": False})
        return copy.deepcopy({**_extra_keys(group), **{key: own[key] for key in _SHARED_KEYS}})

    return _convert_state_dict(
        state_dict, _OWN_KEYS, convert_group, _MomentConversion(_adax_factors, operator.mul, raw_adax=True)
    )


def adax_from_adam(state_dict: Mapping[str, Any], *, beta2: float = 1e-4) -> dict[str, Any]:
    """Return an Adam state dict of this package as one from which its `AdaX` and `AdaXW` start warm.

        m = m_adam / (1 - b1^step),   v = v_adam

    A start, not an equality: the steps go on at the size they had, but from here on v remembers as AdaX's does. `step`
    is kept, so a new squared gradient enters with the small `w_t` of that step, although the v it enters is an average
    over Adam's last `1 / (1 - b2)` steps only. Learning rates, eps and weight decays stay Adam's.

    Args:
        state_dict: of `Adam` or `AdamW`, or from `from_torch_adam`.
        beta2: AdaX's growth rate, in [0, 0.1], in place of Adam's decay. Default: 1e-4.

    Raises:
        ValueError: keys are missing, or a state has further ones; another rule or place of eps than Adam's;
            `beta2` out of range; moments that are not floating-point.
        TypeError: a value of the wrong type.

    Source: the two updates of `schedule`; nothing published.
    """

    def convert_group(group: Mapping[str, Any], where: str) -> dict[str, Any]:
        own = _validated_group(group, where, _ADAM)
        betas = (as_float(own["betas"][0], "betas[0]"), as_float(beta2, "beta2"))
        own = _validated_group({**own, "betas": betas, "second_moment": "adax"}, f"beta2={beta2!r}", {})
        return copy.deepcopy({**_extra_keys(group), **own})

    rule = _MomentConversion(lambda beta1, _, step: (one_minus_power(beta1, step), 1.0), operator.truediv)
    return _convert_state_dict(state_dict, _OWN_KEYS, convert_group, rule)


def adam_from_adax(state_dict: Mapping[str, Any], *, beta2: float = 0.999) -> dict[str, Any]:
    """Return an AdaX state dict of this package as one from which its `Adam` and `AdamW` start warm.

        m_adam = m (1 - b1^step),   v_adam = v

    The inverse of `adax_from_adam`, to one unit in the last place, and like it a start, not an equality. Learning
    rates, eps, weight decays and `step` stay AdaX's, and eps is added to the root of v.

    Args:
        state_dict: of the rule `second_moment="adax"`.
        beta2: Adam's decay, in place of AdaX's growth rate. Default: 0.999.

    Raises:
        ValueError: keys are missing, or a state has further ones; another rule than AdaX's; `beta2` out of range;
            moments that are not floating-point.
        TypeError: a value of the wrong type.

    Source: as `adax_from_adam`.
    """

    def convert_group(group: Mapping[str, Any], where: str) -> dict[str, Any]:
        own = _validated_group(group, where, {"second_moment": "adax"})
        betas = (as_float(own["betas"][0], "betas[0]"), as_float(beta2, "beta2"))
        own = _validated_group({**own, "betas": betas, **_ADAM}, f"beta2={beta2!r}", {})
        return copy.deepcopy({**_extra_keys(group), **own})

    rule = _MomentConversion(lambda beta1, _, step: (one_minus_power(beta1, step), 1.0), operator.mul)
    return _convert_state_dict(state_dict, _OWN_KEYS, convert_group, rule)


def _convert_state_dict(
    state_dict: Mapping[str, Any], needed: tuple[str, ...], convert_group: _ConvertGroup, rule: _MomentConversion
) -> dict[str, Any]:
    """Return a state dict with other groups and moments; everything is checked before anything is computed.

    Args:
        state_dict: of any program.
        needed: keys that each of its groups must have.
        convert_group: returns a group of the result.
        rule: by which moments are converted.

    Raises:
        ValueError, TypeError: it does not fit; see the functions of `conversion`.
    """
    _require_keys(state_dict, ("state", "param_groups"), "state_dict")
    groups, betas_of = [], {}
    for index, group in enumerate(state_dict["param_groups"]):
        where = f"state_dict['param_groups'][{index}]"
        _require_keys(group, ("params", *needed), where)
        groups.append(convert_group(group, where))
        betas_of.update(dict.fromkeys(group["params"], group["betas"]))
    states = {key: (state, f"state_dict['state'][{key!r}]") for key, state in state_dict["state"].items()}
    for key, (state, where) in states.items():
        if key not in betas_of:
            raise ValueError(f"{where} is of no parameter of state_dict['param_groups']")
        _check_state(state, where, rule)
    new_states = {key: _convert_state(*states[key], betas_of[key], rule) if states[key][0] else {} for key in states}
    others = copy.deepcopy({key: state_dict[key] for key in state_dict if key not in ("state", "param_groups")})
    return {**others, "state": new_states, "param_groups": groups}


def _check_state(state: Any, where: str, rule: _MomentConversion) -> None:
    if state == {}:  # a parameter that has had no gradient
        return
    _require_keys(state, _STATE_KEYS, where)
    advice = "save it first from an optimizer with states='float32' and no master_weights"
    if len(state) > len(_STATE_KEYS):
        raise ValueError(f"{where} has keys {sorted(map(str, state))}; expected {list(_STATE_KEYS)}; {advice}")
    checked_count(state["step"], f"{where}['step']")
    for name in _STATE_KEYS[1:]:
        if not isinstance(state[name], Tensor):
            raise TypeError(f"{where}[{name!r}] is a {type(state[name]).__name__}; expected a tensor")
        if not (state[name].is_floating_point() or state[name].is_complex()):
            raise ValueError(f"{where}[{name!r}] is of {state[name].dtype}; {advice}")
        if rule.raw_adax and state[name].is_complex():
            raise ValueError(f"{where}[{name!r}] is complex, where the released program's moments mean something else")


def _convert_state(state: Mapping[str, Any], where: str, betas: Any, rule: _MomentConversion) -> dict[str, Any]:
    step = int(state["step"])
    beta1, beta2 = (as_float(beta, "betas") for beta in betas)
    # Moments of no step are zeros on both sides, and so is the bias factor.
    factors = rule.factors(beta1, beta2, step) if step else (1.0, 1.0)
    exp_avg = _scaled(state["exp_avg"], factors[0], rule.combine)
    exp_avg_sq = _scaled(state["exp_avg_sq"], factors[1], rule.combine)
    if rule.raw_adax and not (state["exp_avg_sq"].isfinite().all() and exp_avg_sq.isfinite().all()):
        last = math.log(torch.finfo(exp_avg_sq.dtype).max) / math.log1p(beta2)
        growth = f"it grows as (1 + {beta2})^t, which leaves {exp_avg_sq.dtype} at about step {last:.0f}"
        raise ValueError(f"{where}['exp_avg_sq']: the raw moment of step {step} is not finite; {growth}")
    return {"step": rule.count(step), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def _scaled(moment: Tensor, factor: float, combine: Callable[[Any, Any], Any]) -> Tensor:
    values = torch.view_as_real(moment.detach()) if moment.is_complex() else moment.detach()
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    scaled = combine(values.to(torch.float64), factor).to(dtype)
    return torch.view_as_complex(scaled) if moment.is_complex() else scaled


def _validated_group(group: Mapping[str, Any], where: str, only: dict[str, Any]) -> dict[str, Any]:
    """Return the hyper-parameters of a group of this package; `only` is what the other side can express."""
    own = {**OLD_CHECKPOINT_DEFAULTS, **{key: group[key] for key in HYPERPARAMETERS if key in group}}
    try:
        validate_group(own)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from None
    for key, value in only.items():
        if own[key] != value:
            raise ValueError(f"{where}[{key!r}] is {own[key]!r}; this conversion is for {value!r} only")
    return own


def _extra_keys(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a group says beside hyper-parameters and torch's choices of implementation."""
    return {key: value for key, value in group.items() if key not in HYPERPARAMETERS and key not in _TORCH_FLAGS}


def _require_keys(given: Any, keys: tuple[str, ...], where: str) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"{where} is a {type(given).__name__}; expected a dict")
    missing = [key for key in keys if key not in given]
    if missing:
        raise ValueError(f"{where} has no {', '.join(map(repr, missing))}; its keys are {sorted(map(str, given))}")


def _adam_factors(_: float, beta2: float, step: int) -> tuple[float, float]:
    return 1.0, one_minus_power(beta2, step)


def _adax_factors(_: float, beta2: float, step: int) -> tuple[float, float]:
    growth = step * math.log1p(beta2)
    return 1.0, math.inf if growth > _LARGEST_EXPONENT else math.expm1(growth)


def _group_of_this_package(group: Mapping[str, Any], where: str, changes: dict[str, Any]) -> dict[str, Any]:
    if "second_moment" in group:
        raise ValueError(f"{where}['second_moment'] is {group['second_moment']!r}: adax_triton has saved this")
    own = _validated_group({**{key: group[key] for key in _SHARED_KEYS}, **changes}, where, {})
    return copy.deepcopy({**_extra_keys(group), **own})
