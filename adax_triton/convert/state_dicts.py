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
from adax_triton.state.validation import OLD_CHECKPOINT_DEFAULTS, as_float, validate_group, with_current_names
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
    """How a conversion scales the moments of a state."""

    moment_factors: Callable[
        [float, float, int], tuple[float, float]
    ]  # (b1, b2, step) -> factors of exp_avg, exp_avg_sq
    apply_factor: Callable[[Any, Any], Any]  # (moment, factor) -> converted moment; truediv or mul
    raw_adax: bool = False  # source or target holds AdaX's raw moment, which can overflow
    convert_step: Callable[[int], Any] = int  # step count -> the target's type of step


def from_torch_adam(state_dict: Mapping[str, Any], *, decoupled_weight_decay: bool | None = None) -> dict[str, Any]:
    """Convert a `torch.optim.Adam` or `AdamW` state dict for `Adam` or `AdamW`.

        m = exp_avg,   v = exp_avg_sq / (1 - b2^step)

    Groups keep their hyper-parameters and the keys of schedulers. torch's implementation flags (`foreach`, `fused`,
    `capturable`, `differentiable`) are dropped. bfloat16 and float16 states become float32. State dicts of DeepSpeed's
    Adam are accepted too.

    Args:
        state_dict: of the torch optimizer.
        decoupled_weight_decay: True for AdamW, False for Adam. Needed if the groups lack this key, as those of
            DeepSpeed and old torch versions do. Default: None, read it from each group.

    Raises:
        ValueError: missing or unexpected keys; `amsgrad=True`; `bias_correction=False`; moments that are not
            floating-point; groups without `decoupled_weight_decay` or with another value than the argument; a
            hyper-parameter that `Adam` rejects.
        TypeError: a value of the wrong type.

    Source: `torch.optim.Adam`; Kingma & Ba 2015, arXiv:1412.6980, algorithm 1.
    """

    def convert_group(group: Mapping[str, Any], where: str) -> dict[str, Any]:
        if group.get("amsgrad"):
            raise ValueError(
                f"{where}['amsgrad'] is {group['amsgrad']!r}, which is not supported; use a checkpoint without amsgrad"
            )
        is_decoupled = group.get("decoupled_weight_decay", decoupled_weight_decay)
        if is_decoupled is None:
            raise ValueError(
                f"{where} has no 'decoupled_weight_decay'; pass decoupled_weight_decay=True for AdamW, False for Adam"
            )
        if decoupled_weight_decay is not None and is_decoupled != decoupled_weight_decay:
            raise ValueError(
                f"decoupled_weight_decay={decoupled_weight_decay!r}, but {where} has {is_decoupled!r}; pass the same "
                "value or None"
            )
        if not group.get("bias_correction", True):
            raise ValueError(f"{where}['bias_correction'] is False, which is not supported; expected True")
        maximize = group.get("maximize", False)
        group = {key: value for key, value in group.items() if key != "bias_correction"}
        return _to_adax_triton_group(
            group, where, {**_ADAM, "decoupled_weight_decay": is_decoupled, "maximize": maximize}
        )

    return _convert_state_dict(
        state_dict, _SHARED_KEYS, convert_group, _MomentConversion(_adam_factors, operator.truediv)
    )


