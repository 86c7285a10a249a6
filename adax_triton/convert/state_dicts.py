"""State dicts of other programs, as state dicts of this package and back.

    from_torch_adam      torch.optim.Adam, AdamW           to  Adam, AdamW
    to_torch_adam        Adam, AdamW                       to  torch.optim.Adam, AdamW
    from_released_adax   the paper's program, AdaX, AdaXW  to  AdaX, AdaXW
    to_released_adax     AdaX, AdaXW                       to  the paper's program
    adax_from_adam       Adam, AdamW                       to  AdaX, AdaXW: a start, not the same optimizer
    adam_from_adax       AdaX, AdaXW                       to  Adam, AdamW: likewise

This package keeps the second moment over its bias factor, the others keep it raw. Factors are taken in float64 and each
moment is rounded once, to float32 or, where it was float64, to that. What is given is never changed, what is returned
shares no memory with it, and everything is checked before anything is computed.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Mapping
from typing import Any

import torch

from adax_triton.state.validation import as_float
from adax_triton.update.coefficients import one_minus_power

from .moments import (
    FOREIGN_KEYS,
    NEEDED_KEYS,
    TORCH_OPTIONS,
    MomentConversion,
    checked_group,
    convert_state_dict,
    other_keys,
)

_ADAM = {"second_moment": "adam", "eps_placement": "normalized"}
_RELEASED_ADAX = {"second_moment": "adax", "eps_placement": "unnormalized"}
_LARGEST_GROWTH = 709.0  # exp(x) overflows float64 a little further


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
        return _own_group(group, where, {**_ADAM, "decoupled_weight_decay": own, "maximize": maximize})

    return convert_state_dict(
        state_dict, FOREIGN_KEYS, convert_group, MomentConversion(_adam_factors, operator.truediv)
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
        own = checked_group(group, where, _ADAM)
        kept = (*FOREIGN_KEYS, "decoupled_weight_decay", "maximize")
        return copy.deepcopy({**other_keys(group), **{key: own[key] for key in kept}, **TORCH_OPTIONS})

    rule = MomentConversion(
        _adam_factors, operator.mul, count=lambda step: torch.tensor(float(step), dtype=torch.float32)
    )
    return convert_state_dict(state_dict, NEEDED_KEYS, convert_group, rule)


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
        return _own_group(group, where, {**_RELEASED_ADAX, "decoupled_weight_decay": decoupled_weight_decay})

    return convert_state_dict(
        state_dict, FOREIGN_KEYS, convert_group, MomentConversion(_adax_factors, operator.truediv, raw_adax=True)
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
        own = checked_group(group, where, {**_RELEASED_ADAX, "maximize": False})
        return copy.deepcopy({**other_keys(group), **{key: own[key] for key in FOREIGN_KEYS}})

    return convert_state_dict(
        state_dict, NEEDED_KEYS, convert_group, MomentConversion(_adax_factors, operator.mul, raw_adax=True)
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
        own = checked_group(group, where, _ADAM)
        betas = (as_float(own["betas"][0], "betas[0]"), as_float(beta2, "beta2"))
        own = checked_group({**own, "betas": betas, "second_moment": "adax"}, f"beta2={beta2!r}", {})
        return copy.deepcopy({**other_keys(group), **own})

    rule = MomentConversion(lambda beta1, _, step: (one_minus_power(beta1, step), 1.0), operator.truediv)
    return convert_state_dict(state_dict, NEEDED_KEYS, convert_group, rule)


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
        own = checked_group(group, where, {"second_moment": "adax"})
        betas = (as_float(own["betas"][0], "betas[0]"), as_float(beta2, "beta2"))
        own = checked_group({**own, "betas": betas, **_ADAM}, f"beta2={beta2!r}", {})
        return copy.deepcopy({**other_keys(group), **own})

    rule = MomentConversion(lambda beta1, _, step: (one_minus_power(beta1, step), 1.0), operator.mul)
    return convert_state_dict(state_dict, NEEDED_KEYS, convert_group, rule)


def _adam_factors(_: float, beta2: float, step: int) -> tuple[float, float]:
    return 1.0, one_minus_power(beta2, step)


def _adax_factors(_: float, beta2: float, step: int) -> tuple[float, float]:
    growth = step * math.log1p(beta2)
    return 1.0, math.inf if growth > _LARGEST_GROWTH else math.expm1(growth)


def _own_group(group: Mapping[str, Any], where: str, changes: dict[str, Any]) -> dict[str, Any]:
    if "second_moment" in group:
        raise ValueError(f"{where}['second_moment'] is {group['second_moment']!r}: adax_triton has saved this")
    own = checked_group({**{key: group[key] for key in FOREIGN_KEYS}, **changes}, where, {})
    return copy.deepcopy({**other_keys(group), **own})