def to_torch_adam(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Convert an `Adam` or `AdamW` state dict for `torch.optim.Adam` or `AdamW`.

        exp_avg = m,   exp_avg_sq = v (1 - b2^step)

    The inverse of `from_torch_adam`, to one unit in the last place. torch's implementation flags get their defaults,
    and `step` becomes a float32 tensor, as in torch.

    Args:
        state_dict: with `second_moment="adam"` and `eps_placement="normalized"`.

    Raises:
        ValueError: missing or unexpected keys; another `second_moment` or `eps_placement`; moments that are not
            floating-point.
        TypeError: a value of the wrong type.

    Source: `torch.optim.Adam`; Kingma & Ba 2015, arXiv:1412.6980, algorithm 1.
    """

    def convert_group(group: Mapping[str, Any], where: str) -> dict[str, Any]:
        validated = _validated_group(group, where, _ADAM)
        kept = (*_SHARED_KEYS, "decoupled_weight_decay", "maximize")
        return copy.deepcopy({**_extra_keys(group), **{key: validated[key] for key in kept}, **_TORCH_FLAGS})

    conversion = _MomentConversion(
        _adam_factors, operator.mul, convert_step=lambda step: torch.tensor(float(step), dtype=torch.float32)
    )
    return _convert_state_dict(state_dict, _OWN_KEYS, convert_group, conversion)


def from_released_adax(state_dict: Mapping[str, Any], *, decoupled_weight_decay: bool) -> dict[str, Any]:
    """Convert a state dict of the paper's code for `AdaX` or `AdaXW`.

        m = exp_avg,   v = exp_avg_sq / ((1 + b2)^step - 1)

    The released code adds eps to the root of the raw moment, so groups get `eps_placement="unnormalized"` and training
    continues with the same numbers. bfloat16 and float16 states become float32.

    Args:
        state_dict: of the released `AdaX` or `AdaXW`.
        decoupled_weight_decay: False for the released `AdaX`, True for `AdaXW`. Their state dicts have the same keys.

    Raises:
        ValueError: missing or unexpected keys; a second moment that is not finite (with b2 = 1e-4 it overflows float32
            at step 887,000); moments that are complex or not floating-point; a hyper-parameter that `AdaX` rejects,
            such as Adam's b2 = 0.999.
        TypeError: a value of the wrong type.

    Source: Li et al. 2020, arXiv:2004.09740, algorithms 1 and 2, and the code released with it.
    """

    def convert_group(group: Mapping[str, Any], where: str) -> dict[str, Any]:
        return _to_adax_triton_group(group, where, {**_RELEASED_ADAX, "decoupled_weight_decay": decoupled_weight_decay})

    return _convert_state_dict(
        state_dict, _SHARED_KEYS, convert_group, _MomentConversion(_adax_factors, operator.truediv, raw_adax=True)
    )


def to_released_adax(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Convert an `AdaX` or `AdaXW` state dict for the paper's released code.

        exp_avg = m,   exp_avg_sq = v ((1 + b2)^step - 1)

    The inverse of `from_released_adax`, to one unit in the last place. The released groups do not store the kind of
    weight decay, so load AdaX into the released `AdaX` and AdaXW into the released `AdaXW`.

    Args:
        state_dict: with `second_moment="adax"` and `eps_placement="unnormalized"`.

    Raises:
        ValueError: missing or unexpected keys; another `second_moment` or `eps_placement`; `maximize=True`, which the
            released code does not support; a raw moment that overflows; moments that are complex or not floating-point.
        TypeError: a value of the wrong type.

    Source: as `from_released_adax`.
    """

    def convert_group(group: Mapping[str, Any], where: str) -> dict[str, Any]:
        validated = _validated_group(group, where, {**_RELEASED_ADAX, "maximize": False})
        return copy.deepcopy({**_extra_keys(group), **{key: validated[key] for key in _SHARED_KEYS}})

    return _convert_state_dict(
        state_dict, _OWN_KEYS, convert_group, _MomentConversion(_adax_factors, operator.mul, raw_adax=True)
    )


def adax_from_adam(state_dict: Mapping[str, Any], *, beta2: float = 1e-4) -> dict[str, Any]:
    """Convert an `Adam` or `AdamW` state dict to warm-start `AdaX` or `AdaXW`.

        m = m_adam / (1 - b1^step),   v = v_adam

    The first updates have Adam's size, but v now follows AdaX's rule, so the run differs from Adam's. `step` is kept.
    The converted v averages Adam's last `1 / (1 - b2)` steps. AdaX's `w_t` is small at this step, so v then changes
    slowly. Learning rates, eps and weight decays stay Adam's.

    Args:
        state_dict: of `Adam` or `AdamW`, or from `from_torch_adam`.
        beta2: AdaX's growth rate, in [0, 0.1]; replaces Adam's decay. Default: 1e-4.

    Raises:
        ValueError: missing or unexpected keys; `second_moment` or `eps_placement` differs from Adam's; `beta2` out of
            range; moments that are not floating-point.
        TypeError: a value of the wrong type.

    Source: derived from the update rules in `update.coefficients`; not from a paper.
    """

    def convert_group(group: Mapping[str, Any], where: str) -> dict[str, Any]:
        validated = _validated_group(group, where, _ADAM)
        betas = (as_float(validated["betas"][0], "betas[0]"), as_float(beta2, "beta2"))
        validated = _validated_group({**validated, "betas": betas, "second_moment": "adax"}, f"beta2={beta2!r}", {})
        return copy.deepcopy({**_extra_keys(group), **validated})

    conversion = _MomentConversion(lambda beta1, _, step: (one_minus_power(beta1, step), 1.0), operator.truediv)
    return _convert_state_dict(state_dict, _OWN_KEYS, convert_group, conversion)


def adam_from_adax(state_dict: Mapping[str, Any], *, beta2: float = 0.999) -> dict[str, Any]:
    """Convert an `AdaX` or `AdaXW` state dict to warm-start `Adam` or `AdamW`.

        m_adam = m (1 - b1^step),   v_adam = v

    The inverse of `adax_from_adam`, to one unit in the last place. Learning rates, eps, weight decays and `step` stay
    AdaX's. `eps_placement` becomes `"normalized"`.

    Args:
        state_dict: with `second_moment="adax"`.
        beta2: Adam's decay; replaces AdaX's growth rate. Default: 0.999.

    Raises:
        ValueError: missing or unexpected keys; another `second_moment`; `beta2` out of range; moments that are not
            floating-point.
        TypeError: a value of the wrong type.

    Source: as `adax_from_adam`.
    """

    def convert_group(group: Mapping[str, Any], where: str) -> dict[str, Any]:
        validated = _validated_group(group, where, {"second_moment": "adax"})
        betas = (as_float(validated["betas"][0], "betas[0]"), as_float(beta2, "beta2"))
        validated = _validated_group({**validated, "betas": betas, **_ADAM}, f"beta2={beta2!r}", {})
        return copy.deepcopy({**_extra_keys(group), **validated})

    conversion = _MomentConversion(lambda beta1, _, step: (one_minus_power(beta1, step), 1.0), operator.mul)
    return _convert_state_dict(state_dict, _OWN_KEYS, convert_group, conversion)


def _convert_state_dict(
    state_dict: Mapping[str, Any],
    required: tuple[str, ...],
    convert_group: _ConvertGroup,
    conversion: _MomentConversion,
) -> dict[str, Any]:
    """Check a state dict, then convert its groups and moments.

    Args:
        state_dict: of any optimizer above.
        required: keys that each of its groups must have.
        convert_group: converts one group.
        conversion: how to scale the moments.

    Raises:
        ValueError, TypeError: the state dict cannot be converted; see the public functions.
    """
    _require_keys(state_dict, ("state", "param_groups"), "state_dict")
    groups, betas_of = [], {}
    for index, group in enumerate(state_dict["param_groups"]):
        where = f"state_dict['param_groups'][{index}]"
        _require_keys(group, ("params", *required), where)
        groups.append(convert_group(group, where))
        betas_of.update(dict.fromkeys(group["params"], group["betas"]))
    states = {key: (state, f"state_dict['state'][{key!r}]") for key, state in state_dict["state"].items()}
    for key, (state, where) in states.items():
        if key not in betas_of:
            raise ValueError(f"{where} belongs to no parameter of state_dict['param_groups']; remove it")
        _check_state(state, where, conversion)
    new_states = {
        key: _convert_state(*states[key], betas_of[key], conversion) if states[key][0] else {} for key in states
    }
    other_keys = copy.deepcopy({key: state_dict[key] for key in state_dict if key not in ("state", "param_groups")})
    return {**other_keys, "state": new_states, "param_groups": groups}


def _check_state(state: Any, where: str, conversion: _MomentConversion) -> None:
    if state == {}:  # its parameter has had no gradient
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
            raise ValueError(f"{where}[{name!r}] has dtype {state[name].dtype}; expected floating-point; {advice}")
        if conversion.raw_adax and state[name].is_complex():
            raise ValueError(f"{where}[{name!r}] is complex; only real moments convert to and from the released AdaX")


def _convert_state(state: Mapping[str, Any], where: str, betas: Any, conversion: _MomentConversion) -> dict[str, Any]:
    step = int(state["step"])
    beta1, beta2 = (as_float(beta, "betas") for beta in betas)
    # At step 0 the moments and the bias factor are 0, so there is nothing to scale.
    factors = conversion.moment_factors(beta1, beta2, step) if step else (1.0, 1.0)
    exp_avg = _scaled(state["exp_avg"], factors[0], conversion.apply_factor)
    exp_avg_sq = _scaled(state["exp_avg_sq"], factors[1], conversion.apply_factor)
    if conversion.raw_adax and not (state["exp_avg_sq"].isfinite().all() and exp_avg_sq.isfinite().all()):
        largest_step = math.log(torch.finfo(exp_avg_sq.dtype).max) / math.log1p(beta2)
        raise ValueError(
            f"{where}['exp_avg_sq']: the raw moment of step {step} is not finite; it grows as (1 + {beta2})^t and "
            f"overflows {exp_avg_sq.dtype} at about step {largest_step:.0f}; use an earlier checkpoint"
        )
    return {"step": conversion.convert_step(step), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def _scaled(moment: Tensor, factor: float, scale: Callable[[Any, Any], Any]) -> Tensor:
    values = torch.view_as_real(moment.detach()) if moment.is_complex() else moment.detach()
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    scaled = scale(values.to(torch.float64), factor).to(dtype)
    return torch.view_as_complex(scaled) if moment.is_complex() else scaled


def _validated_group(group: Mapping[str, Any], where: str, required: dict[str, Any]) -> dict[str, Any]:
    """Return a group's hyper-parameters after checking them.

    Raises unless they are valid and equal those in `required`.
    """
    validated = {
        **OLD_CHECKPOINT_DEFAULTS,
        **{key: value for key, value in with_current_names(group).items() if key in HYPERPARAMETERS},
    }
    try:
        validate_group(validated)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from None
    for key, value in required.items():
        if validated[key] != value:
            raise ValueError(f"{where}[{key!r}] is {validated[key]!r}; this conversion supports only {value!r}")
    return validated


def _extra_keys(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's keys other than hyper-parameters and torch's flags.

    Schedulers add such keys.
    """
    return {key: value for key, value in group.items() if key not in HYPERPARAMETERS and key not in _TORCH_FLAGS}


def _require_keys(given: Any, keys: tuple[str, ...], where: str) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"{where} is a {type(given).__name__}; expected a dict")
    missing = [key for key in keys if key not in given]
    if missing:
        from_torch = "second_moment" in missing and "amsgrad" in given
        advice = "; convert a state dict of torch's Adam with from_torch_adam first" if from_torch else ""
        raise ValueError(
            f"{where} has no {', '.join(map(repr, missing))}; its keys are {sorted(map(str, given))}{advice}"
        )


def _adam_factors(_: float, beta2: float, step: int) -> tuple[float, float]:
    return 1.0, one_minus_power(beta2, step)


def _adax_factors(_: float, beta2: float, step: int) -> tuple[float, float]:
    exponent = step * math.log1p(beta2)
    return 1.0, math.inf if exponent > _LARGEST_EXPONENT else math.expm1(exponent)


def _to_adax_triton_group(group: Mapping[str, Any], where: str, changes: dict[str, Any]) -> dict[str, Any]:
    if "second_moment" in group:
        raise ValueError(
            f"{where}['second_moment'] is {group['second_moment']!r}, so adax_triton saved this state dict; load it "
            "without this conversion"
        )
    validated = _validated_group({**{key: group[key] for key in _SHARED_KEYS}, **changes}, where, {})
    return copy.deepcopy({**_extra_keys(group), **validated})
